"""The one loop: minimise `loss_of(batch)`. Fine-tuning and every kind of distillation differ only in that function."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from openbook.checkpoint import read_json, write_json
from openbook.config import Optim, UsageError
from openbook.types import Batch, Outputs

LossOf = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]  # the number to minimise, and its named parts
History = list[dict[str, float]]
Advance = Callable[[int], None]  # told how many updates are done

DECISIVE = "holdout"


class Plan(Protocol):
    """Batches by step: a pure function of the step, so that a resumed run sees what an uninterrupted one would."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Judge:
    """What tells how good the weights are, and after how many steps it is asked; at the end too.

    Of its scores, which all enter the history, `holdout` decides; larger is better.
    """

    scores: Callable[[], Mapping[str, float]]
    after: Collection[int]


class Lesson(nn.Module):
    """Student and objective under one roof, so that no weight that learns is forgotten."""

    def __init__(self, student: nn.Module, objective: nn.Module):
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, batch: Batch, answers: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        told: tuple[Tensor, dict[str, Tensor]] = self.objective(self.student(batch), answers, batch)
        return told


@dataclass
class Learner:
    """Weights that are trained, what tells the number to minimise for a batch, and how far it came."""

    loss_of: LossOf
    lesson: nn.Module
    optim: Optim
    seed: int
    epsilon: float = 1e-8  # AdamW's
    history: History = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # of loss and parts since the last row of the history
    best: tuple[float, dict[str, Tensor]] | None = None  # score and weights

    def __post_init__(self) -> None:
        groups = grouped(self.lesson, self.optim.weight_decay)
        self.optimizer = AdamW(groups, lr=self.optim.learning_rate, eps=self.epsilon, fused=True)

    def hear(self, batch: Batch, step: int, share: float, accelerator: Accelerator) -> None:
        """One batch of an update. The dropout of a step is the same whatever was trained before or beside it."""
        torch.manual_seed(seed_of(self.seed, step))
        with accelerator.autocast(), precision_of(self.optim, accelerator.device):
            loss, parts = self.loss_of(batch)
        refuse_non_finite(loss, parts, step)
        accelerator.backward(loss * share)
        for name, part in {"loss": loss, **parts}.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * part.item()

    def update(self, rate: float, accelerator: Accelerator) -> None:
        sum_over_processes(self.lesson.parameters(), accelerator)
        accelerator.clip_grad_norm_(self.lesson.parameters(), self.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum_up(self, done: int, accelerator: Accelerator) -> None:
        """A row of the history: the mean of every part over the updates since the last; `sums` starts anew."""
        updates = done - (self.history[-1]["step"] if self.history else 0)
        sums = added_over_processes(self.sums, accelerator)
        means = {name: round(total / updates, 6) for name, total in sums.items()}
        self.history.append({"step": done, "learning_rate": self.optimizer.param_groups[0]["lr"], **means})
        self.sums = {}

    def offer(self, scores: Mapping[str, float]) -> None:
        """Remember the weights as they are if no earlier ones scored as well."""
        self.history[-1].update(scores)
        if self.best is None or scores[DECISIVE] > self.best[0]:
            self.best = scores[DECISIVE], weights_of(self.lesson)

    def finish(self) -> None:
        if self.best is not None:
            self.lesson.load_state_dict(self.best[1])
        self.lesson.eval()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(weights_of(self.lesson), folder / "weights.safetensors")
        save_file(self.moments(), folder / "optimizer.safetensors")
        progress: dict[str, Any] = {"history": self.history, "sums": self.sums}
        if self.best is not None:
            progress["best"] = self.best[0]
            save_file(self.best[1], folder / "best.safetensors")
        write_json(folder / "progress.json", progress)

    def load(self, folder: Path) -> None:
        self.lesson.load_state_dict(load_file(folder / "weights.safetensors"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            place, _, key = name.partition(".")
            state.setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        progress = read_json(folder / "progress.json")
        self.history, self.sums = progress["history"], progress["sums"]
        if "best" in progress:
            self.best = progress["best"], load_file(folder / "best.safetensors")

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state under flat names: `<position of the parameter>.<name>`."""
        states: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return {f"{place}.{name}": value.clone() for place, state in states.items() for name, value in state.items()}


def train(
    loss_of: LossOf,
    lesson: nn.Module,
    plan: Plan,
    optim: Optim,
    seed: int,
    accelerator: Accelerator,
    scratch: Path | None = None,
    advance: Advance = lambda done: None,
    judge: Judge | None = None,
) -> History:
    """Train `lesson` on every batch of `plan` and return the mean of each loss part over about 100 stretches.

    With a `scratch` folder it leaves a checkpoint there every `optim.checkpoint_every` updates and continues from the
    last whole one, also when all was done; weights and history then equal those of an uninterrupted run.
    With `optim.keep: best` the weights that the judge liked best stay, the earlier ones of two; what it said is in the
    history.
    Raises FloatingPointError, naming the step and the parts, when the loss is not finite.
    """
    learner = Learner(loss_of, lesson, optim, seed)
    return train_together([learner], plan, accelerator, scratch, advance, judge)[0]


def train_together(
    learners: Sequence[Learner],
    plan: Plan,
    accelerator: Accelerator,
    scratch: Path | None = None,
    advance: Advance = lambda done: None,
    judge: Judge | None = None,
) -> list[History]:
    """The same for several learners that hear each batch one after the other; every one ends as it would alone.

    Optimizer, schedule, clipping and dropout are each learner's own; accumulation, checkpoints and judge are those of
    the first. Of several processes, each takes its part of an update's batches, and all end with the weights of one.
    """
    optim = learners[0].optim
    if optim.accumulation < accelerator.num_processes:
        raise UsageError(
            f"an update has {optim.accumulation} batches for {accelerator.num_processes} processes;"
            " raise optim.accumulation, or use fewer processes"
        )
    updates = count_updates(plan, optim)
    judged = judged_updates(judge, updates, optim)
    log_every = max(1, updates // 100)
    for learner in learners:
        learner.lesson.to(accelerator.device).train()
    for update in range(load_checkpoint(learners, scratch), updates):
        hear_update(learners, plan, update, accelerator)
        for learner in learners:
            learner.update(learner.optim.learning_rate * scale(update, updates, learner.optim.warmup), accelerator)
        done = update + 1
        if done % log_every == 0 or done == updates or done in judged:
            for learner in learners:
                learner.sum_up(done, accelerator)
        if judge is not None and done in judged:
            learners[0].offer(judge.scores())
            learners[0].lesson.train()
        if done % optim.checkpoint_every == 0 or done == updates:
            save_checkpoint(learners, scratch, done, accelerator)
        advance(done)
    for learner in learners:
        learner.finish()
    return [learner.history for learner in learners]


def hear_update(learners: Sequence[Learner], plan: Plan, update: int, accelerator: Accelerator) -> None:
    """The batches of one update, those of this process; the last update may have fewer than the others."""
    accumulation = learners[0].optim.accumulation
    steps = range(update * accumulation, min(len(plan), (update + 1) * accumulation))
    for step in own_part(steps, accelerator):
        batch = plan[step].to(accelerator.device)
        for learner in learners:
            learner.hear(batch, step, 1 / len(steps), accelerator)


def save_checkpoint(learners: Sequence[Learner], scratch: Path | None, done: int, accelerator: Accelerator) -> None:
    """All that the learners need to go on: safetensors and JSON in a folder that is renamed whole; one is kept."""
    if scratch is not None and accelerator.is_main_process:
        aside = scratch / ".checkpoint"
        shutil.rmtree(aside, ignore_errors=True)
        for place, learner in enumerate(learners):
            learner.save(aside / str(place))
        os.rename(aside, scratch / f"checkpoint-{done}")
        for older in checkpoints(scratch)[:-1]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def load_checkpoint(learners: Sequence[Learner], scratch: Path | None) -> int:
    """Put the learners back to their last whole checkpoint; the number of updates done."""
    found = checkpoints(scratch)
    if not found:
        return 0
    for place, learner in enumerate(learners):
        learner.load(found[-1] / str(place))
    return updates_done(found[-1])


def checkpoints(scratch: Path | None) -> list[Path]:
    """Whole ones, the latest last."""
    return [] if scratch is None else sorted(scratch.glob("checkpoint-*"), key=updates_done)


def updates_done(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def seed_of(seed: int, step: int) -> int:
    """Of the dropout of one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def own_part(steps: range, accelerator: Accelerator) -> range:
    """The batches of an update that this process hears; of the last, short one it may hear none."""
    return steps[accelerator.process_index :: accelerator.num_processes]


def sum_over_processes(parameters: Iterator[nn.Parameter], accelerator: Accelerator) -> None:
    """Gradients of all processes added up. A weight of which no process has one keeps none: AdamW would move it."""
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    here = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=accelerator.device)
    anywhere = accelerator.reduce(here, "sum") > 0
    for parameter in (parameter for parameter, wanted in zip(trained, anywhere.tolist(), strict=True) if wanted):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def added_over_processes(sums: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return sums
    everywhere: list[dict[str, float]] = [{} for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(everywhere, sums)
    names = dict.fromkeys(name for one in everywhere for name in one)
    return {name: sum(one.get(name, 0.0) for one in everywhere) for name in names}


def count_updates(plan: Plan, optim: Optim) -> int:
    return math.ceil(len(plan) / optim.accumulation)


def judged_updates(judge: Judge | None, updates: int, optim: Optim) -> set[int]:
    """How many updates are done whenever the judge is asked; never, if the last weights stay whatever it says."""
    if optim.keep == "last":
        return set()
    if judge is None:
        raise UsageError("optim.keep=best needs held-out rows to judge by, and this training has none; set it to last")
    return {updates, *(math.ceil(step / optim.accumulation) for step in judge.after)}


def scale(update: int, updates: int, warmup: float) -> float:
    """Linear from 0 over the warm-up share of the updates, then linear to 0 (`update` counts from 0)."""
    rising = warmup * updates
    if update + 1 <= rising:
        return (update + 1) / rising
    return max(0.0, min(1.0, (updates - update) / max(1.0, updates - rising)))


def grouped(lesson: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only; biases and layer norms go without."""
    trained = [p for p in lesson.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is native here; without it autocast is several times slower than fp32 on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def precision_of(optim: Optim, device: torch.device) -> torch.autocast:
    """The autocast context of `optim.precision`; losses compute in fp32 inside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(optim, device))


def uses_bf16(optim: Optim, device: torch.device) -> bool:
    return optim.precision == "bf16" or (optim.precision == "auto" and has_bf16(device))


def refuse_non_finite(loss: Tensor, parts: dict[str, Tensor], step: int) -> None:
    if not torch.isfinite(loss):
        told = ", ".join(f"{name} {part.item():.4g}" for name, part in parts.items())
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step} ({told});"
            " lower the learning rate, or look at the term that is not finite"
        )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, as safetensors takes them."""
    return {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}
