"""The rows of one split of a task: where they are, which columns are read, and which rows are of no use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openbook.config import Source, UsageError
from openbook.data.sources import Row, describe, read, require_column

LONG_TEXT = 20_000  # characters; longer ones are worth a warning, since most of them is cut away


@dataclass(frozen=True)
class Split:
    """Where the rows of one split are, and which of their columns are read."""

    key: str  # in the recipe
    source: Source
    text: str
    text_pair: str | None
    label: str

    @property
    def place(self) -> str:
        return f"{self.key}: {describe(self.source)}"


@dataclass(frozen=True)
class LabelledRow:
    """A row with text, whose label is still as it was written."""

    position: int
    text: str
    text_pair: str | None
    label: Any


def labelled_rows(split: Split, unlabelled: int | None, warnings: list[str]) -> list[LabelledRow]:
    """The rows of a split that have text. What was dropped, and what will be cut, is told in `warnings`."""
    rows = read(split.source, split.key)
    columns = dict.fromkeys(name for row in rows for name in row)
    for part in ("text", "text_pair", "label"):
        name = getattr(split, part)
        if name is not None:
            require_column(name, columns, f"task.{part}", split.place)
    kept = [_labelled_row(row, position, split) for position, row in enumerate(rows)]
    full = [row for row in kept if row.text.strip() and (row.text_pair is None or row.text_pair.strip())]
    if not full:
        raise UsageError(f"{split.place}: column {split.text!r} is empty in all {len(rows)} rows; name another")
    labelled = [row for row in full if unlabelled is None or row.label != unlabelled]
    long = sum(len(row.text) + len(row.text_pair or "") > LONG_TEXT for row in labelled)
    _count(warnings, split, len(rows) - len(full), "rows without text were dropped")
    _count(warnings, split, len(full) - len(labelled), "rows without a label were dropped")
    _count(warnings, split, long, f"rows are longer than {LONG_TEXT:,} characters and are cut to task.max_length")
    return labelled


def _labelled_row(row: Row, position: int, split: Split) -> LabelledRow:
    pair = _text(row, split.text_pair, position, split) if split.text_pair is not None else None
    return LabelledRow(position, _text(row, split.text, position, split), pair, row.get(split.label))


def _count(warnings: list[str], split: Split, rows: int, what: str) -> None:
    if rows:
        warnings.append(f"{split.place}: {rows} {what}")


def _text(row: Row, column: str, position: int, split: Split) -> str:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"{split.place}, row {position + 1}: column {column!r} holds {text!r}, a {type(text).__name__}, where text "
            "is expected; name another column or write it as a string"
        )
    return text or ""
