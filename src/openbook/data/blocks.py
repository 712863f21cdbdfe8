"""General text cut into blocks of word-pieces, as a student reads them that is taught no task."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.data.batches import write_tokens

AT_ONCE = 1_000  # documents the tokenizer gets in one call
LARGEST = 2.0**64
SPARE = 1.2  # documents drawn beyond the budget, since their number of word-pieces is estimated

Document = tuple[str, str]  # id and text
Pieces = NDArray[np.int32]
Block = tuple[str, Pieces, NDArray[np.int8], int]  # id, word-pieces, token types, number of special tokens


@dataclass(frozen=True)
class Frame:
    """The special tokens of a tokenizer around one segment, and around and between two."""

    single: tuple[Pieces, Pieces]
    double: tuple[Pieces, Pieces, Pieces]
    types: tuple[int, int]  # token types of two segments

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        one = tokenizer("a", return_special_tokens_mask=True)
        two = tokenizer("a", "a", return_special_tokens_mask=True, return_token_type_ids=True)
        parts = runs_of_special(two["input_ids"], two["special_tokens_mask"])
        real = [place for place, special in enumerate(two["special_tokens_mask"]) if not special]
        types = two["token_type_ids"][real[0]], two["token_type_ids"][real[-1]]
        before, after = runs_of_special(one["input_ids"], one["special_tokens_mask"])
        return cls((before, after), (parts[0], parts[1], parts[2]), types)

    def room(self, length: int, is_pair: bool) -> int:
        """Word-pieces of text that a block of this length holds."""
        return length - sum(map(len, self.double if is_pair else self.single))

    def block(self, pieces: Pieces, is_pair: bool) -> tuple[Pieces, NDArray[np.int8]]:
        """Ids and token types of a block; two segments are its two halves."""
        if not is_pair:
            before, after = self.single
            ids = np.concatenate([before, pieces, after])
            return ids, np.zeros(len(ids), np.int8)
        middle = (len(pieces) + 1) // 2
        before, between, after = self.double
        ids = np.concatenate([before, pieces[:middle], between, pieces[middle:], after])
        types = np.full(len(ids), self.types[1], np.int8)
        types[: len(before) + middle + len(between)] = self.types[0]
        return ids, types


def runs_of_special(ids: list[int], special: list[int]) -> list[Pieces]:
    """The special tokens before, between and after the texts; a run may be empty."""
    runs: list[list[int]] = [[]]
    for token, is_special in zip(ids, special, strict=True):
        if is_special:
            runs[-1].append(token)
        else:
            runs.append([])
    return [np.array(run, np.int32) for run in runs]


@dataclass(frozen=True)
class Cut:
    """How documents become blocks."""

    length: int  # word-pieces of a block, special ones included
    pair_share: float  # of the blocks, made of two segments
    least: int  # word-pieces of text, or a block is dropped
    seed: int


@dataclass(frozen=True)
class Part:
    """Documents that become blocks of at most so many word-pieces of text."""

    name: str  # of the setting that they come from
    documents: Iterable[Document]
    how: Cut
    budget: int


def draw_documents(
    documents: Callable[[], Iterable[Document]], tokens: int, per_character: float, seed: str
) -> Iterator[Document]:
    """Documents of about so many word-pieces in all, each as likely as any other, in their order.

    A document is taken by a digest of its id, so that the choice depends on no other document's.
    """
    characters = sum(len(text) for _, text in documents())
    share = min(1.0, SPARE * tokens / max(1.0, characters * per_character))
    return (document for document in documents() if place_of(document[0], seed) < share)


def place_of(name: str, seed: str) -> float:
    """A number in [0, 1) by name and seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / LARGEST


def pieces_per_character(documents: Iterable[Document], tokenizer: Any) -> float:
    """Of the first documents."""
    texts = [text for _, text in islice(documents, AT_ONCE)]
    return sum(map(len, encode(tokenizer, texts))) / max(1, sum(map(len, texts)))


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Word-pieces without special tokens, however long the texts are."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return found


def cut(documents: Iterable[Document], tokenizer: Any, how: Cut) -> Iterator[Block]:
    """Every block of every document; none holds text of two."""
    frame = Frame.of(tokenizer)
    dice = random.Random(how.seed)
    stream = iter(documents)
    while some := list(islice(stream, AT_ONCE)):
        for (name, _), pieces in zip(some, encode(tokenizer, [text for _, text in some]), strict=True):
            start = 0
            while len(pieces) - start >= how.least:
                is_pair = dice.random() < how.pair_share
                stop = start + frame.room(how.length, is_pair)
                ids, types = frame.block(np.array(pieces[start:stop], np.int32), is_pair)
                yield f"{name}/{start}", ids, types, len(ids) - len(pieces[start:stop])
                start = stop


def write_blocks(parts: Sequence[Part], tokenizer: Any, folder: Path) -> dict[str, int]:
    """The blocks of all parts, one after the other, as a `Tokenised` folder; how many, of which size.

    What a part has beyond its budget is dropped, block by block as chance will have it, so that the end of its
    documents is as likely to be read as their beginning. Raises UsageError for a part that gives no block.
    """
    blocks: list[Block] = []
    for part in parts:
        kept = within([*cut(part.documents, tokenizer, part.how)], part.budget, part.how.seed)
        if not kept:
            raise UsageError(
                f"{part.name} holds no document of {part.how.least} word-pieces within {part.budget} of"
                " text.budget_tokens; name more text, raise the budget, or lower text.least"
            )
        blocks += kept
    names, ids, types, special = zip(*blocks, strict=True)
    lengths = np.array([len(block) for block in ids])
    write_tokens(folder, names, lengths, np.concatenate(ids), np.concatenate(types), special, tokenizer.pad_token_id)
    total = int(lengths.sum())
    return {"blocks": len(names), "tokens": total - sum(special), "with_special_tokens": total}


def within(blocks: Sequence[Block], budget: int, seed: int) -> list[Block]:
    """Blocks of no more than so many word-pieces of text, in their order; each is as likely to stay as any other."""
    kept, room = set(), budget
    for place in random.Random(seed).sample(range(len(blocks)), len(blocks)):
        _, ids, _, special = blocks[place]
        if len(ids) - special <= room:
            kept.add(place)
            room -= len(ids) - special
    return [block for place, block in enumerate(blocks) if place in kept]
