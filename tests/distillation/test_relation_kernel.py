"""The compiled kernel of relations: equal to the maps in float64, whatever the shape, the mask and the threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openbook.distillation import closed_forms, losses, relation_kernel
from openbook.distillation.losses import Norm, Taps

NORMS: tuple[Norm, ...] = ("token", "flat", "paddle")
PAIRS = [(0, 0), (1, 1), (2, 2), (0, 1)]


def made(seed: int, *shape: int, size: float = 1.0) -> Taps:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (size * torch.randn(*shape, generator=generator) for _ in range(3))
    return query, key, value


def loss_and_gradients(
    student: Taps, teacher: Taps, mask: Tensor, heads: int, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    query, key, value = (side.to(dtype).requires_grad_() for side in student)
    aim = teacher[0].to(dtype), teacher[1].to(dtype), teacher[2].to(dtype)
    loss = losses.relations((query, key, value), aim, mask, heads, norm=norm, pairs=PAIRS)
    return loss.detach(), *torch.autograd.grad(loss, (query, key, value))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    norm=st.sampled_from(NORMS),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 3), st.integers(2, 40)),
    size=st.sampled_from([0.1, 1.0, 8.0]),  # the last is beyond what needs no shift
)
def test_it_equals_the_maps_in_float64(
    seed: int, norm: Norm, heads: int, widths: tuple[int, int], sizes: tuple[int, int], size: float
) -> None:
    student = made(seed, *sizes, heads * widths[0], size=size)
    teacher = made(seed + 1, *sizes, heads * widths[1], size=size)
    mask = (torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < 0.7).long()
    mask[:, -1] = 1
    ours = loss_and_gradients(student, teacher, mask, heads, norm, torch.float32)
    exact = loss_and_gradients(student, teacher, mask, heads, norm, torch.float64)
    assert ours[0].dtype == torch.float32
    rounding = 1e-6 * max(1, size**2)  # of the scores
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=rounding)
    for own, aim in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(own.double(), aim, rtol=0, atol=rounding * max(0.1, size))


def test_the_shift_is_taken_where_powers_would_overflow() -> None:
    mask = torch.ones(1, 6).long()
    student, teacher = made(0, 1, 6, 4, size=30.0), made(1, 1, 6, 4, size=30.0)
    ours = loss_and_gradients(student, teacher, mask, 1, "token", torch.float32)
    exact = loss_and_gradients(student, teacher, mask, 1, "token", torch.float64)
    assert exact[0] > 100
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = (torch.arange(9)[None] < torch.tensor([[9], [4], [7]])).long()
    student, teacher = made(2, 3, 9, 10), made(3, 3, 9, 20)
    told = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        told.append(loss_and_gradients(student, teacher, mask, 5, "token", torch.float32))
    for other in told[1:]:
        assert all(torch.equal(one, two) for one, two in zip(told[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "asked"), [(torch.float32, len(PAIRS)), (torch.float64, 0)])
def test_single_precision_on_a_processor_is_what_it_takes(
    dtype: torch.dtype, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> object:
        calls.append(arguments)
        return relation_kernel.relation(*arguments)

    monkeypatch.setattr(closed_forms, "relation", counted)
    loss_and_gradients(made(4, 2, 3, 4), made(5, 2, 3, 8), torch.ones(2, 3).long(), 2, "token", dtype)
    assert len(calls) == asked


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_not_finite_shows_in_the_loss(value: float, side: str) -> None:
    sides = {"student": made(6, 2, 3, 4), "teacher": made(7, 2, 3, 8)}
    sides[side][0][1, 2, 1] = value
    mask = torch.ones(2, 3).long()
    assert loss_and_gradients(sides["student"], sides["teacher"], mask, 2, "token", torch.float32)[0].isnan()


def test_powers_of_two_are_as_exact_as_single_precision() -> None:
    x = np.linspace(-125.5, 60, 100_001, dtype=np.float32)
    powers = np.empty_like(x)
    for place, one in enumerate(x):
        powers[place] = relation_kernel.power_of_two(one)
    np.testing.assert_allclose(powers, np.exp2(x.astype(np.float64)), rtol=3e-7)
    assert relation_kernel.power_of_two(np.float32(-1000)) == np.float32(2.0**-126)


def test_rounding_makes_no_loss_below_zero() -> None:
    """A student that agrees, in other words: every row costs 0 up to rounding, half of them just below."""
    for seed in range(20):
        teacher, mask = made(seed, 1, 4, 2), torch.ones(1, 4).long()
        turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))).Q
        student = (teacher[0] @ turn, teacher[1] @ turn, teacher[2] @ turn)
        assert losses.relations(student, teacher, mask, 1) >= 0
