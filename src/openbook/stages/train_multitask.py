"""Pretrained encoder + many tasks -> a teacher of them all: the encoder in its stock format, the heads beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from openbook.agnostic import AgnosticRecipe
from openbook.agnostic_run import AgnosticRun, tokens_of_rows
from openbook.checkpoint import SCRATCH, fingerprint, write_json
from openbook.config import Optim, TaskSettings, UsageError
from openbook.console import track
from openbook.data.batches import Tokenised
from openbook.data.mixture import Mixture, Sampling
from openbook.data.tasks import TaskData
from openbook.distillation.supervised import Standard, SupervisedLoss, loss_of_kind
from openbook.fine_tuning import standard_of
from openbook.models.encoder import load_headless
from openbook.models.heads import HeadTask, MultiTask
from openbook.parallel import run_group
from openbook.task_scores import guess_of, score_of
from openbook.training import Judge, count_updates, train
from openbook.types import Batch, Example

Tasks = Mapping[str, TaskData]


def inputs(run: AgnosticRun) -> dict[str, Any]:
    settings = run.recipe.teacher
    return {
        "pretrained": run.teacher_digest,
        "settings": settings.model_dump(mode="json", exclude={"model", "tasks", "processes"}),
        "duplicates": fingerprint(sorted(run.duplicates.ids)),
        "tasks": {
            name: {
                "rows": fingerprint([[repr(e) for e in getattr(task, split)] for split in ("train", "holdout")]),
                "labels": task.labels,
                "kind": task.kind,
                "lengths": [given.max_length, given.stride],
            }
            for (name, task), given in zip(run.tasks.items(), settings.tasks, strict=True)
        },
    }


def check(run: AgnosticRun) -> None:
    """Every task is readable and short enough, and every process has work."""
    settings = run.recipe.teacher
    positions = getattr(run.teacher_config, "max_position_embeddings", None)
    for task in settings.tasks:
        if positions is not None and task.max_length > positions:
            raise UsageError(
                f"teacher.tasks, {task.name}: max_length={task.max_length} is more than the teacher reads, {positions}"
                " word-pieces; lower it, or choose another teacher.model"
            )
    if settings.processes > settings.mixture.tasks_per_update:
        raise UsageError(
            f"teacher.processes={settings.processes} is more than the teacher.mixture.tasks_per_update="
            f"{settings.mixture.tasks_per_update} that they share; lower the first or raise the second"
        )
    _ = run.tasks, run.tokenizer


def build(run: AgnosticRun, folder: Path) -> None:
    settings = run.recipe.teacher
    if not run.tasks:
        load_headless(run.teacher_location, settings.revision).save(folder, run.tokenizer)
        write_json(folder / "scores.json", {"tasks": {}})
        return
    tasks = learned(run)
    for given in settings.tasks:  # here, or several processes would write them at once
        held_out(run, given, tasks[given.name])
    updates = count_updates(mixture_of(run.recipe, texts_of(run, tasks)), optim_of(run.recipe))
    with track("training the teacher", updates) as advance:
        if settings.processes == 1:
            teach(run.recipe, run.folder, folder, advance)
        else:
            run_group(teach, (run.recipe, run.folder, folder), settings.processes, advance)


def teach(recipe: AgnosticRecipe, run_folder: Path, folder: Path, progress: Callable[[int], None]) -> None:
    """The whole training, in one process or as one of a group."""
    run = AgnosticRun(recipe, run_folder)
    settings, tasks, accelerator = recipe.teacher, learned(run), Accelerator()
    standards = {name: standard_of(task, task.train) for name, task in tasks.items()}
    encoder = load_headless(run.teacher_location, settings.revision)
    heads = {name: head_of(task, standards[name]) for name, task in tasks.items()}
    model = MultiTask(encoder, heads, settings.seed, settings.dropout)
    lesson = Supervised(model, {name: loss_of(recipe, task, standards[name]) for name, task in tasks.items()})
    texts, optim = texts_of(run, tasks), optim_of(recipe)
    plan = mixture_of(recipe, texts)
    guesses = {name: guess_of(task) for name, task in tasks.items()}

    def judged() -> dict[str, float]:
        """All tasks' scores; what decides is the mean of what they are above a guess, in points (2.2)."""
        scores = scores_of(run, model, tasks)
        gain = 100 * sum(scores[name] - guesses[name] for name in tasks) / len(tasks)
        return {"holdout": gain, **{f"score of {name}": score for name, score in scores.items()}}

    every = settings.judge_every * optim.accumulation
    judge = Judge(judged, range(every, len(plan), every))
    history = train(lesson, lesson, plan, optim, settings.seed, accelerator, folder / SCRATCH, progress, judge)
    if accelerator.is_main_process:
        final = scores_of(run, model, tasks)
        encoder.save(folder, run.tokenizer)
        model.save_heads(folder)
        write_json(folder / "history.json", history)
        told = {
            name: {
                "metric": task.metric,
                "score": final[name],
                "guess": guesses[name],
                "rows": len(task.train),
                "near_duplicates": run.duplicates.counts[name],
                "without_loss": texts[name].dropped,
                "warnings": task.warnings,
                **plan.draws_of()[name],
            }
            for name, task in tasks.items()
        }
        write_json(folder / "scores.json", {"tasks": told})


class Supervised(nn.Module):
    """The loss of whichever task a batch is of."""

    def __init__(self, model: MultiTask, losses: Mapping[str, SupervisedLoss]):
        super().__init__()
        self.model, self.losses = model, dict(losses)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        return self.losses[batch.task](self.model(batch), batch.labels), {}


def learned(run: AgnosticRun) -> dict[str, TaskData]:
    """The tasks with the rows that the teacher learns from: none near a reported one, at most so many."""
    mixture, seed = run.recipe.teacher.mixture, run.recipe.teacher.seed
    tasks = {}
    for name, task in run.tasks.items():
        dice = random.Random(f"{seed}/{name}")
        rows = [row for row in task.train if row.id not in run.duplicates.ids]
        if mixture.rows is not None and len(rows) > mixture.rows:
            rows = [rows[place] for place in sorted(dice.sample(range(len(rows)), mixture.rows))]
        if mixture.shuffle_labels:
            rows = with_labels_shuffled(rows, dice)
        tasks[name] = replace(task, train=rows)
    return tasks


def with_labels_shuffled(rows: list[Example], dice: random.Random) -> list[Example]:
    labels = [row.label for row in rows]
    dice.shuffle(labels)
    return [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]


def texts_of(run: AgnosticRun, tasks: Tasks) -> dict[str, Tokenised]:
    """What the teacher learns from, by task."""
    return {
        given.name: tokens_of_rows(
            run.folder, given, tasks[given.name].kind, tasks[given.name].train, run.tokenizer, training=True
        )
        for given in run.recipe.teacher.tasks
    }


def mixture_of(recipe: AgnosticRecipe, texts: Mapping[str, Tokenised]) -> Mixture:
    settings = recipe.teacher
    how = Sampling(settings.mixture.alpha, settings.mixture.cap, settings.mixture.systematic)
    return Mixture(texts, optim_of(recipe), settings.seed, how)


def optim_of(recipe: AgnosticRecipe) -> Optim:
    """The loop's settings, with what the mixture decides in them."""
    mixture = recipe.teacher.mixture
    decided = {
        "epochs": mixture.passes,
        "batch_size": mixture.micro_batch,
        "accumulation": mixture.tasks_per_update,
    }
    return recipe.teacher.optim.model_copy(update=decided)


def head_of(task: TaskData, standard: Standard) -> HeadTask:
    return HeadTask(task.kind, task.labels or (), standard.mean, standard.deviation)


def loss_of(recipe: AgnosticRecipe, task: TaskData, standard: Standard) -> SupervisedLoss:
    scaled = recipe.teacher.scale_losses
    return loss_of_kind(task.kind, scaled=scaled, null_allowed=task.null_allowed, standard=standard)


def scores_of(run: AgnosticRun, model: MultiTask, tasks: Tasks) -> dict[str, float]:
    """The main metric of every task on the rows set aside, as a fraction."""
    found = {}
    for given in run.recipe.teacher.tasks:
        task = tasks[given.name]
        found[given.name] = score_of(model, given.name, task, task.holdout, held_out(run, given, task))[task.metric]
    return found


def held_out(run: AgnosticRun, given: TaskSettings, task: TaskData) -> Tokenised:
    return tokens_of_rows(run.folder, given, task.kind, task.holdout, run.tokenizer, training=False)
