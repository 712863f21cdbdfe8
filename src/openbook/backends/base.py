"""What an engine is to a predictor, and what all engines share: word-pieces, and batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from openbook.answers import Answers, Encoded, Text
from openbook.config import UsageError, WholeKind

BackendName = Literal["torch", "onnx", "onnx-int8"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
SEVERAL = "multi_label_classification"  # the problem type of transformers for `multi_label`
UNLIMITED = 1 << 20  # a tokenizer that says more has no limit

Inputs = dict[str, NDArray[np.int64]]  # input_ids, attention_mask and token_type_ids, each (B, L)


@dataclass(frozen=True)
class About:
    """What a student's configuration says of its answers."""

    kind: WholeKind
    labels: tuple[str, ...] | None  # in index order; None in regression
    key_space: str | None  # of the book that fits; None: a student openbook did not teach
    made_from: Mapping[str, str] | None = None  # the parts that `key_space` is the digest of, where they are known


class Backend(Protocol):
    """A student that reads rows and answers with logits and pooled vectors. One thread at a time."""

    @property
    def name(self) -> BackendName: ...
    @property
    def folder(self) -> Path | None: ...  # the student's, if it was loaded from one
    @property
    def about(self) -> About: ...
    @property
    def weights(self) -> str | None: ...  # digest of the file the student was saved in, if it was
    @property
    def max_length(self) -> int: ...  # word-pieces, special tokens included
    def encode(self, rows: Sequence[Text]) -> list[Encoded]: ...
    def run(self, rows: Sequence[Encoded]) -> Answers: ...
    def save(self, folder: Path) -> None: ...


class Pieces:
    """A tokenizer that cuts, the longer text of a pair first, and pads."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, pad: int):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")
        self.max_length, self.pad = max_length, pad

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        """One text a row or a pair a row; lone surrogates, which no tokenizer reads, are replaced."""
        told = [readable(row) if isinstance(row, str) else (readable(row[0]), readable(row[1])) for row in rows]
        return [Encoded(one.ids, one.type_ids, bool(one.overflowing)) for one in self.tokenizer.encode_batch_fast(told)]

    def padded(self, rows: Sequence[Encoded]) -> Inputs:
        longest = max(map(len, rows))
        ids, types = np.full((len(rows), longest), self.pad, np.int64), np.zeros((len(rows), longest), np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)], types[place, : len(row)], mask[place, : len(row)] = row.ids, row.types, 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode() if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def longest_input(stated: float | None, config: Mapping[str, Any]) -> int:
    """Word-pieces a model can take, by its tokenizer or else its positions.

    RoBERTa counts positions from beyond the index of padding. Raises UsageError if neither tells.
    """
    if stated is not None and stated < UNLIMITED:
        return int(stated)
    positions = config.get("max_position_embeddings")
    if positions is None:
        raise UsageError(
            "neither tokenizer_config.json (model_max_length) nor config.json (max_position_embeddings) of the student"
            " says how much it can read; set model_max_length"
        )
    offset = (config.get("pad_token_id") or 0) + 1 if "roberta" in str(config.get("model_type")) else 0
    return int(positions) - offset


def about(config: Mapping[str, Any]) -> About:
    """From config.json, or a configuration of transformers as a mapping."""
    space = config.get("key_space"), config.get("made_from")
    if config.get("problem_type") == "regression":
        return About("regression", None, *space)
    names = {int(index): str(name) for index, name in config["id2label"].items()}
    kind: WholeKind = "multi_label" if config.get("problem_type") == SEVERAL else "classification"
    return About(kind, tuple(names[index] for index in sorted(names)), *space)


def in_batches(rows: Sequence[Encoded], answer: Callable[[Sequence[Encoded]], tuple[Any, Any]], size: int) -> Answers:
    """Logits and pooled vectors of any number of rows, in their order, from batches of rows of similar length."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    logits: list[Any] = [None] * len(rows)
    embedding: list[Any] = [None] * len(rows)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        for place, one, vector in zip(places, *answer([rows[place] for place in places]), strict=True):
            logits[place], embedding[place] = one, vector
    return Answers(np.stack(logits), np.stack(embedding), np.empty(0))
