"""Which task, and which of its examples: as often as its share, once a pass, and the same in whatever order asked."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import Optim, UsageError
from openbook.data.mixture import Mixture, Sampling, draws, probabilities
from openbook.types import Batch

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Rows:
    """As much of tokenised text as a mixture reads: ids say the task and the example."""

    name: str
    tokens: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Any) -> Batch:
        ids = torch.tensor(np.array(indices))[:, None]
        return Batch(tuple(f"{self.name}/{row}" for row in indices), ids, ids, ids)


def rows_of(**sizes: int) -> Any:
    return {name: Rows(name, np.random.default_rng(size).integers(1, 60, size)) for name, size in sizes.items()}


def ids_of(plan: Mixture, steps: Any = None) -> list[tuple[str, ...]]:
    return [plan[step].ids for step in (range(len(plan)) if steps is None else steps)]


# --- how often --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "cap", "expected"),
    [
        (1, None, (0.864865, 0.129730, 0.005405)),
        (0.75, None, (0.791605, 0.190799, 0.017596)),
        (0.5, None, (0.681963, 0.264123, 0.053914)),
        (0, None, (1 / 3, 1 / 3, 1 / 3)),
        (1, 65_536, (0.511856, 0.468618, 0.019526)),
        (0.5, 65_536, (0.464653, 0.444595, 0.090753)),
    ],
)
def test_probabilities_as_worked_out(alpha: float, cap: int | None, expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(probabilities((400_000, 60_000, 2_500), alpha, cap), expected, rtol=0, atol=1e-6)


sizes_of_tasks = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("systematic", [False, True])
def test_frequencies_lie_within_three_standard_errors(alpha: float, systematic: bool) -> None:
    p = probabilities((400_000, 60_000, 2_500), alpha)
    drawn = draws(p, 2_000, 32, 0, systematic)
    assert drawn.shape == (2_000, 32)
    errors = np.sqrt(p * (1 - p) / drawn.size)
    assert (np.abs(np.bincount(drawn.reshape(-1)) / drawn.size - p) <= 3 * errors).all()


@PROPERTY
@given(sizes_of_tasks, st.integers(1, 40), st.integers(0, 99))
def test_systematic_counts_are_those_expected_rounded(sizes: list[int], per_update: int, seed: int) -> None:
    p = probabilities(sizes)
    counts = (draws(p, 20, per_update, seed, systematic=True)[..., None] == np.arange(len(p))).sum(axis=1)
    assert (counts.sum(axis=1) == per_update).all()
    assert (np.abs(counts - per_update * p) < 1 + 1e-6).all()


def test_systematic_draws_come_in_any_order_within_an_update() -> None:
    drawn = draws(probabilities((1, 1)), 200, 2, 0, systematic=True)
    assert (np.sort(drawn, axis=1) == [0, 1]).all()
    assert 60 < drawn[:, 0].sum() < 140


@pytest.mark.parametrize(
    ("sizes", "alpha", "cap", "said"),
    [
        ((), 1, None, r"teacher\.tasks"),
        ((3, 0), 1, None, r"teacher\.tasks have \[3, 0\]"),
        ((3,), -0.5, None, r"teacher\.mixture\.alpha=-0\.5"),
        ((3,), math.nan, None, r"teacher\.mixture\.alpha"),
        ((3,), 1, 0, r"teacher\.mixture\.cap=0"),
    ],
)
def test_a_sampling_that_draws_nothing_is_refused(
    sizes: tuple[int, ...], alpha: float, cap: int | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        probabilities(sizes, alpha, cap)


# --- which examples ---------------------------------------------------------------------------------------------------

some_tasks = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 70), min_size=1)
some_optim = st.builds(
    Optim, epochs=st.sampled_from([0.5, 1, 3]), batch_size=st.integers(1, 9), accumulation=st.integers(1, 5)
)


@PROPERTY
@given(some_tasks, some_optim, st.integers(0, 9), st.sampled_from([0.0, 1.0]))
def test_micro_batches_are_full_and_of_one_task(sizes: dict[str, int], optim: Optim, seed: int, alpha: float) -> None:
    plan = Mixture(rows_of(**sizes), optim, seed, Sampling(alpha))
    read: dict[str, Counter[str]] = {name: Counter() for name in sizes}
    for step in range(len(plan)):
        batch = plan[step]
        assert len(batch.ids) == optim.batch_size
        assert {name.split("/")[0] for name in batch.ids} == {batch.task}
        read[batch.task].update(batch.ids)
    drawn = plan.draws_of()
    for name, size in sizes.items():
        total = read[name].total()
        counts = [read[name][f"{name}/{row}"] for row in range(size)]
        assert max(counts) - min(counts) <= 2  # a pass that begins, and the rest of the last one
        assert drawn[name] == {"draws": total // optim.batch_size, "passes": total / size}


@PROPERTY
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 9))
def test_every_example_is_read_once_a_pass(size: int, batch_size: int, seed: int) -> None:
    """After as many passes as fill their micro-batches without a rest."""
    plan = Mixture(rows_of(a=size), Optim(epochs=4 * batch_size, batch_size=batch_size), seed)
    counts = np.zeros(size, np.int64)
    for ids in ids_of(plan):
        np.add.at(counts, [int(name.split("/")[1]) for name in ids], 1)
    assert counts.sum() == 4 * batch_size * size
    assert counts.min() == counts.max() == 4 * batch_size


@PROPERTY
@given(some_tasks, some_optim, st.randoms(use_true_random=False))
def test_any_step_may_be_asked_for_first(sizes: dict[str, int], optim: Optim, random: Any) -> None:
    rows = rows_of(**sizes)
    expected = ids_of(Mixture(rows, optim, 1))
    steps = list(range(len(expected)))
    random.shuffle(steps)
    asked = Mixture(rows, optim, 1)
    for step in steps[:20]:
        assert asked[step].ids == expected[step]
    assert [asked[len(asked) - 1].ids] == expected[-1:]


def test_another_task_changes_no_order_of_examples() -> None:
    optim = Optim(epochs=2, batch_size=4, accumulation=3)
    alone, beside = (Mixture(rows_of(**sizes), optim, 0) for sizes in ({"a": 50}, {"b": 30, "a": 50}))
    own = [batch.ids for batch in beside if batch.task == "a"]
    assert len(own) > 10
    common = min(len(own), len(alone))
    assert own[:common] == ids_of(alone, range(common))


def test_seeds_and_tasks_differ() -> None:
    rows, optim = rows_of(a=50, b=50), Optim(batch_size=5, accumulation=4)
    plans = [[(batch.task, batch.ids) for batch in Mixture(rows, optim, seed)] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    places = [
        [name.split("/")[1] for batch in Mixture(rows, optim, 0) if batch.task == task for name in batch.ids]
        for task in "ab"
    ]
    assert places[0][:50] != places[1][:50]


def test_micro_batches_hold_examples_of_similar_length() -> None:
    rows = rows_of(a=2_000)
    plan = Mixture(rows, Optim(epochs=1, batch_size=10), 0)
    spreads = [np.ptp(rows["a"].tokens[[int(name.split("/")[1]) for name in ids]]) for ids in ids_of(plan, range(100))]
    assert np.median(spreads) < 6  # of lengths from 1 to 59


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0, 0), (0.001, 4), (1, 12), (1.5, 20), (3, 40)],
)
def test_a_plan_takes_as_many_updates_as_its_passes(epochs: float, steps: int) -> None:
    """40 examples, and 3 x 4 in an update: 3.33 updates a pass."""
    plan = Mixture(rows_of(a=30, b=10), Optim(epochs=epochs, batch_size=3, accumulation=4), 0)
    assert len(plan) == steps
    assert len(list(plan)) == steps
    with pytest.raises(IndexError):
        plan[steps]
    with pytest.raises(IndexError):
        plan[-1]


def test_the_report_tells_draws_and_passes() -> None:
    plan = Mixture(rows_of(a=30, b=10), Optim(epochs=3, batch_size=2, accumulation=4), 0, Sampling(systematic=True))
    assert plan.draws_of() == {"a": {"draws": 45, "passes": 3.0}, "b": {"draws": 15, "passes": 3.0}}


@pytest.mark.parametrize("key", ["tokens", "batch_tokens"])
def test_budgets_of_tokens_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=rf"optim\.{key}=100"):
        Mixture(rows_of(a=30), Optim.model_validate({key: 100}), 0)


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(UsageError, match=r"teacher\.tasks"):
        Mixture(rows_of(a=30, b=0), Optim(), 0)
