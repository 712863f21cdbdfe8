"""Hits in, an answer out: the neighbours' soft labels, mixed with the student's own, and the evidence for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase


@dataclass(frozen=True)
class Neighbour:
    """One hit, and what it did to the result."""

    id: str
    text: str
    similarity: float
    weight: float
    value: NDArray[np.float32]  # (C,)
    contribution: float  # (1 - beta) * weight * value of the predicted class
    result_without: NDArray[np.float64]  # (C,) the result if this entry were not there, the other hits unchanged


@dataclass(frozen=True)
class Evidence:
    """The exact arithmetic of one result: the student's and the neighbours' contributions sum to result[predicted].

    It explains the part that was looked up, not how the student came to its own answer.
    """

    result: NDArray[np.float64]  # (C,)
    predicted: int  # class index; 0 in regression
    student: NDArray[np.float64]  # (C,) the answer without retrieval
    student_contribution: float
    neighbours: tuple[Neighbour, ...]  # best first; empty when nothing was found
    variance: float  # of the neighbours' values at `predicted`, under their weights
    decisive: bool  # whether retrieval changed the class


def weights(similarities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """softmax(similarity / temperature) over the hits of each query (ReAugKD, Zhang et al., ACL 2023, inference).

    (B, K) -> (B, K). Rows sum to 1; padding (similarity -inf) weighs 0, and so does a row of nothing else.
    Raises UsageError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}; it must be above 0")
    similarities = np.asarray(similarities, dtype=np.float64)
    found = similarities > -np.inf
    largest = similarities.max(axis=1, keepdims=True, initial=-np.inf, where=found)
    distance = np.subtract(similarities, largest, out=np.zeros_like(similarities), where=found)
    scores = np.where(found, np.exp(distance / temperature), 0.0)
    return np.asarray(scores / np.maximum(scores.sum(axis=1, keepdims=True), 1.0))  # the largest score is 1


def neighbour_average(hits: Hits, values: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Avg = sum_j w_j V_j (ReAugKD, inference). hits (B, K), values (M, C) -> (B, C), NaN if nothing was found."""
    average = np.einsum("bk,bkc->bc", weights(hits.similarities, temperature), values[hits.positions])
    nothing_found = ~(hits.positions >= 0).any(axis=1)
    average[nothing_found] = np.nan
    return np.asarray(average)


def interpolate(probabilities: NDArray[Any], average: NDArray[np.float64], beta: float) -> NDArray[Any]:
    """y' = beta p + (1 - beta) Avg (ReAugKD, inference), on probabilities or regression scores. All (B, C).

    Beta 1 returns the very array it was given, and a query that found nothing keeps the student's answer.
    Raises UsageError for a beta outside 0..1 or shapes that differ.
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"beta is {beta}; it must lie between 0 and 1")
    if probabilities.shape != average.shape:
        raise UsageError(f"the student's answers have shape {probabilities.shape}, the neighbours' {average.shape}")
    if beta == 1:
        return probabilities
    return np.where(np.isnan(average), probabilities, beta * probabilities + (1 - beta) * average)


def evidence(
    base: KnowledgeBase, hits: Hits, probabilities: NDArray[Any], temperature: float, beta: float
) -> list[Evidence]:
    """Show for every query what was found and what it did to the result. hits (B, K), probabilities (B, C).

    The contributions of the student and the neighbours sum to `result[predicted]`. What the result would be without
    entry j is y' with Avg_without_j = (Avg - w_j V_j) / (1 - w_j); the student's answer where j was the only hit.
    """
    return [
        _explain(base, _found(hits, row), probabilities[[row]], temperature, beta) for row in range(len(probabilities))
    ]


def own_positions(base: KnowledgeBase, ids: Sequence[str], texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Positions a query must not find because they are the query itself: the same id, or the same normalised text.

    For `search(..., exclude=...)` when queries may be members of the base. Entries without a text match by id only.
    """
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, (id, text) in enumerate(zip(base.ids, base.texts, strict=True)):
        places["id", id].append(position)
        if text:
            places["text", _normalised(text)].append(position)
    return [
        np.array(sorted({*places.get(("id", id), ()), *places.get(("text", _normalised(text)), ())}), dtype=np.int64)
        for id, text in zip(ids, texts, strict=True)
    ]


def _explain(base: KnowledgeBase, hits: Hits, probabilities: NDArray[Any], temperature: float, beta: float) -> Evidence:
    """Evidence of one query: hits (1, K) without padding, probabilities (1, C)."""
    average = neighbour_average(hits, base.values, temperature)[0]  # (C,)
    result, student = interpolate(probabilities, average[None], beta)[0], probabilities[0]  # each (C,)
    predicted = int(result.argmax())
    positions, similarities = hits.positions[0], hits.similarities[0]  # each (K,)
    shares, values = weights(hits.similarities, temperature)[0], base.values[positions]  # (K,), (K, C)
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
        decisive=predicted != int(student.argmax()),
    )


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
    average = neighbour_average(others, base.values, temperature)
    return interpolate(np.repeat(probabilities, count, axis=0), average, beta)


def _found(hits: Hits, row: int) -> Hits:
    """The hits of one query, without padding."""
    found = hits.positions[row] >= 0
    return Hits(hits.positions[row : row + 1, found], hits.similarities[row : row + 1, found])


def _normalised(text: str) -> str:
    """Equal for texts that differ in case or spacing only. The tab between two texts stays."""
    return "\t".join(" ".join(part.split()) for part in text.casefold().split("\t"))
