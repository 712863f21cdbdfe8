"""Losses against labels, one for every kind of task, on one scale: a guess without knowledge costs 1.

Pure functions of the logits and labels of one micro-batch, in float32 (float64 if the logits are), also under autocast.
What they have in common is MUPPET's scaling (Aghajanyan et al., 2021, section 3.2): a cross-entropy is divided by the
logarithm of how many answers were open. With `scaled=False` they are the plain losses of fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from openbook.config import Kind, UsageError
from openbook.distillation.closed_forms import MASKED
from openbook.distillation.losses import gold_labels, squared_error

UNLABELLED = -100  # the label of a word-piece that carries no tag

SupervisedLoss = Callable[[Tensor, Tensor], Tensor]  # of logits and `Batch.labels`


@dataclass(frozen=True)
class Standard:
    """The units of a regression: its scores are standardised targets. The default leaves targets as they are."""

    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise UsageError(
                f"a regression cannot be standardised by mean {self.mean} and deviation {self.deviation}; task.train"
                " needs finite targets that are not all the same: add other rows, or another task.label"
            )

    @classmethod
    def of(cls, targets: ArrayLike) -> Standard:
        """Mean and population deviation of train's targets (N,). Raises UsageError if they are all the same."""
        values = np.asarray(targets, dtype=np.float64)
        if not len(values) or not np.isfinite(values).all():
            raise UsageError(f"task.train has {len(values)} targets, and a regression needs finite ones; mend its rows")
        spread = float(values.std()) if np.ptp(values) else 0.0  # the mean of equal numbers may be rounded
        return cls(float(values.mean()), spread)

    def standardised(self, targets: Tensor) -> Tensor:
        return (targets - self.mean) / self.deviation

    def restored(self, scores: Tensor) -> Tensor:
        return scores * self.deviation + self.mean


def loss_of_kind(
    kind: Kind, *, scaled: bool = True, null_allowed: bool = False, standard: Standard | None = None
) -> SupervisedLoss:
    """The loss of a kind of task; `null_allowed` is read by spans only, `standard` by regression only."""
    losses: dict[Kind, SupervisedLoss] = {
        "classification": partial(classification, scaled=scaled),
        "regression": partial(regression, standard=standard or Standard()),
        "multiple_choice": partial(multiple_choice, scaled=scaled),
        "span_extraction": partial(span_extraction, null_allowed=null_allowed, scaled=scaled),
        "token_classification": partial(token_classification, scaled=scaled),
    }
    return losses[kind]


def classification(logits: Tensor, labels: Tensor, *, scaled: bool = True) -> Tensor:
    """Cross-entropy of logits (B, C) against class indices (B,), over ln C.

    Raises ValueError for other shapes, labels outside 0..C-1, or C = 1.
    """
    return gold_labels(logits, labels) / _log_classes(logits, scaled)


def regression(scores: Tensor, labels: Tensor, *, standard: Standard) -> Tensor:
    """Squared error of scores (B, 1) against the standardised targets of labels (B,): predicting the mean costs 1.

    Raises ValueError for other shapes or NaN.
    """
    if scores.shape != (*labels.shape, 1):
        raise ValueError(f"scores {tuple(scores.shape)} against targets {tuple(labels.shape)}")
    return squared_error(scores, standard.standardised(labels)[:, None])


def multiple_choice(scores: Tensor, labels: Tensor, *, scaled: bool = True) -> Tensor:
    """Cross-entropy over the options of each question, over ln of their number; the mean over questions.

    scores (N, 1) are those of all options of all questions, labels (N, 2) say which question of the batch an option
    belongs to and whether it is right. A question with one option carries no loss. Raises ValueError for other shapes,
    a question without options, or without exactly one right one.
    """
    if labels.shape != (len(scores), 2) or scores.shape[1:] != (1,) or labels.is_floating_point():
        raise ValueError(f"scores {tuple(scores.shape)} against {labels.dtype} labels {tuple(labels.shape)}")
    question, right = labels[:, 0], labels[:, 1] == 1
    numbers = torch.arange(min(int(question.max()) + 1, len(scores)), device=labels.device)
    own = question == numbers[:, None]  # (Q, N)
    known = own.any(dim=0) & ((labels[:, 1] == 0) | right)
    if not bool(known.all() & ((own & right).sum(dim=1) == 1).all()):
        raise ValueError(f"questions, numbered from 0, need exactly one right option each: {labels.tolist()}")
    losses, options = _choices(scores[:, 0].expand(own.shape), own, (own & right).int().argmax(dim=1))
    return _mean(losses, options, scaled)


def span_extraction(logits: Tensor, labels: Tensor, *, null_allowed: bool = False, scaled: bool = True) -> Tensor:
    """The mean cross-entropy of where an answer starts and ends, over ln of how many positions are open.

    logits (B, L, 2) score every position as start and as end; labels (B, 4) are the first and last position of the
    answer, then of the passage. Open are the passage and, if `null_allowed`, position 0 ([CLS]), where both ends of a
    missing answer lie. Raises ValueError for other shapes, or answers that are not open.
    """
    if logits.dim() != 3 or logits.shape[2] != 2 or labels.shape != (len(logits), 4) or labels.is_floating_point():
        raise ValueError(f"logits {tuple(logits.shape)} against {labels.dtype} labels {tuple(labels.shape)}")
    start, end, first, last = labels.unbind(dim=1)
    inside = (first <= start) & (start <= end) & (end <= last)
    missing = (start == 0) & (end == 0) & null_allowed
    if not bool(((first >= 1) & (first <= last) & (last < logits.shape[1]) & (inside | missing)).all()):
        closed = "" if null_allowed else ", and a missing answer needs null_allowed"
        raise ValueError(f"start, end, first and last of {logits.shape[1]} positions: {labels.tolist()}{closed}")
    places = torch.arange(logits.shape[1], device=labels.device)
    open_places = (first[:, None] <= places) & (places <= last[:, None])  # (B, L)
    open_places[:, 0] = null_allowed
    starts, ends = (_choices(logits[..., side], open_places, aim) for side, aim in enumerate((start, end)))
    return _mean((starts[0] + ends[0]) / 2, starts[1], scaled)


def token_classification(logits: Tensor, labels: Tensor, *, scaled: bool = True) -> Tensor:
    """Cross-entropy of logits (B, L, C) against tags (B, L), over ln C; the mean over pieces not labelled -100.

    Without a labelled piece it is 0. Raises ValueError for other shapes, tags outside 0..C-1, or C = 1.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {tuple(logits.shape)} against labels {tuple(labels.shape)}")
    labelled = labels != UNLABELLED
    if not bool(labelled.any()):
        return _precise(logits[labelled]).sum()
    return classification(logits[labelled], labels[labelled], scaled=scaled)


def _choices(logits: Tensor, is_open: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) over the open ones of logits (N, V), and how many are open (N,)."""
    closed = _precise(logits).masked_fill(~is_open, MASKED)
    return F.cross_entropy(closed, labels, reduction="none"), is_open.sum(dim=1)


def _mean(losses: Tensor, choices: Tensor, scaled: bool) -> Tensor:
    """The mean over examples that had a choice, each over ln of how many choices it had; 0 if none had one."""
    chosen = choices > 1
    losses, choices = losses[chosen], choices[chosen].to(losses.dtype)
    return (losses / choices.log() if scaled else losses).sum() / max(1, len(losses))


def _log_classes(logits: Tensor, scaled: bool) -> float:
    if logits.shape[-1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} have one class, which leaves nothing to learn")
    return math.log(logits.shape[-1]) if scaled else 1.0


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
