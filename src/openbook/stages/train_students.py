"""Distilled students + many tasks -> the same students after they learned them all at once; their heads are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openbook.agnostic_run import AgnosticRun
from openbook.checkpoint import SCRATCH
from openbook.config import UsageError
from openbook.multitask import Pupil, check_learning, inputs_of, learn


def inputs(run: AgnosticRun) -> dict[str, Any]:
    """Raises UsageError for a recipe that does not ask for this stage."""
    settings = run.recipe.students_learn
    if settings is None:
        raise UsageError("the recipe has no students_learn, so students are done after distill; name its tasks there")
    return inputs_of(run, settings)


def check(run: AgnosticRun) -> None:
    if run.recipe.students_learn is not None:
        folder = run.folder / "trained_students"
        check_learning(run, "students_learn", run.recipe.students_learn, run.longest, folder)


def build(run: AgnosticRun, folder: Path) -> None:
    assert run.recipe.students_learn is not None
    for student in run.recipe.students:
        place = folder / student.name
        if (place / "scores.json").exists():  # it was done when another student's training was interrupted
            continue
        place.mkdir(exist_ok=True)
        pupil = Pupil(str(run.folder / "students" / student.name), None, run.recipe.students_learn)
        learn(run, pupil, place, folder / SCRATCH / student.name, f"training {student.name} on tasks")
