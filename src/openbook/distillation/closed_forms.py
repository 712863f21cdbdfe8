"""Losses whose gradient is taken beside them: autograd would keep maps that only the loss itself has to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openbook.distillation.relation_kernel import relation

MASKED = -1e9  # finite, since minus infinity turns into 0 * NaN inside a KL
CHUNK_ENTRIES = 1 << 24  # of maps in memory at once: 64 MiB in float32
KEYED_ENTRIES = 1 << 22  # similarities to keys at once: fewer would read tens of thousands of keys again and again


def product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in the precision of its factors, which autocast would lower."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


class _StateError(torch.autograd.Function):
    """Squared error of one layer's projected states.

    Autograd would keep two tensors of the teacher's width until the backward pass. The gradient has a closed form, so
    it is taken beside the loss and only tensors of the student's width remain.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, d')
        teacher: Tensor,  # (N, d)
        padding: Tensor,  # rows that do not count
        weight: Tensor | None,  # (d, d')
        bias: Tensor | None,  # (d,)
    ) -> Tensor:
        projected = student if weight is None else F.linear(student, weight, bias)  # in bf16 under autocast
        error = teacher.to(torch.promote_types(projected.dtype, torch.float32), copy=True)
        error.sub_(projected).index_fill_(0, padding, 0)  # (N, d)
        share = 1 / ((len(error) - len(padding)) * error.shape[1])
        ctx.scale = -2 * share
        ctx.save_for_backward(
            error if weight is None else error @ weight,
            None if weight is None else error.T @ student,
            None if bias is None else error.sum(0),
        )
        norms: Tensor = torch.linalg.vector_norm(error, dim=1)  # (N,); one norm of all would lose digits
        return share * norms.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient * ctx.scale
        states, weight, bias = (None if kept is None else kept.to(scale.dtype) * scale for kept in ctx.saved_tensors)
        return states, None, None, weight, bias


class _AttentionError(torch.autograd.Function):
    """Squared error of one layer's attention scores, head by head.

    The gradient is taken beside the loss, as in `_StateError`: no map (B, L, L) outlives its head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_query: Tensor,  # (B, h, L, d_S/h)
        student_key: Tensor,
        teacher_query: Tensor,  # (B, h, L, d_T/h)
        teacher_key: Tensor,
        real: Tensor,  # (B, L) bool
    ) -> Tensor:
        heads, width, teacher_width = student_query.shape[1], student_query.shape[-1], teacher_query.shape[-1]
        loss = student_query.new_zeros(())
        query_gradient, key_gradient = torch.empty_like(student_query), torch.empty_like(student_key)
        ratio = math.sqrt(teacher_width / width)  # the student's products in units of the teacher's
        share = 1 / (teacher_width * heads * int(real.sum(1).square().sum()))
        weights = real.to(loss.dtype)
        pairs = weights[:, :, None] * weights[:, None, :]  # (B, L, L)
        for head in range(heads):
            query, key = student_query[:, head].contiguous(), student_key[:, head].contiguous()  # (B, L, d_S/h)
            aims = [side[:, head].to(loss.dtype).contiguous() for side in (teacher_query, teacher_key)]
            error = torch.bmm(aims[0], aims[1].transpose(1, 2))  # (B, L, L)
            error.baddbmm_(query, key.transpose(1, 2), alpha=-ratio).mul_(pairs)
            loss += torch.linalg.vector_norm(error, dim=(1, 2)).square().sum()
            query_gradient[:, head] = torch.bmm(error, key)
            key_gradient[:, head] = torch.bmm(error.transpose(1, 2), query)
        ctx.save_for_backward(query_gradient.mul_(-2 * ratio * share), key_gradient.mul_(-2 * ratio * share))
        return loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ctx.saved_tensors
        return gradient * query_gradient, gradient * key_gradient, None, None, None


class _RelationKL(torch.autograd.Function):
    """Weighted KL of one relation: compiled, a row of scores at a time, or some maps (L, L) at a time.

    The former is for float32 on a processor (`relation_kernel`), the latter for all else.

    The gradient is taken beside the loss, as in `_StateError`: only tensors of the size of q, k and v remain.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_left: Tensor,  # (B, A, L, d_S/A)
        student_right: Tensor,
        teacher_left: Tensor,  # (B, A, L, d_T/A)
        teacher_right: Tensor,
        real: Tensor,  # (B, L) bool
        rows: Tensor,  # (B, L) weight of each query
    ) -> Tensor:
        sides = student_left, student_right, teacher_left, teacher_right
        if all(_is_plain(side) for side in sides):
            own, own_too, aim, aim_too = (side.detach().numpy() for side in sides)
            total, *gradients = relation(
                (own, own_too), (aim, aim_too), real.numpy(), rows.numpy(), torch.get_num_threads()
            )
            ctx.save_for_backward(*map(torch.from_numpy, gradients))
            return rows.new_tensor(total)
        heads, length = student_left.shape[1:3]
        own_left, own_right, aim_left, aim_right = (side.flatten(0, 1) for side in sides)  # each (BA, L, d/A)
        padding = torch.zeros_like(rows).masked_fill_(~real, MASKED).repeat_interleave(heads, 0)[:, None]  # (BA, 1, L)
        weights = rows.repeat_interleave(heads, 0)[:, :, None]  # (BA, L, 1)
        loss = rows.new_zeros(())
        left_gradient, right_gradient = torch.empty_like(own_left), torch.empty_like(own_right)
        step = max(1, CHUNK_ENTRIES // length**2)
        for chunk in (slice(first, first + step) for first in range(0, len(weights), step)):
            left, right = own_left[chunk], own_right[chunk]
            scores, shares, log_sum = _relation(left, right, padding[chunk])
            aims, targets, aim_log_sum = _relation(aim_left[chunk], aim_right[chunk], padding[chunk])
            kl = aims.sub_(scores).mul_(targets).sum(-1, keepdim=True) - aim_log_sum + log_sum  # (a, L, 1)
            loss += (weights[chunk] * kl.clamp_min_(0)).sum()  # rounding may leave it just below
            error = shares.sub_(targets).mul_(weights[chunk])
            torch.bmm(error, right, out=left_gradient[chunk])
            torch.bmm(error.transpose(1, 2), left, out=right_gradient[chunk])
        scale = math.sqrt(own_left.shape[-1])
        ctx.save_for_backward(
            left_gradient.div_(scale).view_as(student_left), right_gradient.div_(scale).view_as(student_right)
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left_gradient, right_gradient = ctx.saved_tensors
        return gradient * left_gradient, gradient * right_gradient, None, None, None, None


class _NeighbourKL(torch.autograd.Function):
    """Sum over queries of the KL between two softmaxes over the same keys, a few queries at a time.

    The gradient is taken beside the loss, as in `_StateError`: no map (N, K) outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, d)
        queries: Tensor,  # (N, d)
        columns: Tensor,  # (d, K)
        own: Tensor | None,  # (N, K) bool: entries left out
        teacher_temperature: float,
        student_temperature: float,
    ) -> Tensor:
        loss, left_gradient = student.new_zeros(()), torch.empty_like(student)
        step = max(1, KEYED_ENTRIES // columns.shape[1])
        for chunk in (slice(first, first + step) for first in range(0, len(student), step)):
            scores = product(student[chunk], columns) / student_temperature  # (n, K)
            aims = product(queries[chunk], columns) / teacher_temperature
            if own is not None:
                scores, aims = scores.masked_fill(own[chunk], MASKED), aims.masked_fill(own[chunk], MASKED)
            log_student, log_teacher = scores.log_softmax(-1), aims.log_softmax(-1)
            targets = log_teacher.exp()
            loss += (log_teacher - log_student).mul_(targets).sum()
            error = log_student.exp_().sub_(targets)
            if own is not None:
                error.masked_fill_(own[chunk], 0)
            left_gradient[chunk] = product(error, columns.T) / student_temperature
        ctx.save_for_backward(left_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (left_gradient,) = ctx.saved_tensors
        return gradient * left_gradient, None, None, None, None, None


state_error: Callable[..., Tensor] = _StateError.apply
attention_error: Callable[..., Tensor] = _AttentionError.apply
relation_kl: Callable[..., Tensor] = _RelationKL.apply
neighbour_kl: Callable[..., Tensor] = _NeighbourKL.apply


def _is_plain(side: Tensor) -> bool:
    """Whether the compiled kernel takes it; what is not finite goes the way on which it shows in the loss."""
    if side.device.type != "cpu" or side.dtype != torch.float32:
        return False
    return bool(side.sum().isfinite())  # as telling as each entry, in one pass


def _relation(left: Tensor, right: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and probabilities (a, L, L) of the keys of each query, and the logarithm of its sum of exponents."""
    with torch.autocast(left.device.type, enabled=False):
        scores = torch.baddbmm(padding, left, right.transpose(1, 2), alpha=1 / math.sqrt(left.shape[-1]))
    shares = scores.softmax(-1)
    # the largest share is at least 1/L: its logarithm loses no digits
    return scores, shares, scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()
