"""The commands that edit and inspect the book of a finished student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from openbook.backends.base import BackendName
from openbook.config import UsageError
from openbook.console import console
from openbook.knowledge_base.interpolate import EMPTY
from openbook.student_keys import STUDENT, rekeyed

Model = Annotated[Path, typer.Option("--model", help="A run folder, such as runs/quickstart.")]
Texts = Annotated[list[str] | None, typer.Argument(help="Texts; or give --file.")]
File = Annotated[Path | None, typer.Option("--file", help="Rows to read: CSV, TSV, JSONL or Parquet.")]
TextColumn = Annotated[str, typer.Option("--text", help="The column that holds the texts.")]
PairColumn = Annotated[str | None, typer.Option("--text-pair", help="The column of second texts, of pairs.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="The column of labels; or the label of all texts.")]


Engine = Annotated[
    BackendName | None,
    typer.Option("--backend", help="torch, onnx or onnx-int8. Default: torch; without it, what the export recommends."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of the engine. Default: its own choice.")]


def remember(
    texts: Texts = None,
    model: Model = Path("runs/quickstart"),
    file: File = None,
    text: TextColumn = "text",
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    weight: Annotated[float, typer.Option("--weight", help="As much as so many entries that are equally near.")] = 1.0,
) -> None:
    """Add texts to the book; the next prediction looks them up. Without labels, the teacher's answer is kept."""
    book = opened(model)
    rows, labels = given(texts, file, text, text_pair, label)
    edit = book.remember(rows, in_words(book, labels, file), weight=weight)
    told(edit, f"remembered {edit.added}")
    if book.book and not book.book.retrieval.opens_book:
        console.print("the book is closed: tuning found that it did not help; see `openbook book --tune`")


def forget(
    ids: Annotated[list[str], typer.Argument(help="Ids of entries, as `openbook predict --explain --json` shows.")],
    model: Model = Path("runs/quickstart"),
) -> None:
    """Remove entries from the book; the next prediction does not look them up."""
    edit = opened(model).forget(ids)
    told(edit, f"forgot {edit.removed}")


def book(
    model: Model = Path("runs/quickstart"),
    log: Annotated[bool, typer.Option("--log", help="Show every edit.")] = False,
    find: Annotated[str | None, typer.Option("--find", help="List the entries whose text holds this.")] = None,
    diff: Annotated[Path | None, typer.Option("--diff", help="Compare with another folder of a book.")] = None,
    merge: Annotated[Path | None, typer.Option("--merge", help="Add all entries of another book's folder.")] = None,
    swap: Annotated[
        Path | None, typer.Option("--swap", help="Put the entries of another book's folder in place of all.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Write it anew, without what was removed.")] = False,
    form: Annotated[str | None, typer.Option("--form", help="With --compact: fp16, sq8, pca-64, opq-64.")] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", help="student: find every entry by the student's own embedding.")
    ] = None,
    tune: Annotated[
        Path | None, typer.Option("--tune", help="Labelled rows to choose anew by how it is opened.")
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="With --tune: how much a remembered text may count. Repeatable; one is chosen."),
    ] = None,
    text: TextColumn = "text",
    text_pair: PairColumn = None,
    label: LabelColumn = None,
) -> None:
    """Show what the book holds and how it is opened; compact, merge, swap, tune or compare it."""
    from openbook.knowledge_base import editing, store
    from openbook.predictor import base_of

    folder = model / "knowledge_base"
    if weight and tune is None:
        raise UsageError("--weight is for --tune, which chooses by labelled rows; give both")
    rewrite(model, folder, compact, form, keys)
    if merge is not None:
        edit = opened(model).merge(merge)
        told(edit, f"merged {edit.added}")
    if swap is not None:
        told(opened(model).swap(swap), f"swapped for {swap}")
    if tune is not None:
        show_tuned(opened(model), tune, *given(None, tune, text, text_pair, label or "label"), weight or ())
    if log:
        for event in editing.changes(folder):
            ids = event.get("ids", [])
            more = f"{len(ids)} entries, such as {ids[0]}" if ids else ""
            console.print(f"{event['when']}  {event['generation']:4}  {event['what']:8}  {more}", markup=False)
        return
    base = store.load(folder)
    if find is not None:
        show_entries(base, find)
    elif diff is not None:
        found = editing.diff(base, base_of(diff))
        for name in ("added", "removed", "relabelled", "rewritten"):
            ids = getattr(found, name)
            console.print(f"{name}: {len(ids)} {', '.join(ids[:5])}", markup=False)
    else:
        show(base, folder)


def rewrite(model: Path, folder: Path, compact: bool, form: str | None, keys: str | None) -> None:
    from openbook.knowledge_base import editing, store
    from openbook.knowledge_base.shelf import build_index

    if form is not None and not compact:
        raise UsageError(f"--form {form} is for --compact; give both")
    if keys not in (None, STUDENT):
        raise UsageError(f"--keys {keys}: a book can be changed to the keys of its student alone; give {STUDENT}")
    if keys is not None:
        from openbook.loading import load, student_in, usual_backend

        student = student_in(model)
        backend = load(student, usual_backend(student))  # a book that does not fit its student can be mended so
        told(editing.rekey(folder, rekeyed(store.load(folder), backend)), "found by its student from now on")
    if compact:
        told(editing.compact(folder, form), "compacted")
    if compact or keys is not None:
        build_index(folder)


def opened(model: Path) -> Any:
    from openbook.predictor import OpenBook

    return OpenBook.from_pretrained(model)


def given(
    texts: list[str] | None, file: Path | None, text: str, text_pair: str | None, label: str | None
) -> tuple[list[Any], list[Any] | None]:
    """Texts or pairs, and their labels if there are any."""
    from openbook.config import FileSource
    from openbook.data.sources import read

    if (file is None) == (not texts):
        raise UsageError("give texts, or --file with rows, and not both")
    if file is None:
        assert texts is not None
        return list(texts), None if label is None else [label] * len(texts)
    rows = read(FileSource(path=str(file)), "--file")
    for column in (text, text_pair, label):
        if column is not None and rows and column not in rows[0]:
            raise UsageError(f"{file} has no column {column!r}; its columns are {', '.join(rows[0])}")
    columns = [[text_of(row, column, place, file) for place, row in enumerate(rows)] for column in (text, text_pair)
               if column is not None]  # fmt: skip
    found = list(zip(*columns, strict=True)) if text_pair is not None else columns[0]
    return found, None if label is None else [row.get(label) for row in rows]


def text_of(row: Mapping[str, Any], column: str, place: int, file: Path) -> str:
    """Raises UsageError for what is no text, or a blank one."""
    found = row.get(column)
    if not isinstance(found, str) or not found.strip():
        raise UsageError(f"row {place + 1} of {file} has {found!r} for {column!r}; give a text, or leave the row out")
    return found


def told(edit: Any, what: str) -> None:
    console.print(f"{what}; {edit.entries} entries, generation {edit.generation}", markup=False)
    if not edit.entries:
        console.print(EMPTY)
    if edit.stale:
        console.print("more than a tenth has changed since its settings were tuned: `openbook book --tune FILE`")


def in_words(predictor: Any, labels: list[Any] | None, file: Path | None) -> list[Any] | None:
    """Labels as the student names them: a file may have numbers for names. Raises UsageError for others in a file."""
    if labels is None:
        return None
    if predictor.kind == "multi_label":
        where = "label {}" if file is None else f"the label in row {{}} of {file}"
        return [
            set_of_names(label, where.format(place + (file is not None)), predictor.labels)
            for place, label in enumerate(labels)
        ]
    if file is None:
        return labels
    from openbook.predictor import score_of

    if predictor.labels is None:
        return [score_of(label, f"the label in row {place + 1} of {file}") for place, label in enumerate(labels)]
    for place, label in enumerate(labels):
        if str(label) not in predictor.labels:
            known = ", ".join(predictor.labels)
            raise UsageError(f"the label in row {place + 1} of {file} is {label!r}; the student knows {known}")
    return [str(label) for label in labels]


def set_of_names(label: Any, where: str, known: Sequence[str]) -> list[str]:
    from openbook.data.label_sets import names_in

    try:
        return names_in(label, known)
    except ValueError as error:
        raise UsageError(f"{where} is {label!r}, which {error}") from None


def show_tuned(predictor: Any, file: Path, rows: list[Any], labels: list[Any] | None, weights: Sequence[float]) -> None:
    tuned = predictor.tune(rows, in_words(predictor, labels, file), weights=weights)
    verdict = (
        f"opened with beta {tuned.beta:g}, {tuned.top_k} neighbours" if tuned.kept else "stays closed: no clear gain"
    )
    if tuned.weight is not None:
        verdict += f"; what was remembered counts {tuned.weight:g} times"
    console.print(
        f"held out {tuned.held_out}: alone {100 * tuned.baseline_score:.1f}, with the book {100 * tuned.score:.1f}"
        f" (standard error {100 * tuned.standard_error:.1f}); {verdict}",
        markup=False,
    )


def show_entries(base: Any, words: str) -> None:
    from openbook.knowledge_base.entries import entries_with

    shown = Table("id", "label", "origin", "text")
    for one in entries_with(base, words):
        shown.add_row(*map(Text, (one.id, one.told, one.origin, one.text)))  # nobody's brackets are markup
    console.print(shown)


def show(base: Any, folder: Path) -> None:
    manifest = base.manifest
    bytes_ = sum(file["bytes"] for file in manifest["files"].values())
    origins = ", ".join(f"{name} {count:,}" for name, count in manifest["origins"].items())
    facts = {
        "entries": f"{len(base.ids):,} ({origins})",
        "labels": ", ".join(manifest["labels"] or ["a score"]),
        "keys": f"{manifest['d']} dimensions, {manifest['form']}; {bytes_ / 1e6:.2f} MB on disk",
        "opened": ", ".join(f"{name} {value}" for name, value in (manifest.get("retrieval") or {}).items()),
        "generation": f"{manifest['generation']}{', its settings are stale' if manifest.get('stale') else ''}",
    }
    for name, fact in facts.items():
        console.print(f"{name:10} {fact}", markup=False)
    console.print(f"{folder}", markup=False)
