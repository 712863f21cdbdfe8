"""The queue: every row is answered once, in its place; large jobs do not hold small ones, broken ones break alone."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.answers import Encoded
from openbook.server import batching
from openbook.server.batching import Batcher, Job, take


def words(rows: Sequence[Any]) -> list[Encoded]:
    """One token a word."""
    return [Encoded([len(word) for word in row.split()], []) for row in rows]


def total(rows: list[Any]) -> list[int]:
    return [sum(row.ids) for row in rows]


def waiting(*lengths: list[int], work: Any = total) -> list[Job]:
    jobs = [Job(work) for _ in lengths]
    for job, sizes in zip(jobs, lengths, strict=True):
        job.begin([Encoded([1] * size, []) for size in sizes])
    return jobs


@pytest.fixture
def batches() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def batcher(batches: list[tuple[int, int]]) -> Iterator[Batcher]:
    one = Batcher(100, lambda rows, tokens, seconds: batches.append((rows, tokens)))
    yield one
    one.close(5)


class Gate:
    """A work that waits until it is opened, so that a queue builds up behind it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, rows: list[Any]) -> list[int]:
        self.entered.set()
        assert self.opened.wait(10)
        return [0] * len(rows)


@pytest.fixture
def gate(batcher: Batcher) -> Iterator[Gate]:
    gate = Gate()
    batcher.submit(["first"], words, gate)
    assert gate.entered.wait(10)
    yield gate
    gate.opened.set()


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_every_row_is_taken_once_and_no_batch_is_over_its_budget(lengths: list[list[int]], budget: int) -> None:
    jobs = waiting(*lengths)
    queue, taken = deque(jobs), []
    while queue:
        batch = take(queue, budget)
        rows = [len(job.encoded[place]) for job, places in batch for place in places]
        assert rows
        assert len(rows) == 1 or len(rows) * max(rows) <= budget
        taken += [(id(job), place) for job, places in batch for place in places]
    assert sorted(taken) == sorted((id(job), place) for job in jobs for place in range(len(job.encoded)))


def test_a_large_job_goes_on_behind_the_small_ones() -> None:
    large, small, other = waiting([10] * 30, [10], [10])
    queue = deque([large, small, other])
    assert [job for job, _ in take(queue, 100)] == [large]
    assert list(queue) == [small, other, large]
    assert [(job, len(places)) for job, places in take(queue, 100)] == [(small, 1), (other, 1), (large, 8)]


def test_rows_of_one_kind_of_work_share_a_batch_and_others_keep_their_turn() -> None:
    first, other, third = waiting([1], [1], [1])
    other.work = words
    queue = deque([first, other, third])
    assert [job for job, _ in take(queue, 100)] == [first, third]
    assert [job for job, _ in take(queue, 100)] == [other]
    assert not queue


def test_rows_of_similar_length_are_taken_together() -> None:
    (job,) = waiting([2, 30, 3, 29])
    queue = deque([job])
    assert [[len(job.encoded[place]) for place in places] for _, places in take(queue, 60)] == [[30, 29]]
    assert [[len(job.encoded[place]) for place in places] for _, places in take(queue, 60)] == [[3, 2]]


def test_answers_come_in_the_order_of_the_rows(batcher: Batcher) -> None:
    rows = [" ".join(["a" * length] * (1 + length % 7)) for length in range(1, 60)]
    jobs = [batcher.submit(rows[start:], words, total) for start in range(5)]
    for start, job in enumerate(jobs):
        assert job.future.result(10) == total(words(rows[start:]))


def test_what_waits_is_answered_in_one_batch(batcher: Batcher, gate: Gate, batches: list[tuple[int, int]]) -> None:
    jobs = [batcher.submit(["a b"], words, total) for _ in range(20)]
    assert len(batcher) == 20
    gate.opened.set()
    assert [job.future.result(10) for job in jobs] == [[2]] * 20
    assert batches == [(1, 1), (20, 40)]
    assert len(batcher) == 0


def test_a_single_text_does_not_wait_for_company(batcher: Batcher, batches: list[tuple[int, int]]) -> None:
    assert batcher.submit(["a b c"], words, total).future.result(10) == [3]
    assert batches == [(1, 3)]


def test_cancelled_work_is_not_done(batcher: Batcher, gate: Gate) -> None:
    seen: list[Any] = []

    def work(rows: list[Any]) -> list[int]:
        seen.extend(rows)
        return total(rows)

    jobs = [batcher.submit([f"{'a' * size}"], words, work) for size in range(1, 6)]
    for job in jobs[1:4]:
        assert job.future.cancel()
    gate.opened.set()
    assert [jobs[0].future.result(10), jobs[4].future.result(10)] == [[1], [5]]
    assert total(seen) == [1, 5]
    with pytest.raises(CancelledError):
        jobs[1].future.result(0)


def test_a_row_that_breaks_the_model_breaks_its_own_job_only(batcher: Batcher, gate: Gate) -> None:
    def work(rows: list[Any]) -> list[int]:
        if any(len(row) == 7 for row in rows):
            raise RuntimeError("seven")
        return total(rows)

    good = [batcher.submit(["a b"], words, work) for _ in range(3)]
    bad = batcher.submit(["a a a a a a a", "a"], words, work)
    good += [batcher.submit(["a b"], words, work) for _ in range(3)]
    gate.opened.set()
    with pytest.raises(RuntimeError, match="seven"):
        bad.future.result(10)
    assert [job.future.result(10) for job in good] == [[2]] * 6


def test_a_job_that_failed_in_part_is_not_gone_on_with(batcher: Batcher) -> None:
    calls: list[int] = []

    def work(rows: list[Any]) -> list[int]:
        calls.append(len(rows))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        batcher.submit(["a " * 50] * 20, words, work).future.result(10)
    batcher.submit(["a"], words, total).future.result(10)
    assert calls == [2]


def test_a_model_that_forgets_a_row_is_an_error(batcher: Batcher) -> None:
    with pytest.raises(RuntimeError, match="1 answers to 2 rows"):
        batcher.submit(["a", "b"], words, lambda rows: [1]).future.result(10)


@pytest.mark.parametrize("text", ["short", "long " * batching.SHORT])
def test_a_text_that_cannot_be_encoded_fails_its_job(batcher: Batcher, text: str) -> None:
    def broken(rows: Sequence[Any]) -> list[Encoded]:
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        batcher.submit([text], broken, total).future.result(10)
    assert batcher.submit([text], words, total).future.result(10) == total(words([text]))


def test_encoding_a_long_text_holds_neither_the_caller_nor_a_short_one(batcher: Batcher) -> None:
    opened = threading.Event()

    def slow(rows: Sequence[Any]) -> list[Encoded]:
        assert opened.wait(10)
        return words(rows)

    long = batcher.submit(["long " * batching.SHORT], slow, total)
    assert batcher.submit(["a"], words, total).future.result(10) == [1]
    assert not long.future.done()
    opened.set()
    assert long.future.result(10) == [4 * batching.SHORT]


def test_a_function_runs_between_batches_on_the_thread_of_the_model(batcher: Batcher, gate: Gate) -> None:
    names: list[str] = []

    def work(rows: list[Any]) -> list[str]:
        return [threading.current_thread().name] * len(rows)

    before = batcher.submit(["a"], words, work)
    called = batcher.call(lambda: names.append(threading.current_thread().name))
    other = batcher.call(lambda: 5)
    gate.opened.set()
    called.future.result(10)
    assert names == before.future.result(10) == ["model"]
    assert other.future.result(10) == [5]
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 / 0).future.result(10)


def test_closing_answers_what_waits(batcher: Batcher, gate: Gate) -> None:
    jobs = [batcher.submit(["a"], words, total) for _ in range(3)]
    threading.Timer(0.05, gate.opened.set).start()
    batcher.close(5)
    assert [job.future.result(0) for job in jobs] == [[1]] * 3
    assert not batcher.alive


def test_closing_does_not_wait_for_a_model_that_hangs(batcher: Batcher, gate: Gate) -> None:
    began = time.monotonic()
    batcher.close(0.05)
    assert time.monotonic() - began < 2
    assert batcher.alive
