"""The order of merit and k (fixtures F5 and F6 of the specification), and that each CC_k is a prefix of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.retrieval.hits import HitTable
from openbook.retrieval.merge import Found, merge, smallest_k


def table(rows: Sequence[Sequence[int]]) -> HitTable:
    return HitTable.of([[(position, 0.0) for position in row] for row in rows])


def listed(found: Found) -> list[tuple[int, int, int]]:
    return list(zip(found.positions.tolist(), found.ranks.tolist(), found.anchors.tolist(), strict=True))


def test_merge_orders_by_rank_then_anchors_then_position() -> None:
    assert listed(merge(table([[0, 1], [1, 3]]), 4)) == [(1, 0, 2), (0, 0, 1), (3, 1, 1)]
    assert listed(merge(table([[2], [1]]), 4)) == [(1, 0, 1), (2, 0, 1)]
    assert listed(merge(table([[], []]), 4)) == []
    assert listed(merge(table([]), 0)) == []


rankings = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), max_size=12)


def merged_by_hand(rows: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Section 2.5 line by line."""
    r = {s: min(row.index(s) for row in rows if s in row) for row in rows for s in row}
    c = {s: sum(s in row for row in rows) for s in r}
    return [(s, r[s], c[s]) for s in sorted(r, key=lambda s: (r[s], -c[s], s))]


@given(rows=rankings, random=st.randoms(use_true_random=False))
def test_merge_equals_the_pseudo_code_in_any_order_of_anchors(rows, random) -> None:
    expected = merged_by_hand(rows)
    assert listed(merge(table(rows), 31)) == expected
    random.shuffle(rows)
    assert listed(merge(table(rows), 31)) == expected


@given(rows=rankings)
def test_the_sentences_below_a_rank_are_a_prefix_of_the_order_and_of_the_next_ones(rows) -> None:
    found = merge(table(rows), 31)
    for k in range(14):
        retrieved = {position for row in rows for position in row[:k]}  # CC_k by its definition
        assert set(found.positions[: len(retrieved)].tolist()) == retrieved


def test_blocks_of_anchors_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = [random.permutation(50)[: random.integers(0, 9)].tolist() for _ in range(23)]
    monkeypatch.setattr("openbook.retrieval.merge.AT_ONCE", 4)
    assert listed(merge(table(rows), 50)) == merged_by_hand(rows)


def test_labels_take_turns_in_the_order_of_their_indices() -> None:
    """Label 0 alone: 1, 0, 2, 3, 4. Label 1 alone: 1, 9. Turns: 1 1 | 0 9 | 2 | 3 | 4."""
    rows = [[0, 2], [1, 3], [1, 4], [1, 9]]
    found = merge(table(rows), 10, [(0,), (0,), (0,), (1,)])
    assert listed(found) == [(1, 0, 3), (0, 0, 1), (9, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]
    assert found.positions.tolist() != merge(table(rows), 10).positions.tolist()


def test_an_anchor_of_two_labels_works_for_both_and_a_missing_label_takes_no_turn() -> None:
    found = merge(table([[0, 1, 2], [3, 4, 5]]), 6, [(2, 7), (7,)])
    assert found.positions.tolist() == [0, 1, 3, 2, 4, 5]  # label 2: 0 1 2; label 7: 0 3 1 4 2 5


@given(rows=rankings.filter(len), data=st.data())
def test_turns_equal_a_round_robin_by_hand(rows, data) -> None:
    labels = data.draw(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=len(rows), max_size=len(rows)))
    queues = [
        [s for s, *_ in merged_by_hand([row for row, own in zip(rows, labels, strict=True) if label in own])]
        for label in sorted(set().union(*labels))
    ]
    turns = [queue[turn] for turn in range(31) for queue in queues if turn < len(queue)]
    found = listed(merge(table(rows), 31, [tuple(own) for own in labels]))
    assert [s for s, *_ in found] == list(dict.fromkeys(turns))
    assert sorted(found) == sorted(merged_by_hand(rows))


def test_anchors_without_a_class_cannot_take_turns() -> None:
    with pytest.raises(UsageError, match=r"corpus\.balance_labels=True needs the class .*, and 1 of the task's 2"):
        merge(table([[0], [1]]), 2, [(0,), ()])


def within(tokens: Sequence[int], budget: int) -> list[int]:
    return [one for one, total in zip(tokens, accumulate(tokens), strict=True) if total <= budget]


@pytest.mark.parametrize(
    ("budget", "k", "sentences"),
    [(2, 1, 0), (3, 1, 1), (8, 1, 1), (9, 1, 2), (10, 2, 2), (13, 2, 2), (14, 2, 3), (20, 2, 3)],
)
def test_k_is_the_smallest_that_reaches_the_budget(budget: int, k: int, sentences: int) -> None:
    kept = within([3, 6, 5], budget)
    assert len(kept) == sentences
    assert smallest_k(np.array([0, 0, 1]), kept, budget, k_max=2) == k


def test_k_comes_from_the_grid_and_never_exceeds_k_max() -> None:
    ranks = np.arange(60)
    k_of = {budget: smallest_k(ranks, [1] * min(budget, 60), budget, 60) for budget in (1, 2, 3, 6, 11, 20, 21, 51, 61)}
    assert k_of == {1: 1, 2: 2, 3: 5, 6: 10, 11: 20, 20: 20, 21: 50, 51: 60, 61: 60}
    assert smallest_k(ranks, [1] * 60, 60, 5000) == 100  # just enough is no shortfall
    assert smallest_k(ranks, [1] * 60, 61, 5000) == 5000


def test_k_takes_in_every_rank_if_labels_take_turns() -> None:
    assert smallest_k(np.array([0, 6, 0, 0]), [1, 1, 1], 3, 100) == 10
