"""Rows turned into examples: classes, sets of labels, targets, answers in a passage, options, a tag for each word."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from openbook.config import Kind, UsageError
from openbook.data.label_sets import label_set
from openbook.data.labels import class_index, index_of, is_whole, label_name, meant, present, refuse, target
from openbook.data.rows import LabelledRow, Split
from openbook.types import Example, Span

Labels = tuple[str, ...] | None
OUTSIDE = "O"  # the tag of a word that belongs to no entity


def label_rows(prefix: str, split: Split, rows: Sequence[LabelledRow], labels: Labels) -> list[Example]:
    """An example of each row; its id tells where it comes from. Raises UsageError by row for what cannot be a label."""
    answer = ANSWERS[split.kind]
    return [
        Example(
            f"{prefix}/{row.position}",
            row.text,
            row.text_pair,
            options=row.options,
            words=row.words,
            **answer(row, split, labels),
        )
        for row in rows
    ]


def tag_names(split: Split, rows: Sequence[LabelledRow]) -> tuple[str, ...]:
    """The tags of training rows, sorted, `O` first; numbers tell no names and are refused."""
    found = set()
    for row in rows:
        tags = _tags(row, split)
        if not all(isinstance(tag, str) for tag in tags):
            refuse(row, split, "holds numbers; list the names they stand for in task.labels, in index order")
        found.update(tags)
    if len(found) < 2:
        only = f"column {split.label!r} is {sorted(found)} in every row"
        raise UsageError(f"{split.place}: {only}, which leaves nothing to learn; add rows with other tags")
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))


def _class(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    assert labels is not None
    return {"label": class_index(row, split, labels)}


def _set(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    assert labels is not None
    return {"label": label_set(row, split, labels)}


def _target(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    return {"label": target(row, split)}


def _span(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    """The first answer as a span, without white space around it; all of them as texts."""
    passage = row.text_pair or ""
    accepted = []
    for text, start in _answers(row, split):
        if not isinstance(text, str) or not text.strip() or isinstance(start, bool) or not isinstance(start, int):
            refuse(row, split, f"has the answer {text!r} at {start!r}: a text and its first character are expected")
        found = passage[max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or found != text:
            where = f"at character {start} of column {split.text_pair!r}"
            refuse(row, split, f"has the answer {text!r}, but {where} stands {found!r}; mend answer_start")
        begin = start + len(text) - len(text.lstrip())
        accepted.append((text.strip(), begin))
    if not accepted:
        return {"label": None}
    text, begin = accepted[0]
    return {"label": Span(begin, begin + len(text)), "answers": tuple(dict.fromkeys(text for text, _ in accepted))}


def _answers(row: LabelledRow, split: Split) -> list[tuple[Any, Any]]:
    """Text and first character of every answer; an unanswerable question has none."""
    written = row.label
    if isinstance(written, dict):
        texts, starts = written.get("text"), written.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    if isinstance(written, list) and all(isinstance(answer, dict) for answer in written):
        return [(answer.get("text"), answer.get("answer_start")) for answer in written]
    wanted = '{"text": [...], "answer_start": [...]} with lists of equal length, or a list of {"text", "answer_start"}'
    refuse(row, split, f"is no answer; give {wanted}, empty where there is none")


def _option(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    """The right option by its number from 0, its letter or its text; with `labels`, by its name there."""
    value = present(row, split)
    name = label_name(value)
    readings: set[int] = set()
    if labels is not None:
        readings = {labels.index(name)} if name in labels else readings
    elif not isinstance(value, bool):
        readings = {int(name)} if is_whole(name) else readings
        if isinstance(value, str):
            readings |= {place for place, option in enumerate(row.options) if option.strip() == name.strip()}
            readings |= {string.ascii_uppercase.index(name)} if name in [*string.ascii_uppercase] else set()
    readings = {place for place in readings if 0 <= place < len(row.options)}
    if len(readings) > 1:
        refuse(row, split, f"could be any of the options {sorted(readings)} (from 0): {[*row.options]}; write a letter")
    if not readings:
        ways = f"the names {list(labels)}" if labels else "their numbers from 0, letters from A or texts"
        refuse(row, split, f"is none of its {len(row.options)} options {[*row.options]}, told by {ways}; mend the row")
    return {"label": readings.pop()}


def _tag_of_each_word(row: LabelledRow, split: Split, labels: Labels) -> dict[str, Any]:
    assert labels is not None
    tags = _tags(row, split)
    if len(tags) != len(row.words):
        refuse(row, split, f"has {len(tags)} tags for the {len(row.words)} words of column {split.text!r}")
    names = [label_name(tag) for tag in tags]
    indices = [index_of(name, labels) for name in names]
    for number, (name, index) in enumerate(zip(names, indices, strict=True), start=1):
        if index is None:
            unknown = f"gives word {number} the tag {name!r}, not one of {list(labels)}; {meant(name, labels)}"
            refuse(row, split, f"{unknown}Mend the row, or list every tag in task.labels")
    return {"label": tuple(indices)}


def _tags(row: LabelledRow, split: Split) -> list[Any]:
    tags = row.label
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) and not isinstance(tag, bool) for tag in tags):
        refuse(row, split, "is no list of tags; one string or whole number for each word is expected")
    return tags


ANSWERS: dict[Kind, Callable[[LabelledRow, Split, Labels], dict[str, Any]]] = {
    "classification": _class,
    "regression": _target,
    "multi_label": _set,
    "span_extraction": _span,
    "multiple_choice": _option,
    "token_classification": _tag_of_each_word,
}
