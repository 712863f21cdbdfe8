"""The commands that edit and inspect the book of a finished student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from openbook.backends.base import BackendName
from openbook.config import THRESHOLD, UsageError
from openbook.console import console
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
    edit = book.remember(rows, in_words(book, labels), weight=weight)
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
    compact: Annotated[bool, typer.Option("--compact", help="Write it anew, without what was removed.")] = False,
    form: Annotated[str | None, typer.Option("--form", help="With --compact: fp16, sq8, pca-64, pq-64.")] = None,
    keys: Annotated[
        str | None, typer.Option("--keys", help="student: find every entry by the student's own embedding.")
    ] = None,
    tune: Annotated[
        Path | None, typer.Option("--tune", help="Labelled rows to choose anew by how it is opened.")
    ] = None,
    text: TextColumn = "text",
    text_pair: PairColumn = None,
    label: LabelColumn = None,
) -> None:
    """Show what the book holds and how it is opened; compact, tune or compare it."""
    from openbook.knowledge_base import editing, store

    folder = model / "knowledge_base"
    rewrite(model, folder, compact, form, keys)
    if tune is not None:
        show_tuned(opened(model), *given(None, tune, text, text_pair, label or "label"))
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
        found = editing.diff(base, store.load(diff))
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
        from openbook.predictor import load, usual_backend  # a book that does not fit its student can be mended so

        backend = load(model / "student", usual_backend(model / "student"))
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
    found = [row[text] if text_pair is None else (row[text], row[text_pair]) for row in rows]
    return found, None if label is None else [row[label] for row in rows]


def told(edit: Any, what: str) -> None:
    console.print(f"{what}; {edit.entries} entries, generation {edit.generation}", markup=False)
    if edit.stale:
        console.print("more than a tenth has changed since its settings were tuned: `openbook book --tune FILE`")


def in_words(predictor: Any, labels: list[Any] | None) -> list[Any] | None:
    """Labels as the student names them: a file may have numbers for names."""
    if labels is None:
        return None
    if predictor.kind == "multi_label":
        return [set_of_names(label, place, predictor.labels) for place, label in enumerate(labels)]
    return [float(label) for label in labels] if predictor.labels is None else [str(label) for label in labels]


def set_of_names(label: Any, place: int, known: Sequence[str]) -> list[str]:
    from openbook.data.label_sets import names_in

    try:
        return names_in(label, known)
    except ValueError as error:
        raise UsageError(f"label {place} is {label!r}, which {error}") from None


def show_tuned(predictor: Any, rows: list[Any], labels: list[Any] | None) -> None:
    tuned = predictor.tune(rows, in_words(predictor, labels))
    verdict = (
        f"opened with beta {tuned.beta:g}, {tuned.top_k} neighbours" if tuned.kept else "stays closed: no clear gain"
    )
    console.print(
        f"held out {tuned.held_out}: alone {100 * tuned.baseline_score:.1f}, with the book {100 * tuned.score:.1f}"
        f" (standard error {100 * tuned.standard_error:.1f}); {verdict}",
        markup=False,
    )


def show_entries(base: Any, words: str) -> None:
    labels, shown = base.manifest["labels"], Table("id", "label", "origin", "text")
    for place, text in enumerate(base.texts):
        if words.casefold() in text.casefold():
            value = base.values[place]
            label = f"{value[0]:.3g}" if labels is None else f"{labels[int(value.argmax())]} {value.max():.2f}"
            if base.manifest["kind"] == "multi_label":
                label = ", ".join(
                    f"{labels[one]} {value[one]:.2f}" for one in (-value).argsort() if value[one] > THRESHOLD
                )
            shown.add_row(base.ids[place], label, base.origins[place] if base.origins else "train", text)
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
