"""Runs a grid: shared stages once, every training as a job of its own, one JSON a result; skips what is done."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from openbook.answers import outputs_of
from openbook.book_arms import SPLITS, Heard, consult
from openbook.checkpoint import fingerprint, link, read_json, write_json
from openbook.config import FileSource
from openbook.console import console, track
from openbook.courses import CORPUS, TEACHER, Course, courses, reads_corpus
from openbook.experiment_page import publish
from openbook.grid import Cell, Grid, Rates, cell, coordinates_of, middle
from openbook.inference import answers_of
from openbook.metrics import agreement, score
from openbook.models.encoder import load_finished
from openbook.parallel import run_jobs
from openbook.pipeline import alone, check, perform, plan
from openbook.readings import tokens_of
from openbook.retrieval.bank import Bank
from openbook.stages.distill import folder_of, teach, updates_of
from openbook.starts import record_word_answers
from openbook.workspace import Run

UNTIL = "record-answers"  # the last stage that the trainings of an arm share
SHARED = ("tokens", "lessons", "words", "folds")  # folders whose content goes by fingerprint
TEST_ANSWERS = "test.npy"  # beside the teacher's weights: its probabilities on the reported split
FAILED = float("-inf")


@dataclass(frozen=True)
class Experiment:
    """A grid at work: results go to `results` (small, to be kept), all else to `root` (large, can be made again)."""

    grid: Grid
    scale: str
    root: Path
    results: Path

    def cell(self, task: str, arm: str, seed: int, rates: Rates) -> Cell:
        return cell(self.grid, task, arm, self.scale, seed, rates)

    def run_of(self, one: Cell) -> Run:
        return Run(one.recipe, self.root / "cells" / one.task / one.arm / one.label)

    def folder_of(self, task: str, arm: str) -> Path:
        return self.results / task / arm

    def answers_of(self, one: Cell) -> Path:
        """What a trained student says, for the arms that open a book for it."""
        return self.root / "answers" / one.task / one.arm / f"seed-{one.seed}-{one.label}.npz"

    def record_of(self, one: Cell) -> Path:
        """Where a training's result is kept, whether it served the tuning or is final."""
        return self.folder_of(one.task, one.arm) / "runs" / f"seed-{one.seed}-{one.label}.json"


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
        shutil.copyfile(experiment.record_of(one), experiment.folder_of(task, one.arm) / f"seed-{one.seed}.json")
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
    console.print(f"[bold]{what}[/]: {len(missing)} of {len(keys)} trainings to do")
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
    console.print(f"[bold]{what}[/]: {len(missing)} of {len(cells)} to do")
    with track(what, len(missing)) as advance:
        for done, one in enumerate(missing, start=1):
            prepare(experiment, one)
            read_cell(experiment, one, keys[one])
            advance(done)


def read_cell(experiment: Experiment, one: Cell, key: str) -> None:
    run, started, arm = experiment.run_of(one), time.monotonic(), experiment.grid.arms[one.arm]
    assert arm.students_of is not None
    trained = replace(one, arm=arm.students_of)
    of = read_json(experiment.record_of(trained))
    record = {"task": one.task, "arm": one.arm, "seed": one.seed, "key": key, "rates": of["rates"]}
    if of["status"] == "ok":
        heard = Heard.load(experiment.answers_of(trained))
        theirs = np.load(run.folder / TEACHER / TEST_ANSWERS, allow_pickle=False)
        found = consult(run, heard, arm.book, one.seed, theirs)
        record |= {"status": "ok", "error": None, **found, "steps": of["steps"], "tokens": of["tokens"]}
    else:
        record |= {"status": "failed", "error": of["error"]}
    record["seconds"] = round(time.monotonic() - started, 1)
    path = experiment.record_of(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    return list({(one.arm, one.seed, one.rates): one for one in cells}.values())


def key_of(experiment: Experiment, one: Cell) -> str:
    """Digest of all that a result depends on, but for settings at their defaults: a new setting undoes no result."""
    run, arm = experiment.run_of(one), experiment.grid.arms[one.arm]
    recipe = one.recipe.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    book = [] if arm.students_of is None else [arm.students_of, arm.book.model_dump(mode="json")]
    return fingerprint([recipe, run.task_digest, run.corpus_digest, run.teacher_digest, one.seed, *book])


def is_whole(experiment: Experiment, one: Cell, key: str) -> bool:
    """Whether a training is done, and what it said is at hand for the arms that still have to read it."""
    if not is_done(experiment.record_of(one), key):
        return False
    readers = [experiment.cell(one.task, arm, one.seed, one.rates) for arm in experiment.grid.readers_of(one)]
    waiting = [arm for arm in readers if not is_trained(experiment, arm, key_of(experiment, arm))]
    return not waiting or experiment.answers_of(one).exists()


def is_done(path: Path, key: str) -> bool:
    try:
        return bool(read_json(path)["key"] == key)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def prepare(experiment: Experiment, one: Cell) -> None:
    """Bring the stages before the trainings up to date; what several arms share is built once and linked."""
    run = experiment.run_of(one)
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        (experiment.root / "store" / name).mkdir(parents=True, exist_ok=True)
        link(run.folder / name, experiment.root / "store" / name)
    for step in plan(run, UNTIL):
        folder = step.stage.folder
        link(run.folder / folder, experiment.root / "store" / folder / fingerprint(step.inputs)[:16])
    stale = [step for step in plan(run, UNTIL) if not step.fresh]
    if stale:
        console.print(f"[bold]{one.task} {one.arm}[/]")
    for step in stale:
        perform(run, step)
    record_word_answers(run)
    describe_arm(experiment, one, run)
    for split in SPLITS:  # here, or several workers would write them at once
        run.tokens(split, getattr(run.task, split), run.tokenizer)


def train_cell(experiment: Experiment, one: Cell, key: str, progress: Callable[[int], None]) -> None:
    """One training in a process of its own, scored; a failure is a result too."""
    run, started = experiment.run_of(one), time.monotonic()
    record: dict[str, Any] = {
        "task": one.task,
        "arm": one.arm,
        "seed": one.seed,
        "key": key,
        "rates": named(experiment.grid, one),
    }
    try:
        teach(one.recipe, run.folder, CORPUS, one.seed, progress)
    except FloatingPointError as error:
        record |= {"status": "failed", "error": str(error)}
    else:
        record |= {"status": "ok", "error": None, **judged(run, one.seed)}
        if experiment.grid.readers_of(one):
            Heard.of(run, load_finished(str(folder_of(run, CORPUS, one.seed)))).save(experiment.answers_of(one))
    record["seconds"] = round(time.monotonic() - started, 1)
    path = experiment.record_of(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    shutil.rmtree(folder_of(run, CORPUS, one.seed), ignore_errors=True)


def named(grid: Grid, one: Cell) -> dict[str, float]:
    return {coordinate.name: rate for coordinate, rate in zip(grid.tune, one.rates, strict=True)}


def judged(run: Run, seed: int) -> dict[str, Any]:
    """Scores of a trained student on both splits, and how its training went."""
    folder = folder_of(run, CORPUS, seed)
    heard = answers_of(load_finished(str(folder)), run.tokens("test", run.task.test, run.tokenizer))
    said = outputs_of(heard, run.task.kind)
    theirs = np.load(run.folder / TEACHER / TEST_ANSWERS, allow_pickle=False)
    history = read_json(folder / "history.json")
    last = {row["stage"]: row for row in history if "loss" in row}
    return {
        "holdout": read_json(folder / "scores.json")["holdout"],
        "scores": {metric: score(metric, said, heard.labels) for metric in run.task.metrics},
        "agreement": None if run.task.kind == "regression" else agreement(said, theirs),
        "steps": {stage: row["step"] for stage, row in last.items()},
        "tokens": {course.name: read_in(run, course) for course in courses(run, CORPUS)},
        "final_terms": {
            stage: {name: value for name, value in row.items() if name not in ("stage", "step", "learning_rate")}
            for stage, row in last.items()
        },
    }


def read_in(run: Run, course: Course) -> int:
    """Word-pieces that a training was to read."""
    optim = course.training.optim
    return optim.tokens or round(optim.epochs * int(tokens_of(run, course.texts, run.tokenizer).tokens.sum()))


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
        "student": recipe.student.model_dump(mode="json"),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }
    path = experiment.results / "grid.json"
    known = read_json(path) if path.exists() else {}
    write_json(path, told | {"bank": known["bank"]} if "bank" in known else told)


def describe_arm(experiment: Experiment, one: Cell, run: Run) -> None:
    """The bank's size, the teacher's scores, and the statistics of the corpus that this arm reads."""
    note_bank(experiment, run)
    teacher = run.folder / TEACHER
    told_in = experiment.results / one.task / "teacher.json"
    if not (teacher / TEST_ANSWERS).exists() or not told_in.exists():
        heard = answers_of(
            load_finished(str(teacher)), run.tokens("test-for-teacher", run.task.test, run.teacher_tokenizer)
        )
        said = outputs_of(heard, run.task.kind)
        np.save(teacher / TEST_ANSWERS, said)
        scores = {metric: score(metric, said, heard.labels) for metric in run.task.metrics}
        told = {"task": one.task, "holdout": read_json(teacher / "scores.json")["holdout"], "scores": scores}
        told_in.parent.mkdir(exist_ok=True)
        write_json(told_in, told)
    if reads_corpus(one.recipe):
        folder = experiment.folder_of(one.task, one.arm)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "corpus.json", read_json(run.folder / "corpus" / "statistics.json"))


def note_bank(experiment: Experiment, run: Run) -> None:
    """Into the plan, once the bank is there."""
    path = experiment.results / "grid.json"
    told = read_json(path)
    if "bank" not in told and (run.folder / "bank").exists():
        sources = [
            source.path if isinstance(source, FileSource) else str(source) for source in run.recipe.corpus.sources
        ]
        write_json(path, told | {"bank": {"sentences": len(Bank.load(run.folder / "bank")), "sources": sources}})


def table(experiment: Experiment, tasks: Sequence[str]) -> Table:
    """Mean scores x 100 of what is done, and how many trainings that is."""
    shown = Table("task", "arm", "", "score", "trainings")
    for task in tasks:
        for arm in experiment.grid.arms_of(task):
            folder, seeds = experiment.folder_of(task, arm), experiment.grid.tasks[task].seeds
            records = [read_json(path) for seed in seeds if (path := folder / f"seed-{seed}.json").exists()]
            scores = [100 * next(iter(record["scores"].values())) for record in records if record["status"] == "ok"]
            mean = f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1) if len(scores) > 1 else 0:.1f}" if scores else ""
            shown.add_row(task, arm, experiment.grid.arms[arm].title, mean, f"{len(scores)} of {len(seeds)}")
    return shown
