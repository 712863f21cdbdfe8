"""Distinct-n and overlap (fixtures F9 and F10 of the specification), and their comparison at equal size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.retrieval.statistics import describe, distinct_n, overlap

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


def test_corpora_are_compared_on_equally_many_words() -> None:
    """All 100 sentences together would have a distinct-1 near 1/2, two have 3/4: size alone lowers it."""
    large = [f"a x{i}" for i in range(100)]
    described = describe({"small": ["the cat sat.", "The dog"], "large": large}, ["the cat", "a dog"], seed=0)
    assert described["sample_words"] == 5
    assert described["corpora"]["small"] == pytest.approx(
        {"distinct_1": 4 / 5, "distinct_2": 1, "distinct_3": 1, "overlap": 3 / 4}
    )  # all of it in every draw; the task's four words are the, cat, a, dog
    assert described["corpora"]["large"] == pytest.approx(
        {"distinct_1": 3 / 4, "distinct_2": 1, "distinct_3": 0, "overlap": 1 / 3}
    )  # two whole sentences of the 100, whichever: 4 words fit under 5


def test_draws_differ_are_averaged_and_follow_the_seed() -> None:
    corpora = {"small": ["p q"], "mixed": ["a a"] * 50 + ["b c"] * 50}
    means = [describe(corpora, ["a"], seed)["corpora"]["mixed"]["distinct_1"] for seed in range(4)]
    assert all(mean in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for mean in means)  # five draws of 0.5 or 1
    assert any(0.5 < mean < 1 for mean in means)
    assert means == [describe(corpora, ["a"], seed)["corpora"]["mixed"]["distinct_1"] for seed in range(4)]
    assert len(set(means)) > 1
