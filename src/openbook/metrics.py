"""How good an answer is: task metrics, agreement with the teacher, calibration, and whether a difference is real.

Outputs are what a model says: probabilities (n, C), or scores (n, 1) in regression. Scores are fractions, not percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr
from scipy.stats import binomtest, rankdata

from openbook.config import UsageError

Array = NDArray[Any]
SMALLEST = 1e-12  # probabilities below it count as this, so that no logarithm is infinite


@dataclass(frozen=True)
class Metric:
    """A function of outputs (n, C) and gold (n,); larger is better."""

    kind: Literal["classification", "regression"]
    function: Callable[[Array, Array], float]


@dataclass(frozen=True)
class Difference:
    """How much better the first of two models is, with a 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(outputs: Array, gold: Array) -> float:
    """Share of examples whose most probable class is the gold one. Outputs (n, C), gold (n,)."""
    return float(np.mean(outputs.argmax(axis=1) == gold))


def f1(outputs: Array, gold: Array) -> float:
    """2 TP / (2 TP + FP + FN): of class 1 with two classes (as GLUE does), else the mean over classes that occur.

    Outputs (n, C), gold (n,). A class that is neither predicted nor gold scores 0 when it is class 1 of two.
    """
    counts = _confusion(outputs, gold)
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    scores = 2 * counts.diagonal() / np.maximum(occurrences, 1)
    return float(scores[1] if len(scores) == 2 else scores[occurrences > 0].mean())


def matthews_correlation(outputs: Array, gold: Array) -> float:
    """Matthews correlation for any number of classes (R_K, Gorodkin 2004). Outputs (n, C), gold (n,).

    Defined as 0 when all predictions, or all gold labels, are of one class.
    """
    counts = _confusion(outputs, gold).astype(np.float64)  # products of counts leave int64 behind
    predicted, true, total = counts.sum(axis=0), counts.sum(axis=1), counts.sum()
    covariance = counts.trace() * total - predicted @ true
    scale = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return float(covariance / scale) if scale > 0 else 0.0


def pearson(outputs: Array, gold: Array) -> float:
    """Pearson's correlation of scores (n, 1) with gold (n,). Defined as 0 when either is constant."""
    return _correlation(outputs[:, 0], gold)


def spearmanr(outputs: Array, gold: Array) -> float:
    """Spearman's rank correlation of scores (n, 1) with gold (n,). Defined as 0 when either is constant."""
    return _correlation(rankdata(outputs[:, 0]), rankdata(gold))


METRICS = {
    "accuracy": Metric("classification", accuracy),
    "f1": Metric("classification", f1),
    "matthews_correlation": Metric("classification", matthews_correlation),
    "pearson": Metric("regression", pearson),
    "spearmanr": Metric("regression", spearmanr),
}


def score(name: str, outputs: Array, gold: Array) -> float:
    """The named metric of outputs (n, C) against gold (n,). Raises UsageError for what the metric cannot judge."""
    metric = _metric(name)
    check = _check_classes if metric.kind == "classification" else _check_scores
    check(outputs, gold)
    return metric.function(outputs, gold)


def agreement(student: Array, teacher: Array) -> float:
    """Share of examples for which student and teacher name the same class. Both (n, C)."""
    _check_pair(student, teacher)
    return float(np.mean(student.argmax(axis=1) == teacher.argmax(axis=1)))


def kl_to_teacher(student: Array, teacher: Array) -> float:
    """Mean KL(teacher || student) = sum_c t_c log(t_c / s_c) in nats. Both probabilities (n, C)."""
    _check_pair(student, teacher)
    return float(rel_entr(teacher, np.maximum(student, SMALLEST)).sum(axis=1).mean())


def nll(outputs: Array, gold: Array) -> float:
    """Mean negative log-likelihood of the gold class in nats. Probabilities (n, C), gold (n,)."""
    _check_classes(outputs, gold)
    return float(-np.log(np.maximum(outputs[np.arange(len(gold)), gold], SMALLEST)).mean())


def ece(outputs: Array, gold: Array, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al., 2015) with bins of equal mass. Probabilities (n, C), gold (n,).

    sum_b (n_b / n) |accuracy_b - mean confidence_b|. Equal confidences share a bin: the order is irrelevant.
    """
    _check_classes(outputs, gold)
    confidence = outputs.max(axis=1)
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    surplus = (outputs.argmax(axis=1) == gold) - confidence
    by_bin = np.bincount(np.searchsorted(edges, confidence, side="right"), weights=surplus)
    return float(np.abs(by_bin).sum() / len(gold))


def mcnemar(outputs: Array, rival: Array, gold: Array) -> float:
    """Exact two-sided McNemar p: do two models differ, given those that only one gets right? Outputs (n, C)."""
    _check_classes(outputs, gold)
    _check_classes(rival, gold)
    right, rival_right = outputs.argmax(axis=1) == gold, rival.argmax(axis=1) == gold
    corrected, broken = int((right & ~rival_right).sum()), int((~right & rival_right).sum())
    return float(binomtest(corrected, corrected + broken).pvalue) if corrected + broken else 1.0


def paired_difference(
    name: str, a: Sequence[Array], b: Sequence[Array], gold: Array, draws: int = 2000, seed: int = 0
) -> Difference:
    """Mean over seeds of metric(a) - metric(b), with a 95 % interval: percentile bootstrap over seeds and examples.

    `a` and `b` hold outputs (n, C) per seed. Seed i of one is paired with seed i of the other; a model with one seed
    meets every seed of its rival. Raises UsageError when the numbers of seeds cannot be paired.
    """
    if min(len(a), len(b)) == 0 or (len(a) != len(b) and min(len(a), len(b)) > 1):
        raise UsageError(f"{len(a)} seeds cannot be paired with {len(b)}; give equally many, or one")
    seeds = max(len(a), len(b))
    pairs = list(zip(_repeat(a, seeds), _repeat(b, seeds), strict=True))
    mean = float(np.mean([score(name, first, gold) - score(name, second, gold) for first, second in pairs]))

    function, random = _metric(name).function, np.random.default_rng(seed)
    differences = np.empty(draws)
    for draw in range(draws):
        rows = random.integers(len(gold), size=len(gold))
        drawn, times = np.unique(random.integers(seeds, size=seeds), return_counts=True)
        gains = [function(pairs[i][0][rows], gold[rows]) - function(pairs[i][1][rows], gold[rows]) for i in drawn]
        differences[draw] = np.average(gains, weights=times)
    low, high = np.quantile(differences, (0.025, 0.975))
    return Difference(mean, float(low), float(high))


def hierarchical_difference(
    groups: Sequence[Sequence[float]], null: float = 0.0, draws: int = 10_000, seed: int = 0
) -> tuple[Difference, float]:
    """Mean over tasks of their mean paired difference, its 95 % interval, and the p of its being `null`.

    `groups` holds one difference a seed for every task. Percentile bootstrap in two steps (contextualized corpus,
    section 7.2): tasks are drawn with replacement, then seeds within each drawn task; with one task, seeds only.
    p is twice the smaller tail of these means, shifted so that `null` is true, beyond the observed one. It is at least
    1 / (draws + 1), and at least 2^(1 - n) with n differences, as in a test of their signs: a bootstrap of three equal
    signs would call anything certain. Raises UsageError for an empty group or fewer than two differences.
    """
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    count = sum(map(len, values))
    if count < 2 or not all(map(len, values)):
        raise UsageError(f"groups of {[len(group) for group in values]} differences have no interval; give two or more")
    if not np.isfinite(np.concatenate(values)).all():
        raise UsageError("a difference is not finite; leave out the runs that failed, in pairs")
    observed = float(np.mean([group.mean() for group in values]))
    random, means = np.random.default_rng(seed), np.zeros(draws)
    for drawn in random.integers(len(values), size=(len(values), draws)):
        for task, group in enumerate(values):
            here = np.flatnonzero(drawn == task)
            means[here] += group[random.integers(len(group), size=(len(here), len(group)))].mean(axis=1)
    means /= len(values)
    low, high = np.quantile(means, (0.025, 0.975))
    surplus, chance = observed - null, means - observed
    tail = min(np.mean(chance >= surplus), np.mean(chance <= surplus))
    p = min(1.0, max(2 * float(tail), 1 / (draws + 1), 2.0 ** (1 - count)))
    return Difference(observed, float(low), float(high)), p


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given (Holm, 1979): the k-th smallest of m times m - k + 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in corrected]


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise UsageError(f"metric {name!r} is unknown; choose one of {', '.join(METRICS)}")
    return METRICS[name]


def _confusion(outputs: Array, gold: Array) -> NDArray[np.int64]:
    """Counts (C, C) of gold class by predicted class."""
    classes = outputs.shape[1]
    return np.bincount(gold * classes + outputs.argmax(axis=1), minlength=classes**2).reshape(classes, classes)


def _correlation(x: Array, y: Array) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - np.mean(x, dtype=np.float64), y - np.mean(y, dtype=np.float64)
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def _repeat(outputs: Sequence[Array], seeds: int) -> list[Array]:
    return list(outputs) * (seeds if len(outputs) == 1 else 1)


def _check_classes(outputs: Array, gold: Array) -> None:
    _check_rows(outputs, gold)
    if outputs.shape[1] < 2:
        raise UsageError("a classification metric needs a probability per class, but the outputs have one column")
    if gold.dtype.kind not in "iu" or gold.min() < 0 or gold.max() >= outputs.shape[1]:
        raise UsageError(
            f"gold labels must be class indices 0..{outputs.shape[1] - 1}, "
            f"but are {gold.dtype} from {gold.min()} to {gold.max()}; check the label names of the task"
        )


def _check_scores(outputs: Array, gold: Array) -> None:
    _check_rows(outputs, gold)
    if outputs.shape[1] != 1:
        raise UsageError(f"a regression metric needs outputs of one column, but they have {outputs.shape[1]}")


def _check_rows(outputs: Array, gold: Array) -> None:
    if outputs.ndim != 2 or len(gold) == 0 or len(outputs) != len(gold):
        raise UsageError(f"outputs of shape {outputs.shape} cannot be judged by gold of shape {gold.shape}")
    if not (np.isfinite(outputs).all() and np.isfinite(gold).all()):
        raise UsageError("outputs or gold labels are not finite; the model has overflowed, or a label is missing")


def _check_pair(student: Array, teacher: Array) -> None:
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2 or len(student) == 0:
        raise UsageError(f"probabilities of shape {student.shape} cannot be compared with {teacher.shape}")
