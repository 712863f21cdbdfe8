"""A recipe as a chain of stages: runs only what is stale, says why, and resumes what was interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook.agnostic import AgnosticRecipe
from openbook.agnostic_run import AgnosticRun
from openbook.checkpoint import begun_with, building, fingerprint, open_artifact
from openbook.config import Recipe, RunError, UsageError
from openbook.console import console
from openbook.courses import reads_corpus
from openbook.lessons import check_lessons
from openbook.manifest import resolved
from openbook.recordings import check_space
from openbook.stages import (
    build_bank,
    build_corpus,
    build_index,
    build_kb,
    build_text,
    distill,
    distill_agnostic,
    evaluate,
    evaluate_agnostic,
    record_answers,
    retrieve,
    train_multitask,
    train_students,
    train_teacher,
    write_report,
)
from openbook.workspace import Run

DISK_FULL = (os.strerror(errno.ENOSPC), " requested and ")  # safetensors and Arrow quote the system, numpy does not


@dataclass(frozen=True)
class Stage:
    """One link of the chain: what it depends on, and how its folder is made."""

    name: str
    folder: str
    upstream: Callable[[Any], tuple[str, ...]]  # of a recipe
    inputs: Callable[[Any], dict[str, Any]]  # of a run
    build: Callable[[Any, Path], None]
    editable: bool = False  # whether its folder may be edited afterwards


def before_recording(recipe: Recipe) -> tuple[str, ...]:
    return ("train-teacher", "build-corpus") if reads_corpus(recipe) else ("train-teacher",)


def after(*names: str) -> Callable[[Any], tuple[str, ...]]:
    """The same stages before it, whatever the recipe."""
    return lambda recipe: names


STAGES = {
    stage.name: stage
    for stage in (
        Stage("train-teacher", "teacher", after(), train_teacher.inputs, train_teacher.build),
        Stage("build-bank", "bank", after(), build_bank.inputs, build_bank.build),
        Stage("build-index", "index", after("build-bank"), build_index.inputs, build_index.build),
        Stage("retrieve", "hits", after("build-index"), retrieve.inputs, retrieve.build),
        Stage("build-corpus", "corpus", build_corpus.upstream, build_corpus.inputs, build_corpus.build),
        Stage("record-answers", "teacher_outputs", before_recording, record_answers.inputs, record_answers.build),
        Stage("distill", "student", after("record-answers"), distill.inputs, distill.build),
        Stage("build-kb", "knowledge_base", after("distill"), build_kb.inputs, build_kb.build, True),
        Stage("evaluate", "evaluation", after("build-kb"), evaluate.inputs, evaluate.build),
        Stage("report", "report", after("evaluate"), write_report.inputs, write_report.build),
    )
}

AGNOSTIC_STAGES = {
    stage.name: stage
    for stage in (
        Stage("train-teacher", "teacher", after(), train_multitask.inputs, train_multitask.build),
        Stage("build-text", "text", after(), build_text.inputs, build_text.build),
        Stage(
            "distill", "students", after("train-teacher", "build-text"), distill_agnostic.inputs, distill_agnostic.build
        ),
        Stage("train-students", "trained_students", after("distill"), train_students.inputs, train_students.build),
        Stage("evaluate", "evaluation", evaluate_agnostic.upstream, evaluate_agnostic.inputs, evaluate_agnostic.build),
    )
}


@dataclass(frozen=True)
class Step:
    """A stage with what it would be built from now, and whether that was done already."""

    stage: Stage
    inputs: dict[str, Any]
    fresh: bool
    why: str


def stages_of(recipe: Any) -> dict[str, Stage]:
    return AGNOSTIC_STAGES if isinstance(recipe, AgnosticRecipe) else STAGES


def plan(run: Any, until: str | None = None) -> list[Step]:
    """The stages that `until` needs, in order. Fingerprints chain: a stage is stale if anything before it is."""
    steps: dict[str, Step] = {}
    stages = stages_of(run.recipe)
    for name in needed(until or list(stages)[-1], run.recipe):
        stage = stages[name]
        upstream = {before: fingerprint(steps[before].inputs) for before in stage.upstream(run.recipe)}
        inputs = {"stage": name, "upstream": upstream, **stage.inputs(run)}
        why = reason(run.folder / stage.folder, inputs)
        steps[name] = Step(stage, inputs, why == "", why or "its inputs did not change")
    return list(steps.values())


def needed(until: str, recipe: Any) -> list[str]:
    stages = stages_of(recipe)
    if until not in stages:
        kind = "task-agnostic (it names `students`)" if stages is AGNOSTIC_STAGES else "for one task (it names `task`)"
        raise UsageError(f"the recipe is {kind}, and has no stage {until}; its stages: {', '.join(stages)}")
    wanted: set[str] = set()
    waiting = [until]
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting += stages[name].upstream(recipe)
    return [name for name in stages if name in wanted]


def reason(folder: Path, inputs: dict[str, Any]) -> str:
    """Why a stage must run; empty if it need not."""
    artifact = open_artifact(folder)
    if artifact is None:
        begun = begun_with(folder)
        if begun is None:
            return "it has not run yet"
        others = sorted(changed(begun, inputs))
        return f"it was interrupted, but {', '.join(others)} changed" if others else "it was interrupted and resumes"
    if artifact.manifest["fingerprint"] == fingerprint(inputs):
        return ""
    return f"{', '.join(changed(artifact.manifest['inputs'], inputs))} changed"


def changed(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Dotted names of the inputs that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from changed(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif fingerprint(before) != fingerprint(after):  # as JSON, which has lists and no tuples
        yield key


def check(run: Any) -> None:
    """Everything that can be wrong with recipe, files and shapes, before a model is loaded."""
    run.check_owner()
    if isinstance(run, AgnosticRun):
        train_multitask.check(run)
        build_text.check(run)
        distill_agnostic.check(run)
        train_students.check(run)
        evaluate_agnostic.check(run)
        return
    _ = run.kind
    train_teacher.check(run)
    check_lessons(run)
    check_space(run)
    build_bank.check(run)
    build_corpus.check(run)
    build_kb.check(run)


def execute(recipe: Any, folder: Path, until: str | None = None, dry_run: bool = False) -> Any:
    """Run the stale stages up to `until`, or all. Raises UsageError for bad input, RunError for a failed stage."""
    run: Any = AgnosticRun(resolved(recipe), folder) if isinstance(recipe, AgnosticRecipe) else Run(recipe, folder)
    until = until or list(stages_of(recipe))[-1]
    _ = needed(until, recipe)
    check(run)
    if dry_run:
        for step in plan(run, until):
            console.print(f"[bold]{step.stage.name:15}[/] {'skip' if step.fresh else 'run ':5} {step.why}")
        return run
    with alone(run.folder):
        run.claim()
        for step in plan(run, until):
            perform(run, step)
        if until == "report":
            write_report.publish(run, run.folder / STAGES["report"].folder)
    return run


def perform(run: Any, step: Step) -> None:
    name = step.stage.name
    if step.fresh:
        console.print(f"[bold]{name:15}[/] skipped: {step.why}")
        return
    console.print(f"[bold]{name:15}[/] runs: {step.why}")
    started = time.monotonic()
    try:
        with building(run.folder / step.stage.folder, step.inputs, step.stage.editable) as partial:
            step.stage.build(run, partial)
    except FloatingPointError as error:
        raise RunError(f"{name}: {error}") from error
    except BrokenProcessPool as error:
        raise RunError(
            f"{name}: a worker process was killed, most likely for want of memory; set distill.workers to fewer and run"
            " the same command: it goes on where it stopped"
        ) from error
    except Exception as error:
        if not any(words in str(error) for words in DISK_FULL):
            raise
        raise RunError(
            f"the disk is full in {run.folder}; free some space and run the same command: finished stages are kept"
        ) from error
    console.print(f"{'':15} done in {time.monotonic() - started:.0f} s")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run at a time in a folder; the lock goes with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is at work in {folder}; wait for it, or give this one --run-dir") from None
        yield
