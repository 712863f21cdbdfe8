"""Several engines as one: reciprocal-rank fusion, which never compares their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openbook.retrieval.hits import Engine, HitTable, Progress

WHOLE = 2.0**56  # shares are whole numbers of its inverse, so that the order of the tables does not change a sum
DECIMALS = 12  # equal sums, such as 1/63 + 1/84 and 1/72 + 1/72, may differ in the last bits; rounded, they tie
LEAST_DEPTH = 100  # hits asked of each engine, whatever k


def fuse(tables: Sequence[HitTable], k: int, constant: int = 60) -> HitTable:
    """The k best hits of each query by the sum over tables of 1 / (constant + rank), ranks from 1, ties by position.

    Cormack, Clarke and Büttcher (SIGIR 2009). Every table answers the same queries; scores inside it are not read.
    """
    if len({len(table) for table in tables}) != 1:
        raise ValueError(f"tables of {[len(table) for table in tables]} queries; give one or more of the same queries")
    longest = max(int(np.diff(table.offsets).max(initial=0)) for table in tables)
    shares = np.rint(WHOLE / (constant + 1 + np.arange(longest))).astype(np.int64)  # by rank
    counts, positions, scores = [0], [np.empty(0, np.int64)], [np.empty(0)]
    for query in range(len(tables[0])):
        rows = [table.row(query) for table in tables]
        found, owners = np.unique(np.concatenate(rows), return_inverse=True)
        sums = np.zeros(len(found), dtype=np.int64)
        np.add.at(sums, owners, np.concatenate([shares[: len(row)] for row in rows]))
        fused = (sums / WHOLE).round(DECIMALS)
        best = np.argsort(-fused, kind="stable")[:k]  # ties stay ascending
        counts.append(len(best))
        positions.append(found[best])
        scores.append(fused[best])
    return HitTable(np.cumsum(counts), np.concatenate(positions), np.concatenate(scores))


@dataclass(frozen=True)
class Hybrid:
    """Engines over one bank, searched one after the other, twice as deep as asked for, and fused."""

    engines: tuple[Engine, ...]

    def __post_init__(self) -> None:
        if len({len(engine) for engine in self.engines}) != 1:
            raise ValueError(f"engines over {[len(engine) for engine in self.engines]} sentences; give one bank to all")

    def __len__(self) -> int:
        return len(self.engines[0])

    def search(
        self, queries: Sequence[str], k: int, excluded: Sequence[int] = (), progress: Progress | None = None
    ) -> HitTable:
        """The k best sentences of each query by fused rank; fewer if all engines together find fewer."""
        tables: list[HitTable] = []

        def heard(done: int) -> None:
            if progress:
                progress((len(tables) * len(queries) + done) // len(self.engines))

        for engine in self.engines:
            tables.append(engine.search(queries, max(2 * k, LEAST_DEPTH), excluded, heard))
        return fuse(tables, k)
