"""Unit queries in, nearest keys out: exact, in an order that neither batching nor ties can change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.types import KnowledgeBase

BLOCK = 1 << 24  # similarities held at once (64 MiB of float32)
SLACK = np.float32(1e-5)  # far above the rounding of a float32 matrix product of vectors no longer than 1
GROUP = 64  # similarities of which the largest is looked at first
AT_ONCE = 1 << 12  # candidates scored at once


@dataclass(frozen=True)
class Hits:
    """The nearest entries of each query, best first. Rows with too few end in position -1, similarity -inf."""

    positions: NDArray[np.int64]  # (B, K) rows of the knowledge base
    similarities: NDArray[np.float32]  # (B, K) cosines

    def top(self, k: int) -> Hits:
        return Hits(self.positions[:, :k], self.similarities[:, :k])


def normalise(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Scale rows to unit length: v / max(||v||, 1e-12). (B, d) -> (B, d)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def search(
    queries: NDArray[Any],
    keys: NDArray[np.float32],
    k: int,
    exclude: Sequence[Iterable[int]] | None = None,
    basis: NDArray[np.float32] | None = None,
) -> Hits:
    """Find the `k` keys with the largest cosine for every query (ReAugKD, Zhang et al., ACL 2023, inference).

    queries (B, d) of any length, keys (M, d) of unit length -> Hits (B, min(k, M)), ties in the order of positions.
    With a `basis` (d, r) keys are (M, r), and a query of unit length times the basis is compared by inner product.
    `exclude` names, per query, positions that it must not find. Raises UsageError for queries that cannot be compared.
    """
    exclude = [()] * len(queries) if exclude is None else exclude
    check(queries, keys if basis is None else basis.T, k, exclude)
    return nearest(prepare(queries, basis), keys, k, exclude)


def search_of(base: KnowledgeBase) -> Callable[[NDArray[Any], int, Sequence[Iterable[int]] | None], Hits]:
    """Exact search in one base."""
    return lambda queries, k, exclude: search(queries, base.keys, k, exclude, base.basis)


def prepare(queries: NDArray[Any], basis: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """What is compared with keys: unit queries (B, d), or those times the basis (d, r), not normalised again."""
    return normalise(queries) if basis is None else normalise(queries) @ basis


def nearest(queries: NDArray[np.float64], keys: NDArray[np.float32], k: int, exclude: Sequence[Iterable[int]]) -> Hits:
    """The keys (M, d) with the largest inner product, for queries (B, d) as `prepare` leaves them."""
    hits = no_hits(len(queries), min(k, len(keys)))
    rows_per_block = max(1, BLOCK // max(1, len(keys)))
    for start in range(0, len(queries) if len(keys) else 0, rows_per_block):
        block = queries[start : start + rows_per_block]
        rough = _grouped(block, keys, k)
        for row, excluded in enumerate(exclude[start : start + rows_per_block]):
            if places := list(excluded):
                rough.reshape(len(block), -1)[row, places] = -np.inf
        rank(*_candidates(rough, min(k, len(keys))), block, keys, hits, start)
    return hits


def no_hits(queries: int, k: int) -> Hits:
    """Padding alone (B, K)."""
    return Hits(np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -np.inf, dtype=np.float32))


def rank(
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    queries: NDArray[np.float64],
    keys: NDArray[np.float32],
    hits: Hits,
    start: int = 0,
) -> None:
    """Score candidates again, equal keys equally, and write the best by (-similarity, position) into the hits.

    Candidate i is the key at places[i] for the query at rows[i], which is row `start` + rows[i] of the hits.
    """
    # a matrix product may round the same key differently in different columns or batches
    exact = np.empty(len(rows), dtype=np.float32)
    for part in (slice(first, first + AT_ONCE) for first in range(0, len(rows), AT_ONCE)):
        exact[part] = (keys[places[part]].astype(np.float64) * queries[rows[part]]).sum(axis=1)
    order = np.lexsort((places, -exact, rows))
    rows, places, exact = rows[order], places[order], exact[order]
    ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)  # place among the candidates of its query
    kept = ranks < hits.positions.shape[1]
    hits.positions[start + rows[kept], ranks[kept]] = places[kept]
    hits.similarities[start + rows[kept], ranks[kept]] = exact[kept]


def _grouped(queries: NDArray[np.float64], keys: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Rough similarities (B, g, G), that of key i at [i // G, i % G], filled up with -inf."""
    size = max(1, min(GROUP, len(keys) // (8 * k)))
    groups = -(-len(keys) // size)
    rough = np.empty((len(queries), size * groups), dtype=np.float32)
    np.matmul(queries.astype(np.float32), keys.T, out=rough[:, : len(keys)])
    rough[:, len(keys) :] = -np.inf
    return rough.reshape(len(queries), size, groups)


def _candidates(rough: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and positions of all that may be among the k best of its row once scored without the product's rounding.

    The k-th largest of the maxima of G groups is at most the k-th largest of all, and is found in a fraction of the
    time. rough (B, g, G) as `_grouped` leaves it, G at least k.
    """
    _, size, groups = rough.shape
    largest = rough.max(axis=1)  # (B, G)
    cut = np.partition(largest, groups - k, axis=1)[:, groups - k, None] - SLACK  # (B, 1)
    rows, found = np.nonzero(largest >= cut)
    members = rough[rows, :, found]  # (found, g)
    which, place = np.nonzero((members >= cut[rows]) & (members > -np.inf))
    return rows[which], place * groups + found[which]


def check(queries: NDArray[Any], keys: NDArray[np.float32], k: int, exclude: Sequence[Iterable[int]]) -> None:
    """Raise UsageError for queries that cannot be compared with keys (M, d)."""
    if k < 1:
        raise UsageError(f"top_k is {k}; at least 1 neighbour must be asked for")
    if queries.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise UsageError(
            f"queries have shape {queries.shape}, but the keys of the knowledge base have {keys.shape[1]} dimensions; "
            "use the student it was built for"
        )
    if len(exclude) != len(queries):
        raise UsageError(
            f"there are {len(exclude)} sets of excluded positions for {len(queries)} queries; give one each"
        )
    broken = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(broken):
        raise UsageError(f"query {broken[0]} is not finite; the student's embedding has overflowed")
