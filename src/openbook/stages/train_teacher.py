"""Pretrained encoder + task -> teacher: an ordinary Hugging Face folder, fine-tuned by the one loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from openbook.answers import outputs_of, told
from openbook.checkpoint import SCRATCH, write_json
from openbook.config import Terms, UsageError, WholeKind
from openbook.console import track
from openbook.data.batches import BatchPlan
from openbook.distillation.objective import Objective
from openbook.distillation.teachers import silent
from openbook.inference import answers_of
from openbook.metrics import score
from openbook.models.encoder import SEVERAL, Encoder, label_names, load_finished, load_pretrained, positions_of
from openbook.recordings import widths_of
from openbook.training import Lesson, train
from openbook.workspace import Run


def inputs(run: Run) -> dict[str, Any]:
    return {
        "task": run.task_digest,
        "pretrained": run.teacher_digest,
        "settings": run.recipe.teacher.model_dump(mode="json", include={"fine_tuned", "optim", "seed", "revision"}),
    }


def check(run: Run) -> None:
    """The teacher can read the texts; if it brings its own head, it knows the labels by name and in this order."""
    positions = positions_of(run.teacher_config)
    if positions is not None and run.recipe.task.max_length > positions:
        raise UsageError(
            f"task.max_length={run.recipe.task.max_length} is more than the teacher reads, {positions} word-pieces;"
            " lower task.max_length, or choose another teacher.model"
        )
    if not run.recipe.teacher.fine_tuned or run.task.labels is None:
        return
    several = getattr(run.teacher_config, "problem_type", None) == SEVERAL
    if several != (run.kind == "multi_label"):
        does = "tells any number of labels" if several else "tells one of its labels"
        raise UsageError(
            f"teacher.fine_tuned: {run.teacher_location} {does} (problem_type in its config.json), and task.kind is"
            f" {run.kind}; change task.kind, or set teacher.fine_tuned: false"
        )
    known = label_names(run.teacher_location, run.recipe.teacher.revision)
    if known != run.task.labels:
        raise UsageError(
            f"teacher.fine_tuned: the labels of {run.teacher_location} are {list(known)}, the task's are"
            f" {list(run.task.labels)}; set task.labels to the teacher's names in the teacher's order"
        )


def build(run: Run, folder: Path) -> None:
    settings = run.recipe.teacher
    if settings.fine_tuned:
        teacher, history = load_finished(run.teacher_location, settings.revision), []
    else:
        teacher = load_pretrained(run.teacher_location, run.head, settings.revision, settings.seed)
        history = fine_tune(run, teacher, folder / SCRATCH)
    heard = answers_of(teacher, run.tokens("holdout", run.task.holdout, run.teacher_tokenizer))
    held_out = score(run.task.metric, outputs_of(heard, run.task.kind), heard.labels)
    teacher.save(folder, run.teacher_tokenizer)
    write_json(folder / "history.json", history)
    warnings = warnings_about(outputs_of(heard, run.kind), run.kind)
    write_json(folder / "scores.json", {"holdout": held_out, "warnings": warnings})


def fine_tune(run: Run, teacher: Encoder, scratch: Path) -> list[dict[str, Any]]:
    settings = run.recipe.teacher
    accelerator = Accelerator()
    widths = widths_of(teacher.model.config)
    objective = Objective(Terms(gold=1), widths, widths, run.kind)
    lesson = Lesson(teacher, objective)
    plan = BatchPlan(run.tokens("train", run.task.train, run.teacher_tokenizer), settings.optim, settings.seed)
    with track("fine-tuning the teacher", len(plan)) as advance:
        history = train(
            lambda batch: lesson(batch, silent(batch)),
            lesson, plan, settings.optim, settings.seed, accelerator, scratch, advance,
        )  # fmt: skip
    return [{"stage": "fine-tuning", **row} for row in history]


def warnings_about(outputs: NDArray[Any], kind: WholeKind) -> list[str]:
    """A teacher that gives every text the same answer teaches nothing. outputs (n, C)"""
    if kind != "regression" and len(np.unique(told(outputs, kind), axis=0)) == 1:
        return ["the teacher gives every held-out text the same label; lower its learning rate or train it longer"]
    return []
