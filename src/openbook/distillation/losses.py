"""The losses: pure functions of tensors, in float32 (float64 if the student's are), also under autocast.

Whatever comes from the teacher is a constant. Shapes that differ are refused: broadcasting would train toward a
plausible wrong target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openbook.distillation.closed_forms import MASKED, attention_error, neighbour_kl, product, relation_kl, state_error

Taps = tuple[Tensor, Tensor, Tensor]  # q, k, v of one layer, each (B, L, d)
Norm = Literal["token", "flat", "paddle"]


def gold_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) against class indices (B,). Raises ValueError for labels outside 0..C-1."""
    if student.dim() != 2 or labels.shape != student.shape[:1] or labels.is_floating_point():
        raise ValueError(f"logits {tuple(student.shape)} against {labels.dtype} labels {tuple(labels.shape)}")
    # cross_entropy leaves a label of -100 out without a word
    if not bool(((labels >= 0) & (labels < student.shape[1])).all()):
        raise ValueError(f"labels {labels.tolist()} for {student.shape[1]} classes")
    return F.cross_entropy(_precise(student), labels)


def gold_label_sets(student: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, C) against labels (B, C) of 0 or 1, mean over labels and texts.

    Raises ValueError for other shapes or labels.
    """
    if student.dim() != 2 or labels.shape != student.shape or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"logits {tuple(student.shape)} against {labels.dtype} labels {tuple(labels.shape)} of 0 and 1"
        )
    student = _precise(student)
    return F.binary_cross_entropy_with_logits(student, labels.to(student.dtype))


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


def soft_label_sets_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each label by itself, from softened logits t and s (B, C): mean over labels and texts.

    With p = sigmoid(t / T) and q = sigmoid(s / T), T² (p log(p / q) + (1 - p) log((1 - p) / (1 - q))), the form above
    for two classes a label. Raises ValueError for unequal shapes, NaN or T <= 0.
    """
    _refuse_cold(temperature)
    student, teacher = (side / temperature for side in _answers(student, teacher))
    sides = torch.stack([student, -student]), torch.stack([teacher, -teacher])  # that it applies, and that it does not
    kl = F.kl_div(F.logsigmoid(sides[0]), F.logsigmoid(sides[1]), reduction="sum", log_target=True)
    return temperature**2 * kl / student.numel()


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
    return state_error(student.flatten(0, 1), teacher.flatten(0, 1), padding, weight, bias)


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Raw scores QKᵀ/√d_head (B, h, L, L), before mask and softmax, of q and k (B, L, d)."""
    query, key = (split_heads(_precise(side), heads) for side in _equal(query, key))
    return product(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])


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
        return attention_error(own[0], own[1], aim[0], aim[1], real)


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
    kl = [relation_kl(own[left], own[right], aim[left], aim[right], real, rows) for left, right in pairs]
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
    return F.normalize(product(_precise(embedding), _precise(weight).T) + _precise(bias), dim=-1)


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
    return neighbour_kl(student, queries, columns, own, teacher_temperature, student_temperature) / len(student)


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


def contrastive_label_sets(
    vectors: Tensor, labels: Tensor, temperature: float, singletons: Literal["skip", "zero"] = "skip"
) -> Tensor:
    """Contrastive loss of unit vectors (N, d) with labels (N, C) of 0 or 1: positives share a label.

    The supervised contrastive loss with the Jaccard overlap |A & B| / |A | B| of two texts' labels in place of
    equality, so that with one label a text it is that loss. `singletons`, anchors that share no label with another
    text, leave the mean (`skip`) or count 0 in it (`zero`). Raises ValueError for unequal shapes, NaN or a temperature
    <= 0.
    """
    sets = _precise(labels)
    shared = product(sets, sets.T)
    either = sets.sum(dim=1)[:, None] + sets.sum(dim=1)[None, :] - shared
    overlap = (shared / either.clamp_min(1)).fill_diagonal_(0)
    total = overlap.sum(dim=1, keepdim=True)
    rows = _contrast(vectors, overlap / total.masked_fill(total == 0, 1), temperature)
    return rows.mean() if singletons == "zero" else rows.sum() / (total > 0).sum().clamp_min(1)


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
    similarities = (product(vectors, vectors.T) / temperature).gather(1, order)
    ends = torch.searchsorted(-farthest, -farthest, right=True) - 1  # equal distances count as a whole
    against = similarities.logcumsumexp(dim=1).gather(1, ends)
    return (against - similarities)[:, :-1].sum() / max(1, itself.numel() - len(vectors))


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, d) to (B, heads, L, d/heads). Raises ValueError if `heads` does not divide d."""
    batch, length, width = tensor.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    return tensor.view(batch, length, heads, width // heads).transpose(1, 2)


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
    similarities = product(vectors, vectors.T) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return -(weights * similarities.masked_fill(itself, MASKED).log_softmax(dim=1)).sum(dim=1)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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
