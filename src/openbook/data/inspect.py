"""What a file of the user's own seems to hold: the column of the text, that of the label, and the kind of task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openbook.config import Kind, UsageError
from openbook.data.label_sets import names_in
from openbook.data.labels import derive_labels
from openbook.data.sources import Row

PAIRS = [
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("question", "answer"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
]
# fmt: off
TEXTS = [
    "text", "sentence", "content", "review", "question", "tweet", "comment", "message", "body", "document", "utterance",
    "query", "headline", "title",
]
LABELS = [
    "label", "labels", "target", "class", "category", "score", "rating", "sentiment", "intent", "topic", "stars",
    "similarity", "gold_label", "gold", "answer", "y",
]
# fmt: on
MOST_CLASSES = 150  # more different values than this are no class label
MOST_NUMBERED_CLASSES = 20  # more different numbers than this are a target to regress on


@dataclass(frozen=True)
class Guess:
    """Columns and kind, ready to be written into a recipe."""

    text: str
    text_pair: str | None
    label: str
    kind: Kind
    labels: tuple[str, ...] | None


def guess_columns(rows: Sequence[Row]) -> Guess:
    """Guess by the columns' names, and where these say nothing, by their contents. Raises UsageError if unsure."""
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    text, text_pair = _text_columns(columns)
    rest = {name: values for name, values in columns.items() if name not in (text, text_pair)}
    label = _label_column(rest)
    if label is None:
        names = ", ".join(map(repr, columns))
        raise UsageError(
            f"no column looks like a label; call it `label`, or write the recipe by hand. Columns: {names}"
        )
    values = [value for value in rest[label] if not _is_missing(value)]
    if _are_sets(values):
        return Guess(text, text_pair, label, "multi_label", derive_labels(_names_of(values)))
    kind: Kind = "regression" if _is_target(values) else "classification"
    return Guess(text, text_pair, label, kind, derive_labels(values) if kind == "classification" else None)


def _text_columns(columns: dict[str, list[Any]]) -> tuple[str, str | None]:
    strings = {name: values for name, values in columns.items() if _is_text(values)}
    named = {name.casefold(): name for name in strings}
    for first, second in PAIRS:
        if first in named and second in named and not _looks_like_classes(strings[named[second]]):
            return named[first], named[second]
    for name in TEXTS:
        if name in named and not _looks_like_classes(strings[named[name]]):
            return named[name], None
    candidates = {name: values for name, values in strings.items() if name.casefold() not in LABELS}
    if not candidates:
        names = ", ".join(map(repr, columns))
        raise UsageError(f"no column looks like text; call it `text`, or write the recipe by hand. Columns: {names}")
    return max(candidates, key=lambda name: sum(len(value or "") for value in candidates[name])), None


def _label_column(columns: dict[str, list[Any]]) -> str | None:
    named = {name.casefold(): name for name in columns}
    for name in LABELS:
        if name in named:
            return named[name]
    fitting = [name for name, values in columns.items() if _looks_like_classes(values)]
    return fitting[-1] if fitting else None  # labels are commonly written last


def _is_text(values: Sequence[Any]) -> bool:
    """All strings, and not all of them numbers: CSV has nothing but strings."""
    present = [value for value in values if value is not None]
    strings = bool(present) and all(isinstance(value, str) for value in present)
    return strings and not all(_is_number(value) for value in present)


def _looks_like_classes(values: Sequence[Any]) -> bool:
    present = [value for value in values if not _is_missing(value)]
    if not all(isinstance(value, str | int | float) for value in present):
        return False
    different = len(set(present))
    return 2 <= different <= min(MOST_CLASSES, max(2, len(present) // 3))


def _is_target(values: Sequence[Any]) -> bool:
    if not values or not all(_is_number(value) for value in values):
        return False
    numbers = {float(value) for value in values}
    return len(numbers) > MOST_NUMBERED_CLASSES or any(not number.is_integer() for number in numbers)


def _are_sets(values: Sequence[Any]) -> bool:
    """Lists, or strings some of which hold several names of a common stock, separated by `|`."""
    try:
        names = _names_of(values)
    except ValueError:
        return False
    if any(isinstance(value, list) for value in values):
        return bool(names)
    return any(isinstance(value, str) and "|" in value for value in values) and len(names) < len(set(values))


def _names_of(values: Sequence[Any]) -> set[str]:
    return {name for value in values for name in names_in(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
