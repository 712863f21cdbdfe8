"""One encoder on one task: fine-tuned with a fresh head, judged, and written down as one JSON a training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from openbook.agnostic_run import task_of, tokens_of_rows
from openbook.checkpoint import fingerprint, read_json, write_json
from openbook.config import Optim, TaskSettings
from openbook.data.batches import BatchPlan
from openbook.data.shots import draw
from openbook.data.tasks import TaskData
from openbook.distillation.supervised import Standard, SupervisedLoss, loss_of_kind
from openbook.models.encoder import load_headless
from openbook.models.heads import HeadTask, MultiTask
from openbook.models.student import load_tokenizer
from openbook.task_scores import score_of
from openbook.training import count_updates, train
from openbook.types import Batch, Example

FAILED = float("-inf")
ROWS_SEED = 0  # whatever is compared reads the same rows


@cache
def digest_of(settings: TaskSettings) -> str:
    """Of all that is read of a task."""
    task = task_of(settings)
    rows = {split: [repr(row) for row in getattr(task, split)] for split in ("train", "holdout", "test")}
    return fingerprint([settings.model_dump(mode="json"), task.labels, rows])


@dataclass(frozen=True)
class Trial:
    """One training: what is fine-tuned, on how much of which task, how, and which rows it is judged on."""

    model: str  # the name it goes by
    task: TaskSettings
    shots: int | None  # examples a class; None: all rows
    number: int | None  # of the draw of few examples
    learning_rate: float
    epochs: float
    seed: int
    is_final: bool  # judged on the reported rows; else on rows set aside, to choose rate and epochs

    @property
    def key(self) -> str:
        return fingerprint({**asdict(self), "task": digest_of(self.task)})[:16]


@dataclass(frozen=True)
class Place:
    """Where a trial finds the encoder and leaves its result."""

    encoder: Path
    results: Path  # one JSON a trial
    scratch: Path  # tokenised rows

    def record_of(self, trial: Trial) -> Path:
        return self.results / trial.model / trial.task.name / f"{trial.key}.json"


@dataclass(frozen=True)
class Rows:
    """What a trial learns from, and what it is judged on."""

    train: Sequence[Example]
    judged: Sequence[Example]


@dataclass(frozen=True)
class Limits:
    """At most so many rows; None: all."""

    train: int | None
    test: int | None


def rows_of(trial: Trial, limits: Limits) -> Rows:
    """The rows set aside select; then they are learned from too, and the reported ones judge (specification, 7.2)."""
    task = task_of(trial.task)
    if trial.shots is not None:
        assert trial.number is not None
        few, select = few_of(trial.task, trial.shots, trial.number)
        return Rows(few, some(task.test, limits.test) if trial.is_final else select)
    if trial.is_final:
        return Rows(some([*task.train, *task.holdout], limits.train), some(task.test, limits.test))
    return Rows(some(task.train, limits.train), some(task.holdout, limits.test))


@cache
def few_of(settings: TaskSettings, shots: int, number: int) -> tuple[list[Example], list[Example]]:
    """A draw of few rows, and as many to select by: seconds of work that many trials share."""
    task = task_of(settings)
    return draw([*task.train, *task.holdout], shots, number, task.labels)


def some(rows: Sequence[Example], most: int | None) -> Sequence[Example]:
    """At most so many, the same for everybody, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[place] for place in sorted(random.Random(ROWS_SEED).sample(range(len(rows)), most))]


def fine_tune(
    trial: Trial, place: Place, limits: Limits, optim: Optim, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Run a trial and write its result; a training that diverges is a result too."""
    task, rows, tokenizer = task_of(trial.task), rows_of(trial, limits), load_tokenizer(str(place.encoder))
    standard = standard_of(task, rows.train)
    head = HeadTask(task.kind, task.labels or (), standard.mean, standard.deviation)
    model = MultiTask(load_headless(str(place.encoder)), {"": head}, trial.seed)
    loss = loss_of_kind(task.kind, scaled=False, null_allowed=task.null_allowed, standard=standard)
    lesson = PlainLesson(model, loss)
    texts = tokens_of_rows(place.scratch, trial.task, task.kind, rows.train, tokenizer, training=True)
    judged = tokens_of_rows(place.scratch, trial.task, task.kind, rows.judged, tokenizer, training=False)
    told = optim.model_copy(update={"learning_rate": trial.learning_rate, "epochs": trial.epochs})
    plan = BatchPlan(texts, told, trial.seed)
    record: dict[str, Any] = {**asdict(trial), "task": trial.task.name, "rows": len(rows.train)}
    try:
        history = train(lesson, lesson, plan, told, trial.seed, Accelerator(), advance=advance)
    except FloatingPointError as error:
        record |= {"status": "failed", "error": str(error), "scores": {}}
    else:
        scores = score_of(model, "", task, rows.judged, judged)
        record |= {"status": "ok", "error": None, "scores": scores, "loss": history[-1]["loss"]}
    path = place.record_of(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record | {"metric": task.metric, "updates": count_updates(plan, told)})


class PlainLesson(nn.Module):
    """A model with one head, and the loss of its task."""

    def __init__(self, model: MultiTask, loss: SupervisedLoss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        return self.loss(self.model(replace(batch, task="")), batch.labels), {}


def standard_of(task: TaskData, rows: Sequence[Example]) -> Standard:
    """The units of a regression's targets; those of other labels stay as they are."""
    if task.kind != "regression":
        return Standard()
    return Standard.of([row.label for row in rows if isinstance(row.label, int | float)])


def main_score(path: Path) -> float:
    """The score that decides; below all others if the training failed."""
    record = read_json(path)
    return float(record["scores"][record["metric"]]) if record["status"] == "ok" else FAILED
