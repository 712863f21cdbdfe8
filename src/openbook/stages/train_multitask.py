"""Pretrained encoder + many tasks -> a teacher of them all: the encoder in its stock format, the heads beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openbook.agnostic_run import AgnosticRun
from openbook.checkpoint import SCRATCH, write_json
from openbook.models.encoder import load_headless, positions_of
from openbook.multitask import Pupil, check_learning, inputs_of, learn


def inputs(run: AgnosticRun) -> dict[str, Any]:
    return {"pretrained": run.teacher_digest, **inputs_of(run, run.recipe.teacher)}


def check(run: AgnosticRun) -> None:
    positions = positions_of(run.teacher_config)
    check_learning(run, "teacher", run.recipe.teacher, positions, run.folder / "teacher")
    _ = run.tokenizer


def build(run: AgnosticRun, folder: Path) -> None:
    settings = run.recipe.teacher
    if settings.tasks:
        pupil = Pupil(run.teacher_location, settings.revision, settings, keeps_heads=True)
        learn(run, pupil, folder, folder / SCRATCH, "training the teacher")
    else:
        load_headless(run.teacher_location, settings.revision).save(folder, run.tokenizer)
        write_json(folder / "scores.json", {"tasks": {}})
