"""Students and teacher x tasks -> scores with their roles: each fine-tuned alike, chosen honestly, reported once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from accelerate import Accelerator

from openbook.agnostic import AgnosticRecipe
from openbook.agnostic_run import AgnosticRun, check_task, task_of, tokens_of_rows
from openbook.checkpoint import fingerprint, read_json, write_json
from openbook.config import TaskSettings, UsageError
from openbook.data.roles import PROVENANCE, provenance, role_of
from openbook.fine_tuning import FAILED, Limits, Place, Trial, digest_of, few_of, fine_tune, main_score, rows_of, some
from openbook.gains import TEACHER
from openbook.models.encoder import load_headless, positions_of
from openbook.models.heads import MultiTask, read_tasks
from openbook.parallel import run_jobs
from openbook.task_scores import score_of

MEANING = sorted({*TaskSettings.model_fields} - {"max_length", "stride"})  # what makes a task of a name this one


@dataclass(frozen=True)
class Entry:
    """One line of the results before its rate and epochs are chosen."""

    model: str
    task: TaskSettings
    shots: int | None = None


def upstream(recipe: AgnosticRecipe) -> tuple[str, ...]:
    return ("distill",) if recipe.students_learn is None else ("train-students",)


def inputs(run: AgnosticRun) -> dict[str, Any]:
    return {
        "settings": run.recipe.fine_tune.model_dump(mode="json"),
        "tasks": {task.name: digest_of(task) for task in judged(run)},
        "roles": [role_of(task, known(run)) for task in judged(run)],
        "families": [provenance(task).family for task in judged(run)],
    }


def judged(run: AgnosticRun) -> tuple[TaskSettings, ...]:
    """All tasks that someone is fine-tuned on."""
    settings = run.recipe.fine_tune
    return (*settings.tasks, *settings.few.tasks, *settings.teacher_tasks)


def known(run: AgnosticRun) -> tuple[TaskSettings, ...]:
    """What counts as trained on."""
    return run.learned if run.recipe.fine_tune.known is None else run.recipe.fine_tune.known


def check(run: AgnosticRun) -> None:
    """Every task can be read and fits the positions; names mean one task; there are enough rows for few-shot draws."""
    settings = run.recipe.fine_tune
    for key, tasks in (("fine_tune.tasks", settings.tasks), ("fine_tune.few.tasks", settings.few.tasks)):
        for task in tasks:
            check_task(key, task, run.tokenizer, run.longest, "the students read", "raise text.long_length")
    for task in settings.teacher_tasks:
        positions = positions_of(run.teacher_config)
        check_task("fine_tune.teacher_tasks", task, run.tokenizer, positions, "the teacher reads", "leave it out")
    refuse_ambiguous(run)
    for task, shots, number in product(settings.few.tasks, settings.few.shots, range(settings.few.draws)):
        try:
            few_of(task, shots, number)
        except UsageError as error:
            raise UsageError(f"fine_tune.few.tasks, {task.name}: {error}") from None


def refuse_ambiguous(run: AgnosticRun) -> None:
    """Raise UsageError where one name stands for two tasks, or `fine_tune.known` names what nobody can place."""
    named: dict[str, TaskSettings] = {}
    for task in (*run.learned, *judged(run)):
        first = named.setdefault(task.name, task)
        if odd := [key for key in MEANING if getattr(task, key) != getattr(first, key)]:
            raise UsageError(
                f"tasks, {task.name}: two entries of this name differ in {', '.join(odd)}, and scores and roles go by"
                " name; make them alike, or give one another name"
            )
    for task in known(run):
        if task.name not in PROVENANCE and task.name not in named and not (task.family or task.group):
            raise UsageError(
                f"fine_tune.known, {task.name}: no task of this name is known here, so it would count for nothing; mend"
                " the name, or say its family and group"
            )


def build(run: AgnosticRun, folder: Path) -> None:
    entries = [*entries_of(run), *only_teacher(run)]
    if run.recipe.fine_tune.select == "honest":
        perform(run, [trial for entry in entries for trial in tuning(run, entry)], "choosing rates and epochs")
        finals = {entry: final(run, entry, [chosen(run, entry)]) for entry in entries}
    else:
        finals = {entry: final(run, entry, choices(run.recipe, entry)) for entry in entries}
    perform(run, [trial for trials in finals.values() for trial in trials], "fine-tuning")
    rows = [row for entry in entries_of(run) for row in told(run, entry, finals[entry])]
    beside = [row for entry in only_teacher(run) for row in told(run, entry, finals[entry])]
    results = {
        "select": run.recipe.fine_tune.select,
        "rows": rows,
        "teacher_rows": beside,
        "heads": scores_of_heads(run),
    }
    write_json(folder / "results.json", results)


def entries_of(run: AgnosticRun) -> list[Entry]:
    """What everybody is fine-tuned on, so that means compare."""
    settings = run.recipe.fine_tune
    models = [*([TEACHER] if settings.teacher else []), *(student.name for student in run.recipe.students)]
    whole = [Entry(model, task) for model, task in product(models, settings.tasks)]
    few = [Entry(model, task, shots) for model, task, shots in product(models, settings.few.tasks, settings.few.shots)]
    return whole + few


def only_teacher(run: AgnosticRun) -> list[Entry]:
    """What the teacher alone is fine-tuned on besides."""
    settings = run.recipe.fine_tune
    done = {task.name for task in settings.tasks} if settings.teacher else set()
    return [Entry(TEACHER, task) for task in settings.teacher_tasks if task.name not in done]


def scores_of_heads(run: AgnosticRun) -> dict[str, dict[str, float]]:
    """What the teacher's own heads, if it has any, score on the reported rows of the tasks it learned."""
    if not run.recipe.teacher.tasks or run.recipe.teacher.mixture.masked_text:
        return {}
    folder = run.folder / "teacher"
    model = MultiTask(load_headless(str(folder)), read_tasks(folder)).to(Accelerator().device)
    model.load_heads(folder)
    found = {}
    for given in run.recipe.teacher.tasks:
        task = task_of(given)
        rows = some(task.test, run.recipe.fine_tune.test_rows)
        texts = tokens_of_rows(run.folder, given, task.kind, rows, run.tokenizer, training=False)
        found[given.name] = score_of(model, given.name, task, rows, texts)
    return found


def choices(recipe: AgnosticRecipe, entry: Entry) -> list[tuple[float, float]]:
    """Learning rates and epochs, the same for every student."""
    grid = recipe.fine_tune if entry.shots is None else recipe.fine_tune.few
    own = recipe.fine_tune.teacher_learning_rates if entry.model == TEACHER else None
    return list(product(own or grid.learning_rates, grid.epochs))


def numbers(recipe: AgnosticRecipe, entry: Entry) -> list[int | None]:
    """The draws of few examples; one nameless draw of all."""
    return [None] if entry.shots is None else list(range(recipe.fine_tune.few.draws))


def seeds(recipe: AgnosticRecipe, entry: Entry) -> tuple[int, ...]:
    """Of the fine-tunings; the first one selects."""
    settings = recipe.fine_tune
    if entry.shots is not None:
        return settings.few.seeds or settings.seeds
    return (settings.teacher_seeds if entry.model == TEACHER else None) or settings.seeds


def tuning(run: AgnosticRun, entry: Entry) -> list[Trial]:
    grid = choices(run.recipe, entry)
    if len(grid) == 1:
        return []
    seed = seeds(run.recipe, entry)[0]
    return [
        Trial(entry.model, entry.task, entry.shots, number, rate, epochs, seed, is_final=False)
        for (rate, epochs), number in product(grid, numbers(run.recipe, entry))
    ]


def chosen(run: AgnosticRun, entry: Entry) -> tuple[float, float]:
    """The choice with the highest mean over the draws on the rows set aside; the first of equals."""
    grid, place = choices(run.recipe, entry), place_of(run, entry.model)
    trials = tuning(run, entry)
    if not trials:
        return grid[0]

    def mean(choice: tuple[float, float]) -> float:
        own = [trial for trial in trials if (trial.learning_rate, trial.epochs) == choice]
        return sum(main_score(place.record_of(trial)) for trial in own) / len(own)

    return max(grid, key=mean)


def final(run: AgnosticRun, entry: Entry, grid: Iterable[tuple[float, float]]) -> list[Trial]:
    return [
        Trial(entry.model, entry.task, entry.shots, number, rate, epochs, seed, is_final=True)
        for (rate, epochs), number, seed in product(grid, numbers(run.recipe, entry), seeds(run.recipe, entry))
    ]


def perform(run: AgnosticRun, trials: Sequence[Trial], what: str) -> None:
    """Run the trials without a result, several at a time; each is kept as soon as it is done."""
    settings = run.recipe.fine_tune
    limits = Limits(settings.rows, settings.test_rows)
    places = {model: place_of(run, model) for model in {trial.model for trial in trials}}
    missing = [trial for trial in trials if not places[trial.model].record_of(trial).exists()]
    for trial in missing:  # here, or several processes would tokenise the same rows
        rows, kind = rows_of(trial, limits), task_of(trial.task).kind
        for examples, training in ((rows.train, True), (rows.judged, False)):
            tokens_of_rows(run.folder, trial.task, kind, examples, run.tokenizer, training)
    jobs = [(trial, places[trial.model], limits, settings.optim) for trial in missing]
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    if jobs:
        run_jobs(tried, jobs, min(workers, len(jobs)), what, len(jobs))


def tried(trial: Trial, place: Place, limits: Limits, optim: Any, progress: Callable[[int], None]) -> None:
    fine_tune(trial, place, limits, optim)
    progress(1)


def place_of(run: AgnosticRun, model: str) -> Place:
    encoder = run.folder / "teacher" if model == TEACHER else run.students_folder / model
    made = read_json(encoder.parent / "artifact.json" if model != TEACHER else encoder / "artifact.json")
    settings = run.recipe.fine_tune
    how = fingerprint([made["fingerprint"], settings.rows, settings.test_rows, settings.optim.model_dump(mode="json")])
    return Place(encoder, run.folder / "trials" / how[:16], run.folder)


def told(run: AgnosticRun, entry: Entry, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each final training, with the role of its task."""
    settings, place = run.recipe.fine_tune, place_of(run, entry.model)
    records = [read_json(place.record_of(trial)) for trial in trials]
    if settings.select == "dev-max":
        records = best_choice(records)
    role, family = role_of(entry.task, known(run), entry.shots), provenance(entry.task).family
    return [{**record, "role": role, "family": family} for record in records]


def overview(folder: Path) -> dict[str, list[str]]:
    """Columns of the results in a folder: mean and standard deviation over seeds and draws, in points, by model."""
    rows = read_json(folder / "results.json")["rows"]
    places = list(dict.fromkeys((row["task"], row["shots"], row["role"], row["metric"]) for row in rows))
    columns = {
        "task": [task if shots is None else f"{task}, {shots} shots" for task, shots, _, _ in places],
        "role": [role for _, _, role, _ in places],
        "metric": [metric for _, _, _, metric in places],
    }
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["status"] == "ok"]
        columns[model] = [
            in_points([row["scores"][metric] for row in own if (row["task"], row["shots"]) == (task, shots)])
            for task, shots, _, metric in places
        ]
    return columns


def in_points(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f}" if values else "failed"
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def best_choice(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainings of the rate and epochs with the highest mean of reported scores."""
    by_choice: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for record in records:
        by_choice.setdefault((record["learning_rate"], record["epochs"]), []).append(record)

    def mean(own: Sequence[dict[str, Any]]) -> float:
        return sum(float(record["scores"].get(record["metric"], FAILED)) for record in own) / len(own)

    return max(by_choice.values(), key=mean)
