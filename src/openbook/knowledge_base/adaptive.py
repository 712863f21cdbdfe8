"""How far the neighbours are trusted, example by example, and which examples need none: fitted on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from openbook.config import WholeKind
from openbook.knowledge_base.answering import FEATURES, Mode, Retrieval, betas_of
from openbook.knowledge_base.interpolate import interpolate

BETAS = tuple(step / 10 for step in range(11))
BUCKETS = 10
SMALLEST_BUCKET = 200  # examples; with fewer, a bucket takes the beta of all
PENALTY = 1.0  # of the gate's coefficients, on features of unit variance
FOLDS = 5
POINT = 0.01  # what reports call one point of a metric
LIKELY = 1e-12  # probabilities below it count as this, so that no logarithm is infinite
STEPS = 500  # confidences tried as theta
NEVER = 2.0  # a confidence that none reaches

Metric = Callable[[NDArray[Any], NDArray[Any]], float]  # outputs (n, C), gold (n,) -> larger is better


@dataclass(frozen=True)
class Sample:
    """Held-out examples for which something was found: what the student and the neighbours say, and the truth."""

    outputs: NDArray[Any]  # (n, C)
    average: NDArray[np.float64]  # (n, C)
    features: NDArray[np.float64]  # (n, 3)
    gold: NDArray[Any]  # (n,), or of several labels (n, C)
    kind: WholeKind

    def rows(self, chosen: NDArray[np.bool_]) -> Sample:
        return replace(
            self,
            outputs=self.outputs[chosen],
            average=self.average[chosen],
            features=self.features[chosen],
            gold=self.gold[chosen],
        )

    def losses(self, betas: float | NDArray[np.float64]) -> NDArray[np.float64]:
        return losses(interpolate(self.outputs, self.average, betas), self.gold, self.kind)


Fit = Callable[[Retrieval, Sample], Retrieval]


def losses(outputs: NDArray[Any], gold: NDArray[Any], kind: WholeKind) -> NDArray[np.float64]:
    """Negative log-likelihood of every example, squared error in regression. (n, C), (n,) -> (n,)

    Of several labels, gold (n, C), it is the mean over the labels.
    """
    if kind == "regression":
        return np.asarray((outputs[:, 0] - gold) ** 2, dtype=np.float64)
    return np.asarray(-np.log(np.maximum(likelihoods(outputs, gold, kind), LIKELY)).mean(axis=1))


def likelihoods(outputs: NDArray[Any], gold: NDArray[Any], kind: WholeKind) -> NDArray[Any]:
    """The probability of the gold class (n, 1), or of what is true of each of several labels (n, C)."""
    if kind == "multi_label":
        return np.where(gold > 0, outputs, 1 - outputs)
    return np.asarray(outputs[np.arange(len(gold)), gold][:, None])


def with_gate(constant: Retrieval, sample: Sample) -> Retrieval:
    """Fit beta(x) = sigmoid(b0 + b . f) by likelihood, from the constant on (specification, section 2.8).

    The L2 penalty is on b of features of unit variance; squared errors are in units of the constant's. `beta_min` is
    the smallest beta of these examples: a text unlike all of them is not trusted to the neighbours any further.
    """
    centre, spread = sample.features.mean(axis=0), sample.features.std(axis=0)
    spread[spread < 1e-9] = 1
    design = np.column_stack([np.ones(len(sample.gold)), (sample.features - centre) / spread])
    beta = min(max(constant.beta, 0.01), 0.99)
    start = np.array([np.log(beta / (1 - beta)), *[0.0] * FEATURES])
    coefficients = minimize(_objective(design, sample, beta), start, jac=True, method="L-BFGS-B").x
    slopes = coefficients[1:] / spread
    gate = (float(coefficients[0] - slopes @ centre), *slopes.tolist())
    fitted = replace(constant, mode="gate", gate=gate, beta_min=0.0)
    return replace(fitted, beta_min=float(betas_of(fitted, sample.features).min()))


def with_buckets(constant: Retrieval, sample: Sample) -> Retrieval:
    """One beta for every tenth of the examples by largest similarity: the one of least loss (Drozdov et al., 2022).

    A bucket of fewer than 200 examples takes the constant.
    """
    nearest = sample.features[:, 0]
    edges = np.quantile(nearest, np.arange(1, BUCKETS) / BUCKETS)
    bucket = np.searchsorted(edges, nearest, side="right")
    betas = [_best_beta(sample.rows(bucket == number), constant.beta) for number in range(BUCKETS)]
    return replace(constant, mode="bucket", edges=tuple(edges.tolist()), betas=tuple(betas))


FITS: dict[Mode, Fit] = {"gate": with_gate, "bucket": with_buckets}


def adapted(
    constant: Retrieval, sample: Sample, modes: Sequence[Mode], rival: NDArray[np.float64]
) -> tuple[Retrieval, NDArray[np.float64]] | None:
    """The mode of least cross-validated loss, with the betas (n,) it gave to examples it was not fitted on.

    None if no mode beats the `rival`, the losses (n,) of the best constant, by more than one standard error.
    """
    found = []
    for mode in modes:
        if mode not in FITS or len(sample.gold) < 2 * FOLDS:
            continue
        betas = cross_validated(FITS[mode], constant, sample)
        gain = rival - sample.losses(betas)
        if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
            found.append((-gain.mean(), mode, betas))
    if not found:
        return None
    _, mode, betas = min(found, key=lambda one: one[0])
    return FITS[mode](constant, sample), betas


def cross_validated(fit: Fit, constant: Retrieval, sample: Sample) -> NDArray[np.float64]:
    """The beta (n,) of every example, fitted on the four fifths of the examples that it is not in."""
    fold_of = np.arange(len(sample.gold)) % FOLDS
    betas = np.empty(len(sample.gold))
    for fold in range(FOLDS):
        here = fold_of == fold
        betas[here] = betas_of(fit(constant, sample.rows(~here)), sample.features[here])
    return betas


def confident_theta(alone: NDArray[Any], mixed: NDArray[Any], gold: NDArray[Any], metric: Metric) -> float:
    """The smallest confidence from which not to search costs at most 0.1 point of the metric (section 2.8).

    alone and mixed (n, C) answer the same examples without and with the book. Where there is none, one above 1.
    """
    confidence = alone.max(axis=1)
    always = metric(mixed, gold)
    for theta in np.unique(np.quantile(confidence, np.linspace(0, 1, STEPS + 1), method="lower")):
        told = np.where((confidence >= theta)[:, None], alone, mixed)
        if always - metric(told, gold) <= 0.1 * POINT + 1e-12:
            return float(theta)
    return NEVER


def _objective(
    design: NDArray[np.float64], sample: Sample, beta: float
) -> Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]:
    """Penalised loss of the gate's coefficients, with its gradient. design (n, 4)"""
    if sample.kind == "regression":
        student, neighbours = sample.outputs[:, :1].astype(np.float64), sample.average[:, :1]  # (n, 1)
        unit = max(float(sample.losses(beta).mean()), LIKELY)
    else:
        student, neighbours = (likelihoods(one, sample.gold, sample.kind) for one in (sample.outputs, sample.average))

    def objective(coefficients: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        betas = (1 + np.tanh(design @ coefficients / 2)) / 2
        mixed = betas[:, None] * student + (1 - betas)[:, None] * neighbours
        if sample.kind == "regression":
            error = mixed - sample.gold[:, None]
            loss, slope = error**2 / (2 * unit), error / unit
        else:
            mixed = np.maximum(mixed, LIKELY)
            loss, slope = -np.log(mixed), -1 / mixed
        gradient = design.T @ (betas * (1 - betas) * (slope * (student - neighbours)).mean(axis=1))
        shrunk = np.concatenate([[0.0], coefficients[1:]])
        return float(loss.mean(axis=1).sum() + PENALTY / 2 * shrunk @ shrunk), gradient + PENALTY * shrunk

    return objective


def _best_beta(sample: Sample, otherwise: float) -> float:
    if len(sample.gold) < SMALLEST_BUCKET:
        return otherwise
    return min(reversed(BETAS), key=lambda beta: float(sample.losses(beta).mean()))
