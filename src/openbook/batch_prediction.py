"""A file of rows in, the same rows with answers out: in their order, and to the same bytes if it was interrupted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from openbook.answers import Text
from openbook.backends.onnx import WEIGHTS
from openbook.checkpoint import digest_file, read_json, write_json
from openbook.config import UsageError
from openbook.data.records import Record, RecordFile, row_format
from openbook.data.rowfiles import RowWriter, added_field, as_json
from openbook.data.sources import require_column
from openbook.keys import QUERIES

if TYPE_CHECKING:
    from openbook.predictor import OpenBook

STATE, ROWS, REJECTED = "state.json", "rows", "rejected.jsonl"  # in the folder of a job that is not finished
MOST_CHARACTERS = 1 << 24  # of the texts of one window
DIGITS = 6  # of probabilities and scores
STUDENT = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Job:
    """What to read, what of it is asked, and what to write."""

    input: Path
    output: Path
    text: str = "text"  # columns
    text_pair: str | None = None
    probabilities: bool = False  # a column for each class
    explain: bool = False  # the neighbours behind each answer
    prefix: str = ""  # of the columns that are added
    quoting: bool = True  # whether double quotes group fields in CSV and TSV
    batch_rows: int = 1024  # rows that are answered, and kept, together


@dataclass(frozen=True)
class Tally:
    """How far a job is."""

    rows: int = 0  # read, rejected ones included
    rejected: int = 0
    truncated: int = 0  # answered, but longer than the model can read
    share: float = 0.0  # of the input's bytes, or of its rows
    rows_per_second: float = 0.0  # since this process began


@dataclass(frozen=True)
class State:
    """What is kept of a job: everything up to here is on the disk, and what lies behind it does not count."""

    made_from: dict[str, Any]
    rows: int = 0
    rejected: int = 0
    truncated: int = 0
    bytes: dict[str, int] = field(default_factory=dict)  # of each file
    finished: bool = False


def prepared(job: Job, force: bool = False) -> RecordFile:
    """The rows of a job, once all is well that can be told before a model is loaded.

    Raises UsageError for files that cannot be read or written, an output that is there already and not to be replaced
    (`force`), and absent columns.
    """
    if job.batch_rows < 1:
        raise UsageError(f"--batch-rows {job.batch_rows}: it must be 1 or more")
    row_format(job.output, "--output")
    if job.output.exists() and (not job.output.is_file() or job.output.resolve() == job.input.resolve()):
        raise UsageError(f"--output {job.output} is a folder, or the input itself; name a file to write")
    if job.output.exists() and not force and not (folder_of(job.output) / STATE).exists():
        raise UsageError(f"--output {job.output} exists; choose another, or replace it with --force")
    records = RecordFile(job.input, job.quoting)
    if records.columns or records.format != "jsonl":  # no lines, no keys
        for option, column in (("--text", job.text), ("--text-pair", job.text_pair)):
            if column is not None:
                require_column(column, records.columns, option, str(job.input))
    return records


def predict_file(
    book: OpenBook,
    model: Path,
    job: Job,
    records: RecordFile,
    force: bool = False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answer every row of a `prepared` job and write it with its answer; `model` is the folder `book` was loaded from.

    Memory does not grow with the file. Killed at any point, the same call goes on where it stopped, and writes what
    it would have written. Rows that cannot be answered are kept aside in `<output>.rejected.jsonl`, with the reason.
    Raises UsageError for a half-done output of another model, book, input or other options, for names of columns
    that are taken, and for what this student cannot tell.
    """
    names = added_columns(book, job)
    refuse_taken(records, job, names)
    began, edition = time.monotonic(), book.book
    writer = RowWriter(row_format(job.output, "--output"), records, [added_field(*name) for name in names.items()])
    with working_folder(job.output) as work:
        state = begun_or_resumed(work, made_from(book, model, job), writer, force)
        first = state.rows
        for window in windows(islice(records, state.rows, None), job) if not state.finished else ():
            told = answered(book, window, job)
            if book.book is not edition:
                raise UsageError("the book was edited meanwhile; begin again with --force")
            state = kept(work, state, window, told, writer)
            share, seconds = records.share(), max(1e-9, time.monotonic() - began)
            progress(Tally(state.rows, state.rejected, state.truncated, share, (state.rows - first) / seconds))
        finish(work, state, writer, job.output)
    shutil.rmtree(work)
    seconds = max(1e-9, time.monotonic() - began)
    return Tally(state.rows, state.rejected, state.truncated, 1.0, (state.rows - first) / seconds)


def added_columns(book: OpenBook, job: Job) -> dict[str, str]:
    """Name -> what it holds. Raises UsageError for what this student cannot tell."""
    if job.explain and book.book is None:
        raise UsageError("--explain: this student has no knowledge base, so there are no neighbours to show")
    if job.probabilities and book.labels is None:
        raise UsageError("--probabilities: this student gives scores; there are no classes with probabilities")
    several = book.kind == "multi_label"  # a list of labels, and a list of their probabilities
    answer = "float" if book.labels is None else "json" if several else "str"
    names = {"row": "int", "prediction": answer, "truncated": "bool"}
    if book.labels is not None:
        names["probability"] = "json" if several else "float"
        names |= {f"probability_{label}": "float" for label in book.labels if job.probabilities}
    if job.explain:
        names |= {"alone": names["prediction"], "neighbours": "json"}
    return {f"{job.prefix}{name}": kind for name, kind in names.items()}


def refuse_taken(records: RecordFile, job: Job, names: dict[str, str]) -> None:
    taken = sorted(set(names) & set(records.columns))
    if taken:
        raise UsageError(
            f"{job.input} has columns of the names that are to be added ({', '.join(taken)}); set --prefix"
        )


def made_from(book: OpenBook, model: Path, job: Job) -> dict[str, Any]:
    """All that the output depends on, as digests and plain values."""
    student, manifest = model / "student", model / "knowledge_base" / "manifest.json"
    own = [] if book.projection is None else [QUERIES]
    parts = [student / name for name in (*STUDENT, WEIGHTS[book.backend.name], *own)]
    digests = [digest_file(path) if path.is_file() else "" for path in parts]
    options = {name: value for name, value in asdict(job).items() if name not in ("input", "output")}
    return {
        "model": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        "book": digest_file(manifest) if book.book is not None and manifest.is_file() else None,
        "engine": book.backend.name,
        "input": digest_file(job.input),
        "format of the output": row_format(job.output, "--output"),
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        "version of openbook": importlib.metadata.version("openbook"),
    }


def folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def rejected_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.{REJECTED}")


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """Where a job keeps what it has; no two processes write there."""
    work = folder_of(output)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"--output {output}: another process is writing it; wait for it, or stop it") from error
    try:
        yield work
    finally:
        lock.release()


def begun_or_resumed(work: Path, wanted: dict[str, Any], writer: RowWriter, force: bool) -> State:
    """The state that a job goes on from. Raises UsageError for one that was begun with something else."""
    if (work / STATE).is_file():
        found = State(**read_json(work / STATE))
        other = [name for name, value in wanted.items() if found.made_from.get(name) != value]
        if not other:
            for name, size in found.bytes.items():
                if (work / name).is_file():  # a finished one may have been put in its place
                    os.truncate(work / name, size)
            return found
        if not force:
            raise UsageError(
                f"{work} holds the half of a job that was begun with another {', another '.join(other)};"
                " give those again to go on with it, or begin anew with --force"
            )
    (work / STATE).unlink(missing_ok=True)
    (work / ROWS).write_bytes(writer.beginning())
    (work / REJECTED).write_bytes(b"")
    state = State(wanted, bytes={ROWS: len(writer.beginning()), REJECTED: 0})
    write_json(work / STATE, asdict(state))
    return state


def windows(records: Iterator[Record], job: Job) -> Iterator[list[Record]]:
    """Rows that are answered together: so many, or fewer where they are long."""
    window: list[Record] = []
    characters = 0
    for record in records:
        window.append(record)
        told = (record.values.get(job.text), record.values.get(job.text_pair) if job.text_pair else None)
        characters += len(record.raw) + sum(len(text) for text in told if isinstance(text, str))
        if len(window) == job.batch_rows or characters > MOST_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


@dataclass(frozen=True)
class Told:
    """The answers to a window: columns for the rows that were answered, and reasons for those that were not."""

    good: list[Record]
    columns: list[list[Any]]  # in the order of `added_columns`
    bad: list[Record]
    truncated: int


def answered(book: OpenBook, window: Sequence[Record], job: Job) -> Told:
    checked = [checked_record(record, job) for record in window]
    good = [record for record in checked if not record.reason]
    bad = [record for record in checked if record.reason]
    encoded = book.encode([text_of(record, job) for record in good]) if good else []
    evidence = book.evidence(encoded) if good and job.explain else []
    answers = [one.result for one in evidence] if evidence else book.answer(encoded) if good else []
    columns: list[list[Any]] = [
        [record.number for record in good],
        [rounded(book.name(answer)) for answer in answers],
        [row.cut for row in encoded],
    ]
    if book.labels is not None:
        columns.append([rounded(chances_of(book, answer)) for answer in answers])
        for place in range(len(book.labels) if job.probabilities else 0):
            columns.append([rounded(float(answer[place])) for answer in answers])
    if job.explain:
        columns += [[rounded(book.name(one.student)) for one in evidence], [one.as_records() for one in evidence]]
    return Told(good, columns, bad, sum(row.cut for row in encoded))


def checked_record(record: Record, job: Job) -> Record:
    """The record, with a reason against it if it has no text to answer."""
    for column in (job.text, job.text_pair):
        if record.reason or column is None:
            break
        value = record.values.get(column)
        if not isinstance(value, str):
            found = "nothing" if value is None else f"a {type(value).__name__}"
            record = replace(record, reason=f"{column!r} holds {found}, not a text")
        elif not value.strip():
            record = replace(record, reason=f"{column!r} is empty")
    return record


def text_of(record: Record, job: Job) -> Text:
    first: str = record.values[job.text]
    return first if job.text_pair is None else (first, record.values[job.text_pair])


def chances_of(book: OpenBook, answer: Any) -> float | list[float]:
    """The probability of what is told, or of each of several labels in their order."""
    told = book.name(answer)
    if isinstance(told, list) and book.labels is not None:
        return [float(answer[book.labels.index(name)]) for name in told]
    return float(answer.max())


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def kept(work: Path, state: State, window: Sequence[Record], told: Told, writer: RowWriter) -> State:
    """Write a window's rows behind those that are there, then say in the state that they count."""
    refused = [{"row": bad.number, "reason": bad.reason, "data": bad.raw or bad.values} for bad in told.bad]
    lines = "".join(f"{as_json(one)}\n" for one in refused).encode("utf-8", "backslashreplace")
    parts = {ROWS: writer.encoded(told.good, told.columns), REJECTED: lines}
    for name, part in parts.items():
        with (work / name).open("ab") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())
    state = replace(
        state,
        rows=state.rows + len(window),
        rejected=state.rejected + len(told.bad),
        truncated=state.truncated + told.truncated,
        bytes={name: state.bytes[name] + len(part) for name, part in parts.items()},
    )
    write_json(work / STATE, asdict(state))
    return state


def finish(work: Path, state: State, writer: RowWriter, output: Path) -> None:
    """Put the files in their places. Each step can be done again after a crash behind it."""
    write_json(work / STATE, asdict(replace(state, finished=True)))
    if (work / ROWS).is_file():
        writer.complete(work / ROWS, output)
    if state.rejected and (work / REJECTED).is_file():
        os.replace(work / REJECTED, rejected_file(output))
    elif not state.rejected:
        rejected_file(output).unlink(missing_ok=True)
