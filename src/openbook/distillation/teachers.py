"""Teachers: sources of answers, live or recorded. A loss cannot tell which, and a test says so."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn

from openbook.config import UsageError
from openbook.types import Batch, Outputs

FLUSH_EVERY = 50  # batches between two marks to resume a recording from

Integers = NDArray[np.int64]


class LiveTeacher:
    """A model that answers on the spot: in evaluation mode, without gradient, on the device it is given.

    `precision` is the teacher's own, whatever training asks it; with `bf16` its answers come back in float32.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
    ):
        self.model, self.device = model.eval().requires_grad_(False).to(device), torch.device(device)
        self.uses_bf16 = precision == "bf16"

    def __call__(self, batch: Batch) -> Outputs:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bf16):
            answers: Outputs = self.model(batch.to(self.device))
        return in_float32(answers) if self.uses_bf16 else answers


class AskedOnce:
    """A teacher whose answer to the batch at hand is kept, since several students ask for it one after the other."""

    def __init__(self, teacher: Callable[[Batch], Outputs]):
        self.teacher = teacher
        self.last: tuple[Batch, Outputs] | None = None

    def __call__(self, batch: Batch) -> Outputs:
        if self.last is None or self.last[0] is not batch:
            self.last = batch, self.teacher(batch)
        return self.last[1]


def in_float32(answers: Outputs) -> Outputs:
    taps = {layer: (q.float(), k.float(), v.float()) for layer, (q, k, v) in answers.relations.items()}
    hidden = tuple(state.float() for state in answers.hidden)
    return Outputs(answers.logits.float(), answers.embedding.float(), hidden, taps)


def record(
    teacher: Callable[[Batch], Outputs],
    batches: Sequence[Batch],
    lengths: dict[str, int],
    layers: Sequence[int],
    folder: Path,
    scratch: Path,
    advance: Callable[[int], None] = lambda done: None,
    taps: Sequence[int] = (),
) -> None:
    """Write what the teacher says about every batch: logits in fp32, all else in fp16.

    That is the embedding, the hidden states of `layers` (0 = the embeddings) and the queries and keys of `taps` (from
    1); attention maps would grow with the square of the length. `lengths` gives the tokens of every example id, in the
    order of the rows on disk. An interrupted recording goes on after the last batch whose answers were flushed (marked
    in `scratch`).
    """
    mark = scratch / "recorded.json"
    first = json.loads(mark.read_text()) if mark.exists() else 0
    rows = {name: row for row, name in enumerate(lengths)}
    offsets = np.concatenate([[0], np.cumsum(list(lengths.values()), dtype=np.int64)])
    arrays: dict[str, NDArray[Any]] = {}
    if first:
        arrays = {path.stem: np.load(path, mmap_mode="r+", allow_pickle=False) for path in folder.glob("*.npy")}
    for done, batch in enumerate(batches[first:], start=first + 1):
        answers = teacher(batch)
        by_row, by_token = kept(answers, layers, taps)
        if not arrays:
            arrays = create(folder, by_row, len(rows)) | create(folder, by_token, int(offsets[-1]))
        here = np.array([rows[name] for name in batch.ids], dtype=np.int64)
        for name, values in by_row.items():
            arrays[name][here] = values.cpu().numpy()
        real = batch.attention_mask.bool().cpu()
        places, tokens = real.flatten().nonzero()[:, 0], tokens_of(offsets, here, real)[real.numpy()]
        for name, values in by_token.items():
            arrays[name][tokens] = values.flatten(0, 1).index_select(0, places.to(values.device)).cpu().numpy()
        if done % FLUSH_EVERY == 0:
            flush(arrays)
            mark.write_text(str(done))
        advance(done)
    flush(arrays)
    np.save(folder / "offsets.npy", offsets)
    (folder / "ids.json").write_text(json.dumps(list(lengths)), encoding="utf-8")


def kept(answers: Outputs, layers: Sequence[int], taps: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes on disk, by file: a vector for each text (B, n), and one for each token (B, L, d)."""
    by_token = {f"hidden-{layer}": answers.hidden[layer].half() for layer in layers}
    for layer in taps:
        query, key, _ = answers.relations[layer]
        by_token |= {f"query-{layer}": query.half(), f"key-{layer}": key.half()}
    return {"logits": answers.logits.float(), "embedding": answers.embedding.half()}, by_token


def create(folder: Path, values: dict[str, Tensor], rows: int) -> dict[str, NDArray[Any]]:
    """A file for each, of as many rows as told and as wide as the values."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in values.items():
        kind = value.new_empty(0).cpu().numpy().dtype
        arrays[name] = open_memmap(folder / f"{name}.npy", "w+", kind, (rows, value.shape[-1]))
        reserve(folder / f"{name}.npy")
    return arrays


def reserve(path: Path) -> None:
    """Take the file's whole space now: a memory map that finds the disk full later ends the process by a signal."""
    if sys.platform == "linux":
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def flush(arrays: dict[str, NDArray[Any]]) -> None:
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()


def tokens_of(offsets: Integers, here: Integers, real: Tensor) -> Integers:
    """Where the tokens (B, L) of the rows `here` lie on disk; padding points at some token of its row."""
    places = (real.cumsum(1) - 1).clamp_min(0).numpy()
    return np.asarray(offsets[here][:, None] + places)


class RecordedTeacher:
    """Answers read from a recording by example id; layers that were not recorded are absent or empty tensors.

    Hidden states, queries and keys are in fp16 as they were kept, and zero where the batch is padded; the values of
    `relations` are empty. Only layers of `hidden` and `taps` are read, or all that were recorded if these are None.
    Raises UsageError for layers that were not.
    """

    def __init__(self, folder: Path, hidden: Sequence[int] | None = None, taps: Sequence[int] | None = None):
        self.folder = folder
        ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        self.rows = {name: row for row, name in enumerate(ids)}
        self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.logits = self.open("logits")
        self.embedding = self.open("embedding")
        self.hidden = self.of_layers("hidden", hidden)
        self.queries, self.keys = self.of_layers("query", taps), self.of_layers("key", taps)

    def open(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return array

    def of_layers(self, kind: str, wanted: Sequence[int] | None) -> dict[int, NDArray[Any]]:
        found = sorted(int(path.stem.split("-")[1]) for path in self.folder.glob(f"{kind}-*.npy"))
        missing = sorted({*(wanted or ())} - {*found})
        if missing:
            raise UsageError(f"{self.folder} has no {kind} of layers {missing}, only of {found}: record anew")
        return {layer: self.open(f"{kind}-{layer}") for layer in (found if wanted is None else wanted)}

    def __call__(self, batch: Batch) -> Outputs:
        here, device = self.rows_of(batch.ids), batch.input_ids.device
        hidden: list[Tensor] = [torch.empty(0)] * (max(self.hidden, default=-1) + 1)
        taps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        if self.hidden or self.queries:
            padded = self.reader(here, batch)
            for layer, states in self.hidden.items():
                hidden[layer] = padded(states)
            for layer, queries in self.queries.items():
                taps[layer] = padded(queries), padded(self.keys[layer]), torch.empty(0)
        return Outputs(
            logits=torch.from_numpy(self.logits[here]).to(device),
            embedding=torch.from_numpy(self.embedding[here].astype(np.float32)).to(device),
            hidden=tuple(hidden),
            relations=taps,
        )

    def rows_of(self, ids: Sequence[str]) -> Integers:
        unknown = [name for name in ids if name not in self.rows]
        if unknown:
            raise UsageError(
                f"{self.folder} has no answer for {unknown[0]!r}; it was recorded for other texts: record anew"
            )
        return np.array([self.rows[name] for name in ids], dtype=np.int64)

    def reader(self, here: Integers, batch: Batch) -> Callable[[NDArray[Any]], Tensor]:
        """A function that gives the rows of the batch (B, L, d) from what is kept of every token (T, d)."""
        real = batch.attention_mask.bool().cpu()
        if not np.array_equal(self.offsets[here + 1] - self.offsets[here], real.sum(1).numpy()):
            raise UsageError(f"{self.folder} was recorded with another tokenizer or length: record anew")
        tokens = tokens_of(self.offsets, here, real).ravel()
        padding = (~real).flatten().nonzero()[:, 0]

        def padded(array: NDArray[Any]) -> Tensor:
            states = torch.from_numpy(np.asarray(array).take(tokens, axis=0)).index_fill_(0, padding, 0)
            return states.view(*real.shape, -1).to(batch.input_ids.device)

        return padded


def silent(batch: Batch) -> Outputs:
    """The teacher of plain fine-tuning: it says nothing, and the gold term does not listen."""
    return Outputs(logits=torch.empty(0), embedding=torch.empty(0))
