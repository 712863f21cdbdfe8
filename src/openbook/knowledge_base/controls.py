"""Controls for what a book gains: values of other entries, the class prior, a tuned bias in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.knowledge_base.adaptive import Metric, losses
from openbook.types import KnowledgeBase

BIASES = tuple(step / 10 for step in range(-20, 21))


def permuted(base: KnowledgeBase, seed: int) -> KnowledgeBase:
    """Control A9: every entry has the value of another. What is gained with it is smoothing."""
    return replace(base, values=base.values[np.random.default_rng(seed).permutation(len(base.ids))])


def flattened(base: KnowledgeBase) -> KnowledgeBase:
    """Control A9: every entry has the mean value, so that Avg is the class prior. What is gained is a threshold."""
    if not base.ids:
        return base
    prior = np.average(base.values.astype(np.float64), axis=0, weights=base.weights)
    return replace(base, values=np.tile(prior.astype(np.float32), (len(base.ids), 1)))


def class_bias(outputs: NDArray[Any], gold: NDArray[Any], metric: Metric) -> NDArray[np.float64]:
    """Control A10: what to add to log p of every class but the first, one after the other, for the best metric.

    Ties go to the lower loss, then the smaller bias. outputs (n, C), gold (n,) -> (C,). Raises UsageError in
    regression, where a shift leaves correlations as they are.
    """
    if outputs.shape[1] == 1:
        raise UsageError("a regression has no classes to bias; leave the control out")
    bias = np.zeros(outputs.shape[1])
    for own in np.eye(outputs.shape[1])[1:]:

        def merit(step: float, own: NDArray[np.float64] = own, before: NDArray[np.float64] = bias) -> tuple[float, ...]:
            told = biased(outputs, before + step * own)
            return -metric(told, gold), float(losses(told, gold, "classification").mean()), abs(step)

        bias = bias + min(BIASES, key=merit) * own
    return bias


def biased(outputs: NDArray[Any], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    """softmax(log p + bias): (n, C), (C,) -> (n, C)."""
    scores = outputs * np.exp(bias)
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))
