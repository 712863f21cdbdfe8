"""Random sentences, random sentences of given lengths, and the task's own text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.retrieval.controls import allowed_texts, random_length, random_text, read, task_text
from openbook.types import Example, Passage


class Sentences:
    """A bank in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def prefix(self) -> Iterator[Passage]:
        return iter(self.passages(range(len(self))))

    def passages(self, positions: Sequence[int]) -> list[Passage]:
        return [Passage(f"bank/{position}", self.texts[position], "d") for position in positions]

    def lengths(self) -> np.ndarray:
        return np.array([len(text.split()) for text in self.texts], np.int32)


def bank_of(lengths: Sequence[int]) -> Sentences:
    return Sentences([" ".join(["w"] * length) for length in lengths])


def lengths_of(passages: Iterator[Passage]) -> list[int]:
    return [len(passage.text.split()) for passage in passages]


def test_random_text_is_the_bank_in_its_order() -> None:
    assert [one.id for one in random_text(bank_of([5, 6, 7]))] == ["bank/0", "bank/1", "bank/2"]


def test_lengths_are_met_exactly_where_the_bank_has_them() -> None:
    bank = bank_of([5, 6, 7, 8, 9] * 50)
    wanted = [5] * 20 + [9] * 10 + [6] * 3
    drawn = lengths_of(random_length(bank, wanted, seed=0))
    assert Counter(drawn[:33]) == Counter(wanted)
    assert Counter(drawn[33:66]) == Counter({5: 20, 9: 10, 6: 3})  # of 50, 10 fives are left
    assert drawn[:33] != wanted  # else a cut by a budget would leave the short ones only


def test_where_a_length_has_run_out_the_nearest_serves_and_the_shorter_of_two() -> None:
    assert lengths_of(random_length(bank_of([7, 9, 30]), [8], seed=0)) == [7, 9, 30]
    assert lengths_of(random_length(bank_of([9, 30, 6]), [8], seed=0)) == [9, 6, 30]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    wanted=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    seed=st.integers(0, 3),
)
def test_every_sentence_of_the_bank_comes_once(lengths: list[int], wanted: list[int], seed: int) -> None:
    drawn = [one.id for one in random_length(bank_of(lengths), wanted, seed)]
    assert sorted(drawn) == sorted(f"bank/{position}" for position in range(len(lengths)))
    assert drawn == [one.id for one in random_length(bank_of(lengths), wanted, seed)]


def test_the_seed_chooses_the_sentences() -> None:
    bank = bank_of([5] * 1000)
    first, second = ({one.id for one in islice(random_length(bank, [5], seed), 100)} for seed in (0, 1))
    assert len(first & second) < 40  # 10 by chance
    assert max(int(name.removeprefix("bank/")) for name in first) > 500  # and not the start of the bank


def test_a_corpus_without_sentences_has_no_lengths_to_meet() -> None:
    with pytest.raises(ValueError, match="no length"):
        random_length(bank_of([5]), [], seed=0)


def test_task_text_is_the_train_set_with_pairs_as_pairs() -> None:
    rows = [Example("t/0", "a b", "c", label=1), Example("t/1", "d")]
    assert list(task_text(rows)) == [Passage("t/0", "a b", "t/0", "c"), Passage("t/1", "d", "t/1")]


def test_evaluation_text_among_the_rows_is_left_out_field_by_field() -> None:
    rows = [Example("t/0", "The cat sat.", "A dog!"), Example("t/1", "the cat"), Example("t/2", "a DOG")]
    assert list(allowed_texts(rows, {"a dog"})) == ["The cat sat.", "the cat"]


def test_sentences_are_read_in_the_order_asked_for() -> None:
    positions = np.random.default_rng(0).permutation(5000)
    passages = read(Sentences([str(number) for number in range(5000)]), positions)
    assert [int(one.text) for one in passages] == positions.tolist()
