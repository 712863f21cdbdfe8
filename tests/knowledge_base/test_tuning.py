from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base import tuning
from openbook.knowledge_base.interpolate import interpolate, neighbour_average
from openbook.knowledge_base.search import Hits, normalise, search
from openbook.knowledge_base.tuning import check_disjoint, standard_error, sweep, tune


def accuracy(outputs, gold):
    return float((outputs.argmax(axis=1) == gold).mean())


def correlation(outputs, gold):
    return float(np.corrcoef(outputs[:, 0], gold)[0, 1])


def random_case(seed, queries=12, entries=7, classes=2):
    random = np.random.default_rng(seed)
    keys = normalise(random.normal(size=(entries, 4))).astype(np.float32)
    values = random.dirichlet(np.ones(classes), size=entries).astype(np.float32)
    vectors = random.normal(size=(queries, 4))
    probabilities, gold = random.dirichlet(np.ones(classes), size=queries), random.integers(classes, size=queries)
    return vectors, keys, probabilities, search(vectors, keys, 32), values, gold


def corrected_and_broken(corrected, broken, count=100):
    """`count` items of gold class 1; the student misses the first ones, the book misses the last ones."""
    gold = np.ones(count, dtype=int)
    student = np.tile([0.4, 0.6], (count, 1))
    student[:corrected] = (0.6, 0.4)
    values = np.float32([(0, 1), (1, 0)])
    positions = np.zeros((count, 1), dtype=np.int64)
    positions[count - broken :] = 1
    return student, Hits(positions, np.ones((count, 1), np.float32)), values, gold


def test_a_gain_above_one_standard_error_is_kept():
    tuned = tune(*corrected_and_broken(9, 4), accuracy, "classification")
    assert tuned.gain == pytest.approx(0.05)
    assert tuned.standard_error == pytest.approx(0.035887, abs=1e-6)
    assert (tuned.kept, tuned.baseline_score, tuned.score) == (True, pytest.approx(0.91), pytest.approx(0.96))
    assert tuned.beta < 1


def test_a_gain_within_one_standard_error_is_not_kept():
    tuned = tune(*corrected_and_broken(6, 4), accuracy, "classification")
    assert tuned.gain == pytest.approx(0.02)
    assert tuned.standard_error == pytest.approx(0.1 * np.sqrt((10 - 100 * 0.02**2) / 9.9 / 10), abs=1e-6)
    assert (tuned.kept, tuned.beta, tuned.score) == (False, 1.0, pytest.approx(0.96))


def test_no_gain_is_no_retrieval():
    tuned = tune(*corrected_and_broken(0, 4), accuracy, "classification")
    assert (tuned.kept, tuned.beta, tuned.gain, tuned.standard_error) == (False, 1.0, 0.0, 0.0)


def test_the_standard_error_of_a_mean_is_the_textbook_one(monkeypatch):
    numbers = np.random.default_rng(0).normal(size=40)
    expected = numbers.std(ddof=1) / np.sqrt(40)
    assert standard_error(lambda rows: float(numbers[rows].mean()), 40) == pytest.approx(expected)
    monkeypatch.setattr(tuning, "GROUPS", 8)  # five rows a group, taken in turn: the group means are the sample
    means = np.array([numbers[start::8].mean() for start in range(8)])
    grouped = standard_error(lambda rows: float(numbers[rows].mean()), 40)
    assert grouped == pytest.approx(means.std(ddof=1) / np.sqrt(8))


def test_the_standard_error_of_a_correlation_is_near_the_bootstraps():
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    jackknife = standard_error(lambda rows: float(np.corrcoef(x[rows], y[rows])[0, 1]), 200)
    draws = [np.corrcoef(x[rows], y[rows])[0, 1] for rows in random.integers(200, size=(1000, 200))]
    assert jackknife == pytest.approx(np.std(draws), rel=0.15)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_every_cell_scores_as_predicting_with_it(seed):
    vectors, keys, probabilities, hits, values, gold = random_case(seed)
    tuned = tune(probabilities, hits, values, gold, accuracy, "classification")
    assert len(tuned.table) == 4 * 5 * 11  # top_k 1, 2, 4 and, clipped to the base, 7
    for cell in tuned.table[::9]:
        found = search(vectors, keys, cell.top_k)
        outputs = interpolate(probabilities, neighbour_average(found, values, cell.temperature), cell.beta)
        assert cell.score == accuracy(outputs, gold)
        assert cell.loss == pytest.approx(-np.log(outputs[np.arange(len(gold)), gold]).mean())
    assert tuned.score >= tuned.baseline_score == accuracy(probabilities, gold)
    assert tuned.gain == tuned.score - tuned.baseline_score


def test_the_grid_is_the_published_one_clipped_to_the_base():
    *_, probabilities, hits, values, _ = random_case(0, entries=40)
    cells = sweep(probabilities, hits, values, lambda outputs: (0.0, 0.0))
    assert {cell.top_k for cell in cells} == {1, 2, 4, 8, 12, 16, 20, 32}
    assert {cell.temperature for cell in cells} == {0.02, 0.05, 0.1, 0.2, 0.5}
    assert {round(cell.beta, 9) for cell in cells} == {0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1}
    assert len(set(cells)) == len(cells) == 8 * 5 * 11


def test_the_score_decides_before_the_loss():
    *_, probabilities, hits, values, gold = random_case(3)
    tuned = tune(probabilities, hits, values, gold, accuracy, "classification")
    merits = [(-cell.score, cell.loss) for cell in tuned.table]
    assert merits == sorted(merits)
    assert merits[0][0] < merits[-1][0]
    assert [loss for _, loss in merits] != sorted(loss for _, loss in merits)
    assert (tuned.top_k, tuned.temperature, tuned.score) == (
        tuned.table[0].top_k,
        tuned.table[0].temperature,
        tuned.table[0].score,
    )


def test_full_ties_go_to_the_larger_beta_then_the_smaller_k_then_the_smaller_temperature():
    """Student and book both give the gold class exactly 0, so every mixture scores and loses the same."""
    *_, hits, _, _ = random_case(3)
    wrong, gold = np.tile([1.0, 0.0], (12, 1)), np.ones(12, dtype=int)
    tuned = tune(wrong, hits, wrong[:7].astype(np.float32), gold, accuracy, "classification")
    order = [(-cell.beta, cell.top_k, cell.temperature) for cell in tuned.table]
    assert order == sorted(order)
    assert (tuned.top_k, tuned.temperature, tuned.beta, tuned.kept) == (1, 0.02, 1.0, False)


def test_regression_is_tuned_by_its_correlation_and_ties_by_squared_error():
    random = np.random.default_rng(4)
    gold = random.uniform(0, 5, size=30)
    probabilities = (gold + random.normal(size=30))[:, None]
    values = gold[:, None].astype(np.float32)  # a book that knows every answer
    hits = Hits(np.arange(30)[:, None], np.ones((30, 1), np.float32))
    tuned = tune(probabilities, hits, values, gold, correlation, "regression")
    assert (tuned.kept, tuned.beta, tuned.top_k) == (True, 0.0, 1)
    assert tuned.score == pytest.approx(1)
    students = [cell for cell in tuned.table if cell.beta == 1]
    assert {cell.loss for cell in students} == {np.mean((probabilities[:, 0] - gold) ** 2)}


def test_an_empty_base_leaves_the_student_alone():
    *_, probabilities, _, values, gold = random_case(5)
    hits = Hits(np.zeros((12, 0), np.int64), np.zeros((12, 0), np.float32))
    tuned = tune(probabilities, hits, values[:0], gold, accuracy, "classification")
    assert (tuned.kept, tuned.beta, tuned.top_k) == (False, 1.0, 1)


def test_held_out_examples_must_not_be_in_the_base(base):
    check_disjoint(base, ("h/0", "h/1"), ("south", "west"))
    with pytest.raises(UsageError, match="1 of 2.*'h/1'"):
        check_disjoint(base, ("h/0", "h/1"), ("south", " North "))
    with pytest.raises(UsageError, match="1 of 1.*'t/3'"):
        check_disjoint(replace(base, texts=("",) * 4), ("t/3",), ("south",))


def test_inputs_of_different_length_are_refused():
    *_, probabilities, hits, values, gold = random_case(6)
    with pytest.raises(UsageError, match="12 predictions, 12 rows of hits and 11 labels"):
        tune(probabilities, hits, values, gold[:11], accuracy, "classification")
    with pytest.raises(UsageError, match="at least 2"):
        tune(
            probabilities[:1],
            Hits(hits.positions[:1], hits.similarities[:1]),
            values,
            gold[:1],
            accuracy,
            "classification",
        )
