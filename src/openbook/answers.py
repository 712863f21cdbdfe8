"""Texts as users give them, and what a model says about them; numpy alone, so that a light install has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import THRESHOLD, UsageError

Text = str | tuple[str, str]
Texts = Text | Sequence[Text]


@dataclass(frozen=True)
class Answers:
    """Row i belongs to row i of the texts."""

    logits: NDArray[np.float32]  # (n, C)
    embedding: NDArray[np.float32]  # (n, d)
    labels: NDArray[Any]  # (n,) gold; empty if the texts have none


@dataclass(frozen=True)
class Encoded:
    """One row as a model reads it: word-pieces with special tokens, no more than it can take."""

    ids: list[int]
    types: list[int]  # 1 = second text
    cut: bool = False  # something was left out

    def __len__(self) -> int:
        return len(self.ids)


def outputs_of(answers: Answers, kind: str) -> NDArray[Any]:
    """Probabilities (n, C), of several labels each by itself; or scores (n, 1) in regression."""
    return SAID[kind](answers.logits)


def probabilities_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Row-wise softmax in float64: (n, C) -> (n, C)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def label_probabilities_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """The logistic function of every logit by itself, in float64: (n, C) -> (n, C)."""
    return np.asarray((1 + np.tanh(logits.astype(np.float64) / 2)) / 2)


def _as_they_are(scores: NDArray[Any]) -> NDArray[Any]:
    return scores


SAID: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "classification": probabilities_of,
    "regression": _as_they_are,
    "multi_label": label_probabilities_of,
}  # what logits (n, C) say, by the kind of task


def told(outputs: NDArray[Any], kind: str) -> NDArray[Any]:
    """What outputs (n, C) name: classes (n,), or of several labels, which of them (n, C)."""
    return outputs > THRESHOLD if kind == "multi_label" else outputs.argmax(axis=-1)


def fields(row: Text) -> tuple[str, ...]:
    return (row,) if isinstance(row, str) else row


def joined(rows: Sequence[Text]) -> tuple[str, ...]:
    """As a knowledge base stores them: the two texts of a pair are separated by a tab."""
    return tuple("\t".join(fields(row)) for row in rows)


def as_rows(texts: Texts) -> tuple[list[Text], bool]:
    """A list of texts or pairs, and whether a single one was given.

    Raises UsageError for an empty list, anything that is no text, and a mixture of texts and pairs.
    """
    single = isinstance(texts, str) or (isinstance(texts, tuple) and len(texts) == 2 and all(map(is_text, texts)))
    if not isinstance(texts, Iterable):
        raise UsageError(f"{texts!r} is no text; give a string, a pair of strings (a, b), or a list of either")
    rows: list[Any] = [texts] if single else list(texts)
    if not rows:
        raise UsageError("there is nothing to predict: the list of texts is empty")
    for place, row in enumerate(rows):
        is_pair = isinstance(row, list | tuple) and len(row) == 2 and all(map(is_text, row))
        if not is_text(row) and not is_pair:
            raise UsageError(f"text {place} is {row!r}; give a string, or a pair of strings (a, b)")
        if is_text(row) != is_text(rows[0]):
            raise UsageError(
                f"text {place} is {'a string' if is_text(row) else 'a pair'}, text 0 is not; do not mix them"
            )
    return [row if is_text(row) else tuple(row) for row in rows], single


def is_text(value: object) -> bool:
    return isinstance(value, str)
