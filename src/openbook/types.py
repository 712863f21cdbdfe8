"""The nouns. Everything else in openbook is a function from one of these to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """An answer inside a passage: its characters from `start` up to `end`, which is not part of it."""

    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """One row of a task. The id is stable across runs, e.g. `trec/train/17`."""

    id: str
    text: str
    text_pair: str | None = None
    # class or option index, regression target, answer in `text_pair` (no answer: None), one tag a word; of several
    # labels, for each whether it applies (1 or 0); or unknown
    label: int | float | Span | tuple[int, ...] | None = None
    options: tuple[str, ...] = ()  # of a multiple choice: what may follow `text`
    words: tuple[str, ...] = ()  # of token classification: what `text` is made of
    answers: tuple[str, ...] = ()  # of span extraction: every answer that counts as right


@dataclass(frozen=True)
class Batch:
    """Tokenised examples, padded to the longest of them."""

    ids: tuple[str, ...]
    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 = real token
    token_type_ids: Tensor  # (B, L) int64, 1 = second text
    # (B,) int64 classes or float32 targets; of several labels (B, C), 1 where it applies; tags (B, L), -100 where none;
    # of a multiple choice (B, 2): question of the batch, whether right; of spans (B, 4): first and last token of the
    # answer, then of the passage
    labels: Tensor | None = None
    task: str = ""  # whose head answers, where a model has several

    def to(self, device: Any) -> Batch:
        labels = None if self.labels is None else self.labels.to(device)
        tensors = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "token_type_ids")}
        return replace(self, labels=labels, **tensors)


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch. Teacher and student speak the same language; empty means not asked for."""

    logits: Tensor  # (B, C); C = 1 in regression
    embedding: Tensor  # (B, d): what the last linear layer of the head reads
    hidden: tuple[Tensor, ...] = ()  # embedding output, then every block's output; each (B, L, d)
    relations: Mapping[int, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict
    )  # layer -> q, k, v, each (B, L, d)


Teacher = Callable[[Batch], Outputs]  # live or recorded; a loss cannot tell which


@dataclass(frozen=True)
class Passage:
    """One sentence of a corpus, with where it came from and why it is there."""

    id: str
    text: str
    document: str
    text_pair: str | None = None  # of a corpus whose units are pairs already
    tokens: int = 0  # word-pieces of the student's tokenizer after truncation, without special tokens
    rank: int = 0  # best rank over all anchors that found it, from 0
    anchors: int = 0  # how many anchors found it


@dataclass(frozen=True)
class Corpus:
    """Passages in the order of their merit, and what is known about them as a whole."""

    passages: tuple[Passage, ...]
    statistics: Mapping[str, Any]


@dataclass(frozen=True)
class KnowledgeBase:
    """What the teacher said about texts the student may look up. Row i of every field belongs to the same text."""

    keys: NDArray[np.float32]  # (M, d) unit vectors; (M, r) where there is a basis
    values: NDArray[np.float32]  # (M, C) soft labels, of several labels each by itself; (M, 1) scores in regression
    ids: tuple[str, ...]
    texts: tuple[str, ...]  # a pair is stored as its two texts joined by a tab
    manifest: Mapping[str, Any]
    weights: NDArray[np.float32] | None = None  # (M,) how often each counts; None: once
    origins: tuple[str, ...] = ()  # where each comes from; none given: from the task's training rows
    basis: NDArray[np.float32] | None = None  # (d, r) what a unit query is multiplied by before it meets a key


@dataclass(frozen=True)
class Artifact:
    """A folder that a stage finished. Its manifest holds the fingerprints of all that went in."""

    folder: Path
    manifest: Mapping[str, Any]
