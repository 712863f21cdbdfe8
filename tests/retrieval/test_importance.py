"""DSIR: fixture F11 of the specification, and that chunks, processes and the bank's size make no difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.retrieval import importance as dsir
from openbook.retrieval.importance import (
    bucket_counts,
    buckets_of,
    descending,
    features,
    frequencies,
    grams,
    log_ratio,
    log_weights,
    resample,
    weigh,
)
from openbook.types import Passage

BANK = ["The cat sat.", "The dog ran.", "Stocks fell sharply."]
TASK = ["the cat ran."]


def bank_of(texts: Sequence[str]) -> SimpleNamespace:
    """A bank in memory."""

    def passages(positions: Sequence[int]) -> list[Passage]:
        return [Passage(f"bank/{position}", texts[position], "d") for position in positions]

    class Sentences(SimpleNamespace):
        def __len__(self) -> int:
            return len(texts)

    def prefix() -> Iterator[Passage]:
        return iter(passages(range(len(texts))))

    return Sentences(passages=passages, prefix=prefix)


def weights_of(smoothing: float) -> np.ndarray:
    task, bank = bucket_counts(10, TASK), bucket_counts(10, BANK)
    return weigh(log_ratio(frequencies(task, smoothing), frequencies(bank, 0)), BANK)


@pytest.mark.parametrize(("gram", "bucket"), [("cat", 2366), ("the cat", 143), ("dog", 5332)])
def test_f11_buckets(gram: str, bucket: int) -> None:
    assert buckets_of([gram], 10_000).tolist() == [bucket]


def test_f11_counts() -> None:
    assert bucket_counts(10, BANK[:1]).tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 0]
    assert bucket_counts(10, BANK).tolist() == [4, 1, 2, 1, 1, 3, 5, 1, 2, 1]
    assert bucket_counts(10, TASK).tolist() == [1, 0, 1, 2, 0, 0, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [(1, [0.275191, -1.334247, -2.027394]), (0, [-45.135224, -15.181414, -47.437809])],
)
def test_f11_log_weights(smoothing: float, expected: list[float]) -> None:
    np.testing.assert_allclose(weights_of(smoothing), expected, rtol=0, atol=1e-6)


def test_f11_order_with_noise() -> None:
    assert descending(weights_of(1) + np.array([0.5, -0.2, 3.3])).tolist() == [2, 0, 1]


def test_f11_two_buckets() -> None:
    ratio = log_ratio(np.array([0.75, 0.25]), np.array([0.5, 0.5]))
    assert np.array([2, 1]) @ ratio == pytest.approx(0.117783, abs=1e-6)


def test_punctuation_counts_and_neighbours_are_pairs() -> None:
    assert grams("Don't STOP...") == ["don", "'", "t", "stop", "...", "don '", "' t", "t stop", "stop ..."]
    assert grams("") == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=8), st.integers(1, 2**32 - 1))
def test_a_bucket_is_sha256_mod_m(texts: list[str], buckets: int) -> None:
    expected = [int(sha256(text.encode()).hexdigest(), 16) % buckets for text in texts]
    assert buckets_of(texts, buckets).tolist() == expected


def test_features_stay_with_their_text() -> None:
    found, owners = features(["a b", "", "c"], 100)
    assert owners.tolist() == [0, 0, 0, 2]
    assert found.tolist() == [*buckets_of(["a", "b", "a b"], 100), *buckets_of(["c"], 100)]
    np.testing.assert_array_equal(weigh(np.arange(100.0), ["", "c", ""]), [0, buckets_of(["c"], 100)[0], 0])
    assert weigh(np.arange(100.0), []).tolist() == []


def test_the_whole_is_the_formula_over_ten_thousand_buckets() -> None:
    bank = [*BANK, "the cat ran home", "a dog sat on the cat"]

    def counts(texts: Sequence[str]) -> Counter[int]:
        return Counter(int(sha256(g.encode()).hexdigest(), 16) % 10_000 for text in texts for g in grams(text))

    p, q = counts(TASK), counts(bank)
    expected = [
        sum(
            times * (np.log((p[j] + 1) / (p.total() + 10_000) + 1e-8) - np.log(q[j] / q.total() + 1e-8))
            for j, times in counts([text]).items()
        )
        for text in bank
    ]
    np.testing.assert_allclose(log_weights(bank_of(bank), TASK), expected, rtol=1e-12)


def some_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(300)])
    return [" ".join(words[random.zipf(1.5, 8) % 300]) for _ in range(count)]


@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_chunks_make_no_difference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, task = bank_of(some_texts(30)), some_texts(5)
    expected = log_weights(bank, task)
    monkeypatch.setattr(dsir, "AT_ONCE", at_once)
    np.testing.assert_array_equal(log_weights(bank, task), expected)


def test_workers_can_be_sent_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What real processes do with it is `test_parallel`'s; starting four of them takes seconds."""
    sent: list[int] = []

    def map_jobs(work: Any, jobs: Any, workers: int, *, once: Any) -> Iterator[Any]:
        for job in jobs:
            ForkingPickler.dumps((work, once, job))
            sent.append(workers)
            yield work(*once, *job)

    monkeypatch.setattr(dsir, "map_jobs", map_jobs)
    log_weights(bank_of(BANK), TASK, workers=2)
    assert sent == [1, 2, 2]


def test_noise_belongs_to_a_position_however_large_the_bank() -> None:
    """Weights far apart in pairs: within a pair the noise decides, so the orders show it."""
    small, large = -1e6 * (np.arange(200) // 2), -1e6 * (np.arange(500) // 2)
    orders = [resample(weights, seed=3) for weights in (small, large)]
    np.testing.assert_array_equal(orders[0], orders[1][:200])
    assert 20 < (orders[0][::2] % 2).sum() < 80
    assert not np.array_equal(orders[0], resample(small, seed=4))


def test_the_first_drawn_follows_the_weights() -> None:
    firsts = Counter(int(resample(np.log([0.6, 0.3, 0.1]), seed)[0]) for seed in range(2000))
    np.testing.assert_allclose([firsts[place] / 2000 for place in range(3)], [0.6, 0.3, 0.1], atol=0.04)


def test_equal_scores_keep_the_order_of_the_bank() -> None:
    assert descending(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_the_bank_comes_whole_and_what_the_task_would_say_comes_first() -> None:
    wanted = [f"how many cats has the {word} ?" for word in ("queen", "king", "duke", "earl", "count")]
    texts = [text for pair in zip(wanted, some_texts(5), strict=True) for text in pair] + some_texts(100)[5:]
    task = [f"how many dogs has the {word} ?" for word in ("tsar", "pope", "judge")] * 50
    drawn = list(dsir.importance(bank_of(texts), task, seed=0))
    assert sorted(one.id for one in drawn) == sorted(f"bank/{position}" for position in range(len(texts)))
    assert {one.text for one in drawn[:5]} == set(wanted)


def test_progress_counts_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsir, "AT_ONCE", 2)
    heard: list[int] = []
    log_weights(bank_of(BANK), TASK, progress=heard.append)
    assert heard == [2, 3, 5, 6]


def test_a_task_without_text_of_its_own_is_refused() -> None:
    with pytest.raises(UsageError, match=r"corpus\.select=importance"):
        log_weights(bank_of(BANK), [])
