from dataclasses import replace

import numpy as np
import pytest

from openbook.config import UsageError
from openbook.knowledge_base.controls import biased, class_bias, flattened, permuted


def accuracy(outputs, gold):
    return float((outputs.argmax(axis=1) == gold).mean())


def test_permuted_values_are_the_same_values_elsewhere(base):
    dice = np.random.default_rng(13)
    base = replace(base, keys=np.eye(50, dtype=np.float32), values=dice.random((50, 3), np.float32))
    base = replace(base, ids=tuple(map(str, range(50))), texts=("",) * 50)
    shuffled = permuted(base, 0)
    assert sorted(map(tuple, shuffled.values.tolist())) == sorted(map(tuple, base.values.tolist()))
    assert (shuffled.values != base.values).any(axis=1).mean() > 0.9
    assert shuffled.keys is base.keys
    assert permuted(base, 0).values.tolist() == shuffled.values.tolist() != permuted(base, 1).values.tolist()


def test_a_flattened_base_answers_with_the_prior(base):
    np.testing.assert_allclose(flattened(base).values, [base.values.mean(axis=0)] * 4, atol=1e-7)
    weighted = replace(base, weights=np.float32([2, 1, 0, 1]))
    np.testing.assert_allclose(flattened(weighted).values[0], (0.625, 0.375), atol=1e-7)


def test_a_class_bias_finds_the_threshold_that_was_shifted():
    random = np.random.default_rng(14)
    true = random.dirichlet(np.full(3, 0.5), size=400)
    gold = true.argmax(axis=1)
    shifted = biased(true, np.array([0, 1.2, -0.6]))
    np.testing.assert_allclose(shifted.sum(axis=1), 1)
    assert accuracy(shifted, gold) < 0.9
    bias = class_bias(shifted, gold, accuracy)
    assert bias[0] == 0
    assert accuracy(biased(shifted, bias), gold) > 0.95
    with pytest.raises(UsageError, match="no classes"):
        class_bias(true[:, :1], gold, accuracy)


def test_a_class_bias_that_changes_nothing_is_none():
    assert class_bias(np.full((4, 2), 0.5), np.array([0, 1, 0, 1]), lambda outputs, gold: 0.0).tolist() == [0, 0]
