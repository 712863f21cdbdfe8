"""One order for what all queries found: by best rank, then by how many found it; and how deep a budget reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.retrieval.hits import HitTable

GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # the values of k that are tried
AT_ONCE = 4096  # queries: bounds the memory that a table of any size needs
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Found:
    """The bank sentences that some anchor hit, in the order of their merit; row i of each array is one of them."""

    positions: NDArray[np.int64]  # (F,)
    ranks: NDArray[np.int64]  # (F,) best over all anchors, from 0
    anchors: NDArray[np.int64]  # (F,) how many hit it

    def __len__(self) -> int:
        return len(self.positions)


def merge(hits: HitTable, size_of_bank: int, labels: Sequence[Sequence[int]] | None = None) -> Found:
    """All sentences that any anchor hit, by (best rank, most anchors, position): first the rank-0 hits of all anchors.

    Scores of different anchors are not comparable, so they never enter (section 2.5). With the `labels` of each anchor
    (section 8.2) the labels take turns: the hits of each label's anchors are merged alone, and turn t gives the t-th
    sentence of every label in the order of their indices; a sentence counts at its first turn, and a label that has no
    more is passed over. An anchor of several labels works for each. Raises UsageError if one has none.
    """
    ranks, anchors = _tally(hits, size_of_bank)
    positions = np.flatnonzero(anchors)
    found = Found(positions, ranks[positions], anchors[positions])
    if labels is None:
        order = np.lexsort((-found.anchors, found.ranks))  # stable, and positions ascend
    else:
        order = np.argsort(_turns(hits, size_of_bank, labels)[positions])
    return Found(found.positions[order], found.ranks[order], found.anchors[order])


def _tally(hits: HitTable, size_of_bank: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best rank and number of anchors of every sentence of the bank, a block of anchors at a time."""
    ranks = np.full(size_of_bank, NEVER)
    anchors = np.zeros(size_of_bank, dtype=np.int64)
    for start in range(0, len(hits), AT_ONCE):
        offsets = hits.offsets[start : start + AT_ONCE + 1]
        span = slice(offsets[0], offsets[-1])
        block = HitTable(offsets - offsets[0], hits.positions[span], hits.scores[span])
        np.minimum.at(ranks, block.positions, block.ranks())
        np.add.at(anchors, block.positions, 1)
    return ranks, anchors


def _turns(hits: HitTable, size_of_bank: int, labels: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """When each sentence of the bank comes if the labels take turns."""
    if unlabelled := sum(not own for own in labels):
        raise UsageError(
            f"corpus.balance_labels=True needs the class of every training row, and {unlabelled} of the task's"
            f" {len(labels)} anchors have none; set it to false"
        )
    turns = np.full(size_of_bank, NEVER)
    classes = sorted({label for own in labels for label in own})
    for place, label in enumerate(classes):
        positions = merge(_only(hits, np.array([label in own for own in labels])), size_of_bank).positions
        turns[positions] = np.minimum(turns[positions], np.arange(len(positions)) * len(classes) + place)
    return turns


def _only(hits: HitTable, chosen: NDArray[np.bool_]) -> HitTable:
    """The rows of the chosen queries."""
    counts = np.diff(hits.offsets)
    kept = np.repeat(chosen, counts)
    return HitTable(np.concatenate([[0], np.cumsum(counts[chosen])]), hits.positions[kept], hits.scores[kept])


def smallest_k(ranks: NDArray[np.int64], tokens: Sequence[int], budget: int, k_max: int) -> int:
    """The smallest k of the grid with tokens(CC_k) >= budget, where CC_k are the sentences of rank < k (section 2.5).

    `ranks` (F,) are in the order of merit. `tokens` are those of the corpus, its longest prefix within the budget;
    if they fall short of it and no sentence is left, the answer is `k_max`.
    """
    filling = int(np.searchsorted(np.cumsum(tokens), budget))  # the sentence that reaches the budget, or exceeds it
    return grid_k(int(ranks[: filling + 1].max()), k_max) if filling < len(ranks) else k_max


def grid_k(deepest: int, k_max: int) -> int:
    """The smallest k of the grid that takes in a rank."""
    return next((k for k in GRID if deepest < k < k_max), k_max)
