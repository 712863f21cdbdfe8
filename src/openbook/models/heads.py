"""Heads for every kind of task on one encoder, and the file they are kept in beside it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openbook.config import Kind, UsageError
from openbook.models.encoder import Encoder
from openbook.types import Batch

WEIGHTS, TASKS = "heads.safetensors", "heads.json"
CLASSIFIES: tuple[Kind, ...] = ("classification", "token_classification")
READS_TOKENS: tuple[Kind, ...] = ("span_extraction", "token_classification")  # the others read the first state
SHARED: tuple[Kind, ...] = ("span_extraction", "multiple_choice")  # heads of their own over-fit (MUPPET, section 3.1)


@dataclass(frozen=True)
class HeadTask:
    """A task as its head sees it. Raises UsageError for label names that do not fit the kind."""

    kind: Kind
    labels: tuple[str, ...] = ()  # of classes and tags, in index order
    mean: float = 0.0  # of a regression's targets: the head predicts standardised ones
    deviation: float = 1.0

    def __post_init__(self) -> None:
        fits = len(set(self.labels)) == len(self.labels) > 1 if self.kind in CLASSIFIES else not self.labels
        if not fits:
            wanted = "at least two, each once" if self.kind in CLASSIFIES else "none"
            raise UsageError(f"task.labels={list(self.labels)}: a {self.kind} has {wanted}; mend task.labels or .kind")
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise UsageError(f"task.train: targets of mean {self.mean} and deviation {self.deviation}; add other rows")

    @property
    def outputs(self) -> int:
        return len(self.labels) if self.kind in CLASSIFIES else 2 if self.kind == "span_extraction" else 1


_FILE = TypeAdapter(dict[str, HeadTask])


class TaskHead(nn.Module):
    """Dropout and a linear layer: weights normal(0, 0.02) drawn by the seed, biases 0."""

    def __init__(self, task: HeadTask, width: int, seed: int, dropout: float = 0.1):
        super().__init__()
        self.kind = task.kind
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, task.outputs, device="meta").to_empty(device="cpu")  # draws nothing by itself
        nn.init.normal_(self.linear.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """States (B, L, d) to logits: (B, C) of classes, (B, 1) of scores, (B, L, 2) of spans, (B, L, C) of tags."""
        read = states if self.kind in READS_TOKENS else states[:, 0]
        logits: Tensor = self.linear(self.dropout(read))
        return logits


class MultiTask(nn.Module):
    """An encoder without a head, and a head for every task: one for all tasks of a kind in `SHARED`, else its own.

    The initial weights of a head depend on the seed and on its name alone, so that another task changes no other head.
    """

    def __init__(self, encoder: Encoder, tasks: Mapping[str, HeadTask], seed: int = 0, dropout: float = 0.1):
        super().__init__()
        self.encoder, self.tasks = encoder, dict(tasks)
        self.heads = nn.ModuleDict()
        for name, task in self.tasks.items():
            key = head_name(name, task)
            if key not in self.heads:
                self.heads[key] = TaskHead(task, encoder.width, _seed(seed, key), dropout)

    def forward(self, batch: Batch) -> Tensor:
        """The logits of the head that serves `batch.task`; the other heads get no gradient, not even a zero."""
        if batch.task not in self.tasks:
            raise ValueError(f"a batch of task {batch.task!r}, and the heads serve {list(self.tasks)}")
        head = self.heads[head_name(batch.task, self.tasks[batch.task])]
        logits: Tensor = head(self.encoder.last_states(batch))
        return logits

    def save_heads(self, folder: Path) -> None:
        """Write the heads' weights and what they were trained for; the encoder is kept elsewhere."""
        save_file({name: value.contiguous() for name, value in self.heads.state_dict().items()}, folder / WEIGHTS)
        (folder / TASKS).write_bytes(_FILE.dump_json(self.tasks, indent=2) + b"\n")

    def load_heads(self, folder: Path) -> None:
        """Read the weights of all heads; the folder may hold others too.

        Raises UsageError for a task that is absent or was another one then (the order of its labels included), and for
        weights that are damaged or of another width.
        """
        stored = read_tasks(folder)
        for name, task in self.tasks.items():
            if name not in stored:
                raise UsageError(f"{folder / TASKS} serves {list(stored)}, and no task {name!r}; train its head too")
            if stored[name] != task:
                raise UsageError(
                    f"{folder / TASKS}: the head of task {name!r} was trained as {stored[name]}, and is wanted as"
                    f" {task}; give task.labels in that order (to a regression the same task.train), or train it again"
                )
        try:
            weights = load_file(folder / WEIGHTS)
            self.heads.load_state_dict({key: weights[key] for key in self.heads.state_dict() if key in weights})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UsageError(f"{folder / WEIGHTS} does not fit these heads: {error}; train them again") from error


def read_tasks(folder: Path) -> dict[str, HeadTask]:
    """The tasks that the heads in a folder serve. Raises UsageError if there are none, or none that can be read."""
    try:
        return _FILE.validate_json((folder / TASKS).read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"{folder / TASKS} describes no heads: {error}; train them again") from error


def head_name(name: str, task: HeadTask) -> str:
    """What the head of a task goes by, in a form that a module's name may take: no dots, no attribute's name."""
    return task.kind if task.kind in SHARED else f"task {name}".replace("%", "%25").replace(".", "%2E")


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
