"""Teacher + corpus and task -> students: every kind under every seed, side by side; the best of them ships."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from openbook.answers import outputs_of
from openbook.checkpoint import SCRATCH, building, fingerprint, is_fresh, open_artifact, read_json, write_json
from openbook.config import Recipe
from openbook.courses import CORPUS, LAST, STUDENTS, Course, courses, needs_teacher
from openbook.data.batches import BatchPlan
from openbook.distillation.objective import QUERY
from openbook.inference import answers_of
from openbook.keys import Map, save_queries
from openbook.lessons import blank_student, key_parts, key_projection, key_space, objective_for, teacher_for
from openbook.metrics import score
from openbook.models.encoder import Encoder
from openbook.parallel import run_jobs
from openbook.readings import reading_inputs, tokens_of
from openbook.recordings import hears_recording
from openbook.starts import fresh_student, record_word_answers
from openbook.training import Judge, Lesson, count_updates, train, weights_of
from openbook.workspace import Run, tokenizer_digest

EXTRAS = ("history.json", "scores.json", "artifact.json")  # ours, beside the stock files of a student's folder

Progress = Callable[[int], None]  # told how many updates are done


@dataclass(frozen=True)
class Learner:
    """A student between two courses."""

    student: Encoder
    projections: dict[str, Tensor]  # that the last course learned: fresh ones would pull the student out of shape
    history: list[dict[str, Any]]  # of all courses so far


def inputs(run: Run) -> dict[str, Any]:
    """Of the student that ships; every student trained on the way has its own (see `student_inputs`)."""
    recipe = run.recipe.model_dump(mode="json", include={"distill", "seeds"}) | {"student": run.recipe.student.told()}
    recipe["distill"].pop("workers")
    return {
        "recipe": recipe,
        "task": run.task_digest,
        "metric": run.task.metric,
    }


def build(run: Run, folder: Path) -> None:
    jobs = [
        (run.recipe, run.folder, student, seed)
        for seed in run.recipe.seeds
        for student in STUDENTS
        if not is_fresh(folder_of(run, student, seed), student_inputs(run, student, seed))
    ]
    run.tokens("holdout", run.task.holdout, run.tokenizer)  # here, or several workers would write it at once
    if jobs:
        record_word_answers(run)
        updates = sum(updates_of(run, student) for _, _, student, _ in jobs)
        run_jobs(teach, jobs, workers_for(run), "teaching students", updates)
    scores = {seed: read_json(folder_of(run, CORPUS, seed) / "scores.json")["holdout"] for seed in run.recipe.seeds}
    best = max(scores, key=lambda seed: scores[seed])
    for path in folder_of(run, CORPUS, best).iterdir():
        if path.name not in EXTRAS:
            shutil.copy2(path, folder / path.name)
    write_json(folder / "selection.json", {"student": CORPUS, "seed": best, "holdout": scores})


def folder_of(run: Run, student: str, seed: int) -> Path:
    return run.folder / "students" / student / f"seed-{seed}"


def workers_for(run: Run) -> int:
    if run.recipe.distill.workers is not None:
        return run.recipe.distill.workers
    return 1 if torch.cuda.is_available() else min(len(STUDENTS) * len(run.recipe.seeds), os.cpu_count() or 1)


def updates_of(run: Run, student: str) -> int:
    """How many updates a student takes; what it reads is tokenised on the way."""
    return sum(updates_in(run, course) for course in courses(run, student))


def updates_in(run: Run, course: Course) -> int:
    return count_updates(plan_of(run, course, seed=0), course.training.optim)


def plan_of(run: Run, course: Course, seed: int) -> BatchPlan:
    return BatchPlan(tokens_of(run, course.texts, run.tokenizer), course.training.optim, seed)


def student_inputs(run: Run, student: str, seed: int) -> dict[str, Any]:
    """What one student depends on: another corpus budget, say, leaves the gold-label student as it is."""
    plans = courses(run, student)
    inputs: dict[str, Any] = {
        "student": run.recipe.student.told(),
        "courses": [[course.name, course.texts, course.training.model_dump(mode="json")] for course in plans],
        "task": run.task_digest,
        "metric": run.task.metric,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "seed": seed,
    }
    upstream = set()
    if run.recipe.student.embeddings != "random" or run.recipe.student.init != "random":
        upstream.add("teacher")
    if any(needs_teacher(course.training.terms) for course in plans):
        upstream |= {"teacher", "teacher_outputs"}
    if any(course.texts != "task" for course in plans):
        upstream.add("corpus")
    return inputs | {name: made_from(run, name) for name in sorted(upstream)}


def made_from(run: Run, name: str) -> str | None:
    artifact = open_artifact(run.folder / name)
    return None if artifact is None else str(artifact.manifest["fingerprint"])


def teach(recipe: Recipe, run_folder: Path, student: str, seed: int, progress: Progress) -> None:
    """Train one student in a process of its own, resuming where a killed run left it."""
    run = Run(recipe, run_folder)
    folder = folder_of(run, student, seed)
    plan = courses(run, student)
    with building(folder, student_inputs(run, student, seed)) as partial:
        learner = stage_one(run, student, seed, progress)
        before = sum(updates_in(run, course) for course in plan if course.name not in LAST)
        for course in plan:
            if course.name in LAST:
                heard = counting_from(before, progress)
                learner = follow(run, course, learner, seed, partial / SCRATCH / course.name, heard)
        if any(needs_teacher(course.training.terms) for course in plan):
            config = learner.student.model.config
            config.made_from, config.key_space = key_parts(run), key_space(run)  # where it was taught to put texts
        learner.student.save(partial, run.tokenizer)
        save_queries(partial, query_map(learner))
        write_json(partial / "history.json", learner.history)
        write_json(partial / "scores.json", {"holdout": held_out_score(run, learner.student)})


def query_map(learner: Learner) -> Map | None:
    """W and b of a student's own projection, if it learned one."""
    learned = [learner.projections.get(f"{QUERY}.{part}") for part in ("weight", "bias")]
    return None if learned[0] is None or learned[1] is None else (learned[0].numpy(), learned[1].numpy())


def held_out_score(run: Run, student: Encoder) -> float:
    heard = answers_of(student, run.tokens("holdout", run.task.holdout, run.tokenizer))
    return score(run.task.metric, outputs_of(heard, run.task.kind), heard.labels)


def stage_one(run: Run, student: str, seed: int, progress: Progress = lambda done: None) -> Learner:
    """A student after its courses on other text than what it is for, which different last courses share."""
    return after(run, [course for course in courses(run, student) if course.name not in LAST], seed, progress)


def after(run: Run, plan: Sequence[Course], seed: int, progress: Progress) -> Learner:
    """A student after these courses: as a run left it in `lessons/`, or taught now and left there."""
    if not plan:
        return Learner(fresh_student(run, seed), {}, [])
    inputs = lesson_inputs(run, plan, seed)
    folder = run.folder / "lessons" / fingerprint(inputs)[:16]
    with one_at_a_time(folder):
        if not is_fresh(folder, inputs):
            with building(folder, inputs) as partial:
                learner = after(run, plan[:-1], seed, progress)
                heard = counting_from(sum(updates_in(run, course) for course in plan[:-1]), progress)
                learner = follow(run, plan[-1], learner, seed, partial / SCRATCH / "training", heard)
                save_file(weights_of(learner.student), partial / "student.safetensors")
                save_file(learner.projections, partial / "projections.safetensors")
                write_json(partial / "history.json", learner.history)
    student = blank_student(run, seed)
    student.load_state_dict(load_file(folder / "student.safetensors"))
    return Learner(student, load_file(folder / "projections.safetensors"), read_json(folder / "history.json"))


def lesson_inputs(run: Run, plan: Sequence[Course], seed: int) -> dict[str, Any]:
    """What a student after these courses depends on: not on courses still to come, nor on corpora it did not read."""
    judged = any(course.training.optim.keep == "best" for course in plan)
    keyed = any(course.training.terms.neighbours for course in plan)
    return {
        "student": run.recipe.student.told(),
        "teacher": [made_from(run, "teacher"), run.teacher_digest],
        "courses": [
            {
                "name": course.name,
                "training": course.training.model_dump(mode="json"),
                "teacher": course.teacher,
                "recorded": hears_recording(run, course),
                "texts": reading_inputs(run, course.texts, run.tokenizer),
            }
            for course in plan
        ],
        "labels": run.task.labels,
        "judged_by": [run.task_digest, run.task.metric] if judged else None,
        "keys": made_from(run, "teacher_outputs") if keyed else None,
        "seed": seed,
    }


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Students of other processes that share a course wait until the first of them has taken it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def counting_from(before: int, progress: Progress) -> Progress:
    return lambda done: progress(before + done)


def follow(run: Run, course: Course, learner: Learner, seed: int, scratch: Path | None, progress: Progress) -> Learner:
    """One course of one student: the terms of its objective, the teacher they hear, the loop."""
    student, optim = learner.student, course.training.optim
    plan = plan_of(run, course, seed)
    accelerator = Accelerator()
    torch.manual_seed(seed)  # projections that no earlier course learned
    keys = key_projection(run) if course.training.terms.neighbours else None
    objective = objective_for(run, course.training.terms, keys)
    objective.projections.load_state_dict(learner.projections, strict=False)
    student.listen(objective.reads_hidden, objective.student_layers)

    def judged() -> dict[str, float]:
        found = held_out_score(run, student)
        student.listen(objective.reads_hidden, objective.student_layers)
        return {"holdout": found}

    teacher = teacher_for(run, course)
    lesson = Lesson(student, objective)
    history = train(
        lambda batch: lesson(batch, teacher(batch)),
        lesson, plan, optim, seed, accelerator, scratch, progress, Judge(judged, plan.epoch_ends),
    )  # fmt: skip
    told: list[dict[str, Any]] = [*learner.history, *({"stage": course.name, **row} for row in history)]
    kept = {name: weight for name, weight in learner.projections.items() if name.startswith(f"{QUERY}.")}
    return replace(learner, projections=kept | weights_of(objective.projections), history=told)
