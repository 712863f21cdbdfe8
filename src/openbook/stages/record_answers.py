"""Teacher + texts -> what it says about each, on disk, once; and the linear map that turns its embeddings into keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from openbook.answers import outputs_of
from openbook.checkpoint import SCRATCH, write_json
from openbook.config import ProjectionSettings, WholeKind
from openbook.console import track
from openbook.courses import retrieves
from openbook.data.batches import BatchPlan, Tokenised, ordered
from openbook.distillation import losses
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, record
from openbook.inference import answers_of
from openbook.keys import in_blocks, keys_of
from openbook.knowledge_base.interpolate import neighbour_average, own_positions
from openbook.knowledge_base.search import search
from openbook.lessons import gold_values, live_teacher, training_base
from openbook.metrics import score
from openbook.models.encoder import load_finished
from openbook.readings import tokens_of
from openbook.recordings import Recording, as_json, recordings
from openbook.training import train
from openbook.types import Batch
from openbook.workspace import Run

RECORD_TOKENS = 4096  # tokens of one batch with padding; only speed depends on it
NEAREST = 16  # keys that judge a held-out text
JUDGED_BY: dict[WholeKind, str] = {"classification": "accuracy", "regression": "spearmanr", "multi_label": "micro_f1"}
MOST = 32  # neighbours recorded of a training text, and the largest `retrieved_k`


def inputs(run: Run) -> dict[str, Any]:
    return {
        "task": run.task_digest,
        "recordings": as_json(recordings(run)),
        "width": run.recipe.student.hidden_size,
        "projection": run.recipe.knowledge_base.projection.model_dump(mode="json"),
        "neighbours": retrieves(run.recipe),
    }


def build(run: Run, folder: Path) -> None:
    for recording in recordings(run):
        teacher = live_teacher(run, recording, recording.taps)
        texts = tokens_of(run, recording.texts, run.teacher_tokenizer)
        record_once(teacher, texts, recording, folder / recording.name, folder / SCRATCH / recording.name)
    make_projection(run, folder)
    judge_keys(run, folder)
    if retrieves(run.recipe):
        record_neighbours(run, folder)


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


def make_projection(run: Run, folder: Path) -> None:
    """W and b of the keys z = normalize(W h + b), by the recipe's `projection.kind` (specification, 2.1)."""
    settings = run.recipe.knowledge_base.projection
    recorded = RecordedTeacher(folder / "task", hidden=(), taps=())
    width = recorded.embedding.shape[1]
    torch.manual_seed(run.recipe.teacher.seed)
    projection = nn.Linear(width, run.recipe.student.hidden_size)
    history: list[dict[str, float]] = []
    if settings.kind == "supcon":
        history = fit_projection(run, recorded, projection)
    elif settings.kind == "pca":
        projection.weight.data, projection.bias.data = principal_components(recorded.embedding[:], len(projection.bias))
    elif settings.kind == "identity":
        projection.weight.data, projection.bias.data = torch.eye(width), torch.zeros(width)
    save_file({"weight": projection.weight.data, "bias": projection.bias.data}, folder / "projection.safetensors")
    write_json(folder / "projection.json", history)


def fit_projection(run: Run, recorded: RecordedTeacher, projection: nn.Linear) -> list[dict[str, float]]:
    """Train the map by supervised contrastive loss, or its like for scores; all else stays as it is."""
    settings, seed = run.recipe.knowledge_base.projection, run.recipe.teacher.seed

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        keys = losses.project_keys(recorded(batch).embedding, projection.weight, projection.bias)
        return contrast(settings, run.kind, keys, batch.labels), {}

    texts = tokens_of(run, "task", run.teacher_tokenizer)
    plan = BatchPlan(texts, settings.optim, seed, by_length=False)  # it compares what happens to share a batch
    return train(loss_of, projection, plan, settings.optim, seed, Accelerator())


def contrast(settings: ProjectionSettings, kind: WholeKind, keys: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch of keys (N, d) with gold labels (N,), or several (N, C) (specification, 2.1, 2.7 and 8)."""
    if kind == "multi_label":
        return losses.contrastive_label_sets(keys, labels, settings.temperature, settings.singletons)
    if kind == "regression" and settings.regression != "bins":
        by_score = {"kernel": losses.contrastive_regression, "rnc": losses.rank_n_contrast}
        return by_score[settings.regression](keys, labels, settings.temperature)
    classes = (labels + 0.5).floor().long() if kind == "regression" else labels
    return losses.supervised_contrastive(keys, classes, settings.temperature, settings.singletons)


def principal_components(embeddings: NDArray[Any], count: int) -> tuple[Tensor, Tensor]:
    """W (count, d_t) and b (count,) that turn embeddings (n, d_t) into their leading components, centred.

    The sign of each is such that its largest weight is positive.
    """
    mean = embeddings.mean(axis=0, dtype=np.float64)
    scatter = np.sum([(block - mean).T @ (block - mean) for block in in_blocks(embeddings)], axis=0)  # (d_t, d_t)
    axes = np.linalg.eigh(scatter)[1].T[::-1][:count]  # the largest first
    largest = axes[np.arange(count), np.abs(axes).argmax(axis=1)]
    weight = np.ascontiguousarray(axes * np.sign(largest)[:, None])
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(-weight @ mean, dtype=torch.float32)


def judge_keys(run: Run, folder: Path) -> None:
    """How well the nearest training keys tell the held-out labels, beside the teacher itself (specification, 2.1)."""
    teacher = load_finished(str(run.folder / "teacher")).to(Accelerator().device)
    heard = answers_of(teacher, run.tokens("holdout", run.task.holdout, run.teacher_tokenizer))
    base = training_base(run, folder)
    hits = search(keys_of(folder, heard.embedding), base.keys, NEAREST)
    found = neighbour_average(hits, gold_values(run), run.recipe.knowledge_base.projection.temperature)
    metric = JUDGED_BY[run.kind]
    told = {"teacher": outputs_of(heard, run.kind), "nearest_keys": found}
    scores = {name: score(metric, outputs, heard.labels) for name, outputs in told.items()}
    write_json(folder / "scores.json", {"holdout": scores, "metric": metric, "neighbours": NEAREST})


def record_neighbours(run: Run, folder: Path) -> None:
    """What every training text finds among the others: never itself, nor its text again (specification, 2.5)."""
    base = training_base(run, folder)
    hits = search(base.keys, base.keys, MOST, own_positions(base, base.ids, base.texts))
    found = {"positions": torch.from_numpy(hits.positions), "similarities": torch.from_numpy(hits.similarities)}
    save_file(found, folder / "neighbours.safetensors")
