"""An encoder learns many tasks at once, or the hidden words of their texts: a teacher, or a student of one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from openbook.agnostic import AgnosticRecipe, MultiTaskSettings
from openbook.agnostic_run import AgnosticRun, check_task, task_of, tokens_of_rows
from openbook.checkpoint import begun_with, fingerprint, partial_folder, write_json
from openbook.config import Optim, TaskSettings, UsageError
from openbook.console import track
from openbook.data.batches import Tokenised, ordered
from openbook.data.masking import MaskedBatches, Masking, masked
from openbook.data.misplaced import with_labels_moved
from openbook.data.mixture import Mixture, Sampling
from openbook.data.tasks import TaskData
from openbook.distillation.supervised import Standard, SupervisedLoss, loss_of_kind, token_classification
from openbook.fine_tuning import standard_of
from openbook.models.encoder import Encoder, load_headless
from openbook.models.heads import HeadTask, MultiTask
from openbook.models.language import MaskedLanguageModel
from openbook.parallel import run_group
from openbook.task_scores import guess_of, score_of
from openbook.training import Judge, Plan, added_over_processes, count_updates, train
from openbook.types import Batch

Tasks = Mapping[str, TaskData]

SAME = 9  # decimals of points: what differs beyond them is a tie, and the earlier weights stay
AT_ONCE = 4096  # word-pieces of a batch whose hidden ones are guessed


@dataclass(frozen=True)
class Pupil:
    """An encoder, and what it learns."""

    encoder: str  # a folder or a Hub id
    revision: str | None
    settings: MultiTaskSettings
    keeps_heads: bool = False


@dataclass(frozen=True)
class Subject:
    """What an encoder is trained on, and how well it does on rows set aside."""

    lesson: nn.Module
    plan: Plan
    judged: Callable[[], dict[str, float]]  # `holdout` decides
    told: Callable[[], dict[str, dict[str, Any]]]  # of every task, after the training
    heads: MultiTask | None = None


def inputs_of(run: AgnosticRun, settings: MultiTaskSettings) -> dict[str, Any]:
    unset = {} if settings.mixture.masked_text else {"mixture": {"masked_text"}}  # older runs knew no such key
    return {
        "settings": settings.model_dump(
            mode="json", exclude={"model": True, "tasks": True, "processes": True, **unset}
        ),
        "duplicates": fingerprint(sorted(run.duplicates(settings.tasks).ids)),
        "names": [given.name for given in settings.tasks],  # draws depend on their order
        "tasks": {given.name: told_of(given) for given in settings.tasks},
    }


def told_of(given: TaskSettings) -> dict[str, Any]:
    """Of a task, what a change of makes another training."""
    task = task_of(given)
    return {
        "rows": fingerprint([[repr(e) for e in getattr(task, split)] for split in ("train", "holdout")]),
        "labels": task.labels,
        "kind": task.kind,
        "metric": task.metric,
        "lengths": [given.max_length, given.stride],
    }


def check_learning(
    run: AgnosticRun, key: str, settings: MultiTaskSettings, positions: int | None, folder: Path
) -> None:
    """Every task is readable and short enough, and every process has work. `key` is where the recipe has the settings.

    `positions` is how many word-pieces the encoder reads; None: any number. What an interrupted training on other
    tasks left of `folder` is refused, not thrown away.
    """
    refuse_other_tasks(key, settings, folder)
    for given in settings.tasks:
        check_task(f"{key}.tasks", given, run.tokenizer, positions, "the encoder reads", MORE_POSITIONS[key])
    if settings.processes > settings.mixture.tasks_per_update:
        raise UsageError(
            f"{key}.processes={settings.processes} is more than the {key}.mixture.tasks_per_update="
            f"{settings.mixture.tasks_per_update} that they share; lower the first or raise the second"
        )
    if settings.mixture.masked_text:
        try:
            Masking.of(run.tokenizer)
        except UsageError as error:
            raise UsageError(f"{key}.{error}") from None


def refuse_other_tasks(key: str, settings: MultiTaskSettings, folder: Path) -> None:
    begun, names = begun_with(folder), [given.name for given in settings.tasks]
    under_way = partial_folder(folder.resolve())
    if begun is None or "names" not in begun or not any(under_way.rglob("checkpoint-*")):
        return
    others = begun["names"]
    if others == names:
        told = {given.name: fingerprint(told_of(given)) for given in settings.tasks}
        changed = [name for name in names if told[name] != fingerprint(begun["tasks"][name])]
        if not changed:
            return
        others = f"other rows, labels or lengths of {changed}"
    raise UsageError(
        f"{key}.tasks={names}, but an interrupted training on {others} waits to go on in {under_way}: put those back,"
        " give this run another --run-dir, or delete that folder to start anew"
    )


MORE_POSITIONS = {"teacher": "choose another teacher.model", "students_learn": "raise text.long_length"}


def learn(run: AgnosticRun, pupil: Pupil, folder: Path, scratch: Path, what: str) -> None:
    """Train an encoder and save it to `folder`, scores.json last; `scratch` holds what it resumes from."""
    settings = pupil.settings
    tasks = learned(run, settings)
    for given in settings.tasks:  # here, or several processes would write them at once
        held_out(run, given, tasks[given.name])
    updates = count_updates(mixture_of(settings, texts_of(run, settings, tasks)), optim_of(settings))
    job = run.recipe, run.folder, pupil, folder, scratch
    with track(what, updates) as advance:
        if settings.processes == 1:
            teach(*job, advance)
        else:
            run_group(teach, job, settings.processes, advance)


def teach(
    recipe: AgnosticRecipe,
    run_folder: Path,
    pupil: Pupil,
    folder: Path,
    scratch: Path,
    progress: Callable[[int], None],
) -> None:
    """The whole training, in one process or as one of a group."""
    run, settings, accelerator = AgnosticRun(recipe, run_folder), pupil.settings, Accelerator()
    tasks = learned(run, settings)
    texts, optim = texts_of(run, settings, tasks), optim_of(settings)
    mixture = mixture_of(settings, texts)
    encoder = load_headless(pupil.encoder, pupil.revision)
    subject_of = hidden_words if settings.mixture.masked_text else supervised
    subject = subject_of(run, settings, tasks, encoder, mixture, accelerator)
    every = settings.judge_every * optim.accumulation
    judge = Judge(subject.judged, range(every, len(mixture), every))
    lesson = subject.lesson
    history = train(lesson, lesson, subject.plan, optim, settings.seed, accelerator, scratch, progress, judge)
    final = subject.told()  # all processes take part
    if accelerator.is_main_process:
        encoder.save(folder, run.tokenizer)
        if subject.heads is not None and pupil.keeps_heads:
            subject.heads.save_heads(folder)
        write_json(folder / "history.json", history)
        counts = run.duplicates(settings.tasks).counts
        told = {
            name: {
                **one,
                "rows": len(tasks[name].train),
                "near_duplicates": counts[name],
                "without_loss": texts[name].dropped,
                "warnings": tasks[name].warnings,
                **mixture.draws_of()[name],
            }
            for name, one in final.items()
        }
        is_masked = settings.mixture.masked_text
        write_json(folder / "scores.json", {"tasks": {}, "masked_text": told} if is_masked else {"tasks": told})


def supervised(
    run: AgnosticRun,
    settings: MultiTaskSettings,
    tasks: Tasks,
    encoder: Encoder,
    plan: Mixture,
    accelerator: Accelerator,
) -> Subject:
    """Every task with its head and its loss."""
    standards = {name: standard_of(task, task.train) for name, task in tasks.items()}
    heads = {name: head_of(task, standards[name]) for name, task in tasks.items()}
    model = MultiTask(encoder, heads, settings.seed, settings.dropout)
    losses = {name: loss_of(settings, task, standards[name]) for name, task in tasks.items()}
    guesses = {name: guess_of(task) for name, task in tasks.items()}

    def judged() -> dict[str, float]:
        """All tasks' scores; what decides is the mean of what they are above a guess, in points (2.2)."""
        scores = scores_of(run, settings, model, tasks, accelerator)
        gain = 100 * sum(scores[name] - guesses[name] for name in tasks) / len(tasks)
        return {"holdout": round(gain, SAME), **{f"score of {name}": score for name, score in scores.items()}}

    def told() -> dict[str, dict[str, Any]]:
        final = scores_of(run, settings, model, tasks, accelerator)
        return {
            name: {"metric": task.metric, "score": final[name], "guess": guesses[name]} for name, task in tasks.items()
        }

    return Subject(Supervised(model, losses), plan, judged, told, model)


def hidden_words(
    run: AgnosticRun,
    settings: MultiTaskSettings,
    tasks: Tasks,
    encoder: Encoder,
    plan: Mixture,
    accelerator: Accelerator,
) -> Subject:
    """The texts of the tasks in the same draws, without their labels: a masked language model (arm G)."""
    model, how = MaskedLanguageModel(encoder, settings.seed), Masking.of(run.tokenizer)

    def losses() -> dict[str, float]:
        """The cross-entropy of hidden pieces in rows set aside, which are the same every time."""
        own = {
            given.name: loss_of_hidden(model, held_out(run, given, tasks[given.name]), how, settings.seed)
            for given in settings.tasks[accelerator.process_index :: accelerator.num_processes]
        }
        everywhere = added_over_processes(own, accelerator)
        return {given.name: everywhere[given.name] for given in settings.tasks}

    def judged() -> dict[str, float]:
        found = losses()
        return {"holdout": -sum(found.values()) / len(found), **{f"loss of {name}": one for name, one in found.items()}}

    lesson = HiddenWords(model, settings.scale_losses)
    return Subject(
        lesson,
        MaskedBatches(plan, how, settings.seed),
        judged,
        lambda: {name: {"loss": one} for name, one in losses().items()},
    )


class Supervised(nn.Module):
    """The loss of whichever task a batch is of."""

    def __init__(self, model: MultiTask, losses: Mapping[str, SupervisedLoss]):
        super().__init__()
        self.model, self.losses = model, dict(losses)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        return self.losses[batch.task](self.model(batch), batch.labels), {}


class HiddenWords(nn.Module):
    """The mean cross-entropy of all pieces that are hidden in a batch, whatever its task; over ln V where scaled."""

    def __init__(self, model: MaskedLanguageModel, scaled: bool):
        super().__init__()
        self.model, self.scaled = model, scaled

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        asked = batch.labels[batch.labels >= 0]  # (n,)
        return token_classification(self.model(batch)[None], asked[None], scaled=self.scaled), {}


@torch.inference_mode()
def loss_of_hidden(model: MaskedLanguageModel, texts: Tokenised, how: Masking, seed: int) -> float:
    """Per hidden piece, in nats."""
    lesson = HiddenWords(model.eval(), scaled=False)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for place, batch in enumerate(ordered(texts, AT_ONCE)):
        asked = masked(batch, how, [seed, place])
        assert asked.labels is not None
        hidden = int((asked.labels >= 0).sum())
        total, count = total + hidden * lesson(asked.to(device))[0].item(), count + hidden
    return total / max(1, count)


def learned(run: AgnosticRun, settings: MultiTaskSettings) -> dict[str, TaskData]:
    """The tasks with the rows that are learned from: none near a reported one, at most so many."""
    mixture, near = settings.mixture, run.duplicates(settings.tasks).ids
    tasks = {}
    for given in settings.tasks:
        task, dice = task_of(given), random.Random(f"{settings.seed}/{given.name}")
        rows = [row for row in task.train if row.id not in near]
        if not rows:
            raise UsageError(
                f"tasks, {given.name}: each of its {len(task.train)} training rows nearly equals a reported row of some"
                " task, or shares its longer text with one; give it other `test` rows, or leave it out"
            )
        if mixture.rows is not None and len(rows) > mixture.rows:
            rows = [rows[place] for place in sorted(dice.sample(range(len(rows)), mixture.rows))]
        if mixture.shuffle_labels:
            rows = with_labels_moved(rows, dice)
        tasks[given.name] = replace(task, train=rows)
    return tasks


def texts_of(run: AgnosticRun, settings: MultiTaskSettings, tasks: Tasks) -> dict[str, Tokenised]:
    """What is learned from, by task."""
    return {
        given.name: tokens_of_rows(
            run.folder, given, tasks[given.name].kind, tasks[given.name].train, run.tokenizer, training=True
        )
        for given in settings.tasks
    }


def mixture_of(settings: MultiTaskSettings, texts: Mapping[str, Tokenised]) -> Mixture:
    how = Sampling(settings.mixture.alpha, settings.mixture.cap, settings.mixture.systematic)
    return Mixture(texts, optim_of(settings), settings.seed, how)


def optim_of(settings: MultiTaskSettings) -> Optim:
    """The loop's settings, with what the mixture decides in them."""
    mixture = settings.mixture
    return Optim(
        **settings.optim.model_dump(),
        epochs=mixture.passes,
        batch_size=mixture.micro_batch,
        accumulation=mixture.tasks_per_update,
    )


def head_of(task: TaskData, standard: Standard) -> HeadTask:
    return HeadTask(task.kind, task.labels or (), standard.mean, standard.deviation)


def loss_of(settings: MultiTaskSettings, task: TaskData, standard: Standard) -> SupervisedLoss:
    return loss_of_kind(task.kind, scaled=settings.scale_losses, null_allowed=task.null_allowed, standard=standard)


def scores_of(
    run: AgnosticRun, settings: MultiTaskSettings, model: MultiTask, tasks: Tasks, accelerator: Accelerator
) -> dict[str, float]:
    """The main metric of every task on the rows set aside, as a fraction. Each process of a group judges its share."""
    found = {}
    for given in settings.tasks[accelerator.process_index :: accelerator.num_processes]:
        task = tasks[given.name]
        found[given.name] = score_of(model, given.name, task, task.holdout, held_out(run, given, task))[task.metric]
    everywhere = added_over_processes(found, accelerator)
    return {given.name: everywhere[given.name] for given in settings.tasks}


def held_out(run: AgnosticRun, given: TaskSettings, task: TaskData) -> Tokenised:
    return tokens_of_rows(run.folder, given, task.kind, task.holdout, run.tokenizer, training=False)
