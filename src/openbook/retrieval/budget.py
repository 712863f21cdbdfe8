"""Corpora of equal size: the longest prefix of an order that fits a budget of word-pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

from openbook.types import Passage

CountTokens = Callable[[Sequence[Passage]], list[int]]  # word-pieces of each, after truncation, without special tokens
AT_ONCE = 1024  # passages measured at once


def within(passages: Iterable[Passage], count_tokens: CountTokens, budget: int) -> tuple[list[Passage], int]:
    """The longest prefix of at most `budget` tokens, each passage with its count, and the tokens missing to the budget.

    No passage that does not fit is skipped for a later one that would. The number missing is 0 unless the passages
    ran out: nothing is padded in.
    """
    kept: list[Passage] = []
    used, waiting = 0, iter(passages)
    while chunk := list(islice(waiting, AT_ONCE)):
        for passage, tokens in zip(chunk, count_tokens(chunk), strict=True):
            if used + tokens > budget:
                return kept, 0
            used += tokens
            kept.append(replace(passage, tokens=tokens))
    return kept, budget - used
