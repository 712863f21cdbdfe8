"""Runs a grid of task-agnostic students: teachers and text once, every arm and seed distilled, fine-tuned, judged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from openbook.agnostic_grid import AgnosticGrid, recipe_of
from openbook.agnostic_page import publish
from openbook.agnostic_run import AgnosticRun, lengths_of
from openbook.checkpoint import fingerprint, link, read_json, write_json
from openbook.config import UsageError
from openbook.console import console
from openbook.data.roles import role_of
from openbook.drift import drift
from openbook.pipeline import Step, alone, check, perform, plan
from openbook.stages.evaluate_agnostic import judged, known

SHARED = ("tokens", "trials")  # folders whose content goes by fingerprint


@dataclass(frozen=True)
class AgnosticExperiment:
    """A grid at work: results go to `results` (small, to be kept), all else to `root` (large, can be made again)."""

    grid: AgnosticGrid
    scale: str
    root: Path
    results: Path

    def run_of(self, arm: str, seed: int) -> AgnosticRun:
        return AgnosticRun(recipe_of(self.grid, arm, self.scale, seed), self.root / "cells" / arm / f"seed-{seed}")

    def record_of(self, arm: str, seed: int) -> Path:
        return self.results / arm / f"seed-{seed}.json"


def execute(experiment: AgnosticExperiment, arms: Sequence[str] | None, page: Path) -> None:
    """Run what is missing, and write the page anew after each arm and seed. Any interruption loses one training."""
    cells = [(arm, seed) for seed in experiment.grid.seeds for arm in arms or experiment.grid.arms]
    for arm, seed in cells:  # every recipe is checked before the first one runs
        check(experiment.run_of(arm, seed))
    refuse_unlike_roles([experiment.run_of(arm, experiment.grid.seeds[0]) for arm in experiment.grid.arms])
    with alone(experiment.root):
        describe(experiment)
        for place, (arm, seed) in enumerate(cells, start=1):
            title = experiment.grid.arms[arm].title
            console.print(f"[bold]arm {escape(arm)}, seed {seed}[/] ({place} of {len(cells)}): {escape(title)}")
            finish(experiment, arm, seed)
            publish(experiment.results, page)


def refuse_unlike_roles(runs: Sequence[AgnosticRun]) -> None:
    """Raise UsageError where a task has another role in another arm: such scores are not compared."""
    first, *others = ({task.name: role_of(task, known(run)) for task in judged(run)} for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        for name, role in other.items():
            if first.get(name, role) != role:
                raise UsageError(
                    f"task {name!r} is {first[name]} in {runs[0].recipe.name} and {role} in {run.recipe.name}, as their"
                    " teachers learn other tasks; name in recipe.fine_tune.known what counts as trained on in all arms"
                )


def finish(experiment: AgnosticExperiment, arm: str, seed: int) -> None:
    """Bring one run up to date, with what other runs made from the same, and keep its results."""
    run, path = experiment.run_of(arm, seed), experiment.record_of(arm, seed)
    key = fingerprint([step.inputs for step in linked(experiment, run)])
    kept = read_json(path) if path.exists() else {}
    is_done = kept.get("key") == key
    if is_done and ("drift" in kept or not plan(run, "train-teacher")[0].fresh):  # none is trained again for it alone
        console.print("                done before")
        return
    perform(run, plan(run, "train-teacher")[0])
    moved = drift_of(experiment, run)  # before more is spent: it tells whether students can differ
    if not is_done:
        for step in plan(run)[1:]:  # the plain arm's text is there by now
            perform(run, step)
        kept = {"key": key, "arm": arm, "seed": seed, **told(run)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept | {"drift": moved})


def linked(experiment: AgnosticExperiment, run: AgnosticRun, until: str | None = None) -> list[Step]:
    """The stages of a run, whose folders now lead to where runs that make them from the same share them."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        link(run.folder / name, experiment.root / "store" / name)
        (experiment.root / "store" / name).mkdir(parents=True, exist_ok=True)
    steps = plan(run, until)
    for step in steps:
        folder = step.stage.folder
        link(run.folder / folder, experiment.root / "store" / folder / fingerprint(step.inputs)[:16])
    return steps


def drift_of(experiment: AgnosticExperiment, run: AgnosticRun) -> dict[str, Any] | None:
    """How far the teacher moved, on text that is the same for all arms; None if it was another encoder before.

    Of the plain arm's text the blocks that students read last are taken, as the losses at their end are of those.
    """
    plain = experiment.run_of(experiment.grid.plain, experiment.grid.seeds[0])
    if run.teacher_digest != plain.teacher_digest:
        return None
    linked(experiment, plain, "build-text")
    for step in plan(plain, "build-text"):
        if not step.fresh:
            perform(plain, step)
    found = drift(run, plain.folder / "text" / lengths_of(plain.recipe.text)[-1][0])
    told = ", ".join(f"{one['loss']:.4f} for {name}" for name, one in found["students"].items())
    console.print(f"{'':15} drift of the teacher: {told}")
    return found


def told(run: AgnosticRun) -> dict[str, Any]:
    """What the page is made of: the teacher's tasks, the text, the students' losses, every fine-tuning.

    Of controls also how well a teacher guesses hidden words, and what students learned after distillation.
    """
    students = {
        student.name: {
            "loss": read_json(run.folder / "students" / student.name / "history.json")[-1]["loss"],
            "updates": read_json(run.folder / "students" / student.name / "history.json")[-1]["step"],
        }
        for student in run.recipe.students
    }
    results = read_json(run.folder / "evaluation" / "results.json")
    teacher = read_json(run.folder / "teacher" / "scores.json")
    if run.recipe.students_learn is not None:
        for name, one in students.items():
            one["learned"] = read_json(run.students_folder / name / "scores.json")
    return {
        "teacher": teacher["tasks"],
        **{name: part for name, part in teacher.items() if name == "masked_text"},
        "text": read_json(run.folder / "text" / "statistics.json"),
        "students": students,
        **{name: results[name] for name in ("rows", "teacher_rows", "heads")},
    }


def describe(experiment: AgnosticExperiment) -> None:
    """What the grid is, for whoever reads its results later."""
    grid = experiment.grid
    recipe = recipe_of(grid, grid.multi_task, experiment.scale, grid.seeds[0])
    experiment.results.mkdir(parents=True, exist_ok=True)
    told = grid.model_dump(mode="json", include={"name", "title", "plain", "multi_task", "contrasts", "seeds"})
    told |= {
        "scale": experiment.scale,
        "arms": {name: arm.title for name, arm in grid.arms.items()},
        "students": {student.name: student.model_dump(mode="json") for student in recipe.students},
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"tasks"}),
        "tokens": {"text": recipe.text.budget_tokens, "distillation": recipe.distill.optim.tokens},
        "fine_tune": recipe.fine_tune.model_dump(mode="json", include={"select", "seeds", "rows", "test_rows"}),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
    }
    write_json(experiment.results / "grid.json", told)
