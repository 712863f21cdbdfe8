"""Hits in, an answer out: the neighbours' soft labels, mixed with the student's own, and the evidence for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import THRESHOLD, UsageError
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase

LOWEST = float(np.finfo(np.float64).min)
EMPTY = "the book is empty: the student answers alone"
TRAIN = "train"  # where the entries of a base without origins come from
Search = Callable[[NDArray[Any], int, Sequence[Iterable[int]] | None], Hits]  # queries (B, d), k, exclude: in one base


@dataclass(frozen=True)
class Neighbour:
    """One hit, and what it did to the result."""

    id: str
    text: str
    similarity: float
    weight: float
    value: NDArray[np.float32]  # (C,)
    contribution: float  # (1 - beta) * weight * value of the predicted class
    result_without: NDArray[np.float64]  # (C,) the result if this entry were not there, beta and other hits unchanged
    rank: int  # 0 is the nearest
    origin: str
    label: str | float | None  # gold; None if it is not known


@dataclass(frozen=True)
class Evidence:
    """The exact arithmetic of one result: the student's and the neighbours' contributions sum to result[predicted].

    It explains the part that was looked up, not how the student came to its own answer.
    """

    result: NDArray[np.float64]  # (C,)
    predicted: int  # class index; of several labels the most probable one; 0 in regression
    student: NDArray[np.float64]  # (C,) the answer without retrieval
    student_contribution: float
    neighbours: tuple[Neighbour, ...]  # best first; empty when nothing was found, or looked up
    variance: float  # of the neighbours' values at `predicted`, under their weights
    decisive: bool  # whether retrieval changed the class, or any label that is told of several
    beta: float = 1.0  # share of the student
    reason: str | None = None  # why there was nothing to look up; None where there was

    def contributions(self, place: int) -> list[float]:
        """What the student, then each neighbour, adds to `result[place]`: they sum to it."""
        own = float(self.student[place] * (self.beta if self.neighbours else 1.0))
        return [own, *(float((1 - self.beta) * one.weight * one.value[place]) for one in self.neighbours)]

    def as_records(self) -> list[dict[str, Any]]:
        """The neighbours in plain values, rounded: what is shown of them in a row of an output."""
        return [
            {"id": one.id, "text": one.text, "similarity": round(one.similarity, 4), "weight": round(one.weight, 4),
             "contribution": round(one.contribution, 4)}
            for one in self.neighbours
        ]  # fmt: skip


def weights(similarities: NDArray[Any], temperature: float, counts: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """softmax(similarity / temperature + log n) over the hits of each query (ReAugKD, Zhang et al., ACL 2023).

    similarities (B, K), counts n (B, K), without them 1 -> (B, K). Rows sum to 1; padding (similarity -inf) weighs 0,
    and so does a row of nothing else. Raises UsageError for a temperature that is not a number above 0.
    """
    if not 0 < temperature < np.inf:
        raise UsageError(f"temperature is {temperature}; it must be a number above 0")
    similarities = np.asarray(similarities, dtype=np.float64)
    largest = similarities.max(axis=1, keepdims=True, initial=LOWEST)  # finite, also of a row of padding
    scores = np.exp((similarities - largest) / temperature)
    if counts is not None:
        scores *= counts
    total = scores.sum(axis=1, keepdims=True)
    return np.asarray(scores / np.where(total > 0, total, 1))


def average_of(shares: NDArray[np.float64], values: NDArray[Any]) -> NDArray[np.float64]:
    """Avg = sum_j w_j V_j of weights (B, K) and values (B, K, C) -> (B, C), NaN where nothing weighs anything."""
    average = np.einsum("bk,bkc->bc", shares, values)
    average[~shares.any(axis=1)] = np.nan
    return np.asarray(average)


def neighbour_average(
    hits: Hits, values: NDArray[Any], temperature: float, counts: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Avg of ReAugKD's inference. hits (B, K), values (M, C), counts n (M,) -> (B, C), NaN if nothing was found."""
    shares = weights(hits.similarities, temperature, None if counts is None else counts[hits.positions])
    return average_of(shares, values[hits.positions])


def interpolate(
    probabilities: NDArray[Any], average: NDArray[np.float64], beta: float | NDArray[np.float64]
) -> NDArray[Any]:
    """y' = beta p + (1 - beta) Avg (ReAugKD, inference), on probabilities or regression scores.

    All (B, C); beta is one number, or one a row (B,).
    Beta 1 returns the very array it was given, and a query that found nothing keeps the student's answer.
    Raises UsageError for a beta outside 0..1 or shapes that differ.
    """
    share = np.asarray(beta, dtype=np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise UsageError(f"beta is {beta}; it must lie between 0 and 1")
    if probabilities.shape != average.shape:
        raise UsageError(f"the student's answers have shape {probabilities.shape}, the neighbours' {average.shape}")
    if share.ndim == 0 and share == 1:
        return probabilities
    share = share[:, None] if share.ndim else share
    return np.where(np.isnan(average), probabilities, share * probabilities + (1 - share) * average)


def evidence(
    base: KnowledgeBase,
    hits: Hits,
    probabilities: NDArray[Any],
    temperature: float,
    beta: float | NDArray[np.float64],
    labels: Mapping[str, str | float] | None = None,
) -> list[Evidence]:
    """Show for every query what was found and what it did to the result (specification, section 2.9).

    hits (B, K), probabilities (B, C), beta one number or (B,); `labels` holds gold labels of entries by id.
    The contributions of the student and the neighbours sum to `result[predicted]`. What the result would be without
    entry j is y' with Avg_without_j = (Avg - w_j V_j) / (1 - w_j); the student's answer where j was the only hit.
    A row of padding was not looked up: it has no neighbours, and the result is the student's.
    """
    betas = np.broadcast_to(np.asarray(beta, dtype=np.float64), len(probabilities))
    return [
        _explain(base, _found(hits, row), probabilities[[row]], temperature, float(betas[row]), labels or {})
        for row in range(len(probabilities))
    ]


def own_positions(
    base: KnowledgeBase,
    ids: Sequence[str],
    texts: Sequence[str],
    anchors: Mapping[str, Collection[str]] | None = None,
) -> list[NDArray[np.int64]]:
    """Positions a query must not find because they are the query itself (leave-one-out, specification, section 2.5).

    For `search(..., exclude=...)` when queries may be members of the base: entries of the same id, of the same
    normalised text, and, where `anchors` names by entry the examples that retrieved it, those only this query
    retrieved: what a base built without it would lack. Entries without a text match by id only.
    """
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, (id, text) in enumerate(zip(base.ids, base.texts, strict=True)):
        for name in {id, *_only(anchors, id)}:
            places["id", name].append(position)
        if text:
            places["text", normalised(text)].append(position)
    return [
        np.array(sorted({*places.get(("id", id), ()), *places.get(("text", normalised(text)), ())}), dtype=np.int64)
        for id, text in zip(ids, texts, strict=True)
    ]


def training_targets(
    base: KnowledgeBase,
    queries: NDArray[Any],
    share: float,
    top_k: int,
    temperature: float,
    search: Search,
    anchors: Mapping[str, Collection[str]] | None = None,
) -> NDArray[Any]:
    """lambda V_i + (1 - lambda) Avg_loo(i) for every entry i, to train a student on (specification, section 2.5).

    queries (M, d) hold what entry i is looked up by: its own key, or the student's embedding; `share` is lambda.
    Nothing an entry is looked up by finds it, its copies, or what it alone brought in. -> (M, C)
    """
    if len(queries) != len(base.ids):
        raise UsageError(f"{len(queries)} queries for {len(base.ids)} entries; give one for each, in their order")
    hits = search(queries, top_k, own_positions(base, base.ids, base.texts, anchors))
    return interpolate(base.values, neighbour_average(hits, base.values, temperature, base.weights), share)


def scaled(base: KnowledgeBase, origin: str, omega: float) -> KnowledgeBase:
    """Let entries of one origin count omega times as often as they do (specification, section 2.11, rule d).

    Those that then count nothing are removed: omega 0 is a base without that origin. Raises UsageError for an omega
    that is negative or not finite.
    """
    if not 0 <= omega < np.inf:
        raise UsageError(f"omega is {omega}; how often an entry counts must be 0 or more")
    own = np.array([one == origin for one in base.origins or (TRAIN,) * len(base.ids)], dtype=bool)
    counts = np.ones(len(base.ids), np.float32) if base.weights is None else base.weights
    counts = np.where(own, counts * np.float32(omega), counts)
    kept = counts > 0
    return replace(
        base,
        keys=base.keys[kept],
        values=base.values[kept],
        ids=tuple(compress(base.ids, kept)),
        texts=tuple(compress(base.texts, kept)),
        weights=None if (counts[kept] == 1).all() else counts[kept],
        origins=tuple(compress(base.origins, kept)),
    )


def check_weight(weight: float) -> None:
    """Raise UsageError for what is not how many other entries one counts for."""
    if not 0 < weight < np.inf:
        raise UsageError(f"weight={weight}: an entry counts as much as so many others; give a number above 0")


def weighed(base: KnowledgeBase, origin: str, weight: float) -> KnowledgeBase:
    """Let each entry of one origin count as much as `weight` others. Raises UsageError for none, or no such weight."""
    own = np.array([one == origin for one in base.origins], dtype=bool)
    check_weight(weight)
    if not own.any():
        raise UsageError(f"weight={weight:g}: no entry of the book is {origin}, so there is nothing to weigh")
    counts = np.ones(len(base.ids), np.float32) if base.weights is None else base.weights
    return replace(base, weights=np.where(own, np.float32(weight), counts).astype(np.float32))


def _explain(
    base: KnowledgeBase,
    hits: Hits,
    probabilities: NDArray[Any],
    temperature: float,
    beta: float,
    labels: Mapping[str, str | float],
) -> Evidence:
    """Evidence of one query: hits (1, K) without padding, probabilities (1, C)."""
    average = neighbour_average(hits, base.values, temperature, base.weights)[0]  # (C,)
    result, student = interpolate(probabilities, average[None], beta)[0], probabilities[0]  # each (C,)
    predicted = int(result.argmax())
    positions, similarities = hits.positions[0], hits.similarities[0]  # each (K,)
    counts = None if base.weights is None else base.weights[hits.positions]
    shares, values = weights(hits.similarities, temperature, counts)[0], base.values[positions]  # (K,), (K, C)
    without = _results_without_each(base, hits, probabilities, temperature, beta)  # (K, C)
    neighbours = tuple(
        Neighbour(
            id=base.ids[position],
            text=base.texts[position],
            similarity=float(similarities[rank]),
            weight=float(shares[rank]),
            value=values[rank],
            contribution=float((1 - beta) * shares[rank] * values[rank, predicted]),
            result_without=without[rank],
            rank=rank,
            origin=base.origins[position] if base.origins else TRAIN,
            label=labels.get(base.ids[position]),
        )
        for rank, position in enumerate(positions)
    )
    return Evidence(
        result=result,
        predicted=predicted,
        student=student,
        student_contribution=float(student[predicted] * (beta if neighbours else 1.0)),
        neighbours=neighbours,
        variance=float(shares @ (values[:, predicted] - average[predicted]) ** 2),
        decisive=_named(result, base) != _named(student, base),
        beta=beta,
        reason=None if base.ids else EMPTY,
    )


def _named(answer: NDArray[Any], base: KnowledgeBase) -> list[int]:
    """The class of an answer (C,), or those of several labels that it tells."""
    if base.manifest.get("kind") == "multi_label":
        return np.flatnonzero(answer > THRESHOLD).tolist()
    return [int(answer.argmax())]


def _results_without_each(
    base: KnowledgeBase, hits: Hits, probabilities: NDArray[Any], temperature: float, beta: float
) -> NDArray[Any]:
    """Row j: the result of the query without its hit j. hits (1, K) -> (K, C)."""
    count = hits.positions.shape[1]
    own = np.eye(count, dtype=bool)
    # weighed anew rather than divided by 1 - w_j, which loses all digits when one entry weighs nearly 1
    others = Hits(
        positions=np.where(own, -1, hits.positions),
        similarities=np.where(own, np.float32(-np.inf), hits.similarities),
    )
    average = neighbour_average(others, base.values, temperature, base.weights)
    return interpolate(np.repeat(probabilities, count, axis=0), average, beta)


def _found(hits: Hits, row: int) -> Hits:
    """The hits of one query, without padding."""
    found = hits.positions[row] >= 0
    return Hits(hits.positions[row : row + 1, found], hits.similarities[row : row + 1, found])


def _only(anchors: Mapping[str, Collection[str]] | None, id: str) -> Collection[str]:
    """The example that retrieved an entry, if it is the only one."""
    found = () if anchors is None else set(anchors.get(id, ()))
    return found if len(found) == 1 else ()


def normalised(text: str) -> str:
    """Equal for texts that differ in case or spacing only. The tab between two texts stays."""
    return "\t".join(" ".join(part.split()) for part in text.casefold().split("\t"))
