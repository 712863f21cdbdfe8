"""Rows set aside: stratified by class, with equal texts on one side only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from openbook.config import UsageError
from openbook.types import Example

SPLIT_SEED = 0  # the held-out rows stay the same whatever the seed of a training is
LEAST_HOLDOUT, MOST_HOLDOUT = 200, 5_000


def holdout_size(rows: int, share: float) -> int:
    """A share of the rows; from 1,000 rows on at least 200 of them, and never more than 5,000."""
    least = LEAST_HOLDOUT if rows >= 1_000 else 1
    return min(max(round(share * rows), least), MOST_HOLDOUT)


def cut_off(examples: Sequence[Example], size: int, key: str) -> tuple[list[Example], list[Example]]:
    """Split into (rest, part of about `size` rows), stratified by class; equal texts stay on one side."""
    strata: dict[int, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    stratum_of: dict[tuple[str, ...], int] = {}
    for index, example in enumerate(examples):
        text = normalised(example)
        stratum = stratum_of.setdefault(text, example.label if isinstance(example.label, int) else 0)
        strata[stratum][text].append(index)
    groups = {stratum: list(strata[stratum].values()) for stratum in sorted(strata)}
    quotas = _quotas({stratum: sum(map(len, members)) for stratum, members in groups.items()}, size)
    generator = np.random.default_rng(SPLIT_SEED)
    taken: set[int] = set()
    for stratum, members in groups.items():
        room = quotas[stratum]
        for position in generator.permutation(len(members)):
            if len(members[position]) <= room:
                taken.update(members[position])
                room -= len(members[position])
    if not taken:
        raise UsageError(
            f"{key}: {len(examples)} rows with {len(stratum_of)} different texts are too few to set {size} of them "
            "aside and still train on every class; add rows"
        )
    rest = [example for index, example in enumerate(examples) if index not in taken]
    return rest, [examples[index] for index in sorted(taken)]


def normalised(example: Example) -> tuple[str, ...]:
    """Its texts without case, white space and order, and its options: rows that agree in this are the same question."""
    texts, options = (
        sorted(" ".join(text.casefold().split()) for text in parts)
        for parts in ((example.text, example.text_pair or ""), example.options)
    )
    return (*texts, *options)


def _quotas(sizes: dict[int, int], total: int) -> dict[int, int]:
    """Shares of `total` by largest remainder; every stratum keeps a row."""
    rows = sum(sizes.values())
    exact = {stratum: total * size / rows for stratum, size in sizes.items()}
    quotas = {stratum: min(math.floor(exact[stratum]), size - 1) for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: (quotas[stratum] - exact[stratum], stratum))
    for stratum in by_remainder[: max(0, total - sum(quotas.values()))]:
        quotas[stratum] = min(quotas[stratum] + 1, sizes[stratum] - 1)
    return quotas
