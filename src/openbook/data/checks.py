"""What the examples of a task must have in common before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openbook.config import UsageError
from openbook.data.examples import OUTSIDE
from openbook.data.splits import normalised
from openbook.types import Example

ENTITY = ("B-", "I-")  # how the tags of entities begin in IOB2


def check_labels(train: Sequence[Example], labels: Sequence[str], warnings: list[str]) -> None:
    """Whether every class, or tag, has rows to learn it from. Raises UsageError if all rows have the same."""
    seen: set[Any] = set()
    for example in train:
        seen.update(example.label if isinstance(example.label, tuple) else (example.label,))
    if len(seen) < 2:
        raise UsageError(f"task.train: every row has one label of {list(labels)}; there is nothing to tell apart")
    unseen = [name for index, name in enumerate(labels) if index not in seen]
    if unseen:
        warnings.append(f"task.train: no row has the label {', '.join(map(repr, unseen))}")


def check_label_sets(train: Sequence[Example], labels: Sequence[str], warnings: list[str]) -> None:
    """Whether there is something to learn of every label. Raises UsageError if no label tells two rows apart."""
    sets = [example.label for example in train if isinstance(example.label, tuple)]
    counts = {name: sum(one[place] for one in sets) for place, name in enumerate(labels)}
    if all(count in (0, len(sets)) for count in counts.values()):
        raise UsageError(
            f"task.train: every row has the same of the labels {list(labels)}; there is nothing to tell apart"
        )
    for count, what in ((0, "no row has"), (len(sets), "every row has")):
        if named := [name for name, rows in counts.items() if rows == count]:
            warnings.append(f"task.train: {what} the label {', '.join(map(repr, named))}")


def check_answers(train: Sequence[Example], test: Sequence[Example], null_allowed: bool, warnings: list[str]) -> None:
    """Whether questions have answers, and train has unanswerable ones if test has. Raises UsageError without any."""
    if all(example.label is None for example in train):
        raise UsageError("task.train: no question has an answer, which leaves nothing to learn; add rows with answers")
    unanswerable = sum(example.label is None for example in test)
    if unanswerable and not null_allowed:
        warnings.append(
            f"task.test: {unanswerable} questions have no answer, and no question of task.train is like that"
        )


def check_tags(
    metrics: tuple[str, ...], labels: Sequence[str], splits: Mapping[str, Sequence[Example]], warnings: list[str]
) -> tuple[str, ...]:
    """The metrics that the tags allow. Raises UsageError if the first is `entity_f1` and they are not those of IOB2.

    Tags `I-x` that continue no entity of type x (IOB1, or mistakes) are told of: scores count them as beginnings.
    """
    strange = [label for label in labels if label != OUTSIDE and not label.startswith(ENTITY)]
    if strange and metrics[0] == "entity_f1":
        fix = "rename the tags, or set task.metric: accuracy"
        raise UsageError(f"task.metric='entity_f1' reads tags of IOB2 (O, B-x, I-x), and {strange[0]!r} is none; {fix}")
    if strange:
        return tuple(name for name in metrics if name != "entity_f1")
    for split, examples in splits.items():
        stray = sum(_stray(example, labels) for example in examples)
        if stray:
            what = "tags I-x follow no B-x or I-x: each counts as the beginning of an entity"
            warnings.append(f"task.{split}: {stray} {what}")
    return metrics


def count_seen(train: Sequence[Example], test: Sequence[Example], warnings: list[str]) -> None:
    """Tell how many test rows have a text that is trained on."""
    known = {normalised(example) for example in train}
    repeated = sum(normalised(example) in known for example in test)
    if repeated:
        warnings.append(f"task.test: {repeated} of {len(test)} rows have a text that is also trained on")


def _stray(example: Example, labels: Sequence[str]) -> int:
    assert isinstance(example.label, tuple)
    tags = [labels[index] for index in example.label]
    before = [OUTSIDE, *tags]
    return sum(tag.startswith("I-") and last[1:] != tag[1:] for last, tag in zip(before, tags, strict=False))
