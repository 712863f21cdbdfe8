"""BM25 against the specification's tables (F2, F3), a plain float64 reference and another engine."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.retrieval import bm25
from openbook.retrieval.bm25 import Index
from openbook.retrieval.hits import HitTable
from openbook.retrieval.passages import lex

BANK = ["the cat sat on the mat", "the dog sat", "cats and dogs", "the cat chased the dog"]


def rows(table: HitTable) -> list[list[tuple[int, float]]]:
    hits = list(zip(table.positions.tolist(), table.scores.tolist(), strict=True))
    return [hits[start:end] for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True)]


def reference(
    texts: Sequence[str], query: str, k: int, k1: float, b: float, excluded: Sequence[int] = ()
) -> list[tuple[int, float]]:
    """Section 2.3 word for word; sums that agree to 9 decimals tie."""
    bank = [text.split() for text in texts]
    df = Counter(word for words in bank for word in set(words))
    mean = sum(map(len, bank)) / len(bank)
    scored = []
    for position, words in enumerate(bank):
        parts = []
        for word in query.split():
            idf, tf = math.log(1 + (len(bank) - df[word] + 0.5) / (df[word] + 0.5)), words.count(word)
            parts.append(idf * tf / (tf + k1 * (1 - b + b * len(words) / mean)) if tf else 0.0)
        scored.append((position, math.fsum(parts)))
    positive = [(position, score) for position, score in scored if score > 0 and position not in excluded]
    return sorted(positive, key=lambda hit: (-round(hit[1], 9), hit[0]))[:k]


def assert_same(found: Sequence[tuple[int, float]], expected: Sequence[tuple[int, float]]) -> None:
    assert [position for position, _ in found] == [position for position, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-9)


@contextmanager
def blocks(size: int, frequent: int) -> Iterator[None]:
    """Few texts a block, and tables for words of few texts, so that small banks go the ways of large ones."""
    with patch.multiple(bm25, BLOCK=size, FREQUENT=frequent):
        yield


def write_shards(folder: Path, texts: Sequence[str], cuts: Sequence[int]) -> list[Path]:
    edges = [0, *sorted(cuts), len(texts)]
    paths = [folder / f"{number}.parquet" for number in range(len(edges) - 1)]
    for path, start, end in zip(paths, edges[:-1], edges[1:], strict=True):
        pq.write_table(pa.table({"id": range(start, end), "text": pa.array(texts[start:end], pa.string())}), path)
    return paths


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("cat sat", {0: 0.539291, 1: 0.358161, 3: 0.293853}),
        ("Cat, sat: zebra", {0: 0.539291, 1: 0.358161, 3: 0.293853}),
        ("dog", {1: 0.358161, 3: 0.293853}),
        ("the cat", {3: 0.506234, 0: 0.469430, 1: 0.184300}),
        ("cat cat sat", {0: 0.808936, 3: 0.587706, 1: 0.358161}),
        ("zebra", {}),
        ("", {}),
    ],
)
def test_scores_and_order_of_the_specification(query: str, expected: dict[int, float]) -> None:
    (found,) = rows(Index.of(BANK, k1=1.2, b=0.75).search([query], k=10))
    assert [position for position, _ in found] == list(expected)
    assert [score for _, score in found] == pytest.approx(list(expected.values()), abs=1e-6)


def test_ties_go_to_the_lower_position_also_at_the_cut() -> None:
    table = Index.of(["a b"] * 6 + ["c"], k1=1.2, b=0.75).search(["a"], k=3)
    assert table.row(0).tolist() == [0, 1, 2]
    assert table.scores.tolist() == pytest.approx([0.091502] * 3, abs=1e-6)
    table = Index.of(["a b"] * 3 + ["c"] + ["a b"] * 3, k1=1.2, b=0.75).search(["a"], k=4)
    assert table.row(0).tolist() == [0, 1, 2, 4]


def test_ties_between_texts_of_different_length_go_by_position() -> None:
    """With b = 0 length does not count, but the engine looks at short texts first."""
    with blocks(2, 2):
        table = Index.of(["a x x x x x", "a b", "c", "a b c", "a"], k1=1.2, b=0).search(["a"], k=3)
    assert table.row(0).tolist() == [0, 1, 3]


def test_sums_of_the_same_weights_tie_in_any_order() -> None:
    """Texts 1 and 2 hold d, a word of two texts and a word of one, but the query adds them up in another order."""
    table = Index.of(["e b d", "c e d", "a d b"], k1=1.2, b=0.75).search(["a b c d e"], k=3)
    assert table.row(0).tolist() == [1, 2, 0]


def test_equal_sums_of_different_weights_tie() -> None:
    """With df 1, 7, 2 and 4: idf(p) + idf(q) = idf(r) + idf(s), as 1.5 * 7.5 = 2.5 * 4.5; in float64 p q is larger."""
    texts = ["r s", "p q", *["q s"] * 3, *["q x"] * 3, "r x", "x y"]
    table = Index.of(texts, k1=0.7, b=0.75).search(["p q r s"], k=2)
    assert table.row(0).tolist() == [0, 1]


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9).map(" ".join)
texts_of = st.lists(st.sampled_from("aaabbcdef"), max_size=40).map(" ".join)
queries_of = st.lists(st.sampled_from("abcdefz"), max_size=30).map(" ".join)


@given(data=st.data(), texts=st.lists(texts_of, min_size=1, max_size=30), queries=st.lists(queries_of, max_size=4))
def test_equals_the_reference(data: st.DataObject, texts: list[str], queries: list[str]) -> None:
    k, k1, b = data.draw(st.integers(1, 35)), data.draw(st.floats(0.1, 3)), data.draw(st.just(0.0) | st.floats(0.01, 1))
    excluded = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=3))
    with blocks(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))):
        table = Index.of(texts, k1, b).search(queries, k, excluded)
    assert len(table) == len(queries)
    for query, found in zip(queries, rows(table), strict=True):
        assert_same(found, reference(texts, query, k, k1, b, excluded))


@pytest.mark.parametrize(
    ("size", "frequent", "k"), [(7, 1, 1), (16, 20, 10), (64, 200, 50), (512, 1, 3), (3, 9999, 25)]
)
def test_equals_the_reference_on_a_bank_with_rare_and_frequent_words(size: int, frequent: int, k: int) -> None:
    rng = np.random.default_rng(size)
    chances = 1 / np.arange(1, 301)
    names = np.array([f"w{number}" for number in range(300)])

    def draw(least: int, most: int) -> str:
        return " ".join(rng.choice(names, rng.integers(least, most), p=chances / chances.sum()))

    texts = [draw(1, 30) for _ in range(700)]
    queries = [draw(1, 40) for _ in range(12)]
    with blocks(size, frequent):
        table = Index.of(texts, 1.2, 0.75).search(queries, k, threads=2)
    for query, found in zip(queries, rows(table), strict=True):
        assert_same(found, reference(texts, query, k, 1.2, 0.75))


@pytest.mark.parametrize("frequent", [1, 99])
def test_more_occurrences_than_a_posting_can_count(frequent: int) -> None:
    texts = [" ".join(["a"] * times + ["b"] * (60 - times)) for times in (16, 15, 14, 40, 3, 59)]
    with blocks(1, frequent):
        index = Index.of(texts, 1.2, 0.75)
    for k in (1, 3):
        (found,) = rows(index.search(["a"], k))
        assert_same(found, reference(texts, "a", k, 1.2, 0.75))
        assert [position for position, _ in found] == [5, 3, 0][:k]


@given(texts=st.lists(words, min_size=1, max_size=25), query=words)
def test_unseen_words_change_nothing_and_a_repeated_query_doubles_the_scores(texts: list[str], query: str) -> None:
    table = Index.of(texts, 1.2, 0.75).search([query, f"{query} zebra", f"{query} {query}"], 99)
    once, unseen, twice = rows(table)
    assert unseen == once
    assert [position for position, _ in twice] == [position for position, _ in once]
    assert [score for _, score in twice] == pytest.approx([2 * score for _, score in once], abs=1e-9)


def test_scores_equal_those_of_another_engine() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([f"w{i}" for i in range(60)], rng.integers(1, 20))) for _ in range(300)]
    other = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend="numpy")
    other.index([lex(text) for text in texts], show_progress=False)
    query = "w1 w2 w2 w3 w40"
    table = Index.of(texts, k1=0.9, b=0.4).search([query], k=300)
    scores = np.zeros(300)
    scores[table.positions] = table.scores
    np.testing.assert_allclose(scores, other.get_scores(lex(query)), atol=1e-5)


def test_excluded_texts_are_passed_over_but_still_counted() -> None:
    (found,) = rows(Index.of(BANK, k1=1.2, b=0.75).search(["cat sat"], k=2, excluded=[0]))
    assert [position for position, _ in found] == [1, 3]
    assert [score for _, score in found] == pytest.approx([0.358161, 0.293853], abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(texts_of, min_size=1, max_size=20), data=st.data())
def test_hits_do_not_depend_on_the_shards(
    texts: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(texts)), max_size=4))
    folder = tmp_path_factory.mktemp("shards")
    queries = ["a b c", "d d", "zebra", "f e d c b a"]
    with blocks(4, 3):
        parted = Index.build(write_shards(folder, texts, cuts), folder / "parted", 1.2, 0.75)
        whole = Index.of(texts, 1.2, 0.75)
    for found, expected in zip(rows(parted.search(queries, 7)), rows(whole.search(queries, 7)), strict=True):
        assert found == expected  # to the last bit
    loaded = Index.load(folder / "parted", 1.2, 0.75)
    assert rows(loaded.search(queries, 7)) == rows(whole.search(queries, 7))
    assert len(loaded) == len(parted) == len(texts)


def test_files_do_not_depend_on_shards_or_workers(tmp_path: Path) -> None:
    texts = [f"Wörd {number % 7}, number {number}" for number in range(200)]
    built = []
    for name, cuts, workers in (("one", [], 1), ("many", [0, 20, 20, 150], 2)):
        (tmp_path / name).mkdir()
        Index.build(write_shards(tmp_path / name, texts, cuts), tmp_path / name / "index", 1.2, 0.75, workers)
        built.append({path.name: path.read_bytes() for path in (tmp_path / name / "index").iterdir()})
    assert built[0] == built[1]
    assert len(built[0]) == 10


@pytest.mark.parametrize("threads", [1, 3, None])
def test_hits_do_not_depend_on_threads_or_batches(threads: int | None) -> None:
    texts = [f"{number % 3} {number % 5} {number % 11}" for number in range(99)]
    queries = [f"{number % 3} {number % 7} zebra" for number in range(40)]
    index = Index.of(texts, 1.2, 0.75)
    expected = [rows(index.search([query], 9))[0] for query in queries]
    with patch.object(bm25, "QUERIES", 3):
        assert rows(index.search(queries, 9, threads=threads)) == expected


@pytest.mark.parametrize("texts", [[], ["", "..."], ["one word"]])
def test_banks_and_queries_of_nothing_find_nothing(texts: list[str], tmp_path: Path) -> None:
    for index in (
        Index.of(texts, 1.2, 0.75),
        Index.build(write_shards(tmp_path, texts, []), tmp_path / "index", 1.2, 0.75),
    ):
        assert rows(index.search(["", "zebra"], 5)) == [[], []]
        assert rows(index.search([], 5)) == []
        assert rows(index.search(["one"], 0)) == [[]]


def test_other_settings_than_those_it_was_built_with_are_refused(tmp_path: Path) -> None:
    Index.build(write_shards(tmp_path, BANK, []), tmp_path / "index", k1=0.9, b=0.4)
    with pytest.raises(UsageError, match=r"corpus\.k1=1\.2, corpus\.b=0\.4.* k1=0\.9, b=0\.4"):
        Index.load(tmp_path / "index", k1=1.2, b=0.4)
    with pytest.raises(UsageError, match=r"corpus\.b=0\.75"):
        Index.load(tmp_path / "index", k1=0.9, b=0.75)
    described = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(described | {"analyzer": "letters"}))
    with pytest.raises(UsageError, match="analyzer 'letters'"):
        Index.load(tmp_path / "index", k1=0.9, b=0.4)


def test_more_texts_than_a_posting_can_number_are_refused() -> None:
    with patch.object(bm25, "MOST_TEXTS", 3), pytest.raises(UsageError, match=r"corpus\.sources: 4 sentences"):
        Index.of(BANK, k1=1.2, b=0.75)


def test_a_pickle_in_the_folder_is_refused(tmp_path: Path) -> None:
    Index.build(write_shards(tmp_path, BANK, []), tmp_path / "index", k1=1.2, b=0.75)
    np.save(tmp_path / "index" / "postings.npy", np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"allow_pickle|Python objects"):
        Index.load(tmp_path / "index", k1=1.2, b=0.75)


def test_progress_hears_the_queries_and_the_shards_done(tmp_path: Path) -> None:
    heard: list[int] = []
    with patch.object(bm25, "QUERIES", 2):
        Index.of(BANK, k1=1.2, b=0.75).search(["cat", "dog", ""], 1, progress=heard.append)
    assert heard == [2, 3]
    heard.clear()
    Index.build(write_shards(tmp_path, BANK, [1, 2]), tmp_path / "index", 1.2, 0.75, progress=heard.append)
    assert heard == [1, 2, 3]


def test_nothing_is_left_of_a_build_that_was_killed(tmp_path: Path) -> None:
    left = tmp_path / "index" / f"{bm25.COUNTING}abc"
    left.mkdir(parents=True)
    (left / "words.npy").write_bytes(b"half a file")
    Index.build(write_shards(tmp_path, BANK, [2]), tmp_path / "index", 1.2, 0.75)
    assert [path.name for path in (tmp_path / "index").iterdir() if path.is_dir()] == []
