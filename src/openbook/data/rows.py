"""The rows of one split of a task: where they are, which columns are read, and which rows are of no use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from openbook.config import Kind, Source, UsageError
from openbook.data.sources import Row, describe, read, require_column

LONG_TEXT = 20_000  # characters; longer ones are worth a warning, since most of them is cut away
SHOWN = 80  # characters of a value that an error message repeats


@dataclass(frozen=True)
class Split:
    """Where the rows of one split are, and which of their columns are read."""

    key: str  # in the recipe
    source: Source
    text: str
    text_pair: str | None
    label: str
    kind: Kind = "classification"
    options: str | tuple[str, ...] | None = None

    @property
    def place(self) -> str:
        return f"{self.key}: {describe(self.source)}"

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Every column that is read, after the key of the recipe that names it."""
        options = (self.options,) if isinstance(self.options, str) else self.options or ()
        named = [("text", self.text), ("text_pair", self.text_pair), ("label", self.label)]
        named += [("options", column) for column in options]
        return [(f"task.{part}", column) for part, column in named if column is not None]


@dataclass(frozen=True)
class LabelledRow:
    """A row with text, whose label is still as it was written."""

    position: int
    text: str
    text_pair: str | None
    label: Any
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def labelled_rows(split: Split, unlabelled: int | None, warnings: list[str]) -> list[LabelledRow]:
    """The rows of a split that have text. What was dropped, and what will be cut, is told in `warnings`."""
    rows = read(split.source, split.key)
    columns = dict.fromkeys(name for row in rows for name in row)
    for key, name in split.columns:
        require_column(name, columns, key, split.place)
    kept = [_labelled_row(row, position, split) for position, row in enumerate(rows)]
    full = [row for row in kept if row.text.strip() and (row.text_pair is None or row.text_pair.strip())]
    if not full:
        raise UsageError(f"{split.place}: column {split.text!r} is empty in all {len(rows)} rows; name another")
    labelled = [row for row in full if unlabelled is None or row.label != unlabelled]
    open_ones = [row for row in labelled if split.kind != "multiple_choice" or len(row.options) > 1]
    if not open_ones:
        raise UsageError(f"{split.place}: task.options={split.options!r} gives no row two options; name other columns")
    is_cut = split.kind != "span_extraction"  # which has windows
    long = sum(is_cut and len(row.text) + len(row.text_pair or "") > LONG_TEXT for row in open_ones)
    _count(warnings, split, len(rows) - len(full), "rows without text were dropped")
    _count(warnings, split, len(full) - len(labelled), "rows without a label were dropped")
    _count(warnings, split, len(labelled) - len(open_ones), "rows with fewer than two options were dropped")
    _count(warnings, split, long, f"rows are longer than {LONG_TEXT:,} characters and are cut to task.max_length")
    return open_ones


def _labelled_row(row: Row, position: int, split: Split) -> LabelledRow:
    pair = _text(row, split.text_pair, position, split) if split.text_pair is not None else None
    label, options = row.get(split.label), _options(row, position, split)
    if split.kind == "token_classification":
        words = _strings(row, split.text, position, split)
        return LabelledRow(position, " ".join(words), pair, label, options, words)
    return LabelledRow(position, _text(row, split.text, position, split), pair, label, options)


def _options(row: Row, position: int, split: Split) -> tuple[str, ...]:
    """The options up to the last one that is not empty: rows with fewer of them leave columns empty."""
    if split.options is None:
        return ()
    if isinstance(split.options, str):
        options = list(_strings(row, split.options, position, split))
    else:
        options = [_text(row, column, position, split) for column in split.options]
    while options and not options[-1].strip():
        options.pop()
    if not all(option.strip() for option in options):
        where = f"{split.place}, row {position + 1}: task.options={split.options!r} gives {options}"
        raise UsageError(f"{where}, with an empty option before others; fill it in or remove the row")
    return tuple(options)


def _count(warnings: list[str], split: Split, rows: int, what: str) -> None:
    if rows:
        warnings.append(f"{split.place}: {rows} {what}")


def _text(row: Row, column: str, position: int, split: Split) -> str:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        _refuse_type(text, column, position, split, "text is expected; name another column or write it as a string")
    return text or ""


def _strings(row: Row, column: str, position: int, split: Split) -> tuple[str, ...]:
    values = row.get(column)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        _refuse_type(values, column, position, split, "a list of strings is expected (JSON or Parquet can hold one)")
    return tuple(values)


def _refuse_type(value: Any, column: str, position: int, split: Split, wanted: str) -> NoReturn:
    held = f"column {column!r} holds {repr(value)[:SHOWN]}, a {type(value).__name__}"
    raise UsageError(f"{split.place}, row {position + 1}: {held}, where {wanted}")
