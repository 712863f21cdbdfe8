"""Several labels a row: a list of names, or a string whose names are separated; what cannot be is refused by row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from openbook.config import UsageError
from openbook.data.labels import MOST_CLASSES, derive_labels, index_of, label_name, meant, refuse
from openbook.data.rows import LabelledRow, Split

DELIMITERS = "|;,"  # the first of them that a string holds separates its names


def names_in(value: Any, labels: Sequence[str] = ()) -> list[str]:
    """The names that a cell holds; an empty one, or none at all, holds no name.

    A string is one of `labels` as a whole, a list in JSON, or names separated by `|`, else by `;`, else by `,`. Raises
    ValueError, which says what is wrong, for anything but names and whole numbers, and for a name given twice.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    parts = _parts(value, labels) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    if not all(map(_is_name, parts)):
        raise ValueError("is no set of labels; give a list of names, or names separated by '|'")
    names = [name for part in parts if (name := label_name(part).strip())]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"names {twice[0]!r} twice; give the names that apply, each once (not a 0 or 1 for each)")
    return names


def set_names(split: Split, rows: Sequence[LabelledRow]) -> tuple[str, ...]:
    """The label names of training rows, sorted; numbers in lists tell none, and one name alone is nothing to learn."""
    found: set[str] = set()
    for row in rows:
        if _has_numbers(row.label):
            refuse(row, split, "holds numbers; list the names they stand for in task.labels, in index order")
        names = _names(row, split)
        unclear = [name for name in names if isinstance(row.label, str) and any(one in name for one in DELIMITERS)]
        if unclear:
            refuse(
                row, split, f"may be separated at more than one sign ({unclear[0]!r}); list the names in task.labels"
            )
        found.update(names)
    column = f"{split.place}: column {split.label!r}"
    if len(found) < 2:
        told = f"names {min(found)!r} alone" if found else "names no label in any row"
        raise UsageError(f"{column} {told}, which leaves nothing to tell apart; add rows with other labels")
    if len(found) > max(MOST_CLASSES, len(rows) // 2):
        raise UsageError(f"{column} has {len(found)} different names in {len(rows)} rows; name another task.label")
    return derive_labels(found)


def label_set(row: LabelledRow, split: Split, labels: tuple[str, ...]) -> tuple[int, ...]:
    """For each label name whether the row has it, 1 or 0."""
    indices = set()
    for name in _names(row, split, labels):
        index = index_of(name, labels)
        if index is None:
            known = f"names {name!r}, not one of {list(labels)}; {meant(name, labels)}"
            refuse(row, split, f"{known}Mend the row, or list every label in task.labels")
        indices.add(index)
    return tuple(int(place in indices) for place in range(len(labels)))


def _names(row: LabelledRow, split: Split, labels: Sequence[str] = ()) -> list[str]:
    try:
        return names_in(row.label, labels)
    except ValueError as error:
        refuse(row, split, str(error))


def _parts(text: str, labels: Sequence[str]) -> Any:
    text = text.strip()
    if text in labels:
        return text
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError("begins like a list and is none in JSON; write names separated by '|'") from None
    delimiter = next((one for one in DELIMITERS if one in text), None)
    return text.split(delimiter) if delimiter else text


def _is_name(part: Any) -> bool:
    is_number = isinstance(part, int) or (isinstance(part, float) and part.is_integer())
    return isinstance(part, str) or (is_number and not isinstance(part, bool))


def _has_numbers(value: Any) -> bool:
    return any(
        isinstance(part, int | float) and part == part for part in (value if isinstance(value, list) else [value])
    )
