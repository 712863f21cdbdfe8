"""Labels that stand at other rows: what a control learns, to which nothing is left but how labels are spread."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from openbook.types import Example, Span

WORD = re.compile(r"\S+")


def with_labels_moved(rows: Sequence[Example], dice: random.Random) -> list[Example]:
    """Every row with the label of another one that fits it, all labels kept; in the order of the rows.

    Tags move between rows of as many words, a right option between questions of as many options. An answer's place in
    its passage and its number of words move, so that an answer is words of the row's own passage.
    """
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        alike[len(row.words), len(row.options)].append(place)
    moved = list(rows)
    for places in alike.values():
        givers = dice.sample(places, len(places))
        for place, giver in zip(places, givers, strict=True):
            moved[place] = with_label_of(rows[place], rows[giver])
    return moved


def with_label_of(row: Example, giver: Example) -> Example:
    if not isinstance(giver.label, Span):
        return replace(row, label=giver.label, answers=())
    assert row.text_pair is not None
    assert giver.text_pair is not None
    answer = same_place(giver.label, giver.text_pair, row.text_pair)
    return replace(row, label=answer, answers=(row.text_pair[answer.start : answer.end],))


def same_place(answer: Span, passage: str, other: str) -> Span:
    """As many words of another passage as an answer has, as far into it."""
    words, before = list(WORD.finditer(other)), len(passage[: answer.start].split())
    count = min(len(words), max(1, len(passage[answer.start : answer.end].split())))
    first = min(len(words) - count, len(words) * before // len(passage.split()))
    return Span(words[first].start(), words[first + count - 1].end())
