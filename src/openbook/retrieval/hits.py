"""What queries found: one table for every engine, reusable for every k and every budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int], None]  # told how many queries are done


@dataclass(frozen=True)
class HitTable:
    """The hits of query i lie at `offsets[i]:offsets[i + 1]`, best first: by (-score, position)."""

    offsets: NDArray[np.int64]  # (Q + 1,)
    positions: NDArray[np.int64]  # (H,) of sentences in the bank
    scores: NDArray[np.float64]  # (H,) comparable within a query only

    @classmethod
    def of(cls, rows: Iterable[Sequence[tuple[int, float]]]) -> Self:
        """From (position, score) pairs a query."""
        rows = list(rows)
        flat = [hit for row in rows for hit in row]
        return cls(
            np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64),
            np.array([position for position, _ in flat], dtype=np.int64),
            np.array([score for _, score in flat], dtype=np.float64),
        )

    @classmethod
    def joined(cls, tables: Sequence[HitTable]) -> Self:
        """The queries of several tables, one after the other."""
        counts = np.concatenate([np.diff(table.offsets) for table in tables] or [np.empty(0, np.int64)])
        return cls(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate([table.positions for table in tables] or [np.empty(0, np.int64)]),
            np.concatenate([table.scores for table in tables] or [np.empty(0)]),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, query: int) -> NDArray[np.int64]:
        """The positions that one query found, best first."""
        return self.positions[self.offsets[query] : self.offsets[query + 1]]

    def top(self, k: int) -> HitTable:
        """The first k hits of every query."""
        ranks = self.ranks()
        kept = ranks < k
        counts = np.minimum(np.diff(self.offsets), k)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return HitTable(offsets, self.positions[kept], self.scores[kept])

    def ranks(self) -> NDArray[np.int64]:
        """The rank of every hit among those of its query, from 0: (H,)."""
        return np.arange(len(self.positions)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def save(self, folder: Path) -> None:
        for name in ("offsets", "positions", "scores"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Self:
        names = ("offsets", "positions", "scores")
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))


class Engine(Protocol):
    """Finds sentences of the bank it was built over. BM25 and dense search are both one."""

    def __len__(self) -> int: ...

    def search(
        self, queries: Sequence[str], k: int, excluded: Sequence[int] = (), progress: Progress | None = None
    ) -> HitTable:
        """The k best sentences of each query; sentences at the `excluded` positions are passed over."""
        ...
