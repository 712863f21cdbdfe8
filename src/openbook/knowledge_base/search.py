"""Unit queries in, nearest keys out: exact, in an order that neither batching nor ties can change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError

BLOCK = 1 << 24  # similarities held at once (64 MiB of float32)
SLACK = 1e-5  # far above the rounding of a float32 matrix product of unit vectors


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
    queries: NDArray[Any], keys: NDArray[np.float32], k: int, exclude: Sequence[Iterable[int]] | None = None
) -> Hits:
    """Find the `k` keys with the largest cosine for every query (ReAugKD, Zhang et al., ACL 2023, inference).

    queries (B, d) of any length, keys (M, d) of unit length -> Hits (B, min(k, M)), ties in the order of positions.
    `exclude` names, per query, positions that it must not find. Raises UsageError for queries that cannot be compared.
    """
    exclude = [()] * len(queries) if exclude is None else exclude
    _check(queries, keys, k, exclude)
    hits = Hits(
        positions=np.full((len(queries), min(k, len(keys))), -1, dtype=np.int64),
        similarities=np.full((len(queries), min(k, len(keys))), -np.inf, dtype=np.float32),
    )
    if len(keys) == 0:
        return hits
    queries = normalise(queries)
    rows_per_block = max(1, BLOCK // len(keys))
    for start in range(0, len(queries), rows_per_block):
        block = queries[start : start + rows_per_block]
        rough = block.astype(np.float32) @ keys.T  # (rows, M)
        for offset, excluded in enumerate(exclude[start : start + rows_per_block]):
            rough[offset, list(excluded)] = -np.inf
            best, similarities = _rank(_candidates(rough[offset], k), block[offset], keys, k)
            hits.positions[start + offset, : len(best)] = best
            hits.similarities[start + offset, : len(best)] = similarities
    return hits


def _candidates(rough: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Every position that may be among the k best once scored without the matrix product's rounding, ascending."""
    k = min(k, len(rough))
    cut = np.partition(rough, len(rough) - k)[len(rough) - k] - SLACK
    return np.flatnonzero((rough >= cut) & (rough > -np.inf))


def _rank(
    candidates: NDArray[np.int64], query: NDArray[np.float64], keys: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score candidates (ascending) again, equal keys equally, and keep the k best by (-similarity, position)."""
    # a matrix product may round the same key differently in different columns or batches
    similarities = (keys[candidates].astype(np.float64) * query).sum(axis=1).astype(np.float32)
    best = np.argsort(-similarities, kind="stable")[:k]
    return candidates[best], similarities[best]


def _check(queries: NDArray[Any], keys: NDArray[np.float32], k: int, exclude: Sequence[Iterable[int]]) -> None:
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
