"""Examples of every kind as sequences of word-pieces: one each, one an option, or one a window of a long passage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import Kind, UsageError
from openbook.types import Example, Span

Columns = dict[str, NDArray[Any]]  # of R rows with T tokens in all: (R,) or (R, k), and (T,) for those of `OF_TOKENS`
OF_TOKENS = ("input_ids", "token_type_ids", "start", "end", "word", "tag")
IGNORED = -100  # the label of what carries no loss
AT_ONCE = 1_000  # examples the tokenizer gets in one call


@dataclass(frozen=True)
class Cutting:
    """How texts become sequences of at most `max_length` word-pieces, special tokens included."""

    max_length: int
    stride: int = 128  # word-pieces that two windows of a passage share
    training: bool = True  # what carries no loss is left out; for predictions, everything is kept
    null_allowed: bool = False  # a window without the answer points to [CLS]


def encode(examples: Sequence[Example], tokenizer: Any, cutting: Cutting, kind: Kind) -> Columns:
    """The rows of these examples, those of an example after each other; `example` (R,) says whose they are.

    Spans have `label` (R, 4), first and last token of the answer and of the passage, and the characters `start`, `end`
    of tokens in the passage. Options have `label` (R,), 1 for the right one; classes and targets as they are. Tags have
    `word`, which one begins with this token, else -1. Raises UsageError for what tokenizer or `cutting` cannot serve.
    """
    parts = []
    for at in range(0, len(examples), AT_ONCE):
        part = ENCODERS[kind](examples[at : at + AT_ONCE], tokenizer, cutting)
        parts.append(part | {"example": part["example"] + at})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if kind == "span_extraction":
        return columns
    labels: list[Any] = [example.label for example in examples if example.label is not None]
    if 0 < len(labels) < len(examples):
        raise ValueError("some examples have a label and some have none")
    if not labels:
        return {name: column for name, column in columns.items() if name not in ("label", "tag")}
    if kind in ("classification", "regression", "multi_label"):
        is_target = any(isinstance(label, float) for label in labels)
        columns["label"] = np.array(labels, np.float32 if is_target else np.int64)
    return columns


def within(lengths: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions begin, begin + 1, ... of ranges of these lengths (k,), one range after the other."""
    before = np.cumsum(lengths) - lengths
    places: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(begins - before, lengths)
    return places


def _texts(examples: Sequence[Example], tokenizer: Any, cutting: Cutting) -> Columns:
    """[CLS] text [SEP], or [CLS] text [SEP] second text [SEP], whose longer text is cut."""
    texts = [e.text if e.text_pair is None else (e.text, e.text_pair) for e in examples]
    columns = _flat(_tokens(texts, tokenizer, cutting))
    special = {pair: tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)}
    columns["special"] = np.array([special[e.text_pair is not None] for e in examples], np.int8)
    return columns | {"example": np.arange(len(examples))}


def _options(examples: Sequence[Example], tokenizer: Any, cutting: Cutting) -> Columns:
    """[CLS] text [SEP] option [SEP] for every option; a second text stands before the option, after it a space."""
    kept = [place for place, e in enumerate(examples) if len(e.options) > 1 or not cutting.training]
    owners = [(place, number) for place in kept for number in range(len(examples[place].options))]
    if not owners:
        return _nothing(("special", "example", "label"))
    columns = _flat(_tokens([_choice(examples[place], number) for place, number in owners], tokenizer, cutting))
    columns["special"] = np.full(len(owners), tokenizer.num_special_tokens_to_add(pair=True), np.int8)
    columns["label"] = np.array([examples[place].label == number for place, number in owners], np.int64)
    return columns | {"example": np.array([place for place, _ in owners])}


def _windows(examples: Sequence[Example], tokenizer: Any, cutting: Cutting) -> Columns:
    """[CLS] question [SEP] part of the passage [SEP], in as many windows as the passage takes."""
    _refuse_slow(tokenizer)
    refuse_long_questions(examples, tokenizer, cutting)
    texts = [(e.text, e.text_pair or "") for e in examples]
    how = {"truncation": "only_second", "stride": cutting.stride, "return_overflowing_tokens": True}
    encoded = _tokens(texts, tokenizer, cutting, return_offsets_mapping=True, **how)
    columns = _flat(encoded)
    characters = _characters(encoded)
    columns["example"] = np.asarray(encoded["overflow_to_sample_mapping"], np.int64)
    rows = len(columns["example"])
    columns["special"] = np.full(rows, tokenizer.num_special_tokens_to_add(pair=True), np.int8)
    labels = np.empty((rows, 4), np.int64)
    ends = np.cumsum(columns["length"])
    for row, owner in enumerate(columns["example"]):
        sequence = np.array([-1 if part is None else part for part in encoded.sequence_ids(row)])
        if sequence[0] != -1:
            raise UsageError(f"tokenizer {tokenizer.name_or_path!r} begins with no [CLS]; span_extraction needs one")
        mine = characters[ends[row] - len(sequence) : ends[row]]  # (L, 2)
        mine[sequence != 1] = 0
        first, last = _ends_of(sequence == 1)
        answer = _tokens_of(examples[owner].label, mine[first : last + 1]) if cutting.training else None
        nothing = 0 if cutting.training else IGNORED
        labels[row] = (nothing, nothing, first, last) if answer is None else (*(first + np.array(answer)), first, last)
    columns |= {"start": characters[:, 0], "end": characters[:, 1], "label": labels}
    if not cutting.training:
        return columns
    open_ones = labels[:, 3] - labels[:, 2] + 1 + cutting.null_allowed  # positions that an answer may begin at
    return _only(columns, (open_ones > 1) & (cutting.null_allowed | (labels[:, 0] > 0)))


def _tagged(examples: Sequence[Example], tokenizer: Any, cutting: Cutting) -> Columns:
    """[CLS] words [SEP], with the tag of a word on its first piece. The words are read as a text, joined by spaces."""
    _refuse_slow(tokenizer)
    texts = [" ".join(e.words) for e in examples]
    encoded = _tokens(texts, tokenizer, cutting, return_offsets_mapping=True)
    columns = _flat(encoded)
    characters = _characters(encoded)
    words = np.full(len(characters), -1, np.int32)
    tags = np.full(len(characters), IGNORED, np.int32)
    end = 0
    for example, length in zip(examples, columns["length"], strict=True):
        begin, end = end, end + length
        firsts, numbers = _first_pieces(example.words, characters[begin:end])
        words[begin + firsts] = numbers
        if isinstance(example.label, tuple):
            tags[begin + firsts] = np.array(example.label, np.int32)[numbers]
    columns["special"] = np.full(len(examples), tokenizer.num_special_tokens_to_add(pair=False), np.int8)
    columns |= {"example": np.arange(len(examples)), "word": words, "tag": tags}
    if not cutting.training:
        return columns
    owners = np.repeat(columns["example"], columns["length"])[words >= 0]
    return _only(columns, np.bincount(owners, minlength=len(examples)) > 0)


ENCODERS: dict[Kind, Callable[[Sequence[Example], Any, Cutting], Columns]] = {
    "classification": _texts,
    "regression": _texts,
    "multi_label": _texts,
    "multiple_choice": _options,
    "span_extraction": _windows,
    "token_classification": _tagged,
}


def _tokens(texts: Sequence[Any], tokenizer: Any, cutting: Cutting, **how: Any) -> Any:
    return tokenizer(
        list(texts),
        max_length=cutting.max_length,
        padding=False,
        return_token_type_ids=True,
        return_attention_mask=False,
        **{"truncation": "longest_first"} | how,
    )


def _flat(encoded: Any) -> Columns:
    pieces = [np.asarray(row, np.int32) for row in encoded["input_ids"]]
    types = [np.asarray(row, np.int8) for row in encoded["token_type_ids"]]
    lengths = np.fromiter(map(len, pieces), np.int64)
    return {"length": lengths, "input_ids": np.concatenate(pieces), "token_type_ids": np.concatenate(types)}


def _characters(encoded: Any) -> NDArray[np.int32]:
    """Where every token (T, 2) begins and ends in its text."""
    return np.concatenate([np.asarray(row, np.int32).reshape(-1, 2) for row in encoded["offset_mapping"]])


def _nothing(names: Sequence[str]) -> Columns:
    empty = {"length": np.int64, "input_ids": np.int32, "token_type_ids": np.int8, "special": np.int8}
    return {name: np.empty(0, empty.get(name, np.int64)) for name in dict.fromkeys([*empty, *names])}


def _only(columns: Columns, kept: NDArray[np.bool_]) -> Columns:
    """The rows (R,) that are kept, with their tokens."""
    tokens = np.repeat(kept, columns["length"])
    return {name: column[tokens if name in OF_TOKENS else kept] for name, column in columns.items()}


def _choice(example: Example, number: int) -> tuple[str, str]:
    option = example.options[number]
    return example.text, option if example.text_pair is None else f"{example.text_pair} {option}"


def _ends_of(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """First and last position that is true; (1, 0) if none is."""
    found = np.flatnonzero(inside)
    return (int(found[0]), int(found[-1])) if len(found) else (1, 0)


def _tokens_of(answer: Any, characters: NDArray[np.int32]) -> tuple[int, int] | None:
    """First and last token that the answer touches, if the passage's tokens in this window (n, 2) hold all of it."""
    if not isinstance(answer, Span) or not len(characters):
        return None
    begins, ends = characters.T
    if answer.start < begins[0] or answer.end > ends[-1]:
        return None
    first = int(np.searchsorted(ends, answer.start, side="right"))
    last = int(np.searchsorted(begins, answer.end, side="left")) - 1
    return (first, last) if first <= last else None


def _first_pieces(words: Sequence[str], characters: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions of the tokens (L, 2) that begin a word, and the words' numbers.

    A token belongs to the word that its last character is in: byte-level tokenizers count the space before it too.
    """
    real = np.flatnonzero(characters[:, 1] > characters[:, 0])
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])[: len(words)]
    numbers = np.searchsorted(begins, characters[real, 1] - 1, side="right") - 1
    new = np.diff(numbers, prepend=-1) != 0
    return real[new], numbers[new]


def _refuse_slow(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise UsageError(f"tokenizer {name!r} does not tell where its tokens stand; choose a model with a fast one")


def refuse_long_questions(examples: Sequence[Example], tokenizer: Any, cutting: Cutting) -> None:
    """Raise UsageError where a question leaves no room: it is never cut, and every window must move on."""
    questions = tokenizer([e.text for e in examples], add_special_tokens=False, verbose=False)["input_ids"]
    lengths = [len(question) for question in questions]
    longest = int(np.argmax(lengths))
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if lengths[longest] + special + cutting.stride >= cutting.max_length:
        taken = f"the question of {examples[longest].id!r} takes {lengths[longest]} and the special tokens {special}"
        least = lengths[longest] + special + cutting.stride + 1
        raise UsageError(
            f"task.max_length={cutting.max_length} leaves no room for a passage whose windows share"
            f" task.stride={cutting.stride} word-pieces: {taken}; set task.max_length to {least} or more"
            " (384 is usual), lower task.stride, or shorten the question"
        )
