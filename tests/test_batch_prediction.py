"""A file in, the same rows with answers out: whatever the format, in order, and to the same bytes after a crash."""

import csv
import datetime
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openbook import batch_prediction
from openbook.answers import Answers, Encoded, Text, fields
from openbook.backends.base import About
from openbook.batch_prediction import Job, Tally, folder_of, predict_file, prepared, rejected_file
from openbook.config import UsageError
from openbook.data import records
from openbook.data.records import RecordFile
from openbook.predictor import OpenBook
from openbook.types import KnowledgeBase

LABELS = ("even", "odd")
READS = 12  # characters


class Counting:
    """An engine that answers by a text's length, a word-piece for each letter."""

    name = "torch"
    max_length = READS
    weights = folder = None

    def __init__(self, labels: tuple[str, ...] | None = LABELS):
        self.about = About("classification" if labels else "regression", labels, "space")
        self.sizes: list[int] = []
        self.fails_at = 1 << 30

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        letters = [list(map(ord, "".join(fields(row)))) for row in rows]
        return [Encoded(one[:READS], [0] * len(one[:READS]), len(one) > READS) for one in letters]

    def run(self, rows: Sequence[Encoded]) -> Answers:
        self.sizes.append(len(rows))
        if len(self.sizes) >= self.fails_at:
            raise KeyboardInterrupt
        angles = np.array([sum(row.ids) for row in rows], np.float32)
        vectors = np.stack([np.sin(angles), np.cos(angles)], 1)
        return Answers(vectors if self.about.labels else vectors[:, :1], vectors, np.empty(0))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def base() -> KnowledgeBase:
    angles = np.arange(8, dtype=np.float32)
    keys = np.stack([np.sin(angles), np.cos(angles)], 1)
    values = np.eye(2, dtype=np.float32)[np.arange(8) % 2]
    about = {"kind": "classification", "labels": list(LABELS), "key_space": "space"}
    about["retrieval"] = {"top_k": 2, "temperature": 0.1, "beta": 0.5}
    names = tuple(f"id/{row}" for row in range(8))
    return KnowledgeBase(keys, values, names, tuple(f"text “{row}”" for row in range(8)), about)


@pytest.fixture
def book() -> OpenBook:
    return OpenBook(Counting(), base())


@pytest.fixture
def alone() -> OpenBook:
    return OpenBook(Counting())


def predict(book: OpenBook, job: Job, force: bool = False, **more: Any) -> Tally:
    return predict_file(book, job.input.parent / "model", job, prepared(job, force), force, **more)


STARTS = ("é", 'a, "b"', "line\nbreak")
ROWS = [{"id": f"n{row}", "text": f"{STARTS[row % 3]} {'x' * (row % 20)} {row}"} for row in range(50)]


def write(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    """Rows in the format that the suffix says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
        return path
    with (
        gzip.open(path, "wt", newline="", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open("w", newline="") as file
    ):
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("target", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", ["csv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_keeps_rows_and_columns_and_adds_answers(
    tmp_path: Path, book: OpenBook, given: str, target: str
) -> None:
    job = Job(write(tmp_path / f"in.{given}"), tmp_path / f"out.{target}", probabilities=True, batch_rows=16)
    tally = predict(book, job)
    found = read(job.output)
    texts = [row["text"] for row in ROWS]
    assert [{"id": row["id"], "text": row["text"]} for row in found] == ROWS
    assert [int(row["row"]) for row in found] == list(range(1, 51))
    assert [row["prediction"] for row in found] == book.predict(texts)
    chances = book.predict_proba(texts)
    told = [[float(row[f"probability_{label}"]) for label in LABELS] for row in found]
    np.testing.assert_allclose(told, chances, atol=1e-6)
    np.testing.assert_allclose([float(row["probability"]) for row in found], chances.max(1), atol=1e-6)
    assert [str(row["truncated"]).lower() for row in found] == [str(len(text) > READS).lower() for text in texts]
    assert (tally.rows, tally.rejected, tally.share) == (50, 0, 1.0)
    assert tally.truncated == sum(len(text) > READS for text in texts) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([job.input.name, job.output.name])


@pytest.mark.parametrize("target", ["csv", "jsonl", "parquet"])
def test_explanations_are_those_of_the_predictor(tmp_path: Path, book: OpenBook, target: str) -> None:
    job = Job(write(tmp_path / "in.csv", ROWS[:5]), tmp_path / f"out.{target}", explain=True)
    predict(book, job)
    for row, told in zip(read(job.output), book.explain([row["text"] for row in ROWS[:5]]), strict=True):
        listed = row["neighbours"] if target == "jsonl" else json.loads(row["neighbours"])
        assert [one["id"] for one in listed] == [one.id for one in told.evidence.neighbours]
        assert [one["text"] for one in listed] == [one.text for one in told.evidence.neighbours]
        assert [one["weight"] for one in listed] == [round(one.weight, 4) for one in told.evidence.neighbours]
        assert (row["prediction"], row["alone"]) == (told.prediction, told.alone)
        assert len(listed) == 2


def test_pairs_and_scores(tmp_path: Path) -> None:
    book = OpenBook(Counting(None))
    rows = [{"one": "a", "two": "b"}, {"one": "a", "two": "c"}, {"one": "a", "two": None}]
    job = Job(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", text="one", text_pair="two")
    assert predict(book, job).rejected == 1
    found = read(job.output)
    assert [row["prediction"] for row in found] == pytest.approx(book.predict([("a", "b"), ("a", "c")]), abs=1e-6)
    assert "probability" not in found[0]
    assert found[0]["prediction"] != found[1]["prediction"]


BAD_LINES = [
    (b'{"text": "fine"}', ""),
    (b'{"text": "half', "it is not JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"text": 3}', "'text' holds a int, not a text"),
    (b'{"text": null}', "'text' holds nothing"),
    (b'{"other": "x"}', "'text' holds nothing"),
    (b'{"text": "  "}', "'text' is empty"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud83d"}', "half a character"),
    (b'{"text": "x", "n": NaN}', "NaN is no number"),
    (b'{"text": ' + b"[" * 9999 + b"]" * 9999 + b"}", "it is not JSON"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "it is not JSON"),
    (b'{"text": "\\ud83d\\ude00 fine too"}', ""),
]


def test_bad_lines_are_kept_aside_with_their_reason_and_the_others_keep_their_order(
    tmp_path: Path, book: OpenBook
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    tally = predict(book, Job(path, tmp_path / "out.jsonl", batch_rows=4))
    good = read(tmp_path / "out.jsonl")
    assert [(row["row"], row["text"]) for row in good] == [(1, "fine"), (len(BAD_LINES), "😀 fine too")]
    bad = read(rejected_file(tmp_path / "out.jsonl"))
    wanted = [(number, reason) for number, (_, reason) in enumerate(BAD_LINES, start=1) if reason]
    assert [one["row"] for one in bad] == [number for number, _ in wanted]
    for one, (_, reason) in zip(bad, wanted, strict=True):
        assert reason in one["reason"]
        assert one["data"]
    assert (tally.rows, tally.rejected) == (len(BAD_LINES), len(wanted))


def test_bad_rows_of_csv_do_not_take_others_with_them(tmp_path: Path, book: OpenBook) -> None:
    path = tmp_path / "in.csv"
    rows = [b"\xef\xbb\xbftext,id", b"one,1", b"too,many,fields", b"few", b"\xe9t\xe9,2", b'"q" x,3', b"", b'"a\nb",4']
    path.write_bytes(b"\r\n".join(rows) + b"\r\n")
    assert predict(book, Job(path, tmp_path / "out.csv")).rejected == 4
    assert [(row["text"], row["row"]) for row in read(tmp_path / "out.csv")] == [("one", "1"), ("a\nb", "6")]
    bad = {one["row"]: one["reason"] for one in read(rejected_file(tmp_path / "out.csv"))}
    assert bad[2] == "it has 3 fields, and the header has 2"
    assert bad[3] == "it has 1 fields, and the header has 2"
    assert "not UTF-8" in bad[4]
    assert bad[5].startswith("lines 6 to 6: ")


def test_a_quote_that_never_closes_takes_no_more_than_is_allowed(
    tmp_path: Path, book: OpenBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    path = tmp_path / "in.csv"
    lines = ["text", *(f"fine {row}" for row in range(5)), '"open', *(f"row {row}" for row in range(40)), "y" * 300]
    path.write_text("\n".join([*lines, "last"]) + "\n")
    predict(book, Job(path, tmp_path / "out.jsonl"))
    texts = [row["text"] for row in read(tmp_path / "out.jsonl")]
    assert texts[:5] == [f"fine {row}" for row in range(5)]
    assert texts[-1] == "last"
    assert len(texts) > 25
    reasons = [one["reason"] for one in read(rejected_file(tmp_path / "out.jsonl"))]
    assert len(reasons) == 2
    assert "field limit" in reasons[0]
    assert "field limit" in reasons[1]
    unquoted = Job(path, tmp_path / "unquoted.jsonl", quoting=False)
    assert predict(book, unquoted).rejected == 1
    assert read(unquoted.output)[5]["text"] == '"open'
    write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "y" * 300}, {"text": "b"}])
    predict(book, Job(tmp_path / "in.jsonl", tmp_path / "lines.jsonl"))
    assert [row["text"] for row in read(tmp_path / "lines.jsonl")] == ["a", "b"]
    assert "a line above 16 MB" in read(rejected_file(tmp_path / "lines.jsonl"))[0]["reason"]


def test_json_keys_that_turn_up_late_have_a_column_of_their_own(tmp_path: Path, book: OpenBook) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "n": 1, "mixed": 1, "deep": {"x": [1]}, "big": 2**60, "huge": 2**70, "flag": True},
        {"n": 2.5, "text": "b", "mixed": "1", "late": "é", "big": 1, "flag": None},
    ]
    path = write(tmp_path / "in.jsonl", rows)
    for target in ("parquet", "csv", "jsonl"):
        predict(book, Job(path, tmp_path / f"out.{target}"))
    columns = ["text", "n", "mixed", "deep", "big", "huge", "flag", "late", "row", "prediction", "truncated"]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == [*columns, "probability"]
    first, second = table.to_pylist()
    assert (first["n"], second["n"], first["big"], first["huge"], first["flag"]) == (1.0, 2.5, 2**60, str(2**70), True)
    assert (first["mixed"], second["mixed"], first["deep"], second["late"]) == ("1", '"1"', '{"x": [1]}', "é")
    cells = read(tmp_path / "out.csv")
    assert list(cells[0]) == [*columns, "probability"]
    assert (cells[0]["deep"], cells[0]["late"], cells[1]["late"], cells[0]["flag"]) == ('{"x": [1]}', "", "é", "true")
    kept = [{name: row[name] for name in given} for row, given in zip(read(tmp_path / "out.jsonl"), rows, strict=True)]
    assert kept == rows


def test_parquet_keeps_what_python_cannot_say(tmp_path: Path, book: OpenBook) -> None:
    nanoseconds = pa.array([1, 1_700_000_000_000_000_001, None], pa.timestamp("ns"))
    given = pa.table(
        {
            "text": pa.array(["a", "", "c"]).dictionary_encode(),
            "when": nanoseconds,
            "bytes": pa.array([b"\xff", b"", None]),
            "real": [float("nan"), 1.0, float("inf")],
        }
    )
    pq.write_table(given, tmp_path / "in.parquet")
    job = Job(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert predict(book, job).rejected == 1
    found = pq.read_table(job.output)
    assert found["when"].combine_chunks() == nanoseconds.take(pa.array([0, 2]))
    assert found["bytes"].to_pylist() == [b"\xff", None]
    assert found["text"].to_pylist() == ["a", "c"]
    predict(book, replace(job, output=tmp_path / "out.jsonl"))
    row, last = read(tmp_path / "out.jsonl")
    assert row["when"] == "1970-01-01 00:00:00.000000001"
    assert (row["bytes"], row["real"], last["real"]) == ("ff", None, None)
    (bad,) = read(rejected_file(tmp_path / "out.jsonl"))
    assert bad["data"]["when"].startswith(str(datetime.date(2023, 11, 14)))


@pytest.mark.parametrize("target", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", ["csv.gz", "jsonl", "parquet"])
def test_interrupted_at_any_window_the_same_call_ends_with_the_same_bytes(
    tmp_path: Path, given: str, target: str
) -> None:
    rows = [row if place % 7 else {**row, "text": ""} for place, row in enumerate(ROWS)]
    path = write(tmp_path / f"in.{given}", rows)
    whole = Job(path, tmp_path / f"whole.{target}", explain=True, batch_rows=8)
    predict(OpenBook(Counting(), base()), whole)
    job = replace(whole, output=tmp_path / f"out.{target}")
    runs = 0
    while not job.output.exists():
        engine = Counting()
        engine.fails_at = 2 + runs % 2
        runs += 1
        try:
            predict(OpenBook(engine, base()), job)
        except KeyboardInterrupt:
            assert folder_of(job.output).is_dir()
            for name in (batch_prediction.ROWS, batch_prediction.REJECTED):
                with (folder_of(job.output) / name).open("ab") as file:
                    file.write(b"half a r")
    assert runs > 3
    assert job.output.read_bytes() == whole.output.read_bytes()
    assert rejected_file(job.output).read_bytes() == rejected_file(whole.output).read_bytes()
    assert len(read(rejected_file(job.output))) == 8
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("target", ["jsonl", "parquet"])
def test_a_crash_between_any_two_steps_of_the_end_is_made_good(
    tmp_path: Path, alone: OpenBook, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    rows = [*ROWS, {"id": "", "text": ""}]
    whole = Job(write(tmp_path / "in.csv", rows), tmp_path / f"whole.{target}")
    predict(alone, whole)
    places = [(os, "replace"), (Path, "unlink"), (batch_prediction.shutil, "rmtree")]
    for owner, name in places:
        real = getattr(owner, name)
        for step in range(1, 8):
            job = replace(whole, output=tmp_path / f"{name}-{step}.{target}")
            calls = iter(range(1, 1000))

            def once(*args: Any, real: Any = real, step: int = step, calls: Any = calls, **more: Any) -> Any:
                if next(calls) == step:
                    raise KeyboardInterrupt
                return real(*args, **more)

            monkeypatch.setattr(owner, name, once)
            try:
                predict(alone, job)
            except KeyboardInterrupt:
                monkeypatch.setattr(owner, name, real)
                predict(alone, job, force=job.output.exists())
            monkeypatch.setattr(owner, name, real)
            assert job.output.read_bytes() == whole.output.read_bytes(), (name, step)
            assert rejected_file(job.output).read_bytes() == rejected_file(whole.output).read_bytes()
            assert not folder_of(job.output).exists()


def test_a_finished_output_is_refused_and_force_replaces_it(tmp_path: Path, alone: OpenBook) -> None:
    job = Job(write(tmp_path / "in.csv", [{"text": "a"}, {"text": ""}]), tmp_path / "out.csv")
    predict(alone, job)
    before = job.output.read_bytes()
    with pytest.raises(UsageError, match=r"--output .*out.csv exists; choose another, or replace it with --force"):
        predict(alone, job)
    assert job.output.read_bytes() == before
    write(job.input, [{"text": "b"}])
    predict(alone, job, force=True)
    assert [row["text"] for row in read(job.output)] == ["b"]
    assert not rejected_file(job.output).exists()


def half_done(book: OpenBook, job: Job, force: bool = False) -> None:
    engine = book.backend
    assert isinstance(engine, Counting)
    engine.fails_at = len(engine.sizes) + 2
    with pytest.raises(KeyboardInterrupt):
        predict(book, job, force)
    engine.fails_at = 1 << 30


def test_a_half_done_job_of_something_else_is_refused_by_name(tmp_path: Path, alone: OpenBook) -> None:
    job = Job(write(tmp_path / "in.csv"), tmp_path / "out.csv", batch_rows=8)
    student = tmp_path / "model" / "student"
    student.mkdir(parents=True)
    half_done(alone, job)
    for other, named in [
        (replace(job, text="id"), "another --text;"),
        (replace(job, probabilities=True, batch_rows=9), "another --probabilities, another --batch-rows;"),
    ]:
        with pytest.raises(UsageError, match=rf"was begun with {named} give those again .* or begin anew with --force"):
            predict(alone, other)
    (student / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UsageError, match="begun with another model;"):
        predict(alone, job)
    (student / "model.safetensors").unlink()
    manifest = tmp_path / "model" / "knowledge_base" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    with pytest.raises(UsageError, match="begun with another book;"):
        predict(OpenBook(Counting(), base()), job)
    predict(alone, job)
    half_done(alone, job, force=True)
    write(job.input, ROWS[1:])
    with pytest.raises(UsageError, match="begun with another input;"):
        predict(alone, job)
    predict(alone, job, force=True)
    assert len(read(job.output)) == 49


def test_a_forced_job_goes_on_where_it_stopped_and_keeps_the_old_output_until_then(
    tmp_path: Path, alone: OpenBook
) -> None:
    job = Job(write(tmp_path / "in.csv"), tmp_path / "out.csv", batch_rows=8)
    job.output.write_text("old")
    half_done(alone, job, force=True)
    assert job.output.read_text() == "old"
    before = len(alone.backend.sizes)  # type: ignore[attr-defined]
    predict(alone, job, force=True)
    assert len(alone.backend.sizes) - before == 6  # type: ignore[attr-defined]  # of seven windows
    assert len(read(job.output)) == 50


def test_an_edit_of_the_book_meanwhile_is_noticed(tmp_path: Path, book: OpenBook) -> None:
    job = Job(write(tmp_path / "in.csv"), tmp_path / "out.csv", batch_rows=8)

    def edit(tally: Tally) -> None:
        assert book.shelf
        book.shelf._given = base()

    with pytest.raises(UsageError, match="the book was edited meanwhile"):
        predict(book, job, progress=edit)


def test_a_second_process_is_kept_out(tmp_path: Path, alone: OpenBook) -> None:
    job = Job(write(tmp_path / "in.csv"), tmp_path / "out.csv", batch_rows=8)

    def again(tally: Tally) -> None:
        with pytest.raises(UsageError, match="another process is writing it"):
            predict(alone, job)

    assert predict(alone, job, progress=again).rows == 50


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input": "nowhere.csv"}, "--input .*nowhere.csv: there is no such file"),
        ({"output": "out.xlsx"}, r"--output .*out.xlsx: its suffix is none of .csv, .tsv, .jsonl and .parquet; conv"),
        ({"output": "out.csv.gz"}, "--output .*: its suffix is none of"),
        ({"output": "in.csv"}, "the input itself; name a file to write"),
        ({"text": "Text"}, r"--text='Text': .*in.csv has no such column; did you mean 'text'\? Its columns: 'id', 't"),
        ({"text_pair": "two"}, "--text-pair='two': .* has no such column"),
        ({"batch_rows": 0}, "--batch-rows 0: it must be 1 or more"),
        ({"explain": True}, "--explain: this student has no knowledge base"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, alone: OpenBook, changes: dict[str, Any], told: str
) -> None:
    write(tmp_path / "in.csv")
    paths = {name: tmp_path / value for name, value in changes.items() if name in ("input", "output")}
    job = replace(Job(tmp_path / "in.csv", tmp_path / "out.csv"), **{**changes, **paths})
    with pytest.raises(UsageError, match=told):
        predict(alone, job)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_taken_names_of_columns_are_refused_and_a_prefix_helps(tmp_path: Path, alone: OpenBook) -> None:
    job = Job(write(tmp_path / "in.csv", [{"text": "a", "prediction": "x", "row": "y"}]), tmp_path / "out.csv")
    with pytest.raises(UsageError, match=r"to be added \(prediction, row\); set --prefix"):
        predict(alone, job)
    predict(alone, replace(job, prefix="openbook_"))
    assert read(job.output)[0]["openbook_prediction"] in LABELS
    with pytest.raises(UsageError, match="gives scores; there are no classes"):
        predict(OpenBook(Counting(None)), replace(job, output=tmp_path / "b.csv", prefix="x", probabilities=True))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("in.csv", b"", "its first line names no columns"),
        ("in.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        ("in.csv", b"t\xffxt\na\n", "its first line names no columns"),
        ("in.parquet", b"PAR1 or not", "is not a readable Parquet file"),
        ("in.jsonl", b'{"words": "a"}\n', "--text='text': .* has no such column"),
        ("in.csv.gz", gzip.compress(b"text\n" + b"a\n" * 99, mtime=0)[:-9], "is no complete gzip file"),
        ("in.csv.gz", b"text\nnot zipped\n", "is no complete gzip file|its header cannot be read"),
        ("in.json", b"[]", "its suffix is none of .csv, .tsv, .jsonl and .parquet \\(but for the last, .gz may"),
    ],
)
def test_files_that_hold_no_rows_to_tell_apart(
    tmp_path: Path, alone: OpenBook, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        predict(alone, Job(tmp_path / name, tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(("name", "rows"), [("in.csv", b"text\n"), ("in.jsonl", b"")])
@pytest.mark.parametrize("target", ["csv", "jsonl", "parquet"])
def test_no_rows_give_an_output_without_rows(
    tmp_path: Path, alone: OpenBook, name: str, rows: bytes, target: str
) -> None:
    (tmp_path / name).write_bytes(rows)
    assert predict(alone, Job(tmp_path / name, tmp_path / f"out.{target}")).rows == 0
    assert read(tmp_path / f"out.{target}") == []


def test_long_texts_make_small_windows(tmp_path: Path, alone: OpenBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_prediction, "MOST_CHARACTERS", 100)
    rows = [{"text": "a" * (60 if row < 4 else 1)} for row in range(10)]
    predict(alone, Job(write(tmp_path / "in.csv", rows), tmp_path / "out.csv", batch_rows=5))
    assert alone.backend.sizes == [2, 2, 5, 1]  # type: ignore[attr-defined]


def test_progress_tells_how_far_it_is(tmp_path: Path, alone: OpenBook) -> None:
    for given in ("csv", "jsonl", "parquet"):
        seen: list[Tally] = []
        job = Job(write(tmp_path / f"in.{given}", 100 * ROWS), tmp_path / f"out-{given}.csv", batch_rows=500)
        predict(alone, job, progress=seen.append)
        assert [tally.rows for tally in seen] == list(range(500, 5500, 500))
        shares = [tally.share for tally in seen]
        assert shares == sorted(shares)
        assert shares[0] < 0.3
        assert shares[-1] == 1
        assert all(tally.rows_per_second > 0 for tally in seen)


@pytest.mark.parametrize(("given", "target"), [("csv", "parquet"), ("jsonl", "csv"), ("parquet", "parquet")])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, alone: OpenBook, given: str, target: str) -> None:
    peaks = []
    for times in (10, 60):
        job = Job(write(tmp_path / f"in-{times}.{given}", times * ROWS), tmp_path / f"{times}.{target}", batch_rows=256)
        tracemalloc.start()
        predict(alone, job)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 200_000


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_batch_prediction as t
class Slow(t.Counting):
    def run(self, rows):
        time.sleep(0.02)
        return super().run(rows)
job = t.Job(Path(sys.argv[1]), Path(sys.argv[2]), batch_rows=8)
t.predict(t.OpenBook(Slow(), t.base()), job)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", 20 * ROWS)
    predict(OpenBook(Counting(), base()), Job(path, tmp_path / "whole.csv", batch_rows=8))
    command = [sys.executable, "-c", SLOW.format(tests=str(Path(__file__).parent)), str(path), str(tmp_path / "o.csv")]
    kills = 0
    while kills < 5:
        process = subprocess.Popen(command)
        state = folder_of(tmp_path / "o.csv") / batch_prediction.STATE
        deadline = time.monotonic() + 60
        rows = json.loads(state.read_text())["rows"] if state.exists() else 0
        while time.monotonic() < deadline and process.poll() is None:
            if state.exists() and json.loads(state.read_text())["rows"] > rows + 40:
                break
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (tmp_path / "o.csv").exists():
            break
    assert kills == 5
    subprocess.run(command, check=True)
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_neither_torch_nor_transformers_is_needed() -> None:
    code = "import sys, openbook.batch_prediction; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_file_is_read_again_from_its_start(tmp_path: Path) -> None:
    for given in ("csv", "jsonl.gz", "parquet"):
        found = RecordFile(write(tmp_path / f"in.{given}"))
        assert [record.number for record in found] == [record.number for record in found] == list(range(1, 51))
