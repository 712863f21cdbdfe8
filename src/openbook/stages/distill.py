"""Teacher + corpus and task -> students: every kind under every seed, side by side; the best of them ships."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from openbook.checkpoint import SCRATCH, building, is_fresh, open_artifact, read_json, write_json
from openbook.config import Recipe
from openbook.data.batches import BatchPlan
from openbook.inference import answers_of, outputs_of
from openbook.lessons import (
    CORPUS,
    STUDENTS,
    Course,
    corpus_examples,
    courses,
    key_projection,
    key_space,
    needs_teacher,
    objective_for,
    teacher_for,
)
from openbook.metrics import score
from openbook.models.encoder import Encoder
from openbook.parallel import run_jobs
from openbook.starts import fresh_student, record_word_answers
from openbook.training import Lesson, train
from openbook.workspace import Run, tokenizer_digest

EXTRAS = ("history.json", "scores.json", "artifact.json")  # ours, beside the stock files of a student's folder


def inputs(run: Run) -> dict[str, Any]:
    """Of the student that ships; every student trained on the way has its own (see `student_inputs`)."""
    recipe = run.recipe.model_dump(mode="json", include={"student", "distill", "seeds"})
    recipe["distill"].pop("workers")
    return {
        "recipe": recipe,
        "task": run.task_digest,
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
    return sum(len(plan_of(run, course, seed=0)) for course in courses(run, student))


def plan_of(run: Run, course: Course, seed: int) -> BatchPlan:
    examples = run.task.train if course.texts == "task" else corpus_examples(run)
    return BatchPlan(run.tokens(course.texts, examples, run.tokenizer), course.training.optim, seed)


def student_inputs(run: Run, student: str, seed: int) -> dict[str, Any]:
    """What one student depends on: another corpus budget, say, leaves the gold-label student as it is."""
    plans = courses(run, student)
    inputs: dict[str, Any] = {
        "student": run.recipe.student.model_dump(mode="json"),
        "courses": [[course.name, course.texts, course.training.model_dump(mode="json")] for course in plans],
        "task": run.task_digest,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "seed": seed,
    }
    upstream = set()
    if run.recipe.student.embeddings != "random" or run.recipe.student.init != "random":
        upstream.add("teacher")
    if any(needs_teacher(course.training.terms) for course in plans):
        upstream |= {"teacher", "teacher_outputs"}
    if any(course.texts == "corpus" for course in plans):
        upstream.add("corpus")
    for name in sorted(upstream):
        artifact = open_artifact(run.folder / name)
        inputs[name] = None if artifact is None else artifact.manifest["fingerprint"]
    return inputs


def teach(recipe: Recipe, run_folder: Path, student: str, seed: int, progress: Callable[[int], None]) -> None:
    """Train one student in a process of its own, resuming where a killed run left it."""
    run = Run(recipe, run_folder)
    folder = folder_of(run, student, seed)
    with building(folder, student_inputs(run, student, seed)) as partial:
        model, history, before = fresh_student(run, seed), [], 0
        projections: dict[str, Tensor] = {}
        for course in courses(run, student):
            plan = plan_of(run, course, seed)
            scratch, heard_so_far = partial / SCRATCH / course.name, counting_from(before, progress)
            told, projections = follow(run, course, plan, model, projections, seed, scratch, heard_so_far)
            history += [{"stage": course.name, **row} for row in told]
            before += len(plan)
        heard = answers_of(model, run.tokens("holdout", run.task.holdout, run.tokenizer))
        if any(needs_teacher(course.training.terms) for course in courses(run, student)):
            model.model.config.key_space = key_space(run)  # where this student's embeddings were taught to lie
        model.save(partial, run.tokenizer)
        write_json(partial / "history.json", history)
        held_out = score(run.task.metric, outputs_of(heard, run.task.kind), heard.labels)
        write_json(partial / "scores.json", {"holdout": held_out})


def counting_from(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: progress(before + done)


def follow(
    run: Run,
    course: Course,
    plan: BatchPlan,
    student: Encoder,
    projections: dict[str, Tensor],
    seed: int,
    scratch: Path | None,
    progress: Callable[[int], None],
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """One course of one student: the terms of its objective, the teacher they hear, the loop.

    The projections that the last course learned go into this one, and on to the next: a fresh one would first pull
    the student out of shape.
    """
    terms = course.training.terms
    accelerator = Accelerator()
    torch.manual_seed(seed)  # projections that no earlier course learned
    objective = objective_for(run, terms, key_projection(run) if terms.neighbours else None)
    objective.projections.load_state_dict(projections, strict=False)
    student.listen(objective.reads_hidden, objective.student_layers)
    teacher = teacher_for(run, course.training)
    lesson = accelerator.prepare(Lesson(student, objective))
    history = train(
        lambda batch: lesson(batch, teacher(batch)),
        lesson, plan, course.training.optim, seed, accelerator, scratch, progress,
    )  # fmt: skip
    return history, objective.projections.state_dict()
