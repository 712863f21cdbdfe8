"""Whose keys a student's embedding is compared with: those of the batch, of the last texts, or of all (ReAugKD)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from openbook.config import Terms
from openbook.distillation import losses

KeyProjection = tuple[Tensor, Tensor]  # W (d, d_t) and b (d,)
Entries = tuple[Tensor, Sequence[str]]  # unit keys (M, d) and their ids


class Neighbours(nn.Module):
    """The relational loss with the teacher's keys as constants (specification, 2.3).

    With `neighbours_scope: queue`, the batch's keys enter the queue before they are compared, so that a text's own key
    is there; what the queue holds is part of a checkpoint. Of several processes, each compares its own batch, with a
    queue of its own. `entries` are all keys of `neighbours_scope: knowledge_base`.
    """

    weight: Tensor
    bias: Tensor
    keys: Tensor
    names: Tensor
    seen: Tensor

    def __init__(self, terms: Terms, projection: KeyProjection, entries: Entries | None = None) -> None:
        super().__init__()
        self.terms = terms
        weight, bias = (tensor.detach().clone() for tensor in projection)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        if terms.neighbours_scope == "queue":
            self.register_buffer("keys", torch.zeros(terms.neighbours_queue, len(bias)))
            self.register_buffer("names", torch.zeros(terms.neighbours_queue, dtype=torch.int64))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        elif entries is not None:
            self.register_buffer("keys", entries[0].detach(), persistent=False)
            self.register_buffer("names", names_of(entries[1]), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, ids: Sequence[str]) -> Tensor:
        """The loss of a batch: embeddings of the student (N, d) and of the teacher (N, d_t), and the texts' ids."""
        queries, names = losses.project_keys(teacher, self.weight, self.bias), names_of(ids).to(teacher.device)
        keys, others = self.compared_with(queries, names)
        warm = self.terms.neighbours_temperature
        own = None if self.terms.neighbours_own else names[:, None] == others  # (N, K)
        return losses.neighbour_relations(
            student, queries, keys, warm, self.terms.neighbours_student_temperature or warm, own
        )

    def compared_with(self, queries: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (K, d) and whose they are (K,)."""
        if self.terms.neighbours_scope == "batch":
            return queries, names
        if self.terms.neighbours_scope == "queue":
            self.enqueue(queries.detach(), names)
            held = min(int(self.seen), len(self.keys))
            return self.keys[:held], self.names[:held]
        return self.keys, self.names

    def enqueue(self, keys: Tensor, names: Tensor) -> None:
        """Put keys in the place of the oldest."""
        size, count = len(self.keys), len(keys)
        places = (self.seen + torch.arange(count, device=keys.device))[-size:] % size
        self.keys[places] = keys[-size:].to(self.keys.dtype)
        self.names[places] = names[-size:]
        self.seen += count


def names_of(ids: Sequence[str]) -> Tensor:
    """Ids as 64-bit digests (N,), which tensors can hold and compare."""
    digests = b"".join(blake2b(one.encode(), digest_size=8).digest() for one in ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64)
