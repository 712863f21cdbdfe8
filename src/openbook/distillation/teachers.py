"""Teachers: sources of answers, live or recorded. A loss cannot tell which, and a test says so."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn

from openbook.config import UsageError
from openbook.types import Batch, Outputs

FLUSH_EVERY = 50  # batches between two marks to resume a recording from


class LiveTeacher:
    """A model that answers on the spot: in evaluation mode, without gradient, on the device it is given."""

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    def __call__(self, batch: Batch) -> Outputs:
        with torch.no_grad():
            answers: Outputs = self.model(batch.to(self.device))
        return answers


def record(
    teacher: Callable[[Batch], Outputs],
    batches: Sequence[Batch],
    lengths: dict[str, int],
    layers: Sequence[int],
    folder: Path,
    scratch: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write what the teacher says about every batch: logits in fp32; embeddings and hidden states of `layers` in fp16.

    `lengths` gives the tokens of every example id, in the order of the rows on disk. An interrupted recording goes on
    after the last batch whose answers were flushed (marked in `scratch`).
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
        if not arrays:
            arrays = create(folder, answers, len(rows), int(offsets[-1]), layers)
        here = [rows[name] for name in batch.ids]
        arrays["logits"][here] = answers.logits.float().cpu().numpy()
        arrays["embedding"][here] = answers.embedding.float().cpu().numpy()
        real = batch.attention_mask.bool()
        for layer in layers:
            states = answers.hidden[layer].float().cpu().numpy()
            for place, row in enumerate(here):
                arrays[f"hidden-{layer}"][offsets[row] : offsets[row + 1]] = states[place][real[place].numpy()]
        if done % FLUSH_EVERY == 0:
            flush(arrays)
            mark.write_text(str(done))
        advance(done)
    flush(arrays)
    np.save(folder / "offsets.npy", offsets)
    (folder / "ids.json").write_text(json.dumps(list(lengths)), encoding="utf-8")


def create(folder: Path, answers: Outputs, rows: int, tokens: int, layers: Iterable[int]) -> dict[str, NDArray[Any]]:
    shapes: dict[str, tuple[tuple[int, int], type[np.floating[Any]]]] = {
        "logits": ((rows, answers.logits.shape[1]), np.float32),
        "embedding": ((rows, answers.embedding.shape[1]), np.float16),
    }
    for layer in layers:
        shapes[f"hidden-{layer}"] = ((tokens, answers.hidden[layer].shape[2]), np.float16)
    arrays: dict[str, NDArray[Any]] = {}
    for name, (shape, kind) in shapes.items():
        arrays[name] = open_memmap(folder / f"{name}.npy", "w+", kind, shape)
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


class RecordedTeacher:
    """Answers read from a recording by example id. Layers that were not recorded are empty tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        self.rows = {name: row for row, name in enumerate(ids)}
        self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.logits = self.open("logits")
        self.embedding = self.open("embedding")
        self.hidden = {int(p.stem.split("-")[1]): self.open(p.stem) for p in folder.glob("hidden-*.npy")}

    def open(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return array

    def __call__(self, batch: Batch) -> Outputs:
        here = self.rows_of(batch.ids)
        device = batch.input_ids.device
        return Outputs(
            logits=torch.from_numpy(self.logits[here]).to(device),
            embedding=torch.from_numpy(self.embedding[here].astype(np.float32)).to(device),
            hidden=self.padded_states(here, batch),
        )

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        unknown = [name for name in ids if name not in self.rows]
        if unknown:
            raise UsageError(
                f"{self.folder} has no answer for {unknown[0]!r}; it was recorded for other texts: record anew"
            )
        return np.array([self.rows[name] for name in ids], dtype=np.int64)

    def padded_states(self, here: NDArray[np.int64], batch: Batch) -> tuple[Tensor, ...]:
        """Hidden states (B, L, d) of the recorded layers; zero where the batch is padded."""
        if not self.hidden:
            return ()
        real = batch.attention_mask.bool().cpu()
        counts = self.offsets[here + 1] - self.offsets[here]
        if not np.array_equal(counts, real.sum(1).numpy()):
            raise UsageError(f"{self.folder} was recorded with another tokenizer or length: record anew")
        tokens = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in here])
        states: list[Tensor] = [torch.empty(0)] * (max(self.hidden) + 1)
        for layer, array in self.hidden.items():
            padded = torch.zeros(*real.shape, array.shape[1])
            padded[real] = torch.from_numpy(array[tokens].astype(np.float32))
            states[layer] = padded.to(batch.input_ids.device)
        return tuple(states)


class FirstThatKnows:
    """Several recordings as one teacher: each text is answered by the recording that holds it."""

    def __init__(self, teachers: Sequence[RecordedTeacher]):
        self.teachers = teachers

    def __call__(self, batch: Batch) -> Outputs:
        for teacher in self.teachers:
            if batch.ids[0] in teacher.rows:
                return teacher(batch)
        raise UsageError(f"no recording has an answer for {batch.ids[0]!r}: record anew")


def silent(batch: Batch) -> Outputs:
    """The teacher of plain fine-tuning: it says nothing, and the gold term does not listen."""
    return Outputs(logits=torch.empty(0), embedding=torch.empty(0))
