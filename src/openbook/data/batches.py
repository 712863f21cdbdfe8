"""Examples tokenised once into a memory-mapped Arrow file, and batches by length: pure functions of seed and step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from openbook.config import Optim, UsageError
from openbook.types import Batch, Example

FILE = "tokens.arrow"
AT_ONCE = 1_000  # examples the tokenizer gets in one call
WINDOW = 64  # batches sorted by length together: wide enough for little padding, narrow enough for chance

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Tokenised:
    """Examples as word-piece ids. Row i lies in `offsets[i]:offsets[i + 1]` of the flat arrays."""

    ids: pa.StringArray  # (N,)
    input_ids: NDArray[np.int32]  # (T,) of all rows
    token_type_ids: NDArray[np.int8]  # (T,) 1 = second text
    offsets: Integers  # (N + 1,)
    special: NDArray[np.int8]  # (N,) how many of a row's tokens are special ones
    labels: NDArray[np.int64] | NDArray[np.float32] | None  # (N,)
    pad_id: int

    @classmethod
    def load(cls, folder: Path) -> Tokenised:
        """Map the file into memory; nothing is copied."""
        with pa.ipc.open_file(pa.memory_map(str(folder / FILE))) as reader:
            record, metadata = reader.get_batch(0), reader.schema.metadata
        pieces, types = record.column("input_ids"), record.column("token_type_ids")
        labels = record.column("label").to_numpy() if "label" in record.schema.names else None
        return cls(
            ids=record.column("id"),
            input_ids=pieces.values.to_numpy(),
            token_type_ids=types.values.to_numpy(),
            offsets=pieces.offsets.to_numpy(),
            special=record.column("special").to_numpy(),
            labels=labels,
            pad_id=int(metadata[b"pad_id"]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Integers:
        return np.diff(self.offsets)  # (N,)

    @cached_property
    def tokens(self) -> Integers:
        """Word-pieces of every row (N,) as budgets count them: after cutting, without special tokens and padding."""
        return self.lengths - self.special

    def batch(self, indices: Sequence[int] | Integers) -> Batch:
        """The rows at these positions, padded to the longest of them."""
        rows = np.asarray(indices, dtype=np.int64)  # (B,)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        shape = (len(rows), int(lengths.max()))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        mask = np.arange(shape[1]) < lengths[:, None]  # (B, L)
        before = np.cumsum(lengths) - lengths  # (B,) real tokens of the rows above
        places = np.arange(lengths.sum()) + np.repeat(self.offsets[rows] - before, lengths)
        input_ids[mask] = self.input_ids[places]
        token_type_ids[mask] = self.token_type_ids[places]
        return Batch(
            ids=tuple(self.ids.take(pa.array(rows)).to_pylist()),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(token_type_ids),
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows]),
        )


def tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int, folder: Path) -> Tokenised:
    """Tokenise single texts and pairs into `folder`, and map the file back. It appears complete or not at all."""
    if not examples:
        raise ValueError("there is no example to tokenise")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; recorded answers are looked up by it")
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token; choose a model that has one")
    parts = [_encode(examples[at : at + AT_ONCE], tokenizer, max_length) for at in range(0, len(examples), AT_ONCE)]
    lengths, pieces, types = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    special = {pair: tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)}
    columns = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(pieces)),
        "token_type_ids": pa.LargeListArray.from_arrays(offsets, pa.array(types)),
        "special": pa.array([special[example.text_pair is not None] for example in examples], pa.int8()),
    }
    labels = _label_column(examples)
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns).replace_schema_metadata({"pad_id": str(tokenizer.pad_token_id)})
    _write(table, folder)
    return Tokenised.load(folder)


def epoch_batches(
    tokens: Integers,
    epoch: int,
    seed: int,
    optim: Optim,
    carried: Integers | None = None,
    by_length: bool = True,
) -> tuple[list[Integers], Integers]:
    """Positions of every example once, in batches of similar length and random order; the same for the same arguments.

    With `optim.batch_tokens`, a batch holds as many examples as fit into that many tokens. Given what the epoch before
    left over (`carried`), every batch is full, and the second part is what this epoch leaves over.
    """
    if optim.batch_tokens is not None and tokens.max() > optim.batch_tokens:
        raise UsageError(
            f"optim.batch_tokens={optim.batch_tokens} is less than the longest example ({tokens.max()} tokens)"
        )
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(tokens))
    limit = optim.batch_tokens
    window = WINDOW * (optim.batch_size if limit is None else max(1, int(limit / tokens.mean())))
    left = order[:0] if carried is None else carried
    batches: list[Integers] = []
    for place, start in enumerate(range(0, len(order), window)):
        turned = len(left) > 0 and (epoch + place) % 2 == 1  # or it were always the longest that wait
        rows = np.concatenate([left, order[start : start + window]])
        if by_length:
            rows = rows[np.argsort(tokens[rows], kind="stable")]
        rows = rows[::-1] if turned else rows
        full, left = _cut(rows, tokens[rows], optim)
        batches += full
    if carried is None and len(left):
        batches, left = [*batches, left], left[:0]
    return [batches[position] for position in generator.permutation(len(batches))], left


class BatchPlan:
    """Which batch every step of a training gets. Any step may be asked for first: a resumed run sees the same.

    It ends after `optim.epochs`, each of which reads every example once; or, with `optim.tokens`, at the first batch
    with which so many tokens are read: epochs then follow each other without a batch that is not full between them,
    so that texts of any size and number take as many steps for as many tokens.
    """

    def __init__(self, tokenised: Tokenised, optim: Optim, seed: int, by_length: bool = True) -> None:
        self._tokenised, self._optim, self._seed, self._by_length = tokenised, optim, seed, by_length
        self._tokens = np.maximum(tokenised.tokens, 1)  # an empty text must not be free
        self._carried: list[Integers] = []  # into each epoch, if there are as many as `optim.tokens` takes
        counts = self._counts_by_epochs() if optim.tokens is None else self._counts_by_tokens(optim.tokens)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # (epochs + 1,) first step of each
        self._cached: tuple[int, list[Integers]] | None = None

    @property
    def epoch_ends(self) -> list[int]:
        """How many steps are done when an epoch ends, for each; the last one may be cut short."""
        return sorted({int(end) for end in self._starts[1:]})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)}")
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._batches(epoch)[0])
        return self._tokenised.batch(self._cached[1][step - int(self._starts[epoch])])

    def _batches(self, epoch: int) -> tuple[list[Integers], Integers]:
        carried = self._carried[epoch] if self._carried else None
        return epoch_batches(self._tokens, epoch, self._seed, self._optim, carried, self._by_length)

    def _counts_by_epochs(self) -> list[int]:
        whole, fraction = divmod(self._optim.epochs, 1)
        counts = [self._count(epoch) for epoch in range(int(whole))]
        return [*counts, math.ceil(fraction * self._count(int(whole)))] if fraction else counts

    def _count(self, epoch: int) -> int:
        if self._optim.batch_tokens is None:
            return math.ceil(len(self._tokens) / self._optim.batch_size)
        return len(self._batches(epoch)[0])

    def _counts_by_tokens(self, wanted: int) -> list[int]:
        counts: list[int] = []
        read, left = 0, np.empty(0, np.int64)
        while read < wanted:
            self._carried.append(left)
            batches, left = self._batches(len(counts))
            ends = np.cumsum([read, *(self._tokens[batch].sum() for batch in batches)])  # tokens read before each
            counts.append(min(len(batches), int(np.searchsorted(ends, wanted))))
            read = int(ends[-1])
        return counts


def ordered(tokenised: Tokenised, batch_tokens: int) -> Iterator[Batch]:
    """Every row once for inference, longest first; at most `batch_tokens` with padding, or a single row."""
    lengths = tokenised.lengths
    rows = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        stop = start + max(1, batch_tokens // int(lengths[rows[start]]))
        yield tokenised.batch(rows[start:stop])
        start = stop


def _encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[Integers, NDArray[np.int32], NDArray[np.int8]]:
    encoded = tokenizer(
        [e.text if e.text_pair is None else (e.text, e.text_pair) for e in examples],
        truncation="longest_first",
        max_length=max_length,
        padding=False,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    lengths = np.fromiter(map(len, encoded["input_ids"]), np.int64)
    pieces = np.concatenate([np.asarray(row, np.int32) for row in encoded["input_ids"]])
    types = np.concatenate([np.asarray(row, np.int8) for row in encoded["token_type_ids"]])
    return lengths, pieces, types


def _label_column(examples: Sequence[Example]) -> pa.Array | None:
    labels = [example.label for example in examples if example.label is not None]
    if not labels:
        return None
    if len(labels) < len(examples):
        raise ValueError("some examples have a label and some have none")
    return pa.array(labels, pa.float32() if any(isinstance(label, float) for label in labels) else pa.int64())


def _write(table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(table.combine_chunks().to_batches()[0])
        os.replace(temporary, folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def _cut(rows: Integers, tokens: Integers, optim: Optim) -> tuple[list[Integers], Integers]:
    """Full batches, and the rows after them that fill none."""
    if optim.batch_tokens is None:
        size = optim.batch_size
        end = len(rows) - len(rows) % size
        return [rows[at : at + size] for at in range(0, end, size)], rows[end:]
    batches = []
    ends = np.cumsum(tokens)
    start, used = 0, 0
    while used + optim.batch_tokens < ends[-1]:
        stop = int(np.searchsorted(ends, used + optim.batch_tokens, side="right"))
        batches.append(rows[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches, rows[start:]
