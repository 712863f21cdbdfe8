"""Entries of a knowledge base: what one says, for people to read, and which of them a query is not to find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook.config import THRESHOLD, UsageError
from openbook.knowledge_base.interpolate import own_positions
from openbook.knowledge_base.manifest import TRAIN
from openbook.types import KnowledgeBase

LeaveOut = bool | Sequence[str]
Hidden = Callable[[KnowledgeBase], list[NDArray[np.int64]]]  # positions that each query must not find in a base


@dataclass(frozen=True)
class Entry:
    """One text and what is kept of it."""

    id: str
    text: str  # a pair is its two texts joined by a tab
    value: Mapping[str, float]  # what it says: the probability of every label; in regression the score, as `score`
    told: str  # the same for people: the most probable label, or those above one half, with their probabilities
    origin: str
    weight: float  # how often it counts


def entries_with(base: KnowledgeBase, words: str) -> list[Entry]:
    """Those whose text holds these words, whatever their case, in the order of the base."""
    sought = words.casefold()
    return [entry(base, place) for place, text in enumerate(base.texts) if sought in text.casefold()]


def entry(base: KnowledgeBase, place: int) -> Entry:
    value = dict(zip(base.manifest["labels"] or ("score",), base.values[place].tolist(), strict=True))
    return Entry(
        id=base.ids[place],
        text=base.texts[place],
        value=value,
        told=in_words(value, base.manifest["kind"]),
        origin=base.origins[place] if base.origins else TRAIN,
        weight=1.0 if base.weights is None else float(base.weights[place]),
    )


def in_words(value: Mapping[str, float], kind: str) -> str:
    if kind == "regression":
        return f"{value['score']:.3g}"
    likely = sorted(value, key=lambda name: -value[name])
    named = [name for name in likely if value[name] > THRESHOLD] if kind == "multi_label" else likely[:1]
    return ", ".join(f"{name} {value[name]:.2f}" for name in named)


def hiding(texts: Sequence[str], leave_out: LeaveOut) -> Hidden | None:
    """What `leave_out` means for these texts, which are as a base stores them.

    True hides every text's own entries, of a base that keeps texts; ids hide these entries from all.
    """
    if leave_out is False:
        return None
    if leave_out is True:
        return lambda base: own_positions(base, [""] * len(texts), texts)
    ids = [leave_out] if isinstance(leave_out, str) else list(leave_out)
    return lambda base: [places_of(base, ids)] * len(texts)


def places_of(base: KnowledgeBase, ids: Sequence[str]) -> NDArray[np.int64]:
    """Raises UsageError for an id that the base has not."""
    known = {id: place for place, id in enumerate(base.ids)}
    unknown = [id for id in ids if id not in known]
    if unknown:
        raise UsageError(f"leave_out: {unknown[0]!r} is no entry of the book; name ids as `explain` shows them")
    return np.array([known[id] for id in ids], np.int64)
