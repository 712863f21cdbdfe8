"""How many neighbours, how sharply weighed, how far trusted: chosen on held-out examples that are not in the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError, WholeKind
from openbook.knowledge_base.interpolate import interpolate, neighbour_average, own_positions
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase

TOP_K = (1, 2, 4, 8, 12, 16, 20, 32)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5)
BETAS = tuple(step / 10 for step in range(11))
GROUPS = 500  # metric evaluations that a standard error may cost

Metric = Callable[[NDArray[Any], NDArray[Any]], float]  # outputs (n, C), gold (n,) -> larger is better


@dataclass(frozen=True)
class Cell:
    """One setting and how well it does on the held-out examples."""

    top_k: int
    temperature: float
    beta: float
    score: float
    loss: float  # negative log-likelihood; mean squared error in regression


@dataclass(frozen=True)
class Tuned:
    """The setting to predict with. Without a clear gain `kept` is false and beta is 1: the student answers alone."""

    top_k: int
    temperature: float
    beta: float
    score: float  # of the best cell, whether kept or not
    baseline_score: float  # of beta = 1
    gain: float
    standard_error: float  # of the gain
    kept: bool
    table: tuple[Cell, ...]  # the whole sweep, best first


def check_disjoint(base: KnowledgeBase, ids: Sequence[str], texts: Sequence[str]) -> None:
    """Refuse to tune on examples that the base holds, by id or by normalised text: they would find themselves."""
    shared = [id for id, own in zip(ids, own_positions(base, ids, texts), strict=True) if len(own)]
    if shared:
        raise UsageError(
            f"{len(shared)} of {len(ids)} held-out examples are in the knowledge base too, by id or by text "
            f"(the first is {shared[0]!r}); build it without them"
        )


def tune(
    probabilities: NDArray[Any],
    hits: Hits,
    values: NDArray[np.float32],
    gold: NDArray[Any],
    metric: Metric,
    kind: WholeKind,
) -> Tuned:
    """Choose top_k, temperature and beta of ReAugKD's interpolation (Zhang et al., ACL 2023) on a held-out set.

    probabilities (n, C), hits (n, K) for the largest top_k, values (M, C), gold (n,).
    The best metric wins; ties go to the lower loss, then the larger beta, then the smaller top_k and temperature.
    Retrieval is kept only if its gain over beta = 1 exceeds one standard error of that paired gain.
    Raises UsageError when there are fewer than two examples or their number differs between the inputs.
    """
    _check(probabilities, hits, gold)

    def measure(outputs: NDArray[Any]) -> tuple[float, float]:
        return metric(outputs, gold), _loss(outputs, gold, kind)

    table = sorted(sweep(probabilities, hits, values, measure), key=_merit)
    best = table[0]
    outputs = interpolate(probabilities, neighbour_average(hits.top(best.top_k), values, best.temperature), best.beta)

    def gain(rows: NDArray[np.bool_]) -> float:
        return metric(outputs[rows], gold[rows]) - metric(probabilities[rows], gold[rows])

    baseline_score = metric(probabilities, gold)
    error = standard_error(gain, len(gold))
    kept = best.score - baseline_score > error
    return Tuned(
        top_k=best.top_k,
        temperature=best.temperature,
        beta=best.beta if kept else 1.0,
        score=best.score,
        baseline_score=baseline_score,
        gain=best.score - baseline_score,
        standard_error=error,
        kept=kept,
        table=tuple(table),
    )


def sweep(
    probabilities: NDArray[Any],
    hits: Hits,
    values: NDArray[np.float32],
    measure: Callable[[NDArray[Any]], tuple[float, float]],
) -> list[Cell]:
    """Score every cell of the grid; `measure` maps outputs (n, C) to a score and a loss. Nothing is searched."""
    available = max(1, hits.positions.shape[1])
    cells = []
    for top_k in sorted({min(k, available) for k in TOP_K}):
        for temperature in TEMPERATURES:
            average = neighbour_average(hits.top(top_k), values, temperature)
            for beta in BETAS:
                cells.append(Cell(top_k, temperature, beta, *measure(interpolate(probabilities, average, beta))))
    return cells


def standard_error(statistic: Callable[[NDArray[np.bool_]], float], count: int) -> float:
    """Delete-one jackknife (Efron and Stein, 1981) of a statistic of `count` rows, given a mask of those to use.

    For a mean it is exactly the sample standard deviation over sqrt(count), and it serves correlations as well.
    Above GROUPS rows it leaves out groups of rows instead.
    """
    groups = min(count, GROUPS)
    group_of = np.arange(count) % groups
    left_out = np.array([statistic(group_of != group) for group in range(groups)])
    return float(np.sqrt((groups - 1) * left_out.var()))


def _merit(cell: Cell) -> tuple[float, ...]:
    """Sorts the best cell first."""
    return (-cell.score, cell.loss, -cell.beta, cell.top_k, cell.temperature)


def _loss(outputs: NDArray[Any], gold: NDArray[Any], kind: WholeKind) -> float:
    if kind == "regression":
        return float(np.mean((outputs[:, 0] - gold) ** 2))
    return float(-np.log(np.maximum(outputs[np.arange(len(gold)), gold], 1e-12)).mean())


def _check(probabilities: NDArray[Any], hits: Hits, gold: NDArray[Any]) -> None:
    rows = len(probabilities), len(hits.positions), len(gold)
    if len(set(rows)) > 1 or rows[0] < 2:
        raise UsageError(
            f"tuning got {rows[0]} predictions, {rows[1]} rows of hits and {rows[2]} labels; "
            "it needs the same number of each, and at least 2: hold out more examples"
        )
