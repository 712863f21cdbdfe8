"""Examples tokenised once into a memory-mapped Arrow file, and batches by length: pure functions of seed and step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
            labels=labels,
            pad_id=int(metadata[b"pad_id"]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Integers:
        return np.diff(self.offsets)  # (N,)

    def batch(self, indices: Sequence[int] | Integers) -> Batch:
        """The rows at these positions, padded to the longest of them."""
        rows = np.asarray(indices, dtype=np.int64)  # (B,)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        shape = (len(rows), int(lengths.max()))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        for line, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = self.offsets[row]
            input_ids[line, :length] = self.input_ids[start : start + length]
            token_type_ids[line, :length] = self.token_type_ids[start : start + length]
        mask = np.arange(shape[1]) < lengths[:, None]  # (B, L)
        return Batch(
            ids=tuple(self.ids.take(pa.array(rows)).to_pylist()),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(token_type_ids),
            labels=None if self.labels is None else torch.from_numpy(self.labels[rows]),
        )


def tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int, folder: Path) -> Tokenised:
    """Tokenise into `folder` and map the file back. The file appears complete or not at all."""
    if not examples:
        raise ValueError("there is no example to tokenise")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; recorded answers are looked up by it")
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token; choose a model that has one")
    parts = [_encode(examples[at : at + AT_ONCE], tokenizer, max_length) for at in range(0, len(examples), AT_ONCE)]
    lengths, pieces, types = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    columns = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(pieces)),
        "token_type_ids": pa.LargeListArray.from_arrays(offsets, pa.array(types)),
    }
    labels = _label_column(examples)
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns).replace_schema_metadata({"pad_id": str(tokenizer.pad_token_id)})
    _write(table, folder)
    return Tokenised.load(folder)


def epoch_batches(
    lengths: Integers, epoch: int, seed: int, batch_size: int, batch_tokens: int | None
) -> list[Integers]:
    """Positions of every example once, in batches of similar length and random order; the same for the same arguments.

    With `batch_tokens`, a batch holds as many examples as fit into that many real tokens.
    """
    if batch_tokens is not None and lengths.max() > batch_tokens:
        raise UsageError(f"optim.batch_tokens={batch_tokens} is less than the longest example ({lengths.max()} tokens)")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    window = WINDOW * (batch_size if batch_tokens is None else max(1, int(batch_tokens / lengths.mean())))
    batches: list[Integers] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(_cut(rows, lengths[rows], batch_size, batch_tokens))
    return [batches[position] for position in generator.permutation(len(batches))]


class BatchPlan:
    """Which batch every step of a training gets. Any step may be asked for first: a resumed run sees the same."""

    def __init__(self, tokenised: Tokenised, optim: Optim, seed: int) -> None:
        self._tokenised, self._optim, self._seed = tokenised, optim, seed
        self._lengths = tokenised.lengths
        whole, fraction = divmod(optim.epochs, 1)
        counts = [self._count(epoch) for epoch in range(int(whole))]
        if fraction:
            counts.append(math.ceil(fraction * self._count(int(whole))))
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # (epochs + 1,) first step of each
        self._cached: tuple[int, list[Integers]] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)}")
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._batches(epoch))
        return self._tokenised.batch(self._cached[1][step - int(self._starts[epoch])])

    def _count(self, epoch: int) -> int:
        if self._optim.batch_tokens is None:
            return math.ceil(len(self._lengths) / self._optim.batch_size)
        return len(self._batches(epoch))

    def _batches(self, epoch: int) -> list[Integers]:
        return epoch_batches(self._lengths, epoch, self._seed, self._optim.batch_size, self._optim.batch_tokens)


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
    pairs = [example.text_pair for example in examples if example.text_pair is not None]
    if pairs and len(pairs) < len(examples):
        raise ValueError("some examples are pairs and some are not")
    encoded = tokenizer(
        [example.text for example in examples],
        pairs or None,
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


def _cut(rows: Integers, lengths: Integers, batch_size: int, batch_tokens: int | None) -> Iterator[Integers]:
    if batch_tokens is None:
        yield from (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))
        return
    ends = np.cumsum(lengths)
    start, used = 0, 0
    while start < len(rows):
        stop = int(np.searchsorted(ends, used + batch_tokens, side="right"))
        yield rows[start:stop]
        start, used = stop, int(ends[stop - 1])
