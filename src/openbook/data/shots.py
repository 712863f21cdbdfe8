"""Few examples of a task, drawn so that everybody who asks for the same draw gets the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from openbook.config import UsageError
from openbook.data.splits import normalised
from openbook.types import Example

DRAWS = 5  # of every number of shots
BINS = 4  # of equally many rows, by which the targets of a regression are spread


def draw(
    examples: Sequence[Example], shots: int, number: int, labels: Sequence[str] | None
) -> tuple[list[Example], list[Example]]:
    """Rows to fine-tune on and equally many to select by: `shots` of each class on either side, in the order given.

    `number` is one of the five draws, 0 to 4; `labels` are the class names. Without them it is a regression: four bins
    by the rank of the target take the place of classes, so either side has 4 x `shots` rows. Of rows with equal texts
    only the first is drawn. A draw of 16 lies in that of 32 of the same number, and depends on nothing but the rows
    and their ids (multi-task infused distillation, section 2.9). Raises UsageError for a class with fewer than
    2 x `shots` rows of different text, and for tasks that have neither classes nor targets.
    """
    if shots < 1 or number not in range(DRAWS):
        raise UsageError(f"shots={shots}, draw={number}: shots are 1 or more, and draws go from 0 to {DRAWS - 1}")
    different = list({normalised(example): example for example in reversed(examples)}.values())[::-1]
    train: set[str] = set()
    select: set[str] = set()
    for name, members in (_bins(different) if labels is None else _classes(different, labels)).items():
        if len(members) < 2 * shots:
            fix = f"{2 * shots} are needed for shots={shots} and as many to select by; lower the shots or add rows"
            raise UsageError(f"{name} has {len(members)} rows of different text: {fix}")
        shuffled = sorted((example.id for example in members), key=lambda row: _place(row, number))
        train.update(shuffled[:shots])
        select.update(shuffled[-shots:])  # from the other end, so that more shots add rows and move none
    return [one for one in different if one.id in train], [one for one in different if one.id in select]


def _place(row: str, number: int) -> bytes:
    """Where a row stands in the shuffle of this draw."""
    return blake2b(f"{number}/{row}".encode(), digest_size=16).digest()


def _classes(examples: Sequence[Example], labels: Sequence[str]) -> dict[str, list[Example]]:
    members: dict[str, list[Example]] = {f"class {name!r}": [] for name in labels}
    names = list(members)
    for example in examples:
        if type(example.label) is not int or not 0 <= example.label < len(names):
            raise UsageError(f"row {example.id}: label {example.label!r} is no index of the classes {list(labels)}")
        members[names[example.label]].append(example)
    return members


def _bins(examples: Sequence[Example]) -> dict[str, list[Example]]:
    targets = [example.label for example in examples]
    other = [example for example in examples if not isinstance(example.label, float)]
    if other:
        wanted = "few-shot draws need classes, or numbers as targets"
        raise UsageError(f"row {other[0].id}: label {other[0].label!r} is neither; {wanted}")
    parts = np.array_split(np.argsort(np.array(targets, dtype=np.float64), kind="stable"), BINS)
    return {
        f"bin {place + 1} of {BINS} of the targets": [examples[index] for index in part]
        for place, part in enumerate(parts)
    }
