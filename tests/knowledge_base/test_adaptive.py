import numpy as np
import pytest

from openbook.knowledge_base import adaptive
from openbook.knowledge_base.adaptive import (
    NEVER,
    Sample,
    adapted,
    confident_theta,
    cross_validated,
    losses,
    with_buckets,
    with_gate,
)
from openbook.knowledge_base.answering import Retrieval, betas_of, skipped

CONSTANT = Retrieval(top_k=8, temperature=0.1, beta=0.5)


def accuracy(outputs, gold):
    return float((outputs.argmax(axis=1) == gold).mean())


def two_classes(share):
    return np.stack([1 - share, share], axis=1)


def near_is_right(seed, count=600, informative=True):
    """Neighbours know the class of what lies near (similarity above .5) and err on the rest; the student is so-so."""
    random = np.random.default_rng(seed)
    gold = random.integers(2, size=count)
    nearest = random.uniform(size=count)
    right = nearest > 0.5 if informative else random.uniform(size=count) > 0.5
    average = two_classes(np.where(right == (gold == 1), 0.9, 0.1))
    outputs = two_classes(np.where(gold == 1, 0.6, 0.4))
    features = np.stack([nearest, average.max(1), outputs.max(1)], axis=1)
    return Sample(outputs, average, features, gold, "classification")


def scores_near_are_right(seed, count=400):
    random = np.random.default_rng(seed)
    gold, nearest = random.uniform(0, 5, size=count), random.uniform(size=count)
    outputs = (gold + random.normal(size=count))[:, None]
    average = (gold + random.normal(size=count) * np.where(nearest > 0.5, 0.1, 3))[:, None]
    features = np.stack([nearest, random.uniform(size=count), np.abs(outputs - average)[:, 0]], axis=1)
    return Sample(outputs, average, features, gold, "regression")


def label_sets_near_are_right(seed, count=400):
    """Of three labels; all of one text are near the truth in the neighbours, or none is."""
    random = np.random.default_rng(seed)
    gold, nearest = random.integers(0, 2, (count, 3)), random.uniform(size=count)
    right = (nearest > 0.5)[:, None] | (random.uniform(size=gold.shape) < 0.3)
    average = np.where(right == (gold == 1), 0.9, 0.1)
    outputs = np.where(gold == 1, 0.6, 0.4)
    features = np.stack([nearest, average.max(axis=1), outputs.max(axis=1)], axis=1)
    return Sample(outputs, average, features, gold, "multi_label")


SAMPLES = (near_is_right, scores_near_are_right, label_sets_near_are_right)


@pytest.mark.parametrize("sample", [make(0) for make in SAMPLES], ids=["classes", "scores", "sets"])
def test_a_gate_trusts_the_neighbours_where_they_are_right(sample):
    fitted = with_gate(CONSTANT, sample)
    betas = betas_of(fitted, sample.features)
    near = sample.features[:, 0] > 0.5
    assert betas[near].mean() < 0.3 < 0.7 < betas[~near].mean()
    assert sample.losses(betas).mean() < min(sample.losses(beta).mean() for beta in adaptive.BETAS)
    assert (fitted.top_k, fitted.temperature, fitted.beta, fitted.mode) == (8, 0.1, 0.5, "gate")
    assert fitted.beta_min == pytest.approx(betas.min())


@pytest.mark.parametrize("sample", [make(1, 50) for make in SAMPLES], ids=["classes", "scores", "sets"])
def test_the_gradient_of_the_gate_is_that_of_its_loss(sample):
    design = np.column_stack([np.ones(50), sample.features])
    objective = adaptive._objective(design, sample, 0.5)
    point, step = np.array([0.3, -0.7, 0.2, 0.5]), 1e-6
    slopes = [(objective(point + step * one)[0] - objective(point - step * one)[0]) / (2 * step) for one in np.eye(4)]
    np.testing.assert_allclose(objective(point)[1], slopes, rtol=1e-5, atol=1e-5)


def test_a_penalty_without_end_leaves_the_best_constant(monkeypatch):
    monkeypatch.setattr(adaptive, "PENALTY", 1e9)
    sample = near_is_right(2)
    betas = betas_of(with_gate(CONSTANT, sample), sample.features)
    assert betas.max() - betas.min() < 1e-3
    grid = np.linspace(0.01, 0.99, 99)
    assert betas[0] == pytest.approx(min(grid, key=lambda beta: sample.losses(beta).mean()), abs=0.02)


def test_features_that_never_vary_and_an_extreme_constant_still_give_a_gate():
    sample = near_is_right(3)
    sample.features[:, 1:] = 0.7
    for beta in (0.0, 1.0):
        fitted = with_gate(Retrieval(8, 0.1, beta), sample)
        assert np.isfinite(fitted.gate).all()
        assert fitted.gate[2:] == pytest.approx((0, 0), abs=1e-6)


def test_buckets_hold_a_tenth_each_and_small_ones_take_the_constant():
    sample = near_is_right(4, count=2000)
    fitted = with_buckets(CONSTANT, sample)
    counts = np.bincount(np.searchsorted(fitted.edges, sample.features[:, 0], side="right"))
    assert counts.tolist() == [200] * 10
    assert fitted.betas == (1.0,) * 5 + (0.0,) * 5
    assert with_buckets(CONSTANT, near_is_right(4, count=1999)).betas.count(0.5) == 1
    assert with_buckets(CONSTANT, near_is_right(4, count=600)).betas == (0.5,) * 10


def test_equal_similarities_share_a_bucket():
    sample = near_is_right(5, count=300)
    sample.features[:, 0] = 1.0
    fitted = with_buckets(CONSTANT, sample)
    assert fitted.betas[:9] == (0.5,) * 9
    assert len(set(betas_of(fitted, sample.features))) == 1


def test_every_example_gets_its_beta_from_a_fit_without_it():
    sample = near_is_right(6, count=50)
    seen = []

    def fit(constant, part):
        seen.append(part)
        return with_gate(constant, part)

    betas = cross_validated(fit, CONSTANT, sample)
    assert [len(part.gold) for part in seen] == [40] * 5
    for fold, part in enumerate(seen):
        held_out = np.arange(50) % 5 == fold
        assert not set(sample.features[held_out, 0]) & set(part.features[:, 0])
        np.testing.assert_array_equal(betas[held_out], betas_of(with_gate(CONSTANT, part), sample.features[held_out]))


def test_a_gate_is_kept_where_it_helps_and_not_where_it_fits_noise():
    for informative, kept in ((True, True), (False, False)):
        sample = near_is_right(7, informative=informative)
        rival = min((sample.losses(beta) for beta in adaptive.BETAS), key=np.mean)
        found = adapted(CONSTANT, sample, ("constant", "gate"), rival)
        assert (found is not None) == kept
    assert adapted(CONSTANT, near_is_right(7), ("constant",), near_is_right(7).losses(0.5)) is None


def test_the_gain_of_a_mode_must_exceed_its_standard_error(monkeypatch):
    sample = near_is_right(8, count=100)
    monkeypatch.setitem(adaptive.FITS, "gate", lambda constant, part: constant_gate(0.0))
    own = sample.losses(np.full(100, 0.5))
    difference = np.where(np.arange(100) % 2, 1.0, -1.0)
    error = difference.std(ddof=1) / 10
    assert adapted(CONSTANT, sample, ["gate"], own + difference + error * 0.99) is None
    retrieval, betas = adapted(CONSTANT, sample, ["gate"], own + difference + error * 1.01)
    assert (retrieval.gate[0], set(betas)) == (0.0, {0.5})


def test_of_two_modes_the_one_of_less_loss_is_kept(monkeypatch):
    sample = near_is_right(9)  # the neighbours are as often wrong as right, the student is always right
    monkeypatch.setitem(adaptive.FITS, "gate", lambda constant, part: constant_gate(-1.0))
    monkeypatch.setitem(adaptive.FITS, "bucket", lambda constant, part: constant_gate(1.0))
    rival = sample.losses(0.0)
    for modes in (("gate", "bucket"), ("bucket", "gate")):
        assert adapted(CONSTANT, sample, modes, rival)[0].gate[0] == 1.0


def constant_gate(bias):
    return Retrieval(8, 0.1, 0.5, mode="gate", gate=(bias, 0, 0, 0))


def test_too_few_examples_fit_no_gate():
    sample = near_is_right(10, count=9)
    assert adapted(CONSTANT, sample, ["gate"], sample.losses(0.0) + 100) is None


def test_theta_is_the_smallest_that_costs_no_more_than_a_tenth_of_a_point():
    """The student is wrong below .9 and right from there on, the book always right."""
    confidence = np.linspace(0.5, 0.999, 300)
    gold = np.ones(300, dtype=int)
    mixed = two_classes(np.full(300, 0.9))
    right = confidence >= 0.9
    alone = two_classes(np.where(right, confidence, 1 - confidence))
    theta = confident_theta(alone, mixed, gold, accuracy)
    assert theta == confidence[right].min()
    skips = skipped(alone, Retrieval(8, 0.1, 0.5, skip="confident", theta=theta))
    assert accuracy(np.where(skips[:, None], alone, mixed), gold) == 1


def test_a_theta_may_cost_a_tenth_of_a_point_but_no_more():
    gold = np.ones(1000, dtype=int)
    mixed = two_classes(np.full(1000, 0.9))
    for wrong, expected in ((1, 0.6), (2, NEVER)):
        alone = two_classes(np.full(1000, 0.6))
        alone[:wrong] = (0.6, 0.4)
        assert confident_theta(alone, mixed, gold, accuracy) == pytest.approx(expected)


def test_losses_are_negative_log_likelihoods_and_squared_errors():
    found = losses(np.array([(0.25, 0.75), (0.0, 1.0)]), np.array([1, 0]), "classification")
    np.testing.assert_allclose(found, [-np.log(0.75), -np.log(1e-12)])
    np.testing.assert_allclose(losses(np.array([[2.0], [1.0]]), np.array([0.5, 1.0]), "regression"), [2.25, 0])


def test_the_loss_of_several_labels_is_the_mean_over_them():
    found = losses(np.array([(0.25, 0.75), (0.5, 1.0)]), np.array([(1, 1), (0, 1)]), "multi_label")
    np.testing.assert_allclose(found, [np.log(16 / 3) / 2, np.log(2) / 2])
