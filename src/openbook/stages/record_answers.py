"""Teacher + texts -> what it says about each, on disk, once; and the linear map that turns its embeddings into keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from openbook.checkpoint import SCRATCH, write_json
from openbook.config import Optim
from openbook.console import track
from openbook.data.batches import Tokenised, epoch_batches, ordered
from openbook.distillation import losses
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, record
from openbook.lessons import corpus_examples, recorded_layers
from openbook.models.encoder import load_finished
from openbook.training import train
from openbook.types import Batch
from openbook.workspace import Run

RECORD_TOKENS = 4096  # tokens of one batch with padding; only speed depends on it


def inputs(run: Run) -> dict[str, Any]:
    return {
        "task": run.task_digest,
        "layers": recorded_layers(run),
        "width": run.recipe.student.hidden_size,
        "projection": run.recipe.knowledge_base.projection.model_dump(mode="json"),
    }


def build(run: Run, folder: Path) -> None:
    teacher = load_finished(str(run.folder / "teacher"))
    layers = recorded_layers(run)
    live = LiveTeacher(teacher.listen(hidden=bool(layers)), Accelerator().device)
    texts = {"task": run.task.train, "corpus": corpus_examples(run)}
    for name, examples in texts.items():
        tokenised = run.tokens(f"{name}-for-teacher", examples, run.teacher_tokenizer)
        record_once(live, tokenised, layers, folder / name, folder / SCRATCH / name, f"the teacher reads the {name}")
    fit_projection(run, folder)


def record_once(live: LiveTeacher, texts: Tokenised, layers: list[int], folder: Path, scratch: Path, what: str) -> None:
    folder.mkdir(exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    if (scratch / "finished").exists():
        return
    batches = list(ordered(texts, RECORD_TOKENS))
    lengths = dict(zip(texts.ids.to_pylist(), texts.lengths.tolist(), strict=True))
    with track(what, len(batches)) as advance:
        record(live, batches, lengths, layers, folder, scratch, advance)
    (scratch / "finished").touch()


def fit_projection(run: Run, folder: Path) -> None:
    """W and b of ReAugKD's keys z = normalize(W h + b), by supervised contrastive loss (section 2.1 of its paper)."""
    settings, seed = run.recipe.knowledge_base.projection, run.recipe.teacher.seed
    texts = run.tokens("task-for-teacher", run.task.train, run.teacher_tokenizer)
    recorded = RecordedTeacher(folder / "task")
    torch.manual_seed(seed)
    projection = nn.Linear(recorded.embedding.shape[1], run.recipe.student.hidden_size)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        keys = losses.project_keys(recorded(batch).embedding, projection.weight, projection.bias)
        return contrast(keys, batch.labels, settings.temperature), {}

    contrast = losses.contrastive_regression if run.task.kind == "regression" else losses.supervised_contrastive
    history = train(loss_of, projection, RandomPlan(texts, settings.optim, seed), settings.optim, seed, Accelerator())
    save_file({"weight": projection.weight.data, "bias": projection.bias.data}, folder / "projection.safetensors")
    write_json(folder / "projection.json", history)


class RandomPlan:
    """Batches drawn without regard to length: a contrastive loss compares what happens to share a batch."""

    def __init__(self, texts: Tokenised, optim: Optim, seed: int):
        self.texts = texts
        equal = np.ones(len(texts), dtype=np.int64)
        epochs = range(int(optim.epochs))
        self.rows = [rows for epoch in epochs for rows in epoch_batches(equal, epoch, seed, optim.batch_size, None)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Batch:
        return self.texts.batch(self.rows[step])
