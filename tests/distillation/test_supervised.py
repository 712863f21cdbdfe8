"""Losses against labels: the fixtures of the method's specification, and one scale for every kind of task."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openbook.config import Kind, UsageError
from openbook.distillation.supervised import (
    Standard,
    classification,
    loss_of_kind,
    multiple_choice,
    regression,
    span_extraction,
    token_classification,
)

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31)
CHOOSING: tuple[Kind, ...] = ("classification", "multiple_choice", "span_extraction", "token_classification")
KINDS: tuple[Kind, ...] = (*CHOOSING, "regression")


def tensor(values: object, *, learned: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learned)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.detach(), tensor(expected), rtol=0, atol=1e-6)


# --- fixtures of the specification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 20, 384])
def test_a_guess_without_knowledge_costs_1(classes: int) -> None:
    close(classification(tensor([[0.7] * classes] * 2), torch.tensor([0, classes - 1])), 1)


@pytest.mark.parametrize(
    ("logits", "label", "plain", "scaled"),
    [([2, 0], 0, 0.126928, 0.183118), ([1, 0, 0], 2, 1.551445, 1.412186)],
)
def test_classes_as_worked_out(logits: list[float], label: int, plain: float, scaled: float) -> None:
    close(classification(tensor([logits]), torch.tensor([label])), scaled)
    close(classification(tensor([logits]), torch.tensor([label]), scaled=False), plain)


SPAN = tensor([[[0.5, 0], [3, 4], [1, 1], [2, 0], [0, 1], [-1, 2]]])  # (1, 6, 2)


@pytest.mark.parametrize(("null_allowed", "plain", "scaled"), [(True, 0.918081, 0.662255), (False, 0.788726, 0.717929)])
def test_a_span_as_worked_out(null_allowed: bool, plain: float, scaled: float) -> None:
    labels = torch.tensor([[3, 4, 3, 5]])
    close(span_extraction(SPAN, labels, null_allowed=null_allowed), scaled)
    close(span_extraction(SPAN, labels, null_allowed=null_allowed, scaled=False), plain)


OPTIONS = torch.tensor([[0, 1], [0, 0], [0, 0], [1, 0], [1, 1]])  # three options, the first right; two, the second


def test_choices_as_worked_out() -> None:
    scores = tensor([[1], [0], [-1], [2], [1]])
    close(multiple_choice(scores, OPTIONS), 1.132828)
    close(multiple_choice(scores, OPTIONS, scaled=False), (0.407606 + 1.313262) / 2)
    close(multiple_choice(scores[:3], OPTIONS[:3]), 0.371019)


def test_tags_as_worked_out() -> None:
    logits = tensor([[[2, 0, 0], [9, 9, 0], [0, 1, 0], [5, 0, 5]]])
    labels = torch.tensor([[0, -100, 1, -100]])
    close(token_classification(logits, labels), 0.359995)
    close(token_classification(logits, labels, scaled=False), 0.395495)
    logits = torch.cat([logits, tensor([[[0, 0, 0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]])])
    labels = torch.tensor([[0, -100, 1, -100], [2, -100, -100, -100]])
    close(token_classification(logits, labels), 0.573330)
    close(token_classification(logits, labels, scaled=False), 0.629867)


def test_targets_as_worked_out() -> None:
    targets = tensor([1, 2, 4])
    standard = Standard.of(targets.numpy())
    close(tensor([standard.mean, standard.deviation]), [2.333333, 1.247219])
    close(standard.standardised(targets), [-1.069045, -0.267261, 1.336306])
    close(regression(tensor([[0], [0], [0]]), targets, standard=standard), 1)
    predictions = tensor([[1.5], [2], [3]])
    close(regression(standard.standardised(predictions), targets, standard=standard), 0.267857)
    close(regression(predictions, targets, standard=Standard()), 0.416667)
    close(standard.restored(standard.standardised(predictions)), [[1.5], [2], [3]])


def test_an_update_of_two_tasks_as_worked_out() -> None:
    """The gradient of an update is the mean over its micro-batches; a task that is not drawn has none at all."""
    shared = nn.Parameter(tensor(0.5))
    heads = nn.ParameterDict({"a": tensor([1, 0]), "b": tensor([1, 2, 0]), "c": tensor([3, 1])})
    untouched = heads["c"].detach().clone()
    optimizer = torch.optim.SGD([shared, *heads.values()], lr=0.1)
    slopes = []
    for name, x, label, cost in (("a", 1, 0, 0.683949), ("b", -1, 1, 1.529447)):
        loss = classification((shared * x * heads[name])[None], torch.tensor([label]))
        close(loss, cost)
        slopes.append(torch.autograd.grad(loss, shared, retain_graph=True)[0])
        (loss / 2).backward()
    close(torch.stack(slopes), [-0.544676, 1.201658])
    assert shared.grad is not None
    close(shared.grad, 0.328491)
    close(heads["a"].grad, [-0.136169, 0.136169])
    close(heads["b"].grad, [-0.069905, 0.185160, -0.115255])
    assert heads["c"].grad is None
    close(nn.utils.clip_grad_norm_([shared, *heads.values()], 1.0), 0.444348)
    optimizer.step()
    close(shared, 0.467151)
    assert torch.equal(heads["c"], untouched)


# --- properties -------------------------------------------------------------------------------------------------------


def some(kind: Kind, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of five examples; one question in five has a single option, two rows in five no tag."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    if kind == "classification":
        return random(5, 4), torch.tensor([integer(0, 4) for _ in range(5)])
    if kind == "regression":
        return random(5, 1), random(5)
    if kind == "multiple_choice":
        counts = [integer(2, 6) for _ in range(4)] + [1]
        rights = [integer(0, count) for count in counts]
        rows = [[q, int(option == rights[q])] for q, count in enumerate(counts) for option in range(count)]
        return random(len(rows), 1), torch.tensor(rows)
    if kind == "token_classification":
        labels = torch.tensor([[integer(0, 3) for _ in range(7)] for _ in range(5)])
        return random(5, 7, 3), torch.where(random(5, 7) > 0, labels, -100).index_fill_(0, torch.tensor([1, 3]), -100)
    starts = [integer(2, 5) for _ in range(5)]
    spans = [[start, integer(start, 7), integer(1, start + 1), 6] for start in starts]
    return random(5, 7, 2), torch.tensor(spans)


def regrouped(kind: Kind, logits: Tensor, labels: Tensor, order: list[int]) -> tuple[Tensor, Tensor]:
    """The same examples in another order."""
    if kind != "multiple_choice":
        return logits[order], labels[order]
    rows = torch.cat([torch.nonzero(labels[:, 0] == question)[:, 0].flip(0) for question in order])
    numbers = torch.tensor(order).argsort()[labels[rows, 0]]
    return logits[rows], torch.stack([numbers, labels[rows, 1]], dim=1)


@pytest.mark.parametrize("kind", CHOOSING)
@PROPERTY
@given(seed=SEEDS)
def test_uniform_logits_cost_exactly_1(kind: Kind, seed: int) -> None:
    logits, labels = some(kind, seed)
    close(loss_of_kind(kind)(torch.full_like(logits, 3.5), labels), 1)
    if kind == "span_extraction":
        labels[0, :2] = 0
        close(loss_of_kind(kind, null_allowed=True)(torch.zeros_like(logits), labels), 1)


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(seed=SEEDS, order=st.permutations(range(5)))
def test_the_order_of_examples_does_not_matter(kind: Kind, seed: int, order: list[int]) -> None:
    logits, labels = some(kind, seed)
    for scaled in (True, False):
        loss_of = loss_of_kind(kind, scaled=scaled)
        torch.testing.assert_close(loss_of(*regrouped(kind, logits, labels, order)), loss_of(logits, labels))


@pytest.mark.parametrize("kind", ["span_extraction", "token_classification"])
@PROPERTY
@given(seed=SEEDS, more=st.integers(1, 4))
def test_padding_does_not_matter(kind: Kind, seed: int, more: int) -> None:
    logits, labels = some(kind, seed)
    longer = torch.cat([logits, torch.full((5, more, logits.shape[2]), 50.0)], dim=1)
    pieces = nn.functional.pad(labels, (0, more), value=-100) if kind == "token_classification" else labels
    assert torch.equal(loss_of_kind(kind)(longer, pieces), loss_of_kind(kind)(logits, labels))


@pytest.mark.parametrize("kind", CHOOSING)
def test_the_gradient_is_that_of_the_loss(kind: Kind) -> None:
    logits, labels = some(kind, 3)
    loss_of = loss_of_kind(kind)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_left_at_the_door(kind: Kind, dtype: torch.dtype) -> None:
    logits, labels = some(kind, 3)
    low = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of_kind(kind)(low, labels)
        assert loss_of_kind(kind)(logits, labels).dtype == torch.float64
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of_kind(kind)(low.detach().float(), labels))
    assert low.grad is not None
    assert low.grad.isfinite().all()


def test_what_has_no_choice_carries_no_loss() -> None:
    scores = tensor([[1], [0], [7]])
    labels = torch.tensor([[0, 1], [0, 0], [1, 1]])
    torch.testing.assert_close(multiple_choice(scores, labels), multiple_choice(scores[:2], labels[:2]))
    spans = torch.tensor([[3, 4, 3, 5], [2, 2, 2, 2]])
    torch.testing.assert_close(
        span_extraction(SPAN.repeat(2, 1, 1), spans), span_extraction(SPAN, torch.tensor([[3, 4, 3, 5]]))
    )


@pytest.mark.parametrize(
    ("loss_of", "logits", "labels"),
    [
        (multiple_choice, [[2]], [[0, 1]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[2, 2, 2, 2]]),
        (token_classification, [[[1, 2], [3, 4]]], [[-100, -100]]),
    ],
)
def test_a_batch_without_a_choice_costs_nothing(
    loss_of: Callable[..., Tensor], logits: list[object], labels: list[object]
) -> None:
    learned = tensor(logits, learned=True)
    loss = loss_of(learned, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert learned.grad is not None
    assert not learned.grad.any()


def test_a_missing_answer_points_to_the_first_position() -> None:
    labels = torch.tensor([[0, 0, 3, 5]])
    expected = -(SPAN[0, [0, 3, 4, 5]].log_softmax(0)[0]).mean()
    torch.testing.assert_close(span_extraction(SPAN, labels, null_allowed=True, scaled=False), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_of", "logits", "labels"),
    [
        (classification, [[1, 2]], [[0]]),
        (classification, [[1, 2]], [2]),
        (classification, [[1, 2]], [-100]),
        (classification, [[1]], [0]),
        (regression, [[1], [2]], [[1], [2]]),
        (regression, [1, 2], [1, 2]),
        (regression, [[1, 2]], [1]),
        (regression, [[math.nan]], [1]),
        (multiple_choice, [1, 2], [[0, 1], [0, 0]]),
        (multiple_choice, [[1], [2]], [0, 1]),
        (multiple_choice, [[1], [2]], [[0, 0], [0, 0]]),
        (multiple_choice, [[1], [2]], [[0, 1], [0, 1]]),
        (multiple_choice, [[1], [2]], [[0, 1], [0, 2]]),
        (multiple_choice, [[1], [2]], [[0, 1], [-1, 0]]),
        (multiple_choice, [[1], [2]], [[0, 1], [2, 1]]),
        (multiple_choice, [[1], [2]], [[0, 1], [10**15, 0]]),
        (span_extraction, [[[1], [2]]], [[1, 1, 1, 1]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[1, 2]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[1, 2, 1, 3]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[2, 1, 1, 2]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[1, 2, 2, 2]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[0, 1, 0, 1]]),
        (span_extraction, [[[1, 1], [2, 2], [3, 3]]], [[0, 0, 1, 2]]),
        (token_classification, [[[1, 2]]], [0]),
        (token_classification, [[[1, 2]]], [[2]]),
        (token_classification, [[[1, 2]]], [[-1]]),
        (token_classification, [[[1]]], [[0]]),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    loss_of: Callable[..., Tensor], logits: list[object], labels: list[object]
) -> None:
    targets = {"standard": Standard()} if loss_of is regression else {}
    with pytest.raises(ValueError, match=r"against|label|option|positions|class|NaN"):
        loss_of(tensor(logits), tensor(labels) if targets else torch.tensor(labels), **targets)


@pytest.mark.parametrize("loss_of", [classification, multiple_choice, span_extraction, token_classification])
def test_targets_are_no_classes(loss_of: Callable[..., Tensor]) -> None:
    logits, labels = some(loss_of.__name__, 0)
    with pytest.raises(ValueError, match="float64"):
        loss_of(logits, labels.double())


def test_a_missing_answer_needs_the_first_position_open() -> None:
    with pytest.raises(ValueError, match="needs null_allowed"):
        span_extraction(SPAN, torch.tensor([[0, 0, 3, 5]]))
    with pytest.raises(ValueError, match="start, end"):
        span_extraction(SPAN, torch.tensor([[0, 4, 3, 5]]), null_allowed=True)


@pytest.mark.parametrize("targets", [[], [2.0, 2.0], [0.1] * 7, [1.0, math.nan], [1.0, math.inf]])
def test_targets_without_a_spread_are_refused(targets: list[float]) -> None:
    with pytest.raises(UsageError, match=r"task\.train"):
        Standard.of(targets)
