"""A metric of drawn rows is that of the rows, each as often as it was drawn; nothing else is believed."""

from pathlib import Path

import numpy as np
import pytest

from openbook import row_answers
from openbook.config import UsageError
from openbook.metrics import METRICS, hierarchical_difference, mcnemar
from openbook.row_answers import RowAnswers, draws_of, mcnemar_of, same_rows


def answers(seed: int, classes: int, rows: int = 40) -> RowAnswers:
    random = np.random.default_rng(seed)
    if classes == 1:
        return RowAnswers.of(random.integers(8, size=(rows, 1)) / 4 + 1e5, random.integers(5, size=rows).astype(float))
    gold = random.integers(classes, size=rows)
    outputs = random.dirichlet(np.ones(classes), size=rows) + 0.5 * np.eye(classes)[gold]
    return RowAnswers.of(outputs, gold)


@pytest.mark.parametrize(
    ("metric", "classes"),
    [("accuracy", 2), ("f1", 2), ("f1", 4), ("matthews_correlation", 2), ("matthews_correlation", 3),
     ("pearson", 1), ("spearmanr", 1)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [3, 40])
def test_a_draw_scores_as_its_rows_do(metric: str, classes: int, rows: int) -> None:
    """With three rows, some draws hold one class or one score alone."""
    own, times = answers(1, classes, rows), draws_of(rows)[:200]
    picked = [np.repeat(np.arange(rows), time.astype(int)) for time in times]
    expected = [METRICS[metric].function(own.outputs[rows], own.labels[rows]) for rows in picked]
    assert own.drawn(metric, times) == pytest.approx(expected, abs=1e-9)
    assert own.drawn(metric, np.ones((1, rows))) == pytest.approx(METRICS[metric].function(own.outputs, own.labels))


def test_every_draw_has_as_many_rows_and_is_the_same_for_all_trainings() -> None:
    times = draws_of(30)
    assert times.shape == (row_answers.DRAWS, 30)
    assert set(times.sum(axis=1)) == {30}
    assert np.array_equal(times, draws_of(30))
    assert times.mean(axis=0) == pytest.approx(np.ones(30), abs=0.2)


@pytest.mark.parametrize("classes", [1, 2, 300])
def test_what_is_kept_is_read_again_and_small(tmp_path: Path, classes: int) -> None:
    own = answers(2, classes, 400)
    own.save(tmp_path / "runs" / "it.npz")
    again = RowAnswers.load(tmp_path / "runs" / "it.npz")
    assert same_rows(own, again)
    assert np.array_equal(own.outputs, again.outputs)
    assert (tmp_path / "runs" / "it.npz").stat().st_size < 400 * 8 + 1000
    assert not same_rows(own, answers(3, classes, 400))


def test_answers_that_give_another_score_are_of_another_training() -> None:
    own = answers(4, 3)
    assert own.gives("accuracy", METRICS["accuracy"].function(own.outputs, own.labels))
    assert not own.gives("accuracy", 0.123)
    assert not own.gives("spearmanr", 0.5)
    assert not own.gives("unknown", 0.5)


@pytest.mark.parametrize("written", [b"", b"no archive", b"PK\x03\x04"])
def test_a_broken_file_is_refused(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "it.npz").write_bytes(written)
    with pytest.raises(UsageError, match=r"it\.npz does not hold the answers.*remove it"):
        RowAnswers.load(tmp_path / "it.npz")


def test_mcnemar_is_that_of_the_classes() -> None:
    a, b = answers(5, 3), answers(5, 3)
    b = RowAnswers(np.roll(b.said, 1), b.gold, 3)
    assert mcnemar_of(a, b) == mcnemar(a.outputs, b.outputs, a.labels)


def test_draws_of_rows_widen_an_interval_by_what_rows_vary() -> None:
    """Seeds that agree leave no width but that of the rows: sqrt(p (1 - p) / n), where a share p of n rows changes."""
    rows, seeds = 400, 5
    gold, right = np.zeros(rows, int), np.arange(rows) < 40
    better, worse = (RowAnswers.of(np.eye(2)[said], gold) for said in (np.zeros(rows, int), right.astype(int)))
    times = draws_of(rows)
    drawn = np.stack([better.drawn("accuracy", times) - worse.drawn("accuracy", times)] * seeds, axis=1)
    plain, _ = hierarchical_difference([[0.1] * seeds])
    found, _ = hierarchical_difference([[0.1] * seeds], redrawn=[drawn])
    assert plain.high - plain.low == pytest.approx(0)
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.1 * 0.9 / rows) ** 0.5, rel=0.1)


def test_a_task_without_rows_is_drawn_as_before() -> None:
    groups = [[0.1, 0.2, 0.0], [0.3, 0.1]]
    assert hierarchical_difference(groups, redrawn=[None, None]) == hierarchical_difference(groups)
