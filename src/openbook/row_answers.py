"""What one training said of every reported row, and its scores on other draws of these rows."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from openbook.config import UsageError
from openbook.metrics import METRICS, mcnemar

DRAWS = 1_000  # of the rows of a task
CONSTANT = 1e-12  # a variance below it, of numbers of size one, is rounding


@dataclass(frozen=True, eq=False)
class RowAnswers:
    """Row i of both belongs to row i of the reported split."""

    said: NDArray[Any]  # (n,) class, or score
    gold: NDArray[Any]  # (n,)
    classes: int  # 1 in regression

    @classmethod
    def of(cls, outputs: NDArray[Any], gold: NDArray[Any]) -> Self:
        """Of probabilities (n, C), or scores (n, 1)."""
        classes = outputs.shape[1]
        if classes == 1:
            return cls(outputs[:, 0].astype(np.float32), gold.astype(np.float32), 1)
        kept = np.uint8 if classes <= 256 else np.uint16
        return cls(outputs.argmax(axis=1).astype(kept), gold.astype(kept), classes)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises UsageError for a file that is not what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as found:
                said, gold, classes = found["said"], found["gold"], int(found["classes"])
        except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} does not hold the answers to rows ({error}); remove it") from None
        if said.ndim != 1 or said.shape != gold.shape or not len(said):
            raise UsageError(f"{path} holds {said.shape} answers to {gold.shape} rows; remove it")
        return cls(said, gold, classes)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, said=self.said, gold=self.gold, classes=self.classes, allow_pickle=False)

    @property
    def outputs(self) -> NDArray[np.float64]:
        """As a metric reads them: (n, C), all on the class, or (n, 1)."""
        if self.classes == 1:
            return self.said[:, None].astype(np.float64)
        return np.asarray(np.eye(self.classes)[self.said])

    @property
    def labels(self) -> NDArray[Any]:
        return self.gold.astype(np.float64 if self.classes == 1 else np.int64)

    def gives(self, metric: str, score: float) -> bool:
        """Whether this is the score of these answers."""
        fits = metric in METRICS and (self.classes == 1) == (metric in SCORED)
        return fits and abs(METRICS[metric].function(self.outputs, self.labels) - score) < 1e-4

    def drawn(self, metric: str, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric where row i counts times[r, i] times: (R, n) -> (R,)."""
        if self.classes == 1:
            return SCORED[metric](self.said.astype(np.float64), self.labels, times)
        pairs = self.labels * self.classes + self.said
        counts = times @ np.eye(self.classes**2)[pairs]
        return CLASSED[metric](counts.reshape(len(times), self.classes, self.classes))


@lru_cache(maxsize=8)
def draws_of(rows: int) -> NDArray[np.float64]:
    """How often each row is drawn (R, n): the same for all trainings of a task, so that differences stay paired."""
    return np.random.default_rng(rows).multinomial(rows, np.full(rows, 1 / rows), size=DRAWS).astype(np.float64)


@lru_cache(maxsize=1024)  # every arm is compared with several others
def redrawn(answers: RowAnswers, metric: str) -> NDArray[np.float64]:
    """The metric on every draw of its rows (R,)."""
    return answers.drawn(metric, draws_of(len(answers.gold)))


def same_rows(a: RowAnswers, b: RowAnswers) -> bool:
    return a.classes == b.classes and np.array_equal(a.gold, b.gold)


def mcnemar_of(a: RowAnswers, b: RowAnswers) -> float:
    """Exact two-sided McNemar p of two classifiers of the same rows."""
    return mcnemar(a.outputs, b.outputs, a.labels)


def accuracies(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of counts (R, C, C) of gold class by predicted class, as all of these."""
    return np.asarray(np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2)))


def f1s(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    occurrences = counts.sum(axis=1) + counts.sum(axis=2)
    scores = 2 * np.diagonal(counts, axis1=1, axis2=2) / np.maximum(occurrences, 1)
    if scores.shape[1] == 2:
        return np.asarray(scores[:, 1])
    return np.asarray(scores.sum(axis=1) / (occurrences > 0).sum(axis=1))


def matthews(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    predicted, true, total = counts.sum(axis=1), counts.sum(axis=2), counts.sum(axis=(1, 2))
    covariance = np.trace(counts, axis1=1, axis2=2) * total - (predicted * true).sum(axis=1)
    scale = np.sqrt((total**2 - (predicted**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1)))
    return np.asarray(np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0.0))


def pearsons(x: NDArray[np.float64], y: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of x and y, (n,) or (R, n), where row i counts times[r, i] times."""
    total = times.sum(axis=1, keepdims=True)
    x, y = (one - (times * one).sum(axis=1, keepdims=True) / total for one in (x, y))
    both, own, other = ((times * one).sum(axis=1) for one in (x * y, x * x, y * y))
    varies = (own > CONSTANT * total[:, 0]) & (other > CONSTANT * total[:, 0])
    return np.asarray(np.where(varies, both / np.sqrt(np.where(varies, own * other, 1)), 0.0))


def spearmans(x: NDArray[np.float64], y: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    return pearsons(ranks(x, times), ranks(y, times), times)


def ranks(x: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean rank of every row among those drawn: (n,), (R, n) -> (R, n)."""
    place = rankdata(x, "dense") - 1
    order = np.argsort(place, kind="stable")
    tied = np.add.reduceat(times[:, order], np.flatnonzero(np.diff(place[order], prepend=-1)), axis=1)
    return np.asarray((np.cumsum(tied, axis=1) - (tied - 1) / 2)[:, place])


CLASSED = {"accuracy": accuracies, "f1": f1s, "matthews_correlation": matthews}
SCORED = {"pearson": pearsons, "spearmanr": spearmans}
