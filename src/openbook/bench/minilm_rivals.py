"""Other implementations of relation distillation: a straightforward one, and a published one where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from transformers import AutoModel

from openbook.config import Optim
from openbook.data.batches import BatchPlan, Tokenised
from openbook.data.sources import installed
from openbook.training import precision_of, seed_of
from openbook.types import Batch

Steps = Callable[[Sequence[int]], list[float]]  # runs updates and tells their losses
LossOf = Callable[[Batch], torch.Tensor]


def steps_of(learners: Sequence[tuple[nn.Module, LossOf]], folder: Path, optim: Optim) -> Steps:
    """The loop that all engines share, ours too: batches, precision, optimizer."""
    plan = BatchPlan(Tokenised.load(folder / "text"), optim, 0)
    optimizers = [AdamW(student.parameters(), lr=optim.learning_rate, fused=True) for student, _ in learners]

    def steps(numbers: Sequence[int]) -> list[float]:
        told = []
        for number in numbers:
            batch = plan[number]
            for (_, loss_of), optimizer in zip(learners, optimizers, strict=True):
                torch.manual_seed(seed_of(0, number))
                with precision_of(optim, torch.device("cpu")):
                    loss = loss_of(batch)
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                told.append(loss.item())
        return told

    return steps


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "token_type_ids")}


def open_plain(teacher: str, folder: Path, optim: Optim, heads: int) -> Steps:
    """What one writes first: whole forward passes with attention maps, then a loop over the texts of the batch."""
    wide = AutoModel.from_pretrained(teacher, attn_implementation="eager").eval().requires_grad_(False)
    narrow = AutoModel.from_pretrained(folder / "student", attn_implementation="eager").train()

    def taps(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        told = model(**inputs, output_hidden_states=True, output_attentions=True)
        attention = model.encoder.layer[-1].attention.self
        states = told.hidden_states[-2]
        return [projection(states) for projection in (attention.query, attention.key, attention.value)]

    def relation(tap: torch.Tensor) -> torch.Tensor:
        length, width = tap.shape
        split = tap.float().view(length, heads, width // heads).transpose(0, 1)
        return split @ split.transpose(1, 2) / math.sqrt(width // heads)

    def loss_of(batch: Batch) -> torch.Tensor:
        inputs = inputs_of(batch)
        with torch.no_grad():
            aims = taps(wide, inputs)
        losses = []
        for own, aim in zip(taps(narrow, inputs), aims, strict=True):
            for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
                target, said = relation(aim[row, :length]).softmax(-1), relation(own[row, :length]).log_softmax(-1)
                kl = torch.nn.functional.kl_div(said, target, reduction="sum")
                losses.append(kl / (heads * length * len(own)))
        return torch.stack(losses).sum()

    return steps_of([(narrow, loss_of)], folder, optim)


def open_bertdistiller(teacher: str, folder: Path, optim: Optim, heads: int) -> Steps:
    """The trainer of the `bertdistiller` package, asked for its loss."""
    from bertdistiller.distillation.minilm import MiniLMTrainer, MiniLMTrainingArguments

    wide = AutoModel.from_pretrained(teacher).requires_grad_(False)
    wide.config.architectures = ["BertForMaskedLM"]  # the one name it looks for
    narrow = AutoModel.from_pretrained(folder / "student").train()
    arguments = MiniLMTrainingArguments(
        output_dir=str(folder / "bertdistiller"),
        teacher_layer=len(wide.encoder.layer),
        student_layer=len(narrow.encoder.layer),
        student_hidden_size=narrow.config.hidden_size,
        student_attention_heads=narrow.config.num_attention_heads,
        num_relation_heads=heads,
        relations={(1, 1): 1.0, (2, 2): 1.0, (3, 3): 1.0},
        use_cpu=True,
        report_to="none",
    )
    trainer = MiniLMTrainer(model=narrow, args=arguments, teacher_model=wide)
    return steps_of([(narrow, lambda batch: trainer.compute_loss(narrow, inputs_of(batch)))], folder, optim)


RIVALS: dict[str, Callable[..., Steps]] = {"plain": open_plain}
if installed("bertdistiller"):
    RIVALS["bertdistiller"] = open_bertdistiller
