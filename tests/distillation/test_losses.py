"""Losses, against values worked out by hand, other formulae, and the properties they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openbook.distillation import closed_forms, losses
from openbook.distillation.losses import Norm, Taps

NORMS: tuple[Norm, ...] = ("token", "flat", "paddle")
PROPERTY = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31)


def tensor(values: object, *, learned: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learned)


def close(actual: Tensor, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach(), tensor(expected), rtol=0, atol=tolerance, check_dtype=False)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded_mask(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


# --- labels -----------------------------------------------------------------------------------------------------------

TEACHER_LOGITS, STUDENT_LOGITS = tensor([[0, math.log(3)]]), tensor([[math.log(2), 0]])


@pytest.mark.parametrize(
    ("temperature", "cross_entropy", "divergence", "slope"),
    [(1.0, 0.925325, 0.362990, 0.416667), (2.0, 0.754519, 0.097712, 0.109881)],
)
def test_soft_labels_as_worked_out(temperature: float, cross_entropy: float, divergence: float, slope: float) -> None:
    student = STUDENT_LOGITS.clone().requires_grad_()
    hard, soft = (
        loss(student, TEACHER_LOGITS, temperature) for loss in (losses.soft_cross_entropy, losses.soft_label_kl)
    )
    close(hard, cross_entropy)
    close(gradient(hard, student), [[slope, -slope]])
    close(soft, temperature**2 * divergence, 4e-6)
    close(gradient(soft, student), [[temperature**2 * slope, -(temperature**2) * slope]], 4e-6)


def test_soft_cross_entropy_of_a_batch_is_its_mean() -> None:
    teacher, student = tensor([[1, 0, -1], [0, 2, 0]]), tensor([[0, 0, 0], [1, 1, 0]])
    close(losses.soft_cross_entropy(student, teacher, 1.0), 1.033557)
    close(losses.soft_cross_entropy(student, teacher, 1.0, official=True), 0.344519)
    close(losses.soft_cross_entropy(STUDENT_LOGITS, TEACHER_LOGITS, 1.0, official=True), 0.462663)


def test_soft_labels_and_gold_labels_of_three_rows() -> None:
    student = tensor([[1, 0], [0, 2], [0.5, 0.5]], learned=True)
    teacher = tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    hard = losses.soft_cross_entropy(student, teacher, 1.0)
    slopes = [[-0.056314, 0.056314], [-0.026932, 0.026932], [-0.033333, 0.033333]]
    close(hard, 0.544446)
    close(gradient(hard, student), slopes)
    close(losses.soft_label_kl(student, teacher, 1.0), 0.044947)
    close(gradient(losses.soft_label_kl(student, teacher, 1.0), student), slopes)
    close(losses.soft_label_kl(student, teacher, 2.0), 0.069245)
    close(losses.gold_labels(student, torch.tensor([0, 1, 0])), 0.377779)


@PROPERTY
@given(SEEDS, st.floats(0.2, 5))
def test_soft_labels_are_least_at_the_teacher_and_their_gradient_sums_to_zero(seed: int, temperature: float) -> None:
    generator = seeded(seed)
    teacher, student = random(generator, 4, 3), random(generator, 4, 3).requires_grad_()
    probabilities = (teacher / temperature).softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    loss = losses.soft_cross_entropy(student, teacher, temperature)
    assert loss >= entropy
    close(losses.soft_cross_entropy(teacher + 7, teacher, temperature), entropy.item())
    slope = gradient(loss, student)
    close(slope.sum(-1), [0.0] * 4)
    torch.testing.assert_close(slope, ((student / temperature).softmax(-1) - probabilities).detach() / temperature / 4)


def test_a_squared_error_is_the_mean_over_all_entries() -> None:
    close(losses.squared_error(tensor([[1], [2.5], [3]]), tensor([[2], [2.5], [1]])), 5 / 3)
    close(losses.squared_error(tensor([[1, 2], [3, 4]]), tensor([[1, 0], [0, 4]])), 13 / 4)


# --- states and attention ---------------------------------------------------------------------------------------------

STATES, TARGETS = [[1, 0], [0, 2]], [[1, 1, 3], [0, 0, 1]]


def test_hidden_states_as_worked_out() -> None:
    weight = tensor([[1, 2, 3], [0, 1, 0]], learned=True)
    whole = losses.hidden_states(tensor([STATES]) @ weight, tensor([TARGETS]), padded_mask(2))
    close(whole, 1.0)
    close(gradient(whole, weight), [[0, 1 / 3, 0], [0, 4 / 3, -2 / 3]])
    padded = tensor([[*STATES, [1, 1]]])
    teacher, mask = tensor([[*TARGETS, [0, 0, 0]]]), torch.tensor([[1, 1, 0]])
    close(losses.hidden_states(padded @ weight, teacher, mask), 1.0)
    close(losses.hidden_states(padded @ weight, teacher, mask, official=True), 25 / 9)
    fitted = losses.hidden_states(padded, teacher, mask, weight=weight.T)
    close(fitted, 1.0)
    close(gradient(fitted, weight), [[0, 1 / 3, 0], [0, 4 / 3, -2 / 3]])
    close(losses.hidden_states(padded, teacher, mask, weight=weight.T, official=True), 25 / 9)


@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_projected_states_equal_the_plain_computation(
    seed: int, lengths: list[int], biased: bool, official: bool
) -> None:
    generator, mask = seeded(seed), padded_mask(*lengths)
    student, teacher = (random(generator, len(lengths), max(lengths), width).requires_grad_() for width in (2, 3))
    weight, bias = random(generator, 3, 2).requires_grad_(), random(generator, 3).requires_grad_()
    learned = (student, weight, bias) if biased else (student, weight)

    def plain(student: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        errors = (F.linear(student, weight, bias) - teacher.detach()).square()
        return errors.mean() if official else (errors * mask[..., None]).sum() / (3 * mask.sum())

    def fused(student: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return losses.hidden_states(student, teacher, mask, weight=weight, bias=bias, official=official)

    torch.testing.assert_close(fused(*learned), plain(*learned))
    for one, other in zip(
        torch.autograd.grad(fused(*learned), learned), torch.autograd.grad(plain(*learned), learned), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_sum_over_many_states_keeps_its_digits() -> None:
    states = random(seeded(6), 64, 32, 256).float()
    loss = losses.hidden_states(states, torch.zeros_like(states), torch.ones(64, 32).long())
    assert loss.item() == pytest.approx(states.double().square().mean().item(), rel=1e-6)


SCORES, AIMS = [[1, 2], [3, 4]], [[1, 0], [3, 1]]


def test_attention_as_worked_out() -> None:
    student = tensor([[SCORES]], learned=True)
    whole = losses.attention(student, tensor([[AIMS]]), padded_mask(2))
    close(whole, 3.25)
    close(gradient(whole, student), [[[[0, 1], [0, 1.5]]]])
    close(losses.attention(student, tensor([[AIMS]]), padded_mask(2), official=True), 3.25)


def test_padding_leaves_attention_alone_unless_official() -> None:
    student, teacher = tensor([[[[1, 2, 9], [3, 4, 9], [1, 1, 9]]]]), tensor([[[[1, 0, 5], [3, 1, 5], [0, 1, 5]]]])
    close(losses.attention(student, teacher, torch.tensor([[1, 1, 0]])), 3.25)
    close(losses.attention(student, teacher, torch.tensor([[1, 1, 0]]), official=True), 14 / 9)


def test_official_attention_also_drops_real_scores_of_minus_100() -> None:
    student, teacher = tensor([[[[-100, 2]] * 2]]), tensor([[[[3, -101]] * 2]])
    close(losses.attention(student, teacher, padded_mask(2), official=True), (9 + 4) / 2)


def taps_of(scores: object, heads: int = 1) -> tuple[Tensor, Tensor]:
    """q and k whose raw scores, at one head, are these."""
    raw = tensor(scores)
    return math.sqrt(raw.shape[-1]) * raw, torch.eye(raw.shape[-1], dtype=torch.float64).expand(raw.shape)


def test_attention_of_taps_as_worked_out() -> None:
    (query, key), teacher = taps_of([SCORES]), taps_of([AIMS])
    query.requires_grad_()
    whole = losses.attention_of_taps((query, key), teacher, padded_mask(2), 1)
    close(whole, 3.25)
    close(gradient(whole, query) * math.sqrt(2), [[[0, 1], [0, 1.5]]])
    student, teacher = taps_of([[[1, 2, 9], [3, 4, 9], [1, 1, 9]]]), taps_of([[[1, 0, 5], [3, 1, 5], [0, 1, 5]]])
    close(losses.attention_of_taps(student, teacher, torch.tensor([[1, 1, 0]]), 1), 3.25)
    close(losses.attention_of_taps(student, teacher, torch.tensor([[1, 1, 0]]), 1, official=True), 14 / 9)
    student, teacher = taps_of([SCORES, [[5, 0], [0, 0]]]), taps_of([AIMS, [[2, 1], [1, 1]]])
    close(losses.attention_of_taps(student, teacher, padded_mask(2, 1), 1), 4.4)


@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.booleans())
def test_attention_of_taps_equals_that_of_the_scores(seed: int, lengths: list[int], heads: int, official: bool) -> None:
    generator, mask = seeded(seed), padded_mask(*lengths)
    teacher = random_taps(generator, len(lengths), max(lengths), 12)[:2]
    query, key = (part.requires_grad_() for part in random_taps(generator, len(lengths), max(lengths), 4)[:2])

    def fused(query: Tensor, key: Tensor) -> Tensor:
        return losses.attention_of_taps((query, key), teacher, mask, heads, official=official)

    def plain(query: Tensor, key: Tensor) -> Tensor:
        scores, aims = (losses.attention_scores(*side, heads) for side in ((query, key), teacher))
        return losses.attention(scores, aims, mask, official=official)

    slopes, expected = (torch.autograd.grad(loss(query, key), (query, key)) for loss in (fused, plain))
    torch.testing.assert_close(fused(query, key), plain(query, key))
    torch.testing.assert_close(slopes, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * fused(query, key), (query, key)), tuple(3 * s for s in expected))


def test_a_gradient_can_be_taken_twice() -> None:
    generator = seeded(9)
    states = random(generator, 2, 3, 4).requires_grad_()
    weight = random(generator, 4, 4)
    for loss in (
        losses.hidden_states(states, 2 * states, padded_mask(3, 2), weight=weight),
        losses.attention_of_taps((states, states), (weight[None, :3].expand(2, 3, 4),) * 2, padded_mask(3, 2), 2),
    ):
        assert torch.equal(gradient(loss, states), gradient(loss, states))


def test_sequences_weigh_by_the_square_of_their_length_in_attention() -> None:
    student, teacher = tensor([[SCORES], [[[5, 0], [0, 0]]]]), tensor([[AIMS], [[[2, 1], [1, 1]]]])
    close(losses.attention(student, teacher, padded_mask(2, 1)), 4.4)
    twice = [side.expand(2, 3, 2, 2) for side in (student, teacher)]
    close(losses.attention(twice[0], twice[1], padded_mask(2, 1)), 4.4)


def test_attention_scores_are_scaled_by_the_heads_own_width() -> None:
    generator = seeded(3)
    query, key = random(generator, 2, 5, 12), random(generator, 2, 5, 12)
    scores = losses.attention_scores(query, key, 3)
    assert scores.shape == (2, 3, 5, 5)
    for sequence, head in product(range(2), range(3)):
        width = slice(4 * head, 4 * head + 4)
        expected = query[sequence, :, width] @ key[sequence, :, width].T / 2
        torch.testing.assert_close(scores[sequence, head], expected)


@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 3))
def test_layers_ignore_padding_and_split_by_their_real_entries(seed: int, lengths: list[int], extra: int) -> None:
    generator, size, longest = seeded(seed), len(lengths), max(lengths)
    mask = padded_mask(*lengths)
    states = [random(generator, size, longest, 3) for _ in range(2)]
    scores = [random(generator, size, 2, longest, longest) for _ in range(2)]
    wide_mask = F.pad(mask, (0, extra))
    wide_states = [F.pad(side, (0, 0, 0, extra), value=float(fill)) for side, fill in zip(states, (7, -9), strict=True)]
    wide_scores = [
        F.pad(side, (0, extra, 0, extra), value=float(fill)) for side, fill in zip(scores, (7, -9), strict=True)
    ]
    counts = tensor(lengths)

    whole = losses.hidden_states(states[0], states[1], mask)
    torch.testing.assert_close(losses.hidden_states(wide_states[0], wide_states[1], wide_mask), whole)
    alone = [losses.hidden_states(states[0][[i]], states[1][[i]], mask[[i]]) for i in range(size)]
    torch.testing.assert_close(whole, torch.stack(alone) @ counts / counts.sum())

    whole = losses.attention(scores[0], scores[1], mask)
    torch.testing.assert_close(losses.attention(wide_scores[0], wide_scores[1], wide_mask), whole)
    alone = [losses.attention(scores[0][[i]], scores[1][[i]], mask[[i]]) for i in range(size)]
    torch.testing.assert_close(whole, torch.stack(alone) @ counts**2 / (counts**2).sum())


def test_padding_changes_the_official_forms() -> None:
    ones, zeros, mask = torch.ones(1, 2, 2), torch.zeros(1, 2, 2), padded_mask(2)
    wide, wide_mask = F.pad(ones, (0, 0, 0, 2)), F.pad(mask, (0, 2))
    close(losses.hidden_states(ones, zeros, mask, official=True), 1.0)
    close(losses.hidden_states(wide, torch.zeros(1, 4, 2), wide_mask, official=True), 0.5)
    square = F.pad(ones, (0, 2, 0, 2))[None]
    assert losses.attention(square, torch.zeros(1, 1, 4, 4), wide_mask, official=True) == 0.25


# --- relations --------------------------------------------------------------------------------------------------------


def same(values: object, *, learned: bool = False) -> tuple[Tensor, Taps]:
    """One tensor as q, k and v."""
    one = tensor(values, learned=learned)
    return one, (one, one, one)


def one_relation(student: Taps, teacher: Taps, mask: Tensor, heads: int = 1, norm: Norm = "token") -> Tensor:
    return losses.relations(student, teacher, mask, heads, norm=norm, pairs=[(0, 0)])


def plain_relations(student: Taps, teacher: Taps, mask: Tensor, heads: int, norm: Norm) -> float:
    """The equations once more, one sequence, head and query at a time."""
    total = 0.0
    lengths = mask.sum(1).tolist()
    for side in range(3):
        for b, a in product(range(len(mask)), range(heads)):
            maps = []
            for taps in (teacher, student):
                part = taps[side][b].detach().chunk(heads, dim=-1)[a]
                maps.append((part @ part.T / part.shape[-1] ** 0.5)[:, : lengths[b]].softmax(-1))
            rows = (maps[0] * (maps[0] / maps[1]).log()).sum(-1)
            real = rows[: lengths[b]].sum().item()
            if norm == "token":
                total += real / heads / lengths[b] / len(mask)
            elif norm == "flat":
                total += real / heads / sum(lengths)
            else:
                total += rows.sum().item() / heads / mask.numel()
    return total


def random_taps(generator: torch.Generator, batch: int, length: int, width: int) -> Taps:
    query, key, value = (random(generator, batch, length, width) for _ in range(3))
    return query, key, value


@pytest.mark.parametrize("norm", NORMS)
def test_relations_as_worked_out(norm: Norm) -> None:
    _, teacher = same([[[1], [0]]])
    student, taps = same([[[0], [0]]], learned=True)
    close(one_relation(taps, teacher, padded_mask(2), norm=norm), 0.055472)
    whole = losses.relations(taps, teacher, padded_mask(2), 1, norm=norm)
    close(whole, 0.166416)
    assert torch.equal(gradient(whole, student), torch.zeros(1, 2, 1, dtype=torch.float64))
    student, taps = same([[[0.5], [-0.5]]], learned=True)
    loss = one_relation(taps, teacher, padded_mask(2), norm=norm)
    close(loss, 0.028637)
    close(gradient(loss, student), [[[-0.050835], [-0.064695]]])


def test_each_side_is_scaled_by_its_own_width() -> None:
    _, teacher = same([[[2, 0, 0, 0], [0, 2, 0, 0]]])
    close(one_relation(same([[[1, 1, 1, 1], [1, -1, 1, -1]]])[1], teacher, padded_mask(2)), 0.0)
    close(one_relation(same([[[2**0.5, 0], [0, 2**0.5]]])[1], teacher, padded_mask(2)), 0.020866)


@pytest.mark.parametrize(
    ("norm", "padded", "batch"),
    [("token", 0.055472, 0.048283), ("flat", 0.055472, 0.046846), ("paddle", 0.204409, 0.122752)],
)
def test_relations_of_padded_sequences(norm: Norm, padded: float, batch: float) -> None:
    teacher, student = [[[1], [0], [3]], [[1], [0], [0]]], [[[0], [0], [-2]], [[0], [0], [0]]]
    mask = padded_mask(2, 3)
    close(one_relation(same(student[:1])[1], same(teacher[:1])[1], mask[:1], norm=norm), padded)
    close(one_relation(same(student[1:])[1], same(teacher[1:])[1], mask[1:], norm=norm), 0.041095)
    close(one_relation(same(student)[1], same(teacher)[1], mask, norm=norm), batch)


def test_heads_are_regrouped_across_the_models_own() -> None:
    native = tensor([[[100 * h + 10 * x + i for i in range(2)] for x in range(2)] for h in range(2)])
    joined = native.transpose(0, 1).reshape(1, 2, 4)
    close(losses.split_heads(joined, 4)[0, :, :, 0], [[0, 10], [1, 11], [100, 110], [101, 111]])
    close(losses.split_heads(joined, 1)[0, 0], [[0, 1, 100, 101], [10, 11, 110, 111]])


@pytest.mark.parametrize(("heads", "misread"), [(4, 1.750792), (2, 1.574825)])
def test_the_models_own_heads_do_not_show_in_the_loss(heads: int, misread: float) -> None:
    """MITKD specification, F7: the same rows kept as two heads of two and as four heads of one."""
    rows = tensor([[1, 2, 3, 4], [0, 1, 0, -1], [2, 0, 1, 1]])
    native = [rows.view(3, own, 4 // own).transpose(0, 1) for own in (2, 4)]  # each (H, L, d_h)
    teacher, student = (same(one.transpose(0, 1).reshape(1, 3, 4).tolist())[1] for one in native)
    close(one_relation(student, teacher, padded_mask(3), heads), 0)
    untransposed = [one.reshape(heads, 3, 4 // heads).transpose(0, 1).reshape(1, 3, 4) for one in native]
    teacher, student = (same(one.tolist())[1] for one in untransposed)
    close(one_relation(student, teacher, padded_mask(3), heads), misread)


def test_products_of_tokens_add_up_to_the_same_over_any_number_of_heads() -> None:
    taps = random(seeded(6), 2, 5, 12)
    for heads in (1, 2, 3, 4, 6, 12):
        split = losses.split_heads(taps, heads)  # (B, A, L, d/A)
        close((split @ split.transpose(2, 3)).sum(1), (taps @ taps.transpose(1, 2)).tolist(), 1e-10)


def test_relations_among_the_samples_of_a_batch() -> None:
    """MITKD specification, F20: the last token of the second text is padding."""
    teacher, student = (
        torch.tensor(rows, dtype=torch.float64)[..., None] for rows in (((1, 1), (2, 7)), ((0, 2), (1, -3)))
    )
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = losses.sample_relations((student,) * 3, (teacher,) * 3, mask, 1, pairs=[(0, 0)])
    close(loss, 0.059358)
    close(losses.sample_relations((student,) * 3, (teacher,) * 3, mask, 1, pairs=[(0, 0), (1, 1)]), 2 * 0.0593583)


def test_a_mixed_pair_of_relations() -> None:
    query, key = tensor([[[1], [1]]], learned=True), tensor([[[1], [0]]], learned=True)
    teacher = (tensor([[[1], [0]]]), tensor([[[0], [2]]]), tensor([[[5], [5]]]))
    loss = losses.relations((query, key, key), teacher, padded_mask(2), 1, pairs=[(0, 1)])
    close(loss, 0.474420)
    close(gradient(loss, query), [[[0.305928], [0.115529]]])
    close(gradient(loss, key), [[[0.421457], [-0.421457]]])


@pytest.mark.parametrize("norm", NORMS)
def test_relations_equal_the_plain_computation_and_their_gradient_its_slope(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, mask = seeded(1), padded_mask(4, 2, 1)
    teacher, student = random_taps(generator, 3, 4, 12), random_taps(generator, 3, 4, 6)
    for part in student:
        part.requires_grad_()
    expected = plain_relations(student, teacher, mask, 3, norm)
    whole = losses.relations(student, teacher, mask, 3, norm=norm)
    close(whole, expected, 1e-10)
    monkeypatch.setattr(closed_forms, "CHUNK_ENTRIES", 2 * 4 * 4)  # two of nine maps at a time
    chunked = losses.relations(student, teacher, mask, 3, norm=norm)
    close(chunked, expected, 1e-10)
    for part in student:
        torch.testing.assert_close(gradient(chunked, part), gradient(whole, part))

    def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (2, 0)]
        return 3 * losses.relations((query, key, value), teacher, mask, 3, norm=norm, pairs=pairs)

    assert torch.autograd.gradcheck(mixed, student)


@PROPERTY
@given(SEEDS, st.sampled_from(NORMS), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_relations_are_no_less_than_zero_and_keep_their_symmetries(seed: int, norm: Norm, lengths: list[int]) -> None:
    generator, mask = seeded(seed), padded_mask(*lengths)
    teacher = random_taps(generator, len(lengths), max(lengths), 8)
    student = random_taps(generator, len(lengths), max(lengths), 4)

    def loss(student: Taps, teacher: Taps) -> float:
        return losses.relations(student, teacher, mask, 2, norm=norm).item()

    whole = loss(student, teacher)
    assert whole >= 0
    assert loss(teacher, teacher) == pytest.approx(0, abs=1e-12)
    turn = torch.linalg.qr(random(generator, 2, 2)).Q
    turned = tuple((part.reshape(*part.shape[:2], 2, 2) @ turn).flatten(-2) for part in student)
    assert loss((turned[0], turned[1], turned[2]), teacher) == pytest.approx(whole)
    assert loss((-student[0], -student[1], -student[2]), teacher) == pytest.approx(whole)


@pytest.mark.parametrize("norm", NORMS)
def test_relations_cost_nothing_only_where_all_of_them_agree(norm: Norm) -> None:
    """One real token of one head of one projection tells; what is padding does not, where its rows are left out."""
    mask, teacher = padded_mask(4, 2), random_taps(seeded(7), 2, 4, 6)
    told = {}
    for side, head, (text, token) in product(range(3), range(3), ((0, 0), (0, 3), (1, 1), (1, 3))):
        student = [tap.clone() for tap in teacher]
        student[side][text, token, 2 * head : 2 * head + 2] += tensor([1.0, 0.5])
        loss = losses.relations((student[0], student[1], student[2]), teacher, mask, 3, norm=norm).item()
        told[side, head, text, token] = loss
    assert len(told) == 36
    padding = {place: loss for place, loss in told.items() if place[2:] == (1, 3)}
    assert min(loss for place, loss in told.items() if place not in padding) > 1e-4
    assert all((loss > 1e-4) == (norm == "paddle") for loss in padding.values())


def test_tokens_may_change_places_on_both_sides_only() -> None:
    generator, mask, order = seeded(2), padded_mask(3), torch.tensor([2, 0, 1])
    teacher, student = random_taps(generator, 1, 3, 4), random_taps(generator, 1, 3, 4)
    moved = [(q[:, order], k[:, order], v[:, order]) for q, k, v in (student, teacher)]
    whole = losses.relations(student, teacher, mask, 2)
    torch.testing.assert_close(losses.relations(moved[0], moved[1], mask, 2), whole)
    assert (losses.relations(moved[0], teacher, mask, 2) - whole).abs() > 1e-3


@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 4), min_size=2, max_size=3), st.integers(0, 3))
def test_relations_ignore_padding_and_split_by_their_norm(seed: int, lengths: list[int], extra: int) -> None:
    generator, mask, size = seeded(seed), padded_mask(*lengths), len(lengths)
    teacher, student = random_taps(generator, size, max(lengths), 4), random_taps(generator, size, max(lengths), 4)

    def changed(taps: Taps, fill: float) -> Taps:
        """Other content in the padding, and more of it."""
        query, key, value = (F.pad(t.where(mask[:, :, None] > 0, fill), (0, 0, 0, extra), value=fill) for t in taps)
        return query, key, value

    def only(taps: Taps, row: int) -> Taps:
        return taps[0][[row]], taps[1][[row]], taps[2][[row]]

    weights: dict[Norm, Tensor] = {"token": torch.ones(size).double() / size, "flat": tensor(lengths) / sum(lengths)}
    for norm, weight in weights.items():
        whole = losses.relations(student, teacher, mask, 2, norm=norm)
        wide = losses.relations(changed(student, 3.0), changed(teacher, -2.0), F.pad(mask, (0, extra)), 2, norm=norm)
        torch.testing.assert_close(wide, whole)
        alone = [losses.relations(only(student, i), only(teacher, i), mask[[i]], 2, norm=norm) for i in range(size)]
        torch.testing.assert_close(torch.stack(alone) @ weight, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relations_stay_finite_in_half_precision_and_for_one_token(dtype: torch.dtype) -> None:
    generator, mask = seeded(4), padded_mask(1, 3)
    query, key, value = (200 * random(generator, 2, 3, 4).to(dtype) for _ in range(3))
    student = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    loss = losses.relations(student, random_taps(generator, 2, 3, 8), mask, 2)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert all(part.grad is not None and part.grad.isfinite().all() for part in student)
    assert losses.relations(student, student, mask.bool(), 2) == 0


# --- neighbours and contrast ------------------------------------------------------------------------------------------

KEYS = tensor([(1, 0), (0, 1), (0.6, 0.8)])
QUERIES = tensor([(0.8, 0.6), (0, 1), (1, 0)])
BANK = torch.cat([KEYS, tensor([(-1, 0)])])
ITSELF = torch.eye(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("student", "keys", "student_temperature", "own", "expected"),
    [
        (QUERIES, KEYS, 0.5, None, 0.207552),
        (QUERIES, KEYS, 0.5, ITSELF[:, :3], 0.224322),
        (QUERIES, KEYS, 0.25, None, 0.499724),
        (KEYS, KEYS, 0.25, None, 0.091259),
        (KEYS, KEYS, 0.5, None, 0.0),
        (QUERIES, BANK, 0.5, None, 0.204857),
        (QUERIES, BANK, 0.5, ITSELF, 0.220301),
    ],
)
def test_neighbour_relations_as_worked_out(
    student: Tensor, keys: Tensor, student_temperature: float, own: Tensor | None, expected: float
) -> None:
    close(losses.neighbour_relations(student, KEYS, keys, 0.5, student_temperature, own), expected)


def test_the_gradient_of_neighbour_relations_shrinks_with_the_length_of_the_vector() -> None:
    student = tensor([(1.6, 1.2), (0, 3), (0.5, 0)], learned=True)
    loss = losses.neighbour_relations(student, KEYS, KEYS, 0.5, 0.5)
    close(loss, 0.207552)
    close(gradient(loss, student), [(-0.067305, 0.089740), (0, 0), (0, -0.508560)])


def test_a_student_equal_to_the_teacher_gets_no_gradient_and_a_lone_example_costs_nothing() -> None:
    student = KEYS.clone().requires_grad_()
    close(gradient(losses.neighbour_relations(student, KEYS, KEYS, 0.5, 0.5), student), [[0, 0]] * 3)
    lone = tensor([(3, 1)], learned=True)
    for own in (None, torch.ones(1, 1, dtype=torch.bool)):
        loss = losses.neighbour_relations(lone, KEYS[:1], KEYS[:1], 0.5, 0.5, own)
        assert loss == 0
        assert torch.equal(gradient(loss, lone), torch.zeros(1, 2, dtype=torch.float64))


@PROPERTY
@given(SEEDS, st.integers(1, 5), st.integers(1, 6))
def test_neighbour_relations_keep_their_symmetries(seed: int, rows: int, entries: int) -> None:
    generator = seeded(seed)
    student = random(generator, rows, 3)
    queries, keys = (F.normalize(random(generator, count, 3), dim=1) for count in (rows, entries))
    turn = torch.linalg.qr(random(generator, 3, 3)).Q
    order, places = torch.randperm(rows, generator=generator), torch.randperm(entries, generator=generator)
    whole = losses.neighbour_relations(student, queries, keys, 0.3, 0.2)
    assert whole >= -1e-12
    for other in (
        losses.neighbour_relations(student @ turn, queries @ turn, keys @ turn, 0.3, 0.2),
        losses.neighbour_relations(student[order], queries[order], keys[places], 0.3, 0.2),
        losses.neighbour_relations(
            student * torch.rand(rows, 1, generator=generator).add(0.1), queries, keys, 0.3, 0.2
        ),
    ):
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_neighbour_relations_in_parts_equal_the_plain_computation_and_keep_no_map(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, rows, entries = seeded(4), 5, 23
    student = random(generator, rows, 3).requires_grad_()
    queries, keys = (F.normalize(random(generator, count, 3), dim=1) for count in (rows, entries))
    own = torch.arange(entries)[None] == torch.arange(rows)[:, None] if masked else None
    logits = [F.normalize(student, dim=1) @ keys.T / 0.2, queries @ keys.T / 0.3]
    if own is not None:
        logits = [side.masked_fill(own, -torch.inf) for side in logits]
    log_student, log_teacher = (side.log_softmax(1).nan_to_num(neginf=-99) for side in logits)
    plain = (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()
    monkeypatch.setattr(closed_forms, "KEYED_ENTRIES", 2 * entries)  # two queries at a time, then a last one
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(tuple(kept.shape)) or kept, lambda t: t):
        loss = losses.neighbour_relations(student, queries, keys, 0.3, 0.2, own)
    assert saved
    assert not [shape for shape in saved if entries in shape]
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient(loss, student), gradient(plain, student))


def test_keys_are_unit_vectors_of_the_projected_embedding() -> None:
    weight, bias = tensor([[1, 0, 1], [0, 2, 0]]), tensor([1, 0])
    close(losses.project_keys(tensor([[1, 2, 1], [-1, 0, 0]]), weight, bias), [[0.6, 0.8], [0, 0]])


VECTORS = torch.cat([KEYS, tensor([(0.8, 0.6)])])


@pytest.mark.parametrize(
    ("labels", "temperature", "skip", "zero"),
    [
        ([0, 1, 1, 0], 0.5, 0.870714, 0.870714),
        ([0, 1, 1, 0], 0.07, 1.221856, 1.221856),
        ([0, 1, 1, 2], 0.5, 0.870714, 0.435357),
        ([0, 1, 2, 3], 0.5, 0.0, 0.0),
        ([0, 0, 0], 0.5, 0.853399, 0.853399),
        ([0], 0.5, 0.0, 0.0),
    ],
)
def test_supervised_contrast_as_worked_out(labels: list[int], temperature: float, skip: float, zero: float) -> None:
    vectors = VECTORS[: len(labels)].clone().requires_grad_()
    loss = losses.supervised_contrastive(vectors, torch.tensor(labels), temperature)
    close(loss, skip)
    close(losses.supervised_contrastive(vectors, torch.tensor(labels), temperature, "zero"), zero)
    assert gradient(loss, vectors).isfinite().all()


def test_contrastive_regression_as_worked_out() -> None:
    targets = tensor([0, 2.5, 3, 5])
    close(losses.contrastive_regression(VECTORS, targets, 0.5), 1.187459)
    close(losses.contrastive_regression(VECTORS, 3 * targets, 0.5, sigma=3.0), 1.187459)
    close(losses.contrastive_regression(VECTORS[:1], targets[:1], 0.5), 0.0)
    far = losses.contrastive_regression(VECTORS.float(), 1000 * targets.float(), 0.5)
    assert far.isfinite()


def plain_rank_n_contrast(vectors: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The definition, pair by pair."""
    similarities, count = vectors @ vectors.T / temperature, len(vectors)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    terms = [
        torch.logsumexp(
            torch.stack(
                [
                    similarities[i, k]
                    for k in range(count)
                    if k != i and abs(targets[i] - targets[k]) >= abs(targets[i] - targets[j])
                ]
            ),
            0,
        )
        - similarities[i, j]
        for i, j in pairs
    ]
    return torch.stack(terms).mean()


def test_rank_n_contrast_as_worked_out() -> None:
    vectors, targets = VECTORS.clone().requires_grad_(), tensor([0, 2.5, 3, 5])
    loss = losses.rank_n_contrast(vectors, targets, 0.5)
    close(loss, 0.726004)
    close(gradient(loss, vectors), gradient(plain_rank_n_contrast(vectors, targets, 0.5), vectors).tolist())
    lone = losses.rank_n_contrast(vectors[:1], targets[:1], 0.5)
    close(lone, 0.0)
    assert gradient(lone, vectors).isfinite().all()


@PROPERTY
@given(SEEDS, st.lists(st.integers(0, 4), min_size=2, max_size=7))
def test_rank_n_contrast_counts_equal_distances_as_a_whole(seed: int, whole: list[int]) -> None:
    vectors, targets = F.normalize(random(seeded(seed), len(whole), 3), dim=1), tensor(whole)
    close(
        losses.rank_n_contrast(vectors, targets, 0.3), plain_rank_n_contrast(vectors, targets, 0.3).item()
    )  # equal targets tie often


# --- all of them ------------------------------------------------------------------------------------------------------

PAIR_MASK, TURN = padded_mask(3, 2), torch.eye(4).flip(0)
Loss = Callable[[Tensor, Tensor], Tensor]
# every loss as a function of a student's and a teacher's tensor, and the shape of both
LOSSES: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "squared_error": (losses.squared_error, (3, 2)),
    "soft_cross_entropy": (lambda s, t: losses.soft_cross_entropy(s, t, 2.0), (3, 2)),
    "soft_label_kl": (lambda s, t: losses.soft_label_kl(s, t, 2.0), (3, 2)),
    "hidden_states": (lambda s, t: losses.hidden_states(s, t, PAIR_MASK), (2, 3, 4)),
    "projected states": (lambda s, t: losses.hidden_states(s, t, PAIR_MASK, weight=TURN.to(s.dtype)), (2, 3, 4)),
    "attention": (lambda s, t: losses.attention(s, t, PAIR_MASK), (2, 2, 3, 3)),
    "attention_of_taps": (lambda s, t: losses.attention_of_taps((s, s), (t, t), PAIR_MASK, 2), (2, 3, 4)),
    "relations": (lambda s, t: losses.relations((s, s, s), (t, t, t), PAIR_MASK, 2), (2, 3, 4)),
    "neighbour_relations": (lambda s, t: losses.neighbour_relations(s, t, t, 0.5, 0.5), (3, 2)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_gets_no_gradient(name: str) -> None:
    loss, shape = LOSSES[name]
    student, teacher = (random(seeded(seed), *shape).requires_grad_() for seed in (0, 1))
    before = teacher.detach().clone()
    torch.autograd.backward(loss(student, teacher))
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("name", LOSSES)
def test_a_shape_that_would_broadcast_is_refused(name: str) -> None:
    loss, shape = LOSSES[name]
    student, teacher = torch.zeros(shape), torch.zeros(1, *shape[1:])
    for one, other in ((student, teacher), (teacher, student)):
        with pytest.raises(ValueError, match=r"against|must be equal"):
            loss(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name != "projected states"]
)  # a layer has its own precision
def test_outputs_in_half_precision_change_little(name: str, dtype: torch.dtype) -> None:
    loss, shape = LOSSES[name]
    student, teacher = (0.3 * random(seeded(seed), *shape) for seed in (0, 1))
    half = loss(student.to(dtype), teacher.to(dtype))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(student, teacher).item(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_worked_out_values_hold_in_half_precision(dtype: torch.dtype) -> None:
    long = tensor([(1.6, 1.2), (0, 3), (0.5, 0)]).to(dtype).requires_grad_()
    related = losses.neighbour_relations(long, KEYS, KEYS, 0.5, 0.5)
    close(related, 0.207552, 1e-3)
    close(gradient(related, long), [(-0.067305, 0.089740), (0, 0), (0, -0.508560)], 1e-3)
    teacher = tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log().to(dtype)
    close(losses.soft_cross_entropy(tensor([[1, 0], [0, 2], [0.5, 0.5]]).to(dtype), teacher, 1.0), 0.544446, 1e-3)


def test_states_are_projected_in_the_precision_of_training() -> None:
    """The products in bf16, differences and sums in float32."""
    generator, mask = seeded(8), padded_mask(5, 3)
    student, teacher, weight, bias = (
        random(generator, *shape).float() for shape in ((2, 5, 8), (2, 5, 6), (6, 8), (6,))
    )
    learned = [part.requires_grad_() for part in (student, weight, bias)]

    def told() -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = losses.hidden_states(student, teacher, mask, weight=weight, bias=bias)
        return loss, torch.autograd.grad(loss, learned)

    exact = told()
    with torch.autocast("cpu", torch.bfloat16):
        rough = told()
    assert rough[0].dtype == torch.float32
    assert not torch.equal(rough[0], exact[0])
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)


def test_autocast_does_not_lower_the_precision_of_a_loss() -> None:
    generator = seeded(5)
    student, teacher = (random(generator, 2, 3, 8).float() for _ in range(2))
    vectors, targets = F.normalize(student.flatten(0, 1), dim=1), torch.tensor([0.0, 1, 1, 2, 0, 2])

    def values() -> list[Tensor]:
        return [
            losses.relations((student,) * 3, (teacher,) * 3, PAIR_MASK, 2),
            losses.attention_scores(student, teacher, 2).sum(),
            losses.attention_of_taps((student, student), (teacher, teacher), PAIR_MASK, 2),
            losses.neighbour_relations(student[0], teacher[0], vectors, 0.1, 0.1),
            losses.supervised_contrastive(vectors, targets, 0.07),
            losses.contrastive_regression(vectors, targets, 0.07),
            losses.rank_n_contrast(vectors, targets, 0.07),
            losses.project_keys(student[0], teacher[0], torch.ones(3)).sum(),
        ]

    expected = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert values() == expected


@pytest.mark.parametrize("name", ["squared_error", "soft_cross_entropy", "soft_label_kl", "neighbour_relations"])
def test_nan_is_refused_on_either_side(name: str) -> None:
    loss, shape = LOSSES[name]
    good, bad = torch.ones(shape), torch.full(shape, torch.nan)
    for student, teacher in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="NaN"):
            loss(student, teacher)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    labels = torch.zeros(3, dtype=torch.long)
    calls: list[Callable[[], Tensor]] = [
        lambda: losses.soft_cross_entropy(KEYS, KEYS, temperature),
        lambda: losses.soft_label_kl(KEYS, KEYS, temperature),
        lambda: losses.neighbour_relations(KEYS, KEYS, KEYS, temperature, 1.0),
        lambda: losses.neighbour_relations(KEYS, KEYS, KEYS, 1.0, temperature),
        lambda: losses.supervised_contrastive(KEYS, labels, temperature),
        lambda: losses.contrastive_regression(KEYS, labels, temperature),
        lambda: losses.contrastive_regression(KEYS, labels, 1.0, sigma=temperature),
        lambda: losses.rank_n_contrast(KEYS, labels, temperature),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be above 0"):
            call()


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    taps, states, scores = same([[[1, 2], [3, 4]]])[1], torch.ones(1, 2, 4), torch.ones(1, 1, 2, 2)
    calls: dict[str, Callable[[], Tensor]] = {
        "0, 2] for 2 classes": lambda: losses.gold_labels(torch.ones(2, 2), torch.tensor([0, 2])),
        "-100] for 2 classes": lambda: losses.gold_labels(torch.ones(2, 2), torch.tensor([0, -100])),
        "float32 labels": lambda: losses.gold_labels(torch.ones(2, 2), torch.ones(2, 2)),
        "logits (1, 2)": lambda: losses.gold_labels(torch.ones(1, 2), torch.tensor([0, 1])),
        "mask (1, 3)": lambda: losses.hidden_states(states, states, padded_mask(3)),
        "(1, 2, 4) against (2, 2, 4)": lambda: losses.attention_of_taps(
            (states, states), (torch.ones(2, 2, 4),) * 2, padded_mask(2), 2
        ),
        "student (1, 2, 3) against": lambda: losses.hidden_states(
            states, states, padded_mask(2), weight=torch.ones(3, 4)
        ),
        "mask (2, 2)": lambda: losses.attention(scores, scores, padded_mask(2, 2)),
        "float32 mask": lambda: losses.relations(taps, taps, torch.zeros(1, 2), 1),
        "no real token": lambda: losses.relations(taps, taps, torch.zeros(1, 2).long(), 1),
        "3 heads do not divide the width 2": lambda: losses.relations(taps, taps, padded_mask(2), 3),
        "must be equal": lambda: losses.attention_scores(states, torch.ones(1, 1, 4), 2),
        "keys (3, 1)": lambda: losses.neighbour_relations(KEYS, KEYS, KEYS[:, :1], 1.0, 1.0),
        "own entries (3, 4)": lambda: losses.neighbour_relations(KEYS, KEYS, KEYS, 1.0, 1.0, ITSELF),
        "3, 2) with 4 labels": lambda: losses.supervised_contrastive(KEYS, torch.zeros(4), 1.0),
        "3, 2) with 1 labels": lambda: losses.contrastive_regression(KEYS, torch.zeros(1), 1.0),
        "NaN": lambda: losses.supervised_contrastive(KEYS * math.nan, torch.zeros(3), 1.0),
        "bias (1,)": lambda: losses.project_keys(KEYS, torch.ones(3, 2), torch.ones(1)),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError) as refusal:  # noqa: PT011  the message is looked at below
            call()
        assert message in str(refusal.value)


def test_gold_label_sets_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [-math.log(3), 0.0]])  # chances 1/2, 3/4; 1/4, 1/2
    labels = torch.tensor([[1, 0], [0, 1]])
    wanted = (math.log(2) + math.log(4) + math.log(4 / 3) + math.log(2)) / 4
    assert losses.gold_label_sets(logits, labels).item() == pytest.approx(wanted, rel=1e-6)


def test_the_kl_of_label_sets_by_hand() -> None:
    """Teacher 3/4, student 1/4 at T = 1: 3/4 ln 3 + 1/4 ln 1/3 = ln(3) / 2; equal chances cost nothing."""
    teacher, student = torch.tensor([[math.log(3), 1.5]]), torch.tensor([[-math.log(3), 1.5]])
    assert losses.soft_label_sets_kl(student, teacher, 1.0).item() == pytest.approx(math.log(3) / 4, rel=1e-6)
    softened = losses.soft_label_sets_kl(2 * student, 2 * teacher, 2.0)  # T² = 4 times the same
    assert softened.item() == pytest.approx(math.log(3), rel=1e-6)


def test_the_kl_of_a_label_is_that_of_two_classes() -> None:
    student, teacher = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    pairs = [torch.cat([side, torch.zeros_like(side)], dim=1) for side in (student, teacher)]
    torch.testing.assert_close(
        losses.soft_label_sets_kl(student, teacher, 3.0), losses.soft_label_kl(pairs[0], pairs[1], 3.0)
    )


def test_label_sets_learn_toward_the_teachers_chances() -> None:
    """At T = 1 the gradient is (q - p) / (B C), as that of the cross-entropy against p."""
    teacher = torch.randn(4, 3, dtype=torch.float64)
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    losses.soft_label_sets_kl(student, teacher, 1.0).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(student.grad, ((student.sigmoid() - teacher.sigmoid()) / 12).detach())


def test_contrast_weighs_positives_by_the_overlap_of_their_labels() -> None:
    """{a, b}, {a}, {a, b, c}, {} on the unit circle: overlaps 1/2, 2/3 and 1/3 among the first three."""
    vectors = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    shares = {0: {1: 3 / 7, 2: 4 / 7}, 1: {0: 3 / 5, 2: 2 / 5}, 2: {0: 2 / 3, 1: 1 / 3}}
    similarities = vectors @ vectors.T  # temperature 1
    rows = []
    for anchor, positives in shares.items():
        others = [one for one in range(4) if one != anchor]
        total = math.log(sum(math.exp(similarities[anchor, one]) for one in others))
        rows.append(-sum(share * (similarities[anchor, one].item() - total) for one, share in positives.items()))
    assert losses.contrastive_label_sets(vectors, labels, 1.0).item() == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert losses.contrastive_label_sets(vectors, labels, 1.0, "zero").item() == pytest.approx(sum(rows) / 4, rel=1e-5)


def test_with_one_label_a_text_it_is_the_supervised_contrastive_loss() -> None:
    vectors, classes = F.normalize(torch.randn(12, 5), dim=1), torch.randint(3, (12,))
    one_hot = F.one_hot(classes, 3)
    for temperature in (0.07, 1.0):
        wanted = losses.supervised_contrastive(vectors, classes, temperature)
        torch.testing.assert_close(losses.contrastive_label_sets(vectors, one_hot, temperature), wanted)


@pytest.mark.parametrize("labels", [[[0, 2]], [[1]], [[1, 0], [0, 1]]], ids=str)
def test_what_are_no_sets_of_labels_is_refused(labels: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="labels"):
        losses.gold_label_sets(torch.zeros(1, 2), torch.tensor(labels))
