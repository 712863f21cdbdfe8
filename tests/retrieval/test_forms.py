"""Parts of a corpus, pairs by rank (fixture F8 of the specification), and packed sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.config import CorpusSettings, FileSource, UsageError
from openbook.retrieval.anchors import anchors_of
from openbook.retrieval.forms import fraction_of, packed, rank_paired, rank_pairs, rows_of
from openbook.retrieval.hits import HitTable
from openbook.retrieval.statistics import sizes
from openbook.types import Corpus, Example, Passage


def recipe(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


def table(*rows: Sequence[int]) -> HitTable:
    return HitTable.of([[(position, 0.0) for position in row] for row in rows])


def corpus_of(tokens: Sequence[int]) -> Corpus:
    passages = tuple(
        Passage(f"p{place}", "w " * count, f"d{place}", tokens=count) for place, count in enumerate(tokens)
    )
    return Corpus(passages, {"k_star": 5, **sizes(passages)})


def part(corpus: Corpus, **changes: object) -> list[str]:
    return [passage.id for passage in fraction_of(corpus, recipe(**changes)).passages]


def test_the_whole_is_the_corpus_itself() -> None:
    corpus = corpus_of([3, 4])
    assert fraction_of(corpus, recipe(fraction_order="random")) is corpus


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.29, ["p0"]), (0.3, ["p0"]), (0.79, ["p0", "p1"]), (0.99, ["p0", "p1"])]
)
def test_a_part_by_rank_is_the_longest_prefix_within_its_tokens(fraction: float, kept: list[str]) -> None:
    assert part(corpus_of([29, 50, 21]), fraction=fraction) == kept  # 0.29 * 100 is below 29 in floating point


def test_a_part_has_its_own_sizes_and_the_other_facts_of_the_whole() -> None:
    statistics = fraction_of(corpus_of([6, 4]), recipe(fraction=0.6)).statistics
    assert (statistics["sentences"], statistics["tokens"], statistics["mean_words"]) == (1, 6, 6)
    assert statistics["lengths"]["5 to 9"] == 1
    assert statistics["k_star"] == 5


def test_a_part_without_a_sentence_is_refused() -> None:
    with pytest.raises(UsageError, match=r"corpus\.fraction=0\.1 of 10 tokens is less than one sentence"):
        fraction_of(corpus_of([6, 4]), recipe(fraction=0.1))


@given(
    tokens=st.lists(st.integers(1, 9), min_size=30, max_size=60),
    order=st.sampled_from(["rank", "random"]),
    seed=st.integers(0, 9),
)
def test_parts_are_nested_in_order_and_as_large_as_they_may(tokens: list[int], order: str, seed: int) -> None:
    corpus = corpus_of(tokens)
    parts = [part(corpus, fraction=f, fraction_order=order, seed=seed) for f in (0.4, 0.6, 0.8, 1.0)]
    for smaller, larger in pairwise(parts):
        assert set(smaller) <= set(larger)
    for fraction, kept in zip((0.4, 0.6, 0.8), parts, strict=False):
        assert kept == [passage.id for passage in corpus.passages if passage.id in set(kept)]
        used = sum(passage.tokens for passage in corpus.passages if passage.id in set(kept))
        assert fraction * sum(tokens) - 9 < used <= fraction * sum(tokens) + 1e-6


def test_a_random_part_is_not_the_best_one_and_follows_the_seed() -> None:
    corpus = corpus_of([1] * 40)
    parts = [part(corpus, fraction=0.5, fraction_order="random", seed=seed) for seed in (0, 1, 0)]
    assert parts[0] == parts[2] != parts[1]
    assert part(corpus, fraction=0.5) not in parts
    assert [len(one) for one in parts] == [20, 20, 20]


ROWS = [
    Example("t/0", "shared text", "first partner"),
    Example("t/1", "lone text", "second partner"),
    Example("t/2", "shared text", "second partner"),
]


def test_rows_keep_the_order_of_the_examples_and_both_their_fields() -> None:
    examples = [*ROWS, Example("t/3", "leaked", "lone text"), Example("t/4", "single")]
    anchors = anchors_of(examples, recipe(), {"leaked"})
    assert [anchor.key for anchor in anchors] == [
        "shared text", "first partner", "lone text", "second partner", "single"
    ]  # fmt: skip
    assert rows_of(anchors, examples) == [((0,), (1,)), ((2,), (3,)), ((0,), (3,)), ((), (2,)), ((4,), ())]
    assert rows_of(anchors, examples[::-1]) == rows_of(anchors, examples)[::-1]


def pairs_of(rows, *hits: Sequence[int]) -> list[tuple[int, int]]:
    return [(pair.first, pair.second) for pair in rank_pairs(rows, table(*hits))]


def test_pairs_of_the_specification() -> None:
    row = [((0,), (1,))]
    assert pairs_of(row, [5, 2, 9], [2, 7]) == [(5, 2), (2, 7)]
    assert pairs_of(row, [5, 2, 9], [5, 7]) == [(2, 7)]


def test_pairs_come_rank_by_rank_and_repeat_no_order() -> None:
    rows = [((0,), (1,)), ((1,), (0,)), ((0,), (2,)), ((), (1,))]
    assert list(rank_pairs(rows, table([1, 2, 3], [4, 5], [4, 6, 2]))) == [
        (1, 4, 0), (4, 1, 0), (2, 5, 1), (5, 2, 1), (2, 6, 1), (3, 2, 2)
    ]  # fmt: skip


def test_sentences_of_a_long_text_take_turns_in_its_list() -> None:
    """0 and 1 are sentences of one text: together they found 1, 4, 2, 3."""
    assert pairs_of([((0, 1), (2,))], [1, 2, 3], [4, 1], [10, 11, 12, 13, 14]) == [(1, 10), (4, 11), (2, 12), (3, 13)]


class Shelf:
    """A bank in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, positions: Iterable[int]) -> list[str]:
        return [self._texts[position] for position in positions]

    def passages(self, positions: Iterable[int]) -> list[Passage]:
        return [Passage(f"bank/{p}", self._texts[p], f"d{p % 2}") for p in positions]

    def positions_of(self, keys: Iterable[str]) -> np.ndarray:
        return np.empty(0, np.int64)


SHELF = Shelf(["a", "b b", "c c c", "d d d d"])


def count_words(passages: Sequence[Passage]) -> list[int]:
    return [len(f"{passage.text} {passage.text_pair or ''}".split()) for passage in passages]


def paired(*hits: Sequence[int], examples: Sequence[Example] = ROWS[:1], **changes: object) -> Corpus:
    return rank_paired(
        SHELF, table(*hits), anchors_of(examples, recipe(), set()), examples, recipe(**changes), count_words
    )


def test_a_corpus_of_pairs_is_cut_at_the_budget() -> None:
    corpus = paired([0, 1, 2], [3, 2, 0], budget_tokens=10)
    assert corpus.passages == (
        Passage("bank/0+bank/3", "a", "d0+d1", "d d d d", tokens=5, rank=0),
        Passage("bank/1+bank/2", "b b", "d1+d0", "c c c", tokens=5, rank=1),
    )
    facts = ("anchors", "anchors_without_hit", "k_star", "sentences", "tokens", "budget_tokens", "shortfall_tokens")
    assert [corpus.statistics[name] for name in facts] == [2, 0, 2, 2, 10, 10, 0]
    assert {one["anchor"] for one in corpus.statistics["examples"]} == {"shared text", "first partner"}
    longer = paired([0, 1, 2], [3, 2, 0], budget_tokens=20)
    assert longer.passages[2] == Passage("bank/2+bank/0", "c c c", "d0", "a", tokens=4, rank=2)
    assert (longer.statistics["k_star"], longer.statistics["shortfall_tokens"]) == (100, 6)
    assert len(paired([0, 1, 2], [3, 2, 0], budget_tokens=20, k_max=1).passages) == 1


def test_pairs_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"corpus\.form=rank_pair: in no training row"):
        paired([0, 1], [0, 1])
    with pytest.raises(UsageError, match=r"corpus\.budget_tokens=4 is less than the first sentence, 5"):
        paired([0], [3], budget_tokens=4)
    with pytest.raises(UsageError, match="none of the task's 2 anchors"):
        paired([], [])


def test_packed_texts_are_full_and_hold_every_sentence_once() -> None:
    corpus = corpus_of([7, 3, 5, 20, 1, 2, 6, 4, 9])
    texts = list(packed(corpus.passages, 13, seed=0))  # ten word-pieces beside the special ones
    order = [name for text in texts for name in text.id.split("+")]
    assert sorted(order) == sorted(passage.id for passage in corpus.passages)
    assert order != sorted(order)
    tokens = {passage.id: passage.tokens for passage in corpus.passages}
    for text, following in pairwise(texts):
        assert text.tokens == sum(tokens[name] for name in text.id.split("+"))
        assert text.tokens <= 10 or "+" not in text.id
        assert text.tokens + tokens[following.id.split("+")[0]] > 10
    assert any("+" in text.id for text in texts)


def test_packed_texts_are_split_at_a_random_sentence_boundary() -> None:
    corpus = corpus_of([1] * 400)
    texts = list(packed(corpus.passages, 7, seed=0))
    assert {(len(text.text.split()), len((text.text_pair or "").split())) for text in texts} == {(1, 3), (2, 2), (3, 1)}
    assert list(packed(corpus.passages, 7, seed=0)) == texts
    assert list(packed(corpus.passages, 7, seed=1)) != texts
    alone = list(packed(corpus.passages, 4, seed=0))
    assert {text.text_pair for text in alone} == {None}
    assert sorted(text.id for text in alone) == sorted(passage.id for passage in corpus.passages)


def test_packing_keeps_what_is_known_of_the_sentences_in_it() -> None:
    first = Passage("a", "x y", "doc", tokens=2, rank=4)
    second = Passage("b", "z", "doc", text_pair="v w", tokens=3, rank=1)
    (text,) = packed([first, second], 60, seed=0)
    assert {text.text, text.text_pair} == {"x y", "z v w"}
    assert (text.document, text.tokens, text.rank) == ("doc", 5, 1)
    assert list(packed([], 60, seed=0)) == []
