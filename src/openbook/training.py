"""The one loop: minimise `loss_of(batch)`. Fine-tuning and every kind of distillation differ only in that function."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Plan(Protocol):
    """Batches by step: a pure function of the step, so that a resumed run sees what an uninterrupted one would."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Judge:
    """What tells how good the weights are (larger is better), and after how many steps it is asked; at the end too."""

    score: Callable[[], float]
    after: Collection[int]


class Lesson(nn.Module):
    """Student and objective under one roof, so that one wrapper averages every gradient and none is forgotten."""

    def __init__(self, student: nn.Module, objective: nn.Module):
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, batch: Batch, answers: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        told: tuple[Tensor, dict[str, Tensor]] = self.objective(self.student(batch), answers, batch)
        return told


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
    history as `holdout`.
    Raises FloatingPointError, naming the step and the parts, when the loss is not finite.
    """
    updates = count_updates(plan, optim)
    judged = judged_updates(judge, updates, optim)
    optimizer = AdamW(grouped(lesson, optim.weight_decay), lr=optim.learning_rate, fused=True)
    prepared: Any = accelerator.prepare(optimizer)
    lesson.train()
    torch.manual_seed(seed)
    state = TrainingState(lesson, optimizer, scratch)
    first, history, sums = state.load()
    log_every = max(1, updates // 100)
    for update in range(first, updates):
        steps = range(update * optim.accumulation, min(len(plan), (update + 1) * optim.accumulation))
        for step in steps:
            with accelerator.autocast(), precision_of(optim, accelerator.device):
                loss, parts = loss_of(plan[step].to(accelerator.device))
            refuse_non_finite(loss, parts, step)
            accelerator.backward(loss / len(steps))
            add(sums, {"loss": loss, **parts}, 1 / len(steps))
        accelerator.clip_grad_norm_(lesson.parameters(), optim.clip)
        set_rate(optimizer, optim.learning_rate * scale(update, updates, optim.warmup))
        prepared.step()
        prepared.zero_grad()
        if (update + 1) % log_every == 0 or update + 1 == updates or update + 1 in judged:
            history.append(summary(update + 1, sums, optimizer))
        if judge is not None and update + 1 in judged:
            history[-1]["holdout"] = state.offer(judge.score())
            lesson.train()
        if (update + 1) % optim.checkpoint_every == 0 or update + 1 == updates:
            state.save(update + 1, history, sums)
        advance(update + 1)
    state.put_best_back()
    lesson.eval()
    return history


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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


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


def add(sums: dict[str, float], parts: dict[str, Tensor], share: float) -> None:
    for name, part in parts.items():
        sums[name] = sums.get(name, 0.0) + share * part.item()
    sums["count"] = sums.get("count", 0.0) + share


def summary(update: int, sums: dict[str, float], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The mean of every part since the last summary; `sums` starts anew."""
    count = sums.pop("count")
    means = {name: round(total / count, 6) for name, total in sums.items()}
    sums.clear()
    return {"step": update, "learning_rate": optimizer.param_groups[0]["lr"], **means}


class TrainingState:
    """All that a training needs to go on where it stopped: safetensors and JSON in a folder that is renamed whole."""

    def __init__(self, lesson: nn.Module, optimizer: torch.optim.Optimizer, scratch: Path | None):
        self.lesson, self.optimizer, self.scratch = lesson, optimizer, scratch
        self.best: tuple[float, dict[str, Tensor]] | None = None  # score and weights

    def offer(self, score: float) -> float:
        """Remember the weights as they are if no earlier ones scored as well."""
        if self.best is None or score > self.best[0]:
            self.best = score, weights_of(self.lesson)
        return score

    def put_best_back(self) -> None:
        if self.best is not None:
            self.lesson.load_state_dict(self.best[1])

    def save(self, update: int, history: History, sums: dict[str, float]) -> None:
        if self.scratch is None:
            return
        aside = self.scratch / ".checkpoint"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(weights_of(self.lesson), aside / "weights.safetensors")
        save_file(self.moments(), aside / "optimizer.safetensors")
        save_file({"cpu": torch.get_rng_state(), **cuda_rng()}, aside / "rng.safetensors")
        progress = {"update": update, "history": history, "sums": sums}
        if self.best is not None:
            progress["best"] = self.best[0]
            save_file(self.best[1], aside / "best.safetensors")
        write_json(aside / "progress.json", progress)
        os.rename(aside, self.scratch / f"checkpoint-{update}")
        for older in self.found()[:-1]:
            shutil.rmtree(older)

    def found(self) -> list[Path]:
        """Whole checkpoints, the latest last."""
        if self.scratch is None or not self.scratch.exists():
            return []
        return sorted(self.scratch.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state under flat names: `<position of the parameter>.<name>`."""
        states: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return {f"{place}.{name}": value.clone() for place, state in states.items() for name, value in state.items()}

    def load(self) -> tuple[int, History, dict[str, float]]:
        """Put the last checkpoint back in place; the number of updates done, the history, the running sums."""
        if not self.found():
            return 0, [], {}
        folder = self.found()[-1]
        self.lesson.load_state_dict(load_file(folder / "weights.safetensors"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            place, _, field = name.partition(".")
            state.setdefault(int(place), {})[field] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        rng = load_file(folder / "rng.safetensors")
        torch.set_rng_state(rng.pop("cpu"))
        for place, value in rng.items():
            torch.cuda.set_rng_state(value, int(place))
        progress = read_json(folder / "progress.json")
        if "best" in progress:
            self.best = progress["best"], load_file(folder / "best.safetensors")
        return progress["update"], progress["history"], progress["sums"]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, as safetensors takes them."""
    return {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}


def cuda_rng() -> dict[str, Tensor]:
    if not torch.cuda.is_available():
        return {}
    return {str(place): state for place, state in enumerate(torch.cuda.get_rng_state_all())}
