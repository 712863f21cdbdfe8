"""The bank: filters, the leak guard, repetitions, the shuffle, and a build that is killed, cut up or spread out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from openbook.config import CorpusSettings, FileSource, UsageError
from openbook.retrieval import bank as module
from openbook.retrieval.bank import Bank, build_bank
from openbook.retrieval.passages import LeakGuard, key, lex, sentences

NO_GUARD = LeakGuard((), 8)
OWN = {"workers", "progress", "chunk_characters", "shard_rows"}  # arguments of `build_bank`, not settings
Documents = list[tuple[str, str]]


def settings(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


def build(folder: Path, documents: Any, guard: LeakGuard = NO_GUARD, **options: Any) -> Bank:
    own = {name: options.pop(name) for name in OWN & set(options)}
    return build_bank(documents, guard, settings(**options), folder / "bank", folder / "scratch", **own)


def numbered(count: int) -> Documents:
    return [(f"d{i}", f"this is sentence number {i}") for i in range(count)]


def texts(bank: Bank) -> list[str]:
    return [passage.text for passage in bank.prefix()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_filter_counts_what_it_removes(tmp_path: Path) -> None:
    documents = [
        ("short", "one two three four"),
        ("ok", "one two three four five"),
        ("long", "a b c d e f g h"),
        ("digits", "a 1 b 2 c 345"),
        ("half", "ab 1 cd 2 e 345"),
        ("leak", "the leaked sentence is here"),
        ("again", "One, two, three, four: FIVE!"),
        ("many", "The first of them is good. The second of them is good."),
    ]
    bank = build(tmp_path, documents, LeakGuard(["The leaked sentence is here."], 8), max_words=6)
    assert bank.counts == {
        "documents": 8, "sentences": 9, "kept": 4,
        "too_short": 1, "too_long": 1, "not_text": 1, "leaked": 1, "duplicate": 1, "near_duplicate": 0,
    }  # fmt: skip
    assert {(passage.document, passage.text) for passage in bank.prefix()} == {
        ("ok", "one two three four five"),  # the first occurrence stays
        ("half", "ab 1 cd 2 e 345"),  # 5 letters of 10
        ("many", "The first of them is good."),
        ("many", "The second of them is good."),
    }


@pytest.mark.parametrize(("ngram", "left"), [(0, [1, 2, 3]), (3, [3])])
def test_nothing_the_guard_blocks_gets_in(tmp_path: Path, ngram: int, left: list[int]) -> None:
    lines = ["The cat sat!", "the cat sat down today", "one quick brown fox", "quick brown dogs jump"]
    guard = LeakGuard(["the cat sat", "a quick brown fox jumps"], ngram)
    bank = build(tmp_path, [("d", "\n".join(lines))], guard, min_words=1)
    assert set(texts(bank)) == {lines[i] for i in left}
    assert bank.counts["leaked"] == 4 - len(left)


def test_the_shuffle_depends_on_the_seed_alone(tmp_path: Path) -> None:
    documents = numbered(50)
    bank = build(tmp_path / "a", documents)
    again = build(tmp_path / "b", reversed(documents))
    other = build(tmp_path / "c", documents, seed=1)
    assert [passage.id for passage in bank.prefix()] == [f"bank/{i:08d}" for i in range(50)]
    assert texts(bank) == texts(again) != texts(other)
    assert sorted(texts(bank)) == sorted(texts(other)) == sorted(text for _, text in documents)
    assert texts(bank) != [text for _, text in documents]


def test_a_prefix_is_a_uniform_sample(tmp_path: Path) -> None:
    documents = numbered(4000)
    number_of = {text: number for number, (_, text) in enumerate(documents)}
    numbers = [number_of[text] for text in texts(build(tmp_path, documents))]
    for part in (numbers[:1000], numbers[1000:2000]):
        assert abs(np.mean(part) - 2000) < 4 * 1155 / 1000**0.5  # four standard errors
        assert abs(sum(number < 1000 for number in part) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5


lines = st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map(" ".join)


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    kept=st.lists(lines, min_size=1, max_size=9),
    evaluation=st.lists(lines, max_size=4),
    ngram=st.integers(0, 4),
    chunk=st.integers(1, 50),
    shard=st.integers(1, 9),
)
def test_the_bank_does_not_depend_on_chunks_and_shards(
    kept: list[str], evaluation: list[str], ngram: int, chunk: int, shard: int
) -> None:
    documents = [(f"d{number}", text) for number, text in enumerate(["x y z", *kept])]  # "x y z" keeps it from empty
    guard = LeakGuard(evaluation, ngram)
    first = {key(text): (name, text) for name, text in reversed(documents) if not guard.blocks(text)}
    with TemporaryDirectory() as folder:
        whole = build(Path(folder, "a"), documents, guard, min_words=1)
        parts = build(Path(folder, "b"), documents, guard, min_words=1, chunk_characters=chunk, shard_rows=shard)
        assert list(parts.prefix()) == list(whole.prefix())
        assert parts.counts == whole.counts
        assert sorted((p.document, p.text) for p in whole.prefix()) == sorted(first.values())
        removed = ("too_short", "too_long", "not_text", "leaked", "duplicate", "near_duplicate", "kept")
        assert sum(whole.counts[name] for name in removed) == whole.counts["sentences"]
        check_access(parts)


def check_access(bank: Bank) -> None:
    everything = list(bank.prefix())
    positions = Random(0).choices(range(len(bank)), k=2 * len(bank))
    assert bank.passages(positions) == [everything[position] for position in positions]
    assert bank.texts(positions) == [everything[position].text for position in positions]
    assert bank.lengths().tolist() == [len(lex(passage.text)) for passage in everything]
    keys = [key(everything[position].text) for position in positions]
    assert bank.positions_of([*keys, "not there", ""]).tolist() == sorted(set(positions))


def test_two_workers_write_the_bytes_that_one_writes(tmp_path: Path) -> None:
    documents = numbered(300) + numbered(200)
    options = {"chunk_characters": 1000, "shard_rows": 250}
    build(tmp_path / "one", documents, **options)
    build(tmp_path / "two", documents, workers=2, **options)
    assert len(files(tmp_path / "one" / "bank")) == 2 + 1
    assert files(tmp_path / "one" / "bank") == files(tmp_path / "two" / "bank")


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = numbered(300)
    options = {"chunk_characters": 1000, "shard_rows": 100, "near_duplicates": 0.9}
    build(tmp_path / "straight", documents, **options)
    files_begun = 0

    def killed_at_times(write: Any, place: int) -> Any:
        def half_or_whole(*arguments: Any, **named: Any) -> Any:
            nonlocal files_begun
            files_begun += 1
            if files_begun % 5 == 0:
                Path(arguments[place]).write_bytes(b"half a fi")
                raise KeyboardInterrupt
            return write(*arguments, **named)

        return half_or_whole

    monkeypatch.setattr(module.pa.ipc, "new_file", killed_at_times(module.pa.ipc.new_file, 0))
    monkeypatch.setattr(module.pq, "write_table", killed_at_times(module.pq.write_table, 1))
    kills = 0
    while not (tmp_path / "killed" / "bank" / "bank.json").exists():
        try:
            build(tmp_path / "killed", iter(documents), **options)
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    assert files_begun - kills == 8 + 3 + 3 + 12 + 3  # chunks, unique, bands, pairs, distinct: none is made twice
    assert files(tmp_path / "killed" / "bank") == files(tmp_path / "straight" / "bank")


@pytest.mark.parametrize("change", ["text", "document", "guard", "min_words", "seed"])
def test_what_another_call_left_behind_is_not_used(tmp_path: Path, change: str) -> None:
    documents, guard = numbered(20), NO_GUARD
    build(tmp_path / "used", documents)
    options = {"min_words": {"min_words": 6}, "seed": {"seed": 1}}.get(change, {})
    if change == "text":
        documents = [*documents[:-1], ("d19", "that is sentence number 19")]
    if change == "document":
        documents = [*documents[:-1], ("e19", documents[-1][1])]
    if change == "guard":
        guard = LeakGuard(["this is sentence number 3"], 8)
    if change == "min_words":
        documents = [*documents, ("long", "this is a sentence of seven words")]
        build(tmp_path / "used", documents)
    build(tmp_path / "used", documents, guard, **options)
    build(tmp_path / "fresh", documents, guard, **options)
    assert files(tmp_path / "used" / "bank") == files(tmp_path / "fresh" / "bank")


def test_documents_are_drawn_as_they_are_needed(tmp_path: Path) -> None:
    def endless() -> Iterator[tuple[str, str]]:
        for number in range(10**9):
            if len(list((tmp_path / "scratch").glob("chunk-*.arrow"))) > 2:
                raise KeyboardInterrupt
            yield f"d{number}", f"this is sentence number {number}"

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, endless(), chunk_characters=1000)


def test_a_bank_of_one_sentence_said_often(tmp_path: Path) -> None:
    said = "One and the same sentence. "
    bank = build(tmp_path, [("first", said), *[("d", said * 50)] * 50], chunk_characters=1000, shard_rows=100)
    (passage,) = bank.prefix()
    assert (passage.text, passage.document) == (said.strip(), "first")
    assert (bank.counts["duplicate"], bank.counts["kept"]) == (2500, 1)
    assert bank.rows == (1,)
    check_access(bank)


def test_a_huge_document_is_split_where_sentences_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"This is sentence number {i} of it. And here is number {i} again." for i in range(200)]
    whole = build(tmp_path / "whole", [("d", "\n".join(lines))])
    monkeypatch.setattr(module, "LONGEST_PIECE", 100)
    for name, joint in (("lines", "\n"), ("line", " ")):
        bank = build(tmp_path / name, [("d", joint.join(lines))])
        assert texts(bank) == texts(whole)
        assert bank.counts == whole.counts


@pytest.mark.parametrize("text", ["", "x" * 1000, "ab\n" * 300, "。" * 250, "\n" * 301, "a. b " * 99])
def test_pieces_are_the_whole_document_and_no_longer_than_allowed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PIECE", 100)
    pieces = list(islice(module._pieces(text), 10_000))
    assert "".join(pieces) == text
    assert all(pieces) or pieces == [""]
    assert max(map(len, pieces)) <= 100


def test_a_chinese_bank(tmp_path: Path) -> None:
    text = "我爱北京天安门。你好。今天天气很好！我爱北京，天安门！"
    bank = build(tmp_path, [("d", text)], LeakGuard(["他说今天天气很好"], 6), language="zh")
    assert texts(bank) == ["我爱北京天安门。"]
    expected = {"sentences": 4, "too_short": 1, "leaked": 1, "duplicate": 1, "kept": 1}
    assert {name: bank.counts[name] for name in expected} == expected
    assert bank.positions_of([key("我爱北京天安门")]).tolist() == [0]


def test_a_position_beyond_the_bank_is_refused(tmp_path: Path) -> None:
    bank = build(tmp_path, numbered(5))
    assert bank.texts([]) == bank.passages(np.array([], np.int64)) == []
    for position in (-1, 5):
        with pytest.raises(IndexError, match="bank of 5"):
            bank.texts([0, position])


def test_a_bank_is_found_again_on_disk(tmp_path: Path) -> None:
    built = build(tmp_path, numbered(50), shard_rows=20)
    bank = Bank.load(tmp_path / "bank")
    assert bank == built
    assert len(bank) == 50
    tables = [pq.read_table(path) for path in bank.shards]
    assert [len(table) for table in tables] == list(bank.rows)
    assert len(tables) == 3
    assert tables[0].column_names == ["digest", "text", "document", "words"]
    assert [text for table in tables for text in table["text"].to_pylist()] == texts(bank)


def test_an_empty_bank_is_refused_with_its_counts(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"corpus\.sources.*documents=1, sentences=2, too_short=2.*corpus\.min_words=5"
    ):
        build(tmp_path, [("d", "Too short. This too.")])
    with pytest.raises(UsageError, match=r"corpus\.sources.*documents=0, sentences=0"):
        build(tmp_path, [])


def test_progress_hears_the_documents_read(tmp_path: Path) -> None:
    heard: list[int] = []
    build(tmp_path, [*numbered(100), ("e", "")], progress=heard.append, chunk_characters=500)
    assert heard == sorted(heard)
    assert heard[-1] == 101
    assert len(heard) == 6  # 2590 characters


def similar_documents() -> Documents:
    """Templates filled in, as encyclopedias are full of: many pairs around the threshold."""
    draw = Random(0)
    places, things = [f"place{i}" for i in range(6)], [f"thing{i}" for i in range(20)]
    frame = "{0} is a small village in the district of {1} known for its {2} and {3} and {4}".format
    return [(f"d{i}", frame(f"name{i % 97}", draw.choice(places), *draw.sample(things, 3))) for i in range(1000)]


@pytest.mark.parametrize("threshold", [0.8, 1.0])
def test_no_sentence_stays_that_resembles_an_earlier_one(tmp_path: Path, threshold: float) -> None:
    documents = [
        *similar_documents(),
        ("same", "words in an order of their own"),
        ("set", "an own order of words in their"),
    ]
    everything = texts(build(tmp_path / "all", documents))
    sets = [set(lex(text)) for text in everything]

    def resembles(place: int) -> bool:
        one = sets[place]
        return any(len(one & two) / len(one | two) >= threshold for two in sets[:place])

    expected = [text for place, text in enumerate(everything) if not resembles(place)]
    bank = build(tmp_path / "some", documents, near_duplicates=threshold)
    assert bank.counts["near_duplicate"] == len(everything) - len(bank) > 0
    kept = texts(bank)
    assert set(expected) <= set(kept)  # nothing goes that is unlike all earlier ones
    missed = set(kept) - set(expected)
    assert len(missed) <= 0.03 * (len(everything) - len(expected))  # MinHash may miss some
    assert kept == [text for text in everything if text in set(kept)]  # in the same order


def test_near_duplicates_do_not_depend_on_chunks_batches_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_in_a_worker(work: Any, jobs: Any, workers: int, *, once: Any) -> Iterator[Any]:
        for job in jobs:
            sent_work, sent_once, sent_job = pickle.loads(pickle.dumps((work, once, job)))  # noqa: S301
            yield sent_work(*sent_once, *sent_job)

    whole = build(tmp_path / "whole", similar_documents(), near_duplicates=0.8)
    monkeypatch.setattr(module, "map_jobs", as_in_a_worker)
    monkeypatch.setattr(module, "BATCH", 7)
    parts = build(tmp_path / "parts", similar_documents(), near_duplicates=0.8, chunk_characters=5000, shard_rows=90)
    assert len(parts.shards) == 12
    assert texts(parts) == texts(whole)
    assert parts.counts == whole.counts
    check_access(parts)


def test_sentences_of_a_document_come_from_the_shared_splitter(tmp_path: Path) -> None:
    text = "Dr. Smith went home to his dogs. He left the cafe\u0301 very early\nand a new line begins here"
    assert set(texts(build(tmp_path, [("d", text)]))) == set(sentences(text, "en"))
