"""What a model with heads scores on a task of any kind, and what a guess would score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.data.batches import Tokenised
from openbook.data.tasks import TaskData
from openbook.inference import Predictions, objects, predictions_of
from openbook.metrics import score
from openbook.models.heads import MultiTask
from openbook.types import Batch, Example


def predict(model: MultiTask, name: str, task: TaskData, examples: Sequence[Example], texts: Tokenised) -> Predictions:
    """What the head of a task says about these examples, which `texts` holds tokenised for predictions."""
    device = next(model.parameters()).device
    head = model.tasks[name]

    def logits_of(batch: Batch) -> Any:
        return model(replace(batch, task=name).to(device))

    model.eval()
    said = predictions_of(logits_of, texts, examples, task.labels or (), task.null_allowed)
    if task.kind != "regression":
        return said
    return Predictions(said.outputs * head.deviation + head.mean, said.gold)


def score_of(
    model: MultiTask, name: str, task: TaskData, examples: Sequence[Example], texts: Tokenised
) -> dict[str, float]:
    """All metrics of the task, as fractions."""
    said = predict(model, name, task, examples, texts)
    return {metric: score(metric, said.outputs, said.gold, task.kind) for metric in task.metrics}


def guess_of(task: TaskData) -> float:
    """The main metric, on the rows set aside, of who knows the training labels' shares and no text.

    The most frequent class, or tag for every word; of options, one by chance; no answer to any question. A constant
    correlates with nothing: 0.
    """
    if task.kind == "regression":
        return 0.0
    if task.kind == "multiple_choice":
        return float(np.mean([1 / len(row.options) for row in task.holdout]))
    if task.kind == "span_extraction":
        return float(np.mean([row.label is None for row in task.holdout]))
    labels = task.labels or ()
    counts = np.bincount(list(chain.from_iterable(map(classes_of, task.train))), minlength=len(labels))
    if task.kind == "classification":
        outputs: NDArray[Any] = np.tile(counts / counts.sum(), (len(task.holdout), 1))
        return score(task.metric, outputs, np.array([row.label for row in task.holdout]), task.kind)
    common = labels[int(counts.argmax())]
    guessed = objects([(common,) * len(row.words) for row in task.holdout])
    gold = objects([tuple(labels[tag] for tag in classes_of(row)) for row in task.holdout])
    return score(task.metric, guessed, gold, task.kind)


def classes_of(row: Example) -> tuple[int, ...]:
    """The class of a text, or the tags of its words."""
    return row.label if isinstance(row.label, tuple) else (row.label,) if isinstance(row.label, int) else ()
