"""The losses: pure functions of tensors, in float32 (float64 if the student's are), also under autocast.

Whatever comes from the teacher is a constant. Shapes that differ are refused: broadcasting would train toward a
plausible wrong target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Taps = tuple[Tensor, Tensor, Tensor]  # q, k, v of one layer, each (B, L, d)
Norm = Literal["token", "flat", "paddle"]

MASKED = -1e9  # finite, since minus infinity turns into 0 * NaN inside a KL
CHUNK_ENTRIES = 1 << 20  # relation entries in memory at once: 4 MiB a map in float32, which caches hold


def gold_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) against class indices (B,). Raises ValueError for labels outside 0..C-1."""
    if student.dim() != 2 or labels.shape != student.shape[:1] or labels.is_floating_point():
        raise ValueError(f"logits {tuple(student.shape)} against {labels.dtype} labels {tuple(labels.shape)}")
    # cross_entropy leaves a label of -100 out without a word
    if not bool(((labels >= 0) & (labels < student.shape[1])).all()):
        raise ValueError(f"labels {labels.tolist()} for {student.shape[1]} classes")
    return F.cross_entropy(_precise(student), labels)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all entries: of scores (B, C) or (B,), or of pooled vectors (B, d).

    For pooled vectors, the hint loss of FitNets (Romero et al., 2015). Raises ValueError for unequal shapes or NaN.
    """
    student, teacher = _answers(student, teacher)
    return (student - teacher).square().mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, *, official: bool = False) -> Tensor:
    """Cross-entropy of logits (B, C) to the teacher's softened probabilities (TinyBERT, eq. 10); no factor T².

    `official` divides by C, as the published code does. Raises ValueError for unequal shapes, NaN or T <= 0.
    """
    _refuse_cold(temperature)
    student, teacher = _answers(student, teacher)
    targets = (teacher / temperature).softmax(dim=-1)
    loss = -(targets * (student / temperature).log_softmax(dim=-1)).sum(dim=-1).mean()
    return loss / student.shape[-1] if official else loss


def soft_label_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened logits (B, C) (Hinton et al., 2015, section 2).

    Times T², so that changing T does not change the size of the gradient. Raises ValueError for unequal shapes, NaN
    or T <= 0.
    """
    _refuse_cold(temperature)
    student, teacher = _answers(student, teacher)
    log_student, log_teacher = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hidden_states(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    official: bool = False,
) -> Tensor:
    """Squared error of states (B, L, d), mean over real tokens and width (TinyBERT, eq. 8 and 9).

    `weight` (d, d') and `bias` (d,) map the student's states (B, L, d') to the teacher's width. `mask` (B, L) is 1 on
    real tokens; `official` counts padding too, as the published code does. Raises ValueError for unequal shapes.
    """
    width = student.shape[-1] if weight is None else weight.shape[0]
    if (*student.shape[:2], width) != teacher.shape:
        raise ValueError(f"student {(*student.shape[:2], width)} against teacher {tuple(teacher.shape)}")
    real = _real_tokens(mask, student.shape[:2])
    padding = (~real).flatten().nonzero()[:, 0]
    if official:
        padding = padding[:0]
    return _state_error(student.flatten(0, 1), teacher.flatten(0, 1), padding, weight, bias)


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Raw scores QKᵀ/√d_head (B, h, L, L), before mask and softmax, of q and k (B, L, d)."""
    query, key = (split_heads(_precise(side), heads) for side in _equal(query, key))
    return _product(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])


def attention(student: Tensor, teacher: Tensor, mask: Tensor, *, official: bool = False) -> Tensor:
    """Squared error of raw attention scores (B, h, L, L), mean over heads and real pairs (TinyBERT, eq. 7).

    `mask` (B, L) is 1 on real tokens. `official` follows the published code: -10000 on padded keys, scores of -100
    and below become 0, and the mean counts padding too. Raises ValueError for unequal shapes.
    """
    student, teacher = _both(student, teacher)
    real = _real_tokens(mask, (student.shape[0], student.shape[2]))
    if official:
        padding = -10000.0 * ~real[:, None, None, :]
        student, teacher = (side + padding for side in (student, teacher))
        return squared_error(student.masked_fill(student <= -100, 0), teacher.masked_fill(teacher <= -100, 0))
    pairs = real[:, None, :, None] & real[:, None, None, :]  # (B, 1, L, L)
    return ((student - teacher).square() * pairs).sum() / (student.shape[1] * pairs.sum())


def attention_of_taps(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, heads: int, *, official: bool = False
) -> Tensor:
    """The same of q and k, the first two of each side's taps (B, L, d), without a map of scores that outlives its use.

    The widths may differ. Raises ValueError for other batches or lengths, or a width that `heads` does not divide.
    """
    if official:
        scores = [attention_scores(side[0], side[1], heads) for side in (student, teacher)]
        return attention(scores[0], scores[1], mask, official=True)
    if student[0].shape[:2] != teacher[0].shape[:2]:
        raise ValueError(f"student attention {tuple(student[0].shape)} against {tuple(teacher[0].shape)}")
    real = _real_tokens(mask, student[0].shape[:2])
    own = [split_heads(_precise(side), heads) for side in _equal(*student[:2])]  # each (B, h, L, d_S/h)
    aim = [split_heads(side.detach(), heads) for side in _equal(*teacher[:2])]  # each (B, h, L, d_T/h)
    with torch.autocast(own[0].device.type, enabled=False):
        return _attention_error(own[0], own[1], aim[0], aim[1], real)


def relations(
    student: Taps,
    teacher: Taps,
    mask: Tensor,
    heads: int,
    *,
    norm: Norm = "token",
    pairs: Sequence[tuple[int, int]] = ((0, 0), (1, 1), (2, 2)),
) -> Tensor:
    """KL(teacher || student) of scaled dot-product relations, summed over `pairs` of (q, k, v) (MiniLMv2, section 3.1).

    q, k, v are (B, L, d) of one layer, bias included and unscaled; the widths may differ, since each side is split
    into `heads` relation heads and scaled by its own √(d/heads). Padded keys are masked on both sides. `norm`: every
    sequence weighs the same (`token`), every real token does (`flat`), or padded queries count too (`paddle`, only to
    compare with PaddleNLP). Raises ValueError for other batches or lengths, or a width that `heads` does not divide.
    """
    if student[0].shape[:2] != teacher[0].shape[:2]:
        raise ValueError(f"student relations {tuple(student[0].shape)} against {tuple(teacher[0].shape)}")
    real = _real_tokens(mask, student[0].shape[:2])
    own = [split_heads(_precise(side), heads) for side in _equal(*student)]  # each (B, A, L, d_S/A)
    aim = [split_heads(side, heads).to(own[0].dtype) for side in _equal(*teacher)]  # each (B, A, L, d_T/A)
    rows = _row_weights(real.to(own[0].dtype), norm) / heads  # (B, L)
    kl = [_relation_kl(own[left], own[right], aim[left], aim[right], real, rows) for left, right in pairs]
    return torch.stack(kl).sum()


def sample_relations(
    student: Taps, teacher: Taps, mask: Tensor, heads: int, *, pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """The same among the samples of a batch at equal positions, (A, B, B) for each; the mean over real tokens.

    As in PP-MiniLM, but with padded samples masked as keys and left out as queries. It depends on which samples share
    a batch. q, k, v are (B, L, d). Raises ValueError as `relations` does.
    """
    turned = [tuple(tap.transpose(0, 1) for tap in side) for side in (student, teacher)]  # each (L, B, d)
    own, aim = ((side[0], side[1], side[2]) for side in turned)
    return relations(own, aim, mask.T, heads, norm="flat", pairs=pairs)


def project_keys(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Unit keys normalize(W h + b) (M, d) of teacher embeddings (M, d_t); W (d, d_t), b (d,) (ReAugKD)."""
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"key projection {tuple(weight.shape)} with bias {tuple(bias.shape)}")
    return F.normalize(_product(_precise(embedding), _precise(weight).T) + _precise(bias), dim=-1)


def neighbour_relations(
    student: Tensor,
    queries: Tensor,
    keys: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    own: Tensor | None = None,
) -> Tensor:
    """KL of the teacher's to the student's softmax over similarities to the teacher's keys (ReAugKD, relational loss).

    `student` (N, d) is normalised here; `queries` (N, d) and `keys` (K, d) are the teacher's unit vectors, and
    constants. `own` (N, K) marks entries left out of both softmaxes; a row without entries costs 0. Raises ValueError
    for unequal shapes, NaN or a temperature <= 0.
    """
    _refuse_cold(teacher_temperature)
    _refuse_cold(student_temperature)
    student, queries = _answers(student, queries)
    if keys.dim() != 2 or keys.shape[1] != student.shape[1]:
        raise ValueError(f"keys {tuple(keys.shape)} for queries {tuple(student.shape)}")
    columns = keys.detach().to(student.dtype).T
    similarities = _product(F.normalize(student, dim=-1), columns) / student_temperature  # (N, K)
    targets = _product(queries, columns) / teacher_temperature
    if own is not None:
        if own.shape != targets.shape:
            raise ValueError(f"own entries {tuple(own.shape)} for similarities {tuple(targets.shape)}")
        similarities, targets = similarities.masked_fill(own, MASKED), targets.masked_fill(own, MASKED)
    log_student, log_teacher = similarities.log_softmax(dim=-1), targets.log_softmax(dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def supervised_contrastive(
    vectors: Tensor, labels: Tensor, temperature: float, singletons: Literal["skip", "zero"] = "skip"
) -> Tensor:
    """Supervised contrastive loss of unit vectors (N, d) with class indices (N,) (Khosla et al., 2020, L_out).

    `singletons`, anchors alone in their class, leave the mean (`skip`) or count 0 in it (`zero`). Raises ValueError
    for unequal shapes, NaN or a temperature <= 0.
    """
    positives = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    counts = positives.sum(dim=1)
    rows = _contrast(vectors, positives / counts.clamp_min(1)[:, None], temperature)
    return rows.mean() if singletons == "zero" else rows.sum() / (counts > 0).sum().clamp_min(1)


def contrastive_regression(vectors: Tensor, targets: Tensor, temperature: float, sigma: float = 1.0) -> Tensor:
    """Contrastive loss of unit vectors (N, d) with targets (N,), positives weighed by a Gaussian of their distance.

    The supervised contrastive loss with the kernel exp(-(c_i - c_p)²/2σ²) in place of equality (Dufumier et al.,
    2021). Raises ValueError for unequal shapes, NaN, or a temperature or sigma <= 0.
    """
    _refuse_cold(sigma)
    distances = (_precise(targets)[:, None] - _precise(targets)[None, :]) / sigma
    # a softmax of the exponents is the normalised kernel, and cannot underflow to 0/0
    weights = (-distances.square() / 2).fill_diagonal_(MASKED).softmax(dim=1)
    return _contrast(vectors, weights, temperature).mean()


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, d) to (B, heads, L, d/heads). Raises ValueError if `heads` does not divide d."""
    batch, length, width = tensor.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    return tensor.view(batch, length, heads, width // heads).transpose(1, 2)


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
    """Weighted KL of one relation, a few heads at a time.

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
        loss = rows.new_zeros(())
        left_gradient, right_gradient = torch.empty_like(student_left), torch.empty_like(student_right)
        weights, scale = rows[:, None, :, None], math.sqrt(student_left.shape[-1])
        for chunk in _chunks(*student_left.shape[:3]):
            left, right = student_left[:, chunk], student_right[:, chunk]
            log_student = _log_relation(left, right, real)  # (B, a, L, L)
            log_teacher = _log_relation(teacher_left[:, chunk], teacher_right[:, chunk], real)
            teacher = log_teacher.exp()
            loss += (weights * teacher * (log_teacher - log_student)).sum()
            error = weights * (log_student.exp() - teacher) / scale
            left_gradient[:, chunk] = _product(error, right)
            right_gradient[:, chunk] = _product(error.transpose(-2, -1), left)
        ctx.save_for_backward(left_gradient, right_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left_gradient, right_gradient = ctx.saved_tensors
        return gradient * left_gradient, gradient * right_gradient, None, None, None, None


_state_error: Callable[..., Tensor] = _StateError.apply
_attention_error: Callable[..., Tensor] = _AttentionError.apply
_relation_kl: Callable[..., Tensor] = _RelationKL.apply


def _chunks(batch: int, heads: int, length: int) -> Iterator[slice]:
    step = max(1, CHUNK_ENTRIES // (batch * length * length))
    return (slice(first, first + step) for first in range(0, heads, step))


def _log_relation(left: Tensor, right: Tensor, real: Tensor) -> Tensor:
    scores = _product(left, right.transpose(-2, -1)) / math.sqrt(left.shape[-1])
    return scores.masked_fill(~real[:, None, None, :], MASKED).log_softmax(dim=-1)


def _row_weights(real: Tensor, norm: Norm) -> Tensor:
    """The weight of every query (B, L) in a mean over sequences, over real tokens, or over padding too."""
    if norm == "token":
        return real / real.sum(dim=1, keepdim=True) / real.shape[0]
    return real / real.sum() if norm == "flat" else torch.full_like(real, 1 / real.numel())


def _contrast(vectors: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Weighted cross-entropy of each vector against all others; (N,)."""
    _refuse_cold(temperature)
    vectors = _without_nan(_precise(vectors))
    if weights.shape != (vectors.shape[0], vectors.shape[0]):
        raise ValueError(f"vectors {tuple(vectors.shape)} with {weights.shape[0]} labels")
    similarities = _product(vectors, vectors.T) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return -(weights * similarities.masked_fill(itself, MASKED).log_softmax(dim=1)).sum(dim=1)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in the precision of its factors, which autocast would lower."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _equal(*tensors: Tensor) -> tuple[Tensor, ...]:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"shapes must be equal: {[tuple(tensor.shape) for tensor in tensors]}")
    return tensors


def _both(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} against teacher {tuple(teacher.shape)}")
    student = _precise(student)
    return student, teacher.detach().to(student.dtype)


def _answers(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of something small enough to look for NaN."""
    student, teacher = _both(student, teacher)
    return _without_nan(student), _without_nan(teacher)


def _without_nan(tensor: Tensor) -> Tensor:
    if bool(tensor.isnan().any()):
        raise ValueError(f"NaN among {tuple(tensor.shape)} values that a loss reads")
    return tensor


def _real_tokens(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask as bool. An additive mask would mean the opposite of what it says, so floats are refused."""
    if mask.shape != tuple(shape) or mask.is_floating_point():
        raise ValueError(f"{mask.dtype} mask {tuple(mask.shape)} for {tuple(shape)} tokens; 1 marks a real one")
    real = mask.bool()
    if not bool(real.any(dim=1).all()):
        raise ValueError("a sequence of the batch has no real token")
    return real


def _refuse_cold(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
