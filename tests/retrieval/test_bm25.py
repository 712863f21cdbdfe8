"""BM25 against the specification's tables (F2, F3), a plain float64 reference and another engine."""

from __future__ import annotations

import math
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.retrieval.bm25 import Index
from openbook.retrieval.passages import lex

BANK = ["the cat sat on the mat", "the dog sat", "cats and dogs", "the cat chased the dog"]


def reference(texts: list[str], query: str, k: int, k1: float, b: float) -> list[tuple[int, float]]:
    """Section 2.3 word for word; sums that agree to 9 decimals tie."""
    bank = [text.split() for text in texts]
    mean = sum(map(len, bank)) / len(bank)
    scored = []
    for position, words in enumerate(bank):
        parts = []
        for word in query.split():
            df, tf = sum(word in other for other in bank), words.count(word)
            idf = math.log(1 + (len(bank) - df + 0.5) / (df + 0.5))
            parts.append(idf * tf / (tf + k1 * (1 - b + b * len(words) / mean)))
        scored.append((position, math.fsum(parts)))
    positive = [(position, score) for position, score in scored if score > 0]
    return sorted(positive, key=lambda hit: (-round(hit[1], 9), hit[0]))[:k]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("cat sat", {0: 0.539291, 1: 0.358161, 3: 0.293853}),
        ("Cat, sat: zebra", {0: 0.539291, 1: 0.358161, 3: 0.293853}),
        ("dog", {1: 0.358161, 3: 0.293853}),
        ("the cat", {3: 0.506234, 0: 0.469430, 1: 0.184300}),
        ("cat cat sat", {0: 0.808936, 3: 0.587706, 1: 0.358161}),
        ("zebra", {}),
    ],
)
def test_scores_and_order_of_the_specification(query: str, expected: dict[int, float]) -> None:
    (hits,) = Index.build(BANK, k1=1.2, b=0.75).search([query], k=10)
    assert [hit.position for hit in hits] == list(expected)
    assert [hit.score for hit in hits] == pytest.approx(list(expected.values()), abs=1e-6)


def test_ties_go_to_the_lower_position_also_at_the_cut() -> None:
    (hits,) = Index.build(["a b"] * 3 + ["c"] + ["a b"] * 3, k1=1.2, b=0.75).search(["a"], k=4)
    assert [hit.position for hit in hits] == [0, 1, 2, 4]
    (hits,) = Index.build(["a b"] * 6 + ["c"], k1=1.2, b=0.75).search(["a"], k=3)
    assert [hit.score for hit in hits] == pytest.approx([0.091502] * 3, abs=1e-6)


def test_sums_that_differ_in_the_last_bit_tie() -> None:
    """Texts 1 and 2 hold d, a word of two texts and a word of one, but the query adds them up in another order."""
    (hits,) = Index.build(["e b d", "c e d", "a d b"], k1=1.2, b=0.75).search(["a b c d e"], k=3)
    assert [hit.position for hit in hits] == [1, 2, 0]


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9).map(" ".join)
banks = st.lists(words, min_size=1, max_size=25)


@given(texts=banks, query=words, k=st.integers(1, 30), k1=st.floats(0.1, 3), b=st.floats(0, 1))
def test_equals_the_reference(texts: list[str], query: str, k: int, k1: float, b: float) -> None:
    expected = reference(texts, query, k, k1, b)
    (hits,) = Index.build(texts, k1, b).search([query], k)
    assert [hit.position for hit in hits] == [position for position, _ in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-11)


@given(texts=banks, query=words)
def test_unseen_words_change_nothing_and_a_repeated_query_doubles_the_scores(texts: list[str], query: str) -> None:
    once, unseen, twice = Index.build(texts, 1.2, 0.75).search([query, f"{query} zebra", f"{query} {query}"], 99)
    assert unseen == once
    assert [hit.position for hit in twice] == [hit.position for hit in once]
    assert [hit.score for hit in twice] == pytest.approx([2 * hit.score for hit in once], abs=1e-11)


def test_scores_equal_those_of_another_engine() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([f"w{i}" for i in range(60)], rng.integers(1, 20))) for _ in range(300)]
    other = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend="numpy")
    other.index([lex(text) for text in texts], show_progress=False)
    query = "w1 w2 w2 w3 w40"
    (hits,) = Index.build(texts, k1=0.9, b=0.4).search([query], k=300)
    scores = np.zeros(300)
    scores[[hit.position for hit in hits]] = [hit.score for hit in hits]
    np.testing.assert_allclose(scores, other.get_scores(lex(query)), atol=1e-5)


def test_excluded_texts_are_passed_over_but_still_counted() -> None:
    (hits,) = Index.build(BANK, k1=1.2, b=0.75).search(["cat sat"], k=2, excluded=[0])
    assert [hit.position for hit in hits] == [1, 3]
    assert [hit.score for hit in hits] == pytest.approx([0.358161, 0.293853], abs=1e-6)


def test_a_loaded_index_finds_the_same(tmp_path: Path) -> None:
    index = Index.build([*BANK, "Ünïcode wörds stay"], k1=0.8, b=0.3)
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    queries = ["the cat sat", "WÖRDS on the mat", "zebra"]
    assert loaded.search(queries, 5) == index.search(queries, 5)
    assert len(loaded) == 5


def test_a_pickle_in_the_folder_is_refused(tmp_path: Path) -> None:
    Index.build(BANK, k1=1.2, b=0.75).save(tmp_path)
    np.save(tmp_path / "texts.npy", np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        Index.load(tmp_path)


def test_progress_hears_the_queries_done() -> None:
    heard: list[int] = []
    Index.build(BANK, k1=1.2, b=0.75).search(["cat", "dog", ""], 1, heard.append)
    assert heard == [1, 2, 3]
