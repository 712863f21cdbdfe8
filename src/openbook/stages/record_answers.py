"""Teacher + texts -> what it says about each, on disk, once; and the linear map that turns its embeddings into keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from openbook.checkpoint import SCRATCH, write_json
from openbook.console import track
from openbook.data.batches import BatchPlan, Tokenised, ordered
from openbook.distillation import losses
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, record
from openbook.lessons import Recording, as_json, live_teacher, recordings
from openbook.readings import tokens_of
from openbook.training import train
from openbook.types import Batch
from openbook.workspace import Run

RECORD_TOKENS = 4096  # tokens of one batch with padding; only speed depends on it


def inputs(run: Run) -> dict[str, Any]:
    return {
        "task": run.task_digest,
        "recordings": as_json(recordings(run)),
        "width": run.recipe.student.hidden_size,
        "projection": run.recipe.knowledge_base.projection.model_dump(mode="json"),
    }


def build(run: Run, folder: Path) -> None:
    for recording in recordings(run):
        teacher = live_teacher(run, recording, recording.taps)
        texts = tokens_of(run, recording.texts, run.teacher_tokenizer)
        record_once(teacher, texts, recording, folder / recording.name, folder / SCRATCH / recording.name)
    fit_projection(run, folder)


def record_once(live: LiveTeacher, texts: Tokenised, recording: Recording, folder: Path, scratch: Path) -> None:
    folder.mkdir(exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    if (scratch / "finished").exists():
        return
    batches = list(ordered(texts, RECORD_TOKENS))
    lengths = dict(zip(texts.ids.to_pylist(), texts.lengths.tolist(), strict=True))
    with track(
        f"the {recording.teacher.replace('_', '-')} teacher reads the {recording.texts}", len(batches)
    ) as advance:
        record(live, batches, lengths, recording.hidden, folder, scratch, advance, taps=recording.taps)
    (scratch / "finished").touch()


def fit_projection(run: Run, folder: Path) -> None:
    """W and b of ReAugKD's keys z = normalize(W h + b), by supervised contrastive loss (section 2.1 of its paper)."""
    settings, seed = run.recipe.knowledge_base.projection, run.recipe.teacher.seed
    recorded = RecordedTeacher(folder / "task", hidden=(), taps=())
    torch.manual_seed(seed)
    projection = nn.Linear(recorded.embedding.shape[1], run.recipe.student.hidden_size)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        keys = losses.project_keys(recorded(batch).embedding, projection.weight, projection.bias)
        return contrast(keys, batch.labels, settings.temperature), {}

    contrast = losses.contrastive_regression if run.task.kind == "regression" else losses.supervised_contrastive
    texts = tokens_of(run, "task", run.teacher_tokenizer)
    plan = BatchPlan(texts, settings.optim, seed, by_length=False)  # it compares what happens to share a batch
    history = train(loss_of, projection, plan, settings.optim, seed, Accelerator())
    save_file({"weight": projection.weight.data, "bias": projection.bias.data}, folder / "projection.safetensors")
    write_json(folder / "projection.json", history)
