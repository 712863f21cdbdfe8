"""What a task-agnostic student learns: a lesson of attention relations, and the weights it leaves untouched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openbook.distillation import losses
from openbook.types import Batch, Outputs

PLACES = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Relations:
    """Which relations are compared, and how (MiniLMv2, section 3.1)."""

    pairs: Sequence[str]  # such as "qq", "qk"
    heads: int
    norm: losses.Norm
    sample_share: float  # of the loss: relations among the samples of a batch
    teacher_layer: int
    student_layer: int


class RelationLesson(nn.Module):
    """The sum of the relation losses of one student, with each of them as a part."""

    def __init__(self, student: nn.Module, relations: Relations):
        super().__init__()
        self.student, self.relations = student, relations

    def forward(self, batch: Batch, answers: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        how = self.relations
        own = self.student(batch).relations[how.student_layer]
        aim = answers.relations[how.teacher_layer]
        places = {pair: [(PLACES[pair[0]], PLACES[pair[1]])] for pair in how.pairs}
        parts = {
            pair: losses.relations(own, aim, batch.attention_mask, how.heads, norm=how.norm, pairs=place)
            for pair, place in places.items()
        }
        loss = torch.stack(list(parts.values())).sum()
        if how.sample_share:
            parts["samples"] = losses.sample_relations(
                own, aim, batch.attention_mask, how.heads, pairs=[one for place in places.values() for one in place]
            )
            loss = (1 - how.sample_share) * loss + how.sample_share * parts["samples"]
        return loss, {name: part.detach() for name, part in parts.items()}


def without_gradient(module: nn.Module) -> list[str]:
    """Names of the weights that a backward pass gave no gradient."""
    return [name for name, weight in module.named_parameters() if weight.requires_grad and weight.grad is None]
