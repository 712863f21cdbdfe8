"""Labels as they are written, turned into class indices or targets; what cannot be is refused by row and value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from openbook.config import UsageError
from openbook.data.rows import SHOWN, LabelledRow, Split

MOST_CLASSES = 50  # a column with more values is one of classes only if rows share them


def derive_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """Label names found in rows: sorted, as numbers if all of them are whole numbers."""
    names = {label_name(value) for value in values}
    return tuple(sorted(names, key=int) if all(map(is_whole, names)) else sorted(names))


def label_name(value: Any) -> str:
    """The name a label goes by: `true` for True, `1` for 1 and 1.0, a string as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def class_names(split: Split, rows: Sequence[LabelledRow], kind_is_given: bool) -> tuple[str, ...]:
    """The label names of training rows; what does not look like classes is refused."""
    found = derive_labels(present(row, split) for row in rows)
    column = f"{split.place}: column {split.label!r}"
    fractions = [name for name in found if _is_fraction(name)]
    if fractions and not kind_is_given:
        raise UsageError(f"{column} holds {fractions[0]!r}; set task.kind: regression (or classification)")
    if len(found) > max(MOST_CLASSES, len(rows) // 2):
        fix = "name another task.label, or set task.kind: regression"
        raise UsageError(f"{column} has {len(found)} different values in {len(rows)} rows: no classes; {fix}")
    if len(found) < 2:
        raise UsageError(
            f"{column} is {found[0]!r} in every row, which leaves nothing to learn; add rows of other classes"
        )
    return found


def target(row: LabelledRow, split: Split) -> float:
    """The number to regress on."""
    value = present(row, split)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        refuse(row, split, "is no finite number; a regression needs one, or set task.kind: classification")
    return number


def class_index(row: LabelledRow, split: Split, labels: tuple[str, ...]) -> int:
    """The place of the row's class among the label names."""
    name = label_name(present(row, split))
    index = index_of(name, labels)
    if index is not None:
        return index
    if isinstance(row.label, bool):
        refuse(row, split, f"is a boolean, not one of {list(labels)}; YAML and JSON need quotes: 'yes', 'no'")
    refuse(
        row,
        split,
        f"is not one of {list(labels)}; {meant(name, labels)}Mend the row, or list every label in task.labels",
    )


def index_of(name: str, labels: tuple[str, ...]) -> int | None:
    """The place of a name, or the name as a place."""
    if name in labels:
        return labels.index(name)
    # Names that are numbers leave no room for indices: 1 could be the first or the second of ("1", "2").
    return int(name) if is_whole(name) and 0 <= int(name) < len(labels) and not any(map(is_whole, labels)) else None


def meant(name: str, labels: tuple[str, ...]) -> str:
    """A hint to the label name that is nearest, if one is near."""
    near = difflib.get_close_matches(name, labels, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def present(row: LabelledRow, split: Split) -> Any:
    """The label of a row that has one."""
    value = row.label
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        refuse(row, split, "is missing; fill it in or remove the row")
    if not isinstance(value, str | int | float):
        refuse(row, split, "is no single label; give one string or number a row, or set task.kind: multi_label")
    return value


def refuse(row: LabelledRow, split: Split, why: str) -> NoReturn:
    """Say where the label is, what it is and why it cannot be read."""
    raise UsageError(
        f"{split.place}, row {row.position + 1}: label {repr(row.label)[:SHOWN]} (column {split.label!r}) {why}"
    )


def is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _is_fraction(name: str) -> bool:
    try:
        return not float(name).is_integer() and math.isfinite(float(name))
    except ValueError:
        return False
