"""A finished run -> one folder that travels: student, exports, book, card, container recipe, and what proves them."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import yaml
from markupsafe import Markup
from numpy.typing import NDArray

from openbook.answers import Text
from openbook.backends.base import BackendName
from openbook.backends.onnx import EXPORT, FILES, RECORD, TORCH_WEIGHTS, checked
from openbook.checkpoint import digest_file, exchange, finish_renaming, partial_folder, read_json, sync, write_json
from openbook.config import RunError, UsageError
from openbook.keys import QUERIES
from openbook.knowledge_base import store
from openbook.knowledge_base.manifest import dtype_of
from openbook.markdown import environment
from openbook.predictor import OpenBook
from openbook.provenance import ingredients
from openbook.recipe import load_recipe
from openbook.report import Shipped, model_card
from openbook.stages.write_report import gather
from openbook.verification import (
    DIGESTS,
    EXAMPLES,
    FORMAT,
    TOLERANCE,
    agree,
    answers_to,
    as_text,
    engines_of,
    is_installed,
    verify,
    write_digests,
)
from openbook.workspace import RUN_FILE, Run

STUDENT = ("config.json", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt")  # of tokenizers
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LEAST_EXAMPLES = 4
TEXTS: tuple[Text, ...] = (  # of no one's data
    "How far is it from the station to the harbour?",
    "Who painted the ceiling of the chapel?",
    "The room was small, but the view made up for it.",
    "It stopped working after two days, and nobody answered my letters.",
    "In 1987 the company sold 12,450 bicycles, 3.5 % more than the year before.",
    "Was bedeutet dieses Wort?",
    "Zoë paid 40 € for a ticket 🎫 to Ålesund.",
    "no",
    "What does the abbreviation stand for",
    "A recipe for bread: flour, water, salt, yeast, and a night of patience.",
    " ".join(["and then the train left the valley behind"] * 60),
    ("A man is playing a guitar.", "Someone makes music."),
    ("The shop is closed on Mondays.", "The shop opens every day of the week."),
    ("Where is the nearest library?", "How do I get to a library from here?"),
    ("It rained all night.", "The committee rejected the proposal."),
    ("one", "two " * 100),
)


@dataclass(frozen=True)
class Choices:
    """What goes into a package."""

    form: str | None = None  # of the book's keys; as in the run if absent
    torch_weights: bool = True
    texts: bool = True  # of the book
    licence: str | None = None  # identifier of the student's own, for the card
    wheel: Path | None = None  # of openbook, for the container
    force: bool = False  # replace an older package


@dataclass(frozen=True)
class Packed:
    folder: Path
    engines: tuple[BackendName, ...]
    notes: tuple[str, ...]  # what was left out, and why
    bytes: int
    digest: str  # of all digests


def package(run: Path, output: Path, choices: Choices | None = None) -> Packed:
    """Write a run's student, its exports and its book to a folder that `OpenBook.from_pretrained` loads.

    The folder appears whole and verified, or not at all. Raises UsageError for an unfinished run, an export of other
    weights, a form or choice that is not possible, and an output that is there; RunError if the result is not sound.
    """
    choices = choices or Choices()
    finish_renaming(output)  # an older package that a crash left aside
    refuse_early(run, output, choices)
    report = gather(Run(load_recipe(run / RUN_FILE), run))
    with assembling(output) as folder:
        notes = [*put_student(run / "student", folder / "student", choices), *put_book(run, folder, choices)]
        if choices.wheel is not None:
            shutil.copyfile(choices.wheel, folder / choices.wheel.name)
        notes += put_examples(folder)
        shipped = described(run, folder, output.name, choices)
        (folder / "README.md").write_text(model_card(report, shipped), encoding="utf-8")
        (folder / "NOTICE.md").write_text(notice(shipped), encoding="utf-8")
        if shipped.engine is not None:
            (folder / "Dockerfile").write_text(dockerfile(folder, shipped.engine, choices.wheel), encoding="utf-8")
        write_digests(folder)
        found = verify(folder)
        if found.problems:
            raise RunError("the package is not sound and was not written: " + "; ".join(found.problems))
    size = sum(path.stat().st_size for path in files_in(output))
    return Packed(output, tuple(engines_of(output)), tuple(notes), size, digest_file(output / DIGESTS))


def refuse_early(run: Path, output: Path, choices: Choices) -> None:
    for name in (RUN_FILE, "student/config.json", f"student/{TORCH_WEIGHTS}", "evaluation/results.json"):
        if not (run / name).is_file():
            raise UsageError(f"--model {run} is no finished run ({name} is not there); finish it with `openbook run`")
    if output.exists() and not (choices.force and (output / DIGESTS).is_file()):
        fix = "name another" if choices.force else "name another, or replace an older package with --force"
        raise UsageError(f"--output {output} exists{' and is no package' * choices.force}; {fix}")
    if not choices.torch_weights and not (run / "student" / EXPORT / RECORD).is_file():
        raise UsageError(f"--no-torch-weights: nothing else would be left; `openbook export --model {run}` first")
    if choices.form is not None and not dtype_of(choices.form):
        raise UsageError(f"--form {choices.form!r} is unknown; choose fp32, fp16, sq8, or pca-64, opq-64 and the like")
    if choices.licence is not None and not LICENCE.fullmatch(choices.licence):
        raise UsageError(f"--license {choices.licence!r} is no identifier such as apache-2.0 or cc-by-4.0")
    if choices.wheel is not None:
        refuse_wheel(choices.wheel)


def refuse_wheel(wheel: Path) -> None:
    try:
        with ZipFile(wheel) as archive:
            is_ours = any(re.fullmatch(r"openbook-[^/]+\.dist-info/METADATA", name) for name in archive.namelist())
    except (OSError, BadZipFile) as error:
        raise UsageError(f"--wheel {wheel} cannot be read ({error}); `pip wheel --no-deps .` makes one") from error
    if not is_ours or not re.fullmatch(r"openbook-[\w.+-]+\.whl", wheel.name):
        raise UsageError(f"--wheel {wheel} is not a wheel of openbook; `pip wheel --no-deps .` makes one")


@contextmanager
def assembling(output: Path) -> Iterator[Path]:
    """A folder aside that takes the place of `output` when all went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = partial_folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        sync(folder)
        exchange(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_student(student: Path, target: Path, choices: Choices) -> list[str]:
    """The files a loader reads, and the exports; nothing that only training needs."""
    names = [*STUDENT, *(name for name in OPTIONAL if (student / name).is_file())]
    names += [TORCH_WEIGHTS] if choices.torch_weights else []
    names += [QUERIES] if (student / QUERIES).is_file() else []
    target.mkdir()
    for name in names:
        shutil.copyfile(student / name, target / name)
    if not (student / EXPORT / RECORD).is_file():
        return ["not exported: it needs torch, and there is no Dockerfile (`openbook export` first, then pack again)"]
    there = [checked(student, name) for name, file in FILES.items() if (student / EXPORT / file).is_file()]
    record = read_json(student / EXPORT / RECORD)
    (target / EXPORT).mkdir()
    for name in (RECORD, *(name for name in record["files"] if any(name.startswith(graph.name) for graph in there))):
        shutil.copyfile(student / EXPORT / name, target / EXPORT / name)
    left_out = [name for name in FILES if not (target / EXPORT / FILES[name]).is_file()]
    return [f"{name} is not in it: it was not exported" for name in left_out]


def put_book(run: Path, folder: Path, choices: Choices) -> list[str]:
    """The book as it is now, written anew: without what was removed from it, and without the log of its edits."""
    if not (run / "knowledge_base" / "manifest.json").is_file():
        if choices.form is not None or not choices.texts:
            raise UsageError("--form and --without-texts are about the book, and this run has none")
        return ["no book: the student answers alone, and there are no neighbours to show"]
    base = store.load(run / "knowledge_base")
    if not choices.texts:
        base = replace(base, texts=("",) * len(base.ids))
    store.save(base, folder / "knowledge_base", choices.form)
    (folder / "knowledge_base" / ".lock").unlink(missing_ok=True)
    return [] if choices.texts else ["the book's texts: neighbours are shown by their ids"]


def put_examples(folder: Path) -> list[str]:
    """Record what the first engine answers, on texts on which the others agree with half of their tolerance."""
    engines = [name for name in engines_of(folder) if is_installed(name)]
    if not engines:
        raise UsageError("no engine that could run this student is installed: pip install 'openbook[onnx]'")
    books = {name: OpenBook.from_pretrained(folder, name, threads=1) for name in engines}
    answers = {name: answers_to(list(TEXTS), book) for name, book in books.items()}
    wanted = answers[engines[0]]
    chosen = np.ones(len(TEXTS), np.bool_)
    tolerance: dict[BackendName, float | None] = {**TOLERANCE}
    notes = []
    for name in engines[1:]:
        agreed = chosen & agree(answers[name], wanted, TOLERANCE[name] / 2)
        if agreed.sum() >= LEAST_EXAMPLES:
            chosen = agreed
        else:
            tolerance[name] = None
            notes.append(f"answers of {name} in {EXAMPLES}: on too few texts are they those of {engines[0]}")
    base = books[engines[0]].base
    content = {
        "format": FORMAT,
        "engine": engines[0],
        "tolerance": tolerance,
        "labels": books[engines[0]].labels,
        "book": None if base is None else len(base.ids),
        "rows": [recorded(TEXTS[place], wanted[place]) for place in np.flatnonzero(chosen)],
    }
    write_json(folder / EXAMPLES, content)
    return notes


def recorded(text: Text, answer: NDArray[np.float64]) -> dict[str, Any]:
    return {"text": as_text(text), "answer": [round(float(number), 7) for number in answer]}


def described(run: Path, folder: Path, name: str, choices: Choices) -> Shipped:
    """What the card says of this very folder."""
    exported, book = folder / "student" / EXPORT / RECORD, folder / "knowledge_base"
    record = read_json(exported) if exported.is_file() else {}
    engines = engines_of(folder)
    light = [engine for engine in engines if engine != "torch"]
    best = "onnx-int8" if record.get("recommended") == "onnx-int8" and "onnx-int8" in light else None
    manifest = store.load(book).manifest if book.is_dir() else {}
    selection = run / "student" / "selection.json"
    return Shipped(
        name=name,
        engines=tuple(engines),
        engine=best or (light[0] if light else None),
        export=record,
        book=manifest,
        has_texts=choices.texts,
        seed=read_json(selection).get("seed") if selection.is_file() else None,
        licence=choices.licence,
        ingredients=tuple(ingredients(yaml.safe_load((run / RUN_FILE).read_text(encoding="utf-8")))),
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in files_in(folder)},
    )


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def notice(shipped: Shipped) -> str:
    """What the student was made from, for whoever has to know before passing it on."""
    own = f"Its own licence: {shipped.licence}." if shipped.licence else "No licence was stated for it."
    lines = [f"- {one.role}: {one.name}; licence: {one.licence}" for one in shipped.ingredients]
    said = "What it was made from, with the licences that files and packages state for themselves; others may apply:"
    return "\n".join([f"# {shipped.name}", "", own, "", said, "", *lines, ""])


def dockerfile(folder: Path, engine: str, wheel: Path | None) -> str:
    """A container that serves the package with ONNX Runtime alone."""
    template = environment().get_template("Dockerfile.j2")
    book = (folder / "knowledge_base").is_dir()
    openbook = f"openbook[onnx,serve]=={importlib.metadata.version('openbook')}"
    plain = {
        "engine": engine,
        "openbook": openbook,
        "export": f"student/{EXPORT}",
        "wheel": wheel.name if wheel else "",
    }
    files = [Markup(f"student/{name}") for name in STUDENT]
    return template.render(files=files, book=book, **{name: Markup(value) for name, value in plain.items()})
