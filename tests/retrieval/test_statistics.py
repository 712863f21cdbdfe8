"""Distinct-n, overlap (fixtures F9 and F10 of the specification) and lengths, compared at equal size."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.retrieval import statistics
from openbook.retrieval.statistics import describe, distinct_n, overlap, sizes
from openbook.types import Passage

BANK = [line.split() for line in ("the cat sat on the mat", "the dog sat", "cats and dogs", "the cat chased the dog")]
TASK = [line.split() for line in ("the cat sat", "a dog sat", "the dog ran")]
SMALL = [["a", "b", "a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("sentences", "n", "expected"),
    [
        (SMALL, 1, 2 / 5),
        (SMALL, 2, 2 / 3),
        (SMALL, 3, 1),
        (BANK, 1, 10 / 17),
        (BANK, 2, 11 / 13),
        (BANK, 3, 1),
        (SMALL, 4, 0),
    ],
)
def test_distinct_n_of_the_specification(sentences: list[list[str]], n: int, expected: float) -> None:
    assert distinct_n(sentences, n) == pytest.approx(expected, abs=1e-12)


def test_overlap_of_the_specification() -> None:
    assert overlap(BANK, TASK, k=4) == pytest.approx(0.75)
    assert overlap(BANK, TASK) == pytest.approx(2 / 3)
    assert overlap(BANK, []) == 0


lines = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), min_size=1, max_size=8)


@given(corpus=lines, task=lines, n=st.integers(1, 3), k=st.integers(1, 9))
def test_bounds_doubling_and_symmetry(corpus: list[list[str]], task: list[list[str]], n: int, k: int) -> None:
    assert 0 <= distinct_n(corpus, n) <= 1
    assert distinct_n(corpus * 2, n) == pytest.approx(distinct_n(corpus, n) / 2)
    assert overlap(task, task, k) == 1
    assert overlap(corpus, task, k) == overlap(task, corpus, k)


def test_distinct_n_of_all_different_text_is_one() -> None:
    assert distinct_n([["a", "b", "c"], ["d", "e"]], 1) == distinct_n([["a", "b", "c"], ["d", "e"]], 2) == 1


def by_hand(corpus: list[list[str]], task: list[list[str]], n: int, k: int) -> tuple[float, float]:
    """Section 2.7 line by line, over strings."""
    grams = [tuple(words[at : at + n]) for words in corpus for at in range(len(words) - n + 1)]
    tops = []
    for sentences in (corpus, task):
        counts = Counter(word for words in sentences for word in words)
        tops.append(sorted(counts, key=lambda word: (-counts[word], word)))
    k = min(k, *map(len, tops))
    return len(set(grams)) / len(grams) if grams else 0.0, len({*tops[0][:k]} & {*tops[1][:k]}) / k


@given(corpus=lines, task=lines, n=st.integers(1, 7), k=st.integers(1, 9))
def test_numbers_for_words_change_nothing(corpus: list[list[str]], task: list[list[str]], n: int, k: int) -> None:
    assert (distinct_n(corpus, n), overlap(corpus, task, k)) == by_hand(corpus, task, n, k)


def test_long_grams_of_many_words_do_not_collide() -> None:
    """As one number in base 256, nine words are more than 64 bits: the first would be lost."""
    words = [f"w{place}" for place in range(256)]
    assert distinct_n([words, *([word, *words[:8]] for word in words)], 9) == 1


def test_corpora_are_compared_on_equally_many_words() -> None:
    """All 100 sentences together would have a distinct-1 near 1/2, two have 3/4: size alone lowers it."""
    large = [f"a x{i}" for i in range(100)]
    described = describe({"small": ["the cat sat.", "The dog"], "large": large}, ["the cat", "a dog"], seed=0)
    assert described["sample_words"] == 5
    small, two = described["corpora"]["small"], described["corpora"]["large"]
    assert (small.pop("lengths")["under 5"], two.pop("lengths")["under 5"]) == (1, 1)
    assert small == pytest.approx(
        {"distinct_1": 4 / 5, "distinct_2": 1, "distinct_3": 1, "overlap": 3 / 4, "mean_words": 2.5}
    )  # all of it in every draw; the task's four words are the, cat, a, dog
    assert two == pytest.approx(
        {"distinct_1": 3 / 4, "distinct_2": 1, "distinct_3": 0, "overlap": 1 / 3, "mean_words": 2}
    )  # two whole sentences of the 100, whichever: 4 words fit under 5


def test_a_large_corpus_is_read_no_further_than_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    lex = statistics.lex
    monkeypatch.setattr(statistics, "lex", lambda text: read.append(text) or lex(text))
    monkeypatch.setattr(statistics, "LARGEST_SAMPLE", 10)
    described = describe({"large": [f"a{i} b{i}" for i in range(10_000)]}, [], seed=0)
    assert described["sample_words"] == 10
    assert described["corpora"]["large"]["distinct_1"] == 1
    assert len(read) == len(set(read)) < 5 + 5 * 6 + 1


def test_sizes_count_words_of_both_texts_of_a_pair() -> None:
    passages = [Passage("0", "a b c d", "d", tokens=5), Passage("1", "a b c", "d", text_pair="d, e!", tokens=9)]
    assert sizes(passages) == {
        "sentences": 2,
        "tokens": 14,
        "mean_words": 4.5,
        "lengths": {"under 5": 0.5, "5 to 9": 0.5, "10 to 19": 0, "20 to 39": 0, "40 to 79": 0, "from 80": 0},
    }
    assert sizes([])["mean_words"] == 0
    assert sizes([Passage("0", "w " * 80, "d")])["lengths"]["from 80"] == 1
    assert sizes([Passage("0", "w " * 79, "d")])["lengths"]["40 to 79"] == 1


def test_draws_differ_are_averaged_and_follow_the_seed() -> None:
    corpora = {"small": ["p q"], "mixed": ["a a"] * 50 + ["b c"] * 50}
    means = [describe(corpora, ["a"], seed)["corpora"]["mixed"]["distinct_1"] for seed in range(4)]
    assert all(mean in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for mean in means)  # five draws of 0.5 or 1
    assert any(0.5 < mean < 1 for mean in means)
    assert means == [describe(corpora, ["a"], seed)["corpora"]["mixed"]["distinct_1"] for seed in range(4)]
    assert len(set(means)) > 1
