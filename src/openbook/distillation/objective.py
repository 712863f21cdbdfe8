"""What is minimised: named, weighted losses, and the projections they learn; but for its own, no student ships them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openbook.config import Terms, UsageError, WholeKind
from openbook.distillation import losses
from openbook.distillation.mapping import layer_map, relation_heads
from openbook.distillation.neighbours import Entries, KeyProjection, Neighbours
from openbook.types import Batch, Outputs

QUERY = "query"  # the student's own projection, which ships with it

Loss = Callable[[Tensor, Tensor], Tensor]  # of the student's logits (B, C), against labels
Softened = Callable[[Tensor, Tensor, float], Tensor]  # against a teacher's logits, at a temperature
GOLD: dict[WholeKind, Loss] = {
    "classification": losses.gold_labels,
    "regression": lambda scores, targets: losses.squared_error(scores, targets[:, None]),
    "multi_label": losses.gold_label_sets,
}
SOFT: dict[WholeKind, Softened] = {
    "classification": losses.soft_label_kl,
    "regression": lambda scores, taught, temperature: losses.squared_error(scores, taught),
    "multi_label": losses.soft_label_sets_kl,
}
TERMS = ("gold", "soft_labels", "embedding", "hidden", "attention", "relations", "neighbours")


@dataclass(frozen=True)
class Widths:
    """The sizes of one model that the terms compare."""

    hidden: int
    layers: int
    heads: int
    embedding: int  # of the pooled vector


class Objective(nn.Module):
    """The weighted sum of the terms whose weight is above 0. Raises UsageError for terms the two shapes cannot serve.

    `key_projection` is W (d, d_t) and b (d,) of the teacher's keys, and `entries` the keys of every training text
    with their ids; both are fixed, and `neighbours` alone reads them. With `projected`, it compares a learned map of
    the student's pooled vector in place of the vector; the map begins as the identity.
    """

    def __init__(
        self,
        terms: Terms,
        student: Widths,
        teacher: Widths,
        kind: WholeKind,
        key_projection: KeyProjection | None = None,
        entries: Entries | None = None,
        projected: bool = False,
    ) -> None:
        super().__init__()
        self.terms, self.kind = terms, kind
        self.student_widths, self.teacher_widths = student, teacher
        self.weights: dict[str, float] = {name: getattr(terms, name) for name in TERMS if getattr(terms, name) > 0}
        if not self.weights:
            raise UsageError(f"every one of the distill terms weighs 0; give one of {list(TERMS)} a weight")
        if terms.official and terms.soft_labels and kind == "multi_label":
            raise UsageError(
                "terms.official=true: TinyBERT's code has no soft labels of several labels a text (task.kind:"
                " multi_label); set it, or terms.soft_labels, to 0"
            )
        if terms.attention and student.heads != teacher.heads:
            raise UsageError(
                f"terms.attention needs equal head counts: student.heads={student.heads}, the teacher has "
                f"{teacher.heads}; make them equal, or use terms.relations"
            )
        reads_map = terms.hidden or terms.attention
        self.layer_map = layer_map(teacher.layers, student.layers, terms.layer_mapping) if reads_map else ()
        self.relation_heads = (
            relation_heads(teacher.hidden, student.hidden, terms.relation_heads) if terms.relations else 0
        )
        self.fits = _fits(terms, student, teacher)
        self.projections = nn.ModuleDict(
            {name: _projection(student.hidden, teacher.hidden) for name in dict.fromkeys(self.fits) if name}
        )
        if terms.embedding:
            self.projections["embedding"] = _projection(student.embedding, teacher.embedding)
        if terms.neighbours:
            projection = _fitting_keys(key_projection, student, teacher)
            if projected:
                self.projections[QUERY] = _projection(student.embedding, student.embedding)
            self.neighbours = Neighbours(terms, projection, _fitting_entries(entries, terms, student))

    @property
    def reads_hidden(self) -> bool:
        return "hidden" in self.weights

    @property
    def reads_padding(self) -> bool:
        """Whether states, queries and keys of padding count, which only a live teacher has."""
        return self.terms.official and ("hidden" in self.weights or "attention" in self.weights)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student, from 1, whose q, k and v are read."""
        attended = range(1, self.student_widths.layers + 1) if "attention" in self.weights else ()
        related = (self.student_widths.layers,) if "relations" in self.weights else ()
        return tuple(sorted({*attended, *related}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher, from 1, whose q, k and v are read."""
        attended = self.layer_map if "attention" in self.weights else ()
        related = (self.teacher_widths.layers,) if "relations" in self.weights else ()
        return tuple(sorted({*attended, *related}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's value before its weight, detached."""
        term_of = {
            "gold": self._gold,
            "soft_labels": self._soft_labels,
            "embedding": self._embedding,
            "hidden": self._hidden,
            "attention": self._attention,
            "relations": self._relations,
            "neighbours": self._neighbours,
        }
        parts = {name: term_of[name](student, teacher, batch) for name in self.weights}
        loss = torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _gold(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise UsageError(
                f"terms.gold={self.terms.gold} needs labels, and {batch.ids[0]} has none; set it to 0 there"
            )
        return GOLD[self.kind](student.logits, batch.labels)

    def _soft_labels(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The KL times T², whose gradient at T = 1 is the cross-entropy's; `official`, the cross-entropy by classes."""
        if self.terms.official and self.kind == "classification":
            return losses.soft_cross_entropy(student.logits, teacher.logits, self.terms.temperature, official=True)
        return SOFT[self.kind](student.logits, teacher.logits, self.terms.temperature)

    def _embedding(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return losses.squared_error(self.projections["embedding"](student.embedding), teacher.embedding)

    def _hidden(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        layers = []
        for layer, (imitated, fit) in enumerate(zip((0, *self.layer_map), self.fits, strict=True)):
            own, aim = _state(student, layer, "student"), _state(teacher, imitated, "teacher")
            fitted = dict(self.projections[fit].named_parameters()) if fit else {}  # weight and bias
            layers.append(losses.hidden_states(own, aim, batch.attention_mask, **fitted, official=self.terms.official))
        return torch.stack(layers).sum()

    def _attention(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        layers = [
            losses.attention_of_taps(
                _taps(student, layer, "student"),
                _taps(teacher, imitated, "teacher"),
                batch.attention_mask,
                self.student_widths.heads,
                official=self.terms.official,
            )
            for layer, imitated in enumerate(self.layer_map, start=1)
        ]
        return torch.stack(layers).sum()

    def _relations(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not student.relations or not teacher.relations:
            raise ValueError("terms.relations reads q, k and v of both sides' last layers; one side gave none")
        own, aim = (outputs.relations[max(outputs.relations)] for outputs in (student, teacher))
        if not aim[2].numel():
            raise ValueError("terms.relations reads values, and a recording holds queries and keys alone; ask live")
        return losses.relations(own, aim, batch.attention_mask, self.relation_heads, norm=self.terms.relation_norm)

    def _neighbours(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        asked = self.projections[QUERY](student.embedding) if QUERY in self.projections else student.embedding
        loss: Tensor = self.neighbours(asked, teacher.embedding, batch.ids)
        return loss


def _fits(terms: Terms, student: Widths, teacher: Widths) -> tuple[str, ...]:
    """The name of the projection of each hidden state, the embeddings first; empty names stand for none."""
    if not terms.hidden:
        return ()
    if terms.fit == "none" and student.hidden != teacher.hidden:
        raise UsageError(
            f"terms.fit=none compares hidden states as they are, but student.hidden_size={student.hidden} and the"
            f" teacher's width is {teacher.hidden}; make them equal, or use fit: shared"
        )
    layers = range(1, student.layers + 1)
    if terms.fit == "per_layer":
        return ("hidden_0", *(f"hidden_{layer}" for layer in layers))
    names = {"shared": ("hidden", "hidden"), "two": ("hidden_embeddings", "hidden_layers"), "none": ("", "")}
    embeddings, others = names[terms.fit]
    return (embeddings, *(others for _ in layers))


def _projection(student: int, teacher: int) -> nn.Linear:
    """A learned map from student to teacher width, the identity where the widths agree."""
    linear = nn.Linear(student, teacher)
    if student == teacher:
        nn.init.eye_(linear.weight)
    else:
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _fitting_keys(key_projection: KeyProjection | None, student: Widths, teacher: Widths) -> KeyProjection:
    if key_projection is None:
        raise UsageError(
            "terms.neighbours needs the teacher's key projection; train the teacher's first, or set it to 0"
        )
    weight, bias = key_projection
    wanted = (student.embedding, teacher.embedding)
    if weight.shape != wanted or bias.shape != wanted[:1]:
        raise UsageError(
            f"terms.neighbours: a student embedding of width {wanted[0]} and a teacher embedding of width {wanted[1]} "
            f"need a key projection {wanted}, and it is {tuple(weight.shape)} with bias {tuple(bias.shape)}; refit it"
        )
    return weight, bias


def _fitting_entries(entries: Entries | None, terms: Terms, student: Widths) -> Entries | None:
    if terms.neighbours_scope != "knowledge_base":
        return None
    if entries is None or entries[0].shape != (len(entries[1]), student.embedding):
        found = "there are none" if entries is None else f"they are {tuple(entries[0].shape)} of {len(entries[1])} ids"
        raise UsageError(
            f"terms.neighbours_scope=knowledge_base needs a key of width {student.embedding} for every training text,"
            f" and {found}; record the teacher's answers first, or set it to batch"
        )
    return entries


def _state(outputs: Outputs, layer: int, side: str) -> Tensor:
    if layer >= len(outputs.hidden):
        raise ValueError(f"terms.hidden reads state {layer} of the {side}, which gave {len(outputs.hidden)}")
    return outputs.hidden[layer]


def _taps(outputs: Outputs, layer: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    if layer not in outputs.relations:
        raise ValueError(f"terms.attention reads layer {layer} of the {side}, which gave {list(outputs.relations)}")
    return outputs.relations[layer]
