"""Runs a grid: shared stages once, every training as a job of its own, one JSON a result; skips what is done."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from openbook.cells import Experiment, is_done, keep, key_of, prepare, read_cell, train_cell
from openbook.checkpoint import read_json, write_json
from openbook.console import console, track
from openbook.courses import CORPUS
from openbook.experiment_page import publish
from openbook.grid import Cell, Rates, coordinates_of, middle
from openbook.parallel import run_jobs
from openbook.pipeline import alone, check
from openbook.stages.distill import updates_of

FAILED = float("-inf")


def default_scale(grid: Any) -> str:
    """The largest size with a GPU, the smallest without."""
    return str(list(grid.scales)[-1 if torch.cuda.is_available() else 0])


def execute(experiment: Experiment, tasks: Sequence[str], arms: Sequence[str] | None, page: Path) -> None:
    """Run what is missing, task by task, and write the page anew after each. Any interruption loses one training."""
    for task in tasks:  # every recipe of the grid is checked before the first one runs
        for arm in experiment.grid.arms_of(task):
            check(experiment.run_of(experiment.cell(task, arm, 0, middle(experiment.grid))))
    with alone(experiment.root):
        describe(experiment)
        publish(experiment.results, page)
        for task in tasks:
            finish_task(experiment, task, [arm for arm in experiment.grid.arms_of(task) if arms is None or arm in arms])
            publish(experiment.results, page)


def finish_task(experiment: Experiment, task: str, arms: Sequence[str]) -> None:
    """Tune every arm coordinate by coordinate, then train it with all seeds; the arms share each wave of jobs."""
    grid = experiment.grid
    rates = {grid.tuned_as(arm): middle(grid) for arm in arms}  # also of an arm that was not asked for itself
    for place, coordinate in enumerate(grid.tune):
        tuned = [arm for arm in rates if place in coordinates_of(grid, task, arm, experiment.scale)]
        wave = {arm: tried(experiment, task, arm, rates[arm], place) for arm in tuned}
        train(experiment, [one for cells in wave.values() for one in cells], f"{task}: tuning {coordinate.name}")
        for arm, cells in wave.items():
            rates[arm] = max(cells, key=lambda one: held_out(experiment, one)).rates
            write_tuning(experiment, task, arm, rates[arm])

    def with_all_seeds(names: Iterable[str]) -> list[Cell]:
        seeds = grid.tasks[task].seeds
        return [experiment.cell(task, arm, seed, rates[grid.tuned_as(arm)]) for arm in names for seed in seeds]

    final = with_all_seeds(dict.fromkeys(grid.arms[arm].students_of or arm for arm in arms))
    train(experiment, final, f"{task}: all seeds", is_whole)
    reading = with_all_seeds(arm for arm in arms if grid.arms[arm].students_of is not None)
    open_books(experiment, reading, f"{task}: opening books")
    for one in (*final, *reading):
        keep(experiment, one)
    console.print(table(experiment, [task]))
    shutil.rmtree(experiment.root / "store" / "teacher_outputs", ignore_errors=True)  # tens of gigabytes a task


def tried(experiment: Experiment, task: str, arm: str, rates: Rates, place: int) -> list[Cell]:
    """A cell for every value of one coordinate, the others as they are."""
    values = experiment.grid.tune[place].values
    seed = experiment.grid.tuning_seed
    return [experiment.cell(task, arm, seed, (*rates[:place], value, *rates[place + 1 :])) for value in values]


def held_out(experiment: Experiment, one: Cell) -> float:
    record = read_json(experiment.record_of(one))
    return float(record["holdout"]) if record["status"] == "ok" else FAILED


Done = Callable[[Experiment, Cell, str], bool]


def is_trained(experiment: Experiment, one: Cell, key: str) -> bool:
    return is_done(experiment.record_of(one), key)


def train(experiment: Experiment, cells: Sequence[Cell], what: str, done: Done = is_trained) -> None:
    """Train the cells whose result is missing or was made from something else."""
    keys = {one: key_of(experiment, one) for one in unique(cells)}
    missing = [one for one, key in keys.items() if not done(experiment, one, key)]
    console.print(f"[bold]{escape(what)}[/]: {len(missing)} of {len(keys)} trainings to do")
    for one in missing:
        prepare(experiment, one)
    jobs = [(experiment, one, keys[one]) for one in missing]
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    if jobs:
        updates = sum(updates_of(experiment.run_of(one), CORPUS) for one in missing)
        run_jobs(train_cell, jobs, min(workers, len(jobs)), what, updates)


def open_books(experiment: Experiment, cells: Sequence[Cell], what: str) -> None:
    """The arms that train nothing, from what the students of others said."""
    keys = {one: key_of(experiment, one) for one in cells}
    missing = [one for one in cells if not is_done(experiment.record_of(one), keys[one])]
    if not missing:
        return
    console.print(f"[bold]{escape(what)}[/]: {len(missing)} of {len(cells)} to do")
    with track(what, len(missing)) as advance:
        for done, one in enumerate(missing, start=1):
            prepare(experiment, one)
            read_cell(experiment, one, keys[one])
            advance(done)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    return list({(one.arm, one.seed, one.rates): one for one in cells}.values())


def is_whole(experiment: Experiment, one: Cell, key: str) -> bool:
    """Whether a training is done, and what it said is at hand for the arms that still have to read it."""
    if not is_done(experiment.record_of(one), key):
        return False
    readers = [experiment.cell(one.task, arm, one.seed, one.rates) for arm in experiment.grid.readers_of(one)]
    waiting = [arm for arm in readers if not is_trained(experiment, arm, key_of(experiment, arm))]
    return not waiting or experiment.answers_of(one).exists()


def write_tuning(experiment: Experiment, task: str, arm: str, chosen: Rates) -> None:
    """All rates that were tried, and those that were best on the held-out rows."""
    folder, grid = experiment.folder_of(task, arm), experiment.grid
    records = [read_json(path) for path in sorted(folder.glob(f"runs/seed-{grid.tuning_seed}-*.json"))]
    kept = ("rates", "status", "error", "holdout")
    runs = [{name: record.get(name) for name in kept} for record in records]
    names = [coordinate.name for coordinate in grid.tune]
    write_json(folder / "tuning.json", {"runs": runs, "chosen": dict(zip(names, chosen, strict=True))})


def describe(experiment: Experiment) -> None:
    """What the grid is, for whoever reads its results later."""
    grid = experiment.grid
    experiment.results.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for name, task in grid.tasks.items():
        run = experiment.run_of(experiment.cell(name, grid.baseline, 0, middle(grid)))
        rows = {split: len(getattr(run.task, split)) for split in ("train", "holdout", "test")}
        tasks[name] = {
            "title": task.title,
            "metric": run.task.metric,
            "metrics": run.task.metrics,
            "rows": rows,
            "seeds": task.seeds,
        }
    recipe = run.recipe
    told = grid.model_dump(mode="json", include={"name", "title", "baseline", "hypotheses", "curves", "tune"})
    told |= {
        "scale": experiment.scale,
        "tasks": tasks,
        "arms": {name: {"title": arm.title, "tasks": grid.tasks_of(name)} for name, arm in grid.arms.items()},
        "budget": {"tokens": recipe.corpus.budget_tokens, "training_tokens": recipe.distill.corpus.optim.tokens},
        "student": recipe.student.told(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }
    path = experiment.results / "grid.json"
    known = read_json(path) if path.exists() else {}
    write_json(path, told | {"bank": known["bank"]} if "bank" in known else told)


def table(experiment: Experiment, tasks: Sequence[str]) -> Table:
    """Mean scores x 100 of what is done, and how many trainings that is."""
    shown = Table("task", "arm", "", "score", "trainings")
    for task in tasks:
        for arm in experiment.grid.arms_of(task):
            folder, seeds = experiment.folder_of(task, arm), experiment.grid.tasks[task].seeds
            records = [read_json(path) for seed in seeds if (path := folder / f"seed-{seed}.json").exists()]
            scores = [100 * next(iter(record["scores"].values())) for record in records if record["status"] == "ok"]
            mean = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1) if len(scores) > 1 else 0:.1f}" if scores else ""
            cells = (task, arm, experiment.grid.arms[arm].title, mean, f"{len(scores)} of {len(seeds)}")
            shown.add_row(*map(Text, cells))
    return shown
