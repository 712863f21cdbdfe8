"""Examples tokenised once into a memory-mapped Arrow file, and batches by length: pure functions of seed and step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from openbook.config import Kind, Optim, UsageError
from openbook.data.sequences import IGNORED, OF_TOKENS, Columns, Cutting, encode, within
from openbook.types import Batch, Example

FILE = "tokens.arrow"
WINDOW = 64  # batches sorted by length together: wide enough for little padding, narrow enough for chance

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Tokenised:
    """Examples as word-piece ids: R rows, of which row i lies in `offsets[i]:offsets[i + 1]` of the flat arrays.

    They are batched in N units. A unit is a row (a text, a window of a passage) or all options of a question.
    """

    ids: pa.StringArray  # (R,) of the example; after those of options and windows stands `#` and their number
    input_ids: NDArray[np.int32]  # (T,) of all rows
    token_type_ids: NDArray[np.int8]  # (T,) 1 = second text
    offsets: Integers  # (R + 1,)
    special: NDArray[np.int8]  # (R,) how many of a row's tokens are special ones
    # classes, targets, or whether an option is right (R,); answer and passage (R, 4), as in Batch; tags (T,)
    labels: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32] | None
    pad_id: int
    kind: str = "classification"
    dropped: int = 0  # examples that have no row, since they carry no loss
    example: Integers | None = None  # (R,) position of the example that a row is of; None: they are the rows
    start: NDArray[np.int32] | None = None  # (T,) first character of a token in the passage; 0 outside
    end: NDArray[np.int32] | None = None  # (T,) and the one after its last
    word: NDArray[np.int32] | None = None  # (T,) number of the word that begins with this token, else -1

    @classmethod
    def load(cls, folder: Path) -> Tokenised:
        """Map the file into memory; nothing is copied."""
        with pa.ipc.open_file(pa.memory_map(str(folder / FILE))) as reader:
            record, metadata = reader.get_batch(0), reader.schema.metadata
        columns = {name: record.column(name) for name in record.schema.names}
        arrays = {name: _array(column) for name, column in columns.items() if name != "id"}
        return cls(
            ids=columns["id"],
            offsets=columns["input_ids"].offsets.to_numpy(),
            labels=arrays.pop("label", arrays.pop("tag", None)),
            pad_id=int(metadata[b"pad_id"]),
            kind=metadata.get(b"kind", b"classification").decode(),
            dropped=int(metadata.get(b"dropped", 0)),
            **arrays,
        )

    def __len__(self) -> int:
        return len(self.ids) if self._bounds is None else len(self._bounds) - 1

    @property
    def lengths(self) -> Integers:
        return np.diff(self.offsets)  # (R,)

    @cached_property
    def tokens(self) -> Integers:
        """Word-pieces of every unit (N,) as budgets count them: after cutting, without special tokens and padding."""
        return self.of_units(np.add, self.lengths - self.special)

    def of_units(self, merge: np.ufunc, values: Integers) -> Integers:
        """Numbers of rows (R,) as numbers of units (N,)."""
        return values if self._bounds is None else np.asarray(merge.reduceat(values, self._bounds[:-1]))

    def rows(self, unit: int) -> range:
        """The rows of a unit."""
        return range(unit, unit + 1) if self._bounds is None else range(*map(int, self._bounds[unit : unit + 2]))

    def batch(self, indices: Sequence[int] | Integers) -> Batch:
        """The units at these positions, padded to the longest of their rows."""
        units = np.asarray(indices, dtype=np.int64)
        bounds = self._bounds
        counts = np.ones_like(units) if bounds is None else bounds[units + 1] - bounds[units]
        rows = units if bounds is None else within(counts, bounds[units])  # (B,)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        shape = (len(rows), int(lengths.max()))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        mask = np.arange(shape[1]) < lengths[:, None]  # (B, L)
        places = within(lengths, self.offsets[rows])
        input_ids[mask] = self.input_ids[places]
        token_type_ids[mask] = self.token_type_ids[places]
        return Batch(
            ids=tuple(self.ids.take(pa.array(rows)).to_pylist()),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(token_type_ids),
            labels=None if self.labels is None else torch.from_numpy(self._labels(rows, counts, mask, places)),
        )

    @cached_property
    def _bounds(self) -> Integers | None:
        """Unit u has the rows `bounds[u]:bounds[u + 1]` (N + 1,); None where every row is one."""
        if self.kind != "multiple_choice" or self.example is None:
            return None
        return np.concatenate([[0], np.flatnonzero(np.diff(self.example)) + 1, [len(self.ids)]])

    def _labels(self, rows: Integers, counts: Integers, mask: NDArray[np.bool_], places: Integers) -> NDArray[Any]:
        """Labels as `Batch` wants them."""
        assert self.labels is not None
        if self.kind == "token_classification":
            tags = np.full(mask.shape, IGNORED, dtype=np.int64)
            tags[mask] = self.labels[places]
            return tags
        if self.kind == "multiple_choice":
            return np.stack([np.repeat(np.arange(len(counts)), counts), self.labels[rows]], axis=1)
        return self.labels[rows]


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    folder: Path,
    kind: Kind = "classification",
    stride: int = 128,
    training: bool = True,
) -> Tokenised:
    """Tokenise examples of any kind into `folder`, and map the file back. It appears complete or not at all.

    In training, a window without the answer is left out; or points to [CLS], if some question here has no answer. So
    is what carries no loss: questions with one option, passages of one token, sentences without a tag. For predictions
    all of it is kept, and windows tell the passage's place only (labels -100). Raises UsageError if nothing is left.
    """
    if not examples:
        raise ValueError("there is no example to tokenise")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; recorded answers are looked up by it")
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token; choose a model that has one")
    null_allowed = kind == "span_extraction" and any(example.label is None for example in examples)
    columns = encode(examples, tokenizer, Cutting(max_length, stride, training, null_allowed), kind)
    owners = columns["example"]
    if not len(owners):
        raise UsageError(
            f"none of {len(examples)} examples carries a loss: no window of task.max_length={max_length} word-pieces"
            " holds a whole answer, no question has two options, or no word has a tag; raise it, or mend the rows"
        )
    ids = [example.id for example in examples]
    if kind in ("multiple_choice", "span_extraction"):
        _, first, inverse = np.unique(owners, return_index=True, return_inverse=True)
        numbers = np.arange(len(owners)) - first[inverse]  # (R,) which option or window of its example
        names = [f"{ids[owner]}#{number}" for owner, number in zip(owners, numbers, strict=True)]
    else:
        names = [ids[owner] for owner in owners]
    dropped = len(examples) - len(np.unique(owners))
    _write(folder, names, columns, {"kind": kind, "dropped": dropped, "pad_id": tokenizer.pad_token_id})
    return Tokenised.load(folder)


def write_tokens(
    folder: Path,
    ids: Sequence[str],
    lengths: Integers,
    input_ids: NDArray[np.int32],
    token_type_ids: NDArray[np.int8],
    special: Sequence[int],
    pad_id: int,
) -> None:
    """Write rows (R,) of word-pieces (T,) that need no tokenizer any more, for `Tokenised.load`."""
    columns: Columns = {"length": lengths, "input_ids": input_ids, "token_type_ids": token_type_ids}
    _write(folder, ids, columns | {"special": np.asarray(special, np.int8)}, {"pad_id": pad_id})


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
    """Every unit once for inference, longest first; at most `batch_tokens` with padding, or a single unit."""
    lengths = tokenised.of_units(np.maximum, tokenised.lengths)
    units = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(tokenised.of_units(np.add, np.ones_like(tokenised.lengths))[units])  # rows up to each
    start, done = 0, 0
    while start < len(units):
        room = done + batch_tokens // int(lengths[units[start]])
        stop = max(start + 1, int(np.searchsorted(ends, room, side="right")))
        yield tokenised.batch(units[start:stop])
        start, done = stop, int(ends[stop - 1])


def _array(column: Any) -> NDArray[Any]:
    """A column without a copy: flat if a row has as many values as it has tokens."""
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.values.to_numpy().reshape(-1, column.type.list_size))
    return np.asarray(column.values.to_numpy() if pa.types.is_large_list(column.type) else column.to_numpy())


def _write(folder: Path, ids: Sequence[str], columns: Columns, metadata: Mapping[str, Any]) -> None:
    offsets = pa.array(np.concatenate([[0], np.cumsum(columns["length"])]), pa.int64())
    arrays: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
    for name, column in columns.items():
        values = pa.array(column.ravel())
        if name in OF_TOKENS:
            values = pa.LargeListArray.from_arrays(offsets, values)
        elif column.ndim == 2:
            values = pa.FixedSizeListArray.from_arrays(values, column.shape[1])
        arrays[name] = values
    del arrays["length"]  # the offsets tell it
    table = pa.table(arrays).replace_schema_metadata({name: str(value) for name, value in metadata.items()})
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
