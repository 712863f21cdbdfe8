"""What retrieved text has to beat: random sentences, random ones of given lengths, and the task's own text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from openbook.retrieval.bank import Bank
from openbook.retrieval.contextualize import blocks
from openbook.retrieval.passages import key
from openbook.types import Example, Passage


def random_text(bank: Bank) -> Iterator[Passage]:
    """The bank in its own order, which is random (section 2.9, `random`)."""
    return bank.prefix()


def random_length(bank: Bank, lengths_wanted: Sequence[int], seed: int) -> Iterator[Passage]:
    """Random sentences with the lengths of another corpus, each at most once (section 2.9, `random_len`).

    `lengths_wanted` has the `lex` words of every sentence of that corpus. All of them are looked for in a seeded order,
    then all again, until the bank is used up; so every part of the result is long and short in the same proportions,
    and a budget can cut it anywhere. Where a length has run out, the nearest one serves, the shorter of two.
    """
    if not len(lengths_wanted):
        raise ValueError("there is no length to look for")
    return read(bank, _matched(bank.lengths(), lengths_wanted, seed))


def _matched(lengths: NDArray[np.int32], wanted: Sequence[int], seed: int) -> Iterator[int]:
    """Positions in the bank."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    sorted_by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    values, starts = np.unique(lengths[sorted_by_length], return_index=True)
    parts = np.split(sorted_by_length, starts[1:])
    left = {value: iter(part) for value, part in zip(values.tolist(), parts, strict=False)}
    while left:
        for length in generator.permutation(wanted):
            while left:
                nearest = length if length in left else min(left, key=lambda value: (abs(value - length), value))
                if (position := next(left[nearest], None)) is not None:
                    yield int(position)
                    break
                del left[nearest]


def task_text(examples: Iterable[Example]) -> Iterator[Passage]:
    """The task's own training text, pairs as pairs (section 2.9, `task`): the leak guard does not apply to it."""
    return (Passage(example.id, example.text, example.id, example.text_pair) for example in examples)


def allowed_texts(examples: Iterable[Example], excluded: AbstractSet[str]) -> Iterator[str]:
    """Every text of the rows, one field at a time, whose key is not that of an evaluation text (section 2.2)."""
    texts = (text for example in examples for text in texts_of(example))
    return (text for text in texts if key(text) not in excluded)


def texts_of(example: Example) -> tuple[str, ...]:
    return (example.text,) if example.text_pair is None else (example.text, example.text_pair)


def read(bank: Bank, positions: Iterable[int]) -> Iterator[Passage]:
    """The sentences at these positions, in their order, a block in memory at a time."""
    for block in blocks(positions):
        yield from bank.passages(block)
