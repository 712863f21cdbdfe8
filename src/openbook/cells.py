"""One cell of a grid: what it stands on, how it is trained or reads a book, and the result it leaves."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from openbook.answers import outputs_of
from openbook.book_arms import READING, SPLITS, Heard, consult
from openbook.checkpoint import fingerprint, link, read_json, write_json
from openbook.config import FileSource, UsageError
from openbook.console import console
from openbook.courses import CORPUS, TEACHER, Course, courses, reads_corpus
from openbook.grid import Cell, Grid, Rates, cell
from openbook.inference import answers_of
from openbook.metrics import agreement, score
from openbook.models.encoder import load_finished
from openbook.pipeline import perform, plan
from openbook.readings import tokens_of
from openbook.results import rows_file
from openbook.retrieval.bank import Bank
from openbook.row_answers import RowAnswers
from openbook.stages.distill import folder_of, teach
from openbook.starts import record_word_answers
from openbook.workspace import Run

UNTIL = "record-answers"  # the last stage that the trainings of an arm share
SHARED = ("tokens", "lessons", "words", "folds")  # folders whose content goes by fingerprint
TEST_ANSWERS = "test.npy"  # beside the teacher's weights: its probabilities on the reported split


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

    def rows_of(self, one: Cell) -> Path:
        """What was said of each reported row, beside the record."""
        return self.record_of(one).with_suffix(".npz")

    def record_of(self, one: Cell) -> Path:
        """Where a training's result is kept, whether it served the tuning or is final."""
        return self.folder_of(one.task, one.arm) / "runs" / f"seed-{one.seed}-{one.label}.json"


def is_done(path: Path, key: str) -> bool:
    try:
        return bool(read_json(path)["key"] == key)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def key_of(experiment: Experiment, one: Cell) -> str:
    """Digest of all that a result depends on, but for settings at their defaults: a new setting undoes no result."""
    run, arm = experiment.run_of(one), experiment.grid.arms[one.arm]
    recipe = one.recipe.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    book = [] if arm.students_of is None else [READING, arm.students_of, arm.book.model_dump(mode="json")]
    return fingerprint([recipe, run.task_digest, run.corpus_digest, run.teacher_digest, one.seed, *book])


def prepare(experiment: Experiment, one: Cell) -> None:
    """Bring the stages before the trainings up to date; what several arms share is built once and linked."""
    run = experiment.run_of(one)
    if run.kind == "multi_label":
        raise UsageError(f"{one.task}: an experiment has no measures for task.kind=multi_label; run its recipe alone")
    if one.recipe.student.projection == "linear" and experiment.grid.readers_of(one):
        raise UsageError(f"{one.arm}: arms that open a book ask it by the pooled vector; set student.projection: none")
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        (experiment.root / "store" / name).mkdir(parents=True, exist_ok=True)
        link(run.folder / name, experiment.root / "store" / name)
    for step in plan(run, UNTIL):
        folder = step.stage.folder
        link(run.folder / folder, experiment.root / "store" / folder / fingerprint(step.inputs)[:16])
    stale = [step for step in plan(run, UNTIL) if not step.fresh]
    if stale:
        console.print(f"[bold]{escape(f'{one.task} {one.arm}')}[/]")
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
    experiment.rows_of(one).unlink(missing_ok=True)  # of another training of this name
    try:
        teach(one.recipe, run.folder, CORPUS, one.seed, progress)
    except FloatingPointError as error:
        record |= {"status": "failed", "error": str(error)}
    else:
        facts, rows = judged(run, one.seed)
        record |= {"status": "ok", "error": None, **facts}
        rows.save(experiment.rows_of(one))
        if experiment.grid.readers_of(one):
            Heard.of(run, load_finished(str(folder_of(run, CORPUS, one.seed)))).save(experiment.answers_of(one))
    record["seconds"] = round(time.monotonic() - started, 1)
    path = experiment.record_of(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    shutil.rmtree(folder_of(run, CORPUS, one.seed), ignore_errors=True)


def read_cell(experiment: Experiment, one: Cell, key: str) -> None:
    run, started, arm = experiment.run_of(one), time.monotonic(), experiment.grid.arms[one.arm]
    assert arm.students_of is not None
    trained = replace(one, arm=arm.students_of)
    of = read_json(experiment.record_of(trained))
    record = {"task": one.task, "arm": one.arm, "seed": one.seed, "key": key, "rates": of["rates"]}
    if of["status"] == "ok":
        heard = Heard.load(experiment.answers_of(trained))
        theirs = np.load(run.folder / TEACHER / TEST_ANSWERS, allow_pickle=False)
        found, outputs = consult(run, heard, arm.book, one.seed, theirs)
        RowAnswers.of(outputs, heard.test.labels).save(experiment.rows_of(one))
        record |= {"status": "ok", "error": None, **found, "steps": of["steps"], "tokens": of["tokens"]}
    else:
        record |= {"status": "failed", "error": of["error"]}
    record["seconds"] = round(time.monotonic() - started, 1)
    path = experiment.record_of(one)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def named(grid: Grid, one: Cell) -> dict[str, float]:
    return {coordinate.name: rate for coordinate, rate in zip(grid.tune, one.rates, strict=True)}


def judged(run: Run, seed: int) -> tuple[dict[str, Any], RowAnswers]:
    """Scores of a trained student on both splits, and how its training went; what it said of the reported rows."""
    folder = folder_of(run, CORPUS, seed)
    heard = answers_of(load_finished(str(folder)), run.tokens("test", run.task.test, run.tokenizer))
    said = outputs_of(heard, run.task.kind)
    theirs = np.load(run.folder / TEACHER / TEST_ANSWERS, allow_pickle=False)
    history = read_json(folder / "history.json")
    last = {row["stage"]: row for row in history if "loss" in row}
    facts = {
        "holdout": read_json(folder / "scores.json")["holdout"],
        "scores": {metric: score(metric, said, heard.labels) for metric in run.task.metrics},
        "agreement": None if run.kind == "regression" else agreement(said, theirs, run.kind),
        "steps": {stage: row["step"] for stage, row in last.items()},
        "tokens": {course.name: read_in(run, course) for course in courses(run, CORPUS)},
        "final_terms": {
            stage: {name: value for name, value in row.items() if name not in ("stage", "step", "learning_rate")}
            for stage, row in last.items()
        },
    }
    return facts, RowAnswers.of(said, heard.labels)


def keep(experiment: Experiment, one: Cell) -> None:
    """A result that is final, with what was said of each row where that is known."""
    key = one.task, one.arm, one.seed
    shutil.copyfile(experiment.record_of(one), experiment.folder_of(one.task, one.arm) / f"seed-{one.seed}.json")
    rows, final = experiment.rows_of(one), rows_file(experiment.results, key)
    if not rows.exists() and experiment.answers_of(one).exists():  # of a training from before rows were kept
        heard = Heard.load(experiment.answers_of(one)).test
        RowAnswers.of(outputs_of(heard, experiment.run_of(one).task.kind), heard.labels).save(rows)
    final.unlink(missing_ok=True)
    if rows.exists():
        shutil.copyfile(rows, final)


def read_in(run: Run, course: Course) -> int:
    """Word-pieces that a training was to read."""
    optim = course.training.optim
    return optim.tokens or round(optim.epochs * int(tokens_of(run, course.texts, run.tokenizer).tokens.sum()))


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
