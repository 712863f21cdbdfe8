"""What a task-agnostic student learns: which relations, weighed how, reach its loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openbook.distillation.losses import Norm
from openbook.distillation.relations import RelationLesson, Relations, without_gradient
from openbook.types import Batch, Outputs


def taps(*rows: list[list[float]]) -> tuple[Tensor, ...]:
    """q, k and v (B, L, 1)."""
    return tuple(torch.tensor(side, dtype=torch.float64)[..., None] for side in rows)


class Saying(nn.Module):
    """A student that says the same about every batch, in its second layer."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor):
        super().__init__()
        self.taps = nn.ParameterList([query, key, value])

    def forward(self, batch: Batch) -> Outputs:
        query, key, value = self.taps
        return Outputs(torch.empty(0), torch.empty(0), relations={2: (query, key, value)})


def lesson_of(
    student: tuple[Tensor, ...], pairs: tuple[str, ...], norm: Norm = "token", sample_share: float = 0.0
) -> RelationLesson:
    return RelationLesson(Saying(*student), Relations(pairs, 1, norm, sample_share, teacher_layer=3, student_layer=2))


def told(lesson: RelationLesson, teacher: tuple[Tensor, ...], mask: list[list[int]]) -> tuple[Tensor, dict[str, float]]:
    real = torch.tensor(mask)
    batch = Batch(tuple("ab"[: len(mask)]), real, real, real * 0)
    query, key, value = teacher
    answers = Outputs(torch.empty(0), torch.empty(0), relations={3: (query, key, value)})
    loss, parts = lesson(batch, answers)
    return loss, {name: part.item() for name, part in parts.items()}


@pytest.mark.parametrize(("norm", "expected"), [("token", 0.048283), ("flat", 0.046846), ("paddle", 0.122752)])
def test_what_weighs_the_same_reaches_the_loss(norm: Norm, expected: float) -> None:
    """MITKD specification, F5, in queries alone and in all three."""
    aim, own = [[1, 0, 3.0], [1, 0, 0.0]], [[0, 0, -2.0], [0, 0, 0.0]]
    mask = [[1, 1, 0], [1, 1, 1]]
    same = taps([[0.0] * 3] * 2) * 2
    loss, parts = told(lesson_of((*taps(own), *same), ("qq",), norm), (*taps(aim), *same), mask)
    assert parts == pytest.approx({"qq": expected}, abs=1e-6)
    loss, parts = told(lesson_of(taps(own) * 3, ("qq", "kk", "vv"), norm), taps(aim) * 3, mask)
    assert parts == pytest.approx(dict.fromkeys(("qq", "kk", "vv"), expected), abs=1e-6)
    assert loss.item() == pytest.approx(3 * expected, abs=3e-6)


def test_a_pair_compares_the_first_projection_with_the_second() -> None:
    """MITKD specification, F8."""
    lesson = lesson_of(taps([[1, 1.0]], [[1, 0.0]], [[3, -3.0]]), ("qk",))
    loss, parts = told(lesson, taps([[1, 0.0]], [[0, 2.0]], [[5, 5.0]]), [[1, 1]])
    assert parts == pytest.approx({"qk": 0.474420}, abs=1e-6)
    torch.autograd.backward(loss)
    gradients = [weight.grad for weight in lesson.student.taps]  # type: ignore[union-attr]
    assert gradients[0].flatten().tolist() == pytest.approx([0.305928, 0.115529], abs=1e-6)
    assert gradients[1].flatten().tolist() == pytest.approx([0.421457, -0.421457], abs=1e-6)
    assert without_gradient(lesson) == ["student.taps.2"]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_samples_have_their_share_of_the_loss(share: float) -> None:
    """MITKD specification, F20: 0.059358 among samples; of tokens, by hand, softmaxes of one row of two."""
    own, aim, mask = taps([[0, 2.0], [1, -3.0]]), taps([[1, 1.0], [2, 7.0]]), [[1, 1], [1, 0]]
    loss, parts = told(lesson_of(own * 3, ("qq", "vv"), sample_share=share), aim * 3, mask)
    logits = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # of the student, whose teacher says 1/2, 1/2
    tokens = -(logits.log_softmax(-1) + torch.tensor(2.0).log()).mean().item() / 2
    assert parts["qq"] == parts["vv"] == pytest.approx(tokens, abs=1e-6)
    assert loss.item() == pytest.approx(2 * ((1 - share) * tokens + share * 0.059358), abs=3e-6)
    assert ("samples" in parts) == (share > 0)
    if share:
        assert parts["samples"] == pytest.approx(2 * 0.059358, abs=3e-6)
