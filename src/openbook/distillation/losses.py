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
CACHED_ENTRIES = 1 << 17  # of maps in memory at once: 512 KiB in float32, which a processor's cache holds
CHUNK_ENTRIES = 1 << 24  # the same on a GPU
KEYED_ENTRIES = 1 << 22  # similarities to keys at once: fewer would read tens of thousands of keys again and again


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
    constants. `own` (N, K) marks entries left out of both softmaxes; a row without entries costs 0. No map (N, K)
    outlives the call, and no more than a part of it is held. Raises ValueError for unequal shapes, NaN or a
    temperature <= 0.
    """
    _refuse_cold(teacher_temperature)
    _refuse_cold(student_temperature)
    student, queries = _answers(student, queries)
    if keys.dim() != 2 or keys.shape[1] != student.shape[1]:
        raise ValueError(f"keys {tuple(keys.shape)} for queries {tuple(student.shape)}")
    if own is not None and own.shape != (len(queries), len(keys)):
        raise ValueError(f"own entries {tuple(own.shape)} for {len(queries)} queries and {len(keys)} keys")
    student, columns = F.normalize(student, dim=-1), keys.detach().to(student.dtype).T
    return _neighbour_kl(student, queries, columns, own, teacher_temperature, student_temperature) / len(student)


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


def rank_n_contrast(vectors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Rank-N-Contrast of unit vectors (N, d) with targets (N,) (Zha et al., 2023, eq. 1).

    Every other example is a positive in its turn, against all that lie at least as far from the anchor's target.
    Raises ValueError for unequal shapes, NaN or a temperature <= 0.
    """
    _refuse_cold(temperature)
    vectors, targets = _without_nan(_precise(vectors)), _without_nan(_precise(targets)).to(vectors.device)
    if targets.shape != vectors.shape[:1]:
        raise ValueError(f"vectors {tuple(vectors.shape)} with targets {tuple(targets.shape)}")
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    distances = (targets[:, None] - targets[None, :]).abs().masked_fill(itself, -1)  # itself comes last
    farthest, order = distances.sort(dim=1, descending=True)
    similarities = (_product(vectors, vectors.T) / temperature).gather(1, order)
    ends = torch.searchsorted(-farthest, -farthest, right=True) - 1  # equal distances count as a whole
    against = similarities.logcumsumexp(dim=1).gather(1, ends)
    return (against - similarities)[:, :-1].sum() / max(1, itself.numel() - len(vectors))


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
    """Weighted KL of one relation, a few maps (L, L) at a time.

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
        heads, length = student_left.shape[1:3]
        sides = (side.flatten(0, 1) for side in (student_left, student_right, teacher_left, teacher_right))
        own_left, own_right, aim_left, aim_right = sides  # each (BA, L, d/A)
        padding = torch.zeros_like(rows).masked_fill_(~real, MASKED).repeat_interleave(heads, 0)[:, None]  # (BA, 1, L)
        weights = rows.repeat_interleave(heads, 0)[:, :, None]  # (BA, L, 1)
        loss = rows.new_zeros(())
        left_gradient, right_gradient = torch.empty_like(own_left), torch.empty_like(own_right)
        for chunk in _chunks(len(weights), length**2, rows.device):
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
            scores = _product(student[chunk], columns) / student_temperature  # (n, K)
            aims = _product(queries[chunk], columns) / teacher_temperature
            if own is not None:
                scores, aims = scores.masked_fill(own[chunk], MASKED), aims.masked_fill(own[chunk], MASKED)
            log_student, log_teacher = scores.log_softmax(-1), aims.log_softmax(-1)
            targets = log_teacher.exp()
            loss += (log_teacher - log_student).mul_(targets).sum()
            error = log_student.exp_().sub_(targets)
            if own is not None:
                error.masked_fill_(own[chunk], 0)
            left_gradient[chunk] = _product(error, columns.T) / student_temperature
        ctx.save_for_backward(left_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (left_gradient,) = ctx.saved_tensors
        return gradient * left_gradient, None, None, None, None, None


_state_error: Callable[..., Tensor] = _StateError.apply
_attention_error: Callable[..., Tensor] = _AttentionError.apply
_relation_kl: Callable[..., Tensor] = _RelationKL.apply
_neighbour_kl: Callable[..., Tensor] = _NeighbourKL.apply


def _chunks(count: int, entries: int, device: torch.device) -> Iterator[slice]:
    """Parts of so many things, each with so many entries, as large as is fast."""
    most = CACHED_ENTRIES if device.type == "cpu" else CHUNK_ENTRIES
    step = max(1, most // entries)
    return (slice(first, first + step) for first in range(0, count, step))


def _relation(left: Tensor, right: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and probabilities (a, L, L) of the keys of each query, and the logarithm of its sum of exponents."""
    with torch.autocast(left.device.type, enabled=False):
        scores = torch.baddbmm(padding, left, right.transpose(1, 2), alpha=1 / math.sqrt(left.shape[-1]))
    shares = scores.softmax(-1)
    # the largest share is at least 1/L: its logarithm loses no digits
    return scores, shares, scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()


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
