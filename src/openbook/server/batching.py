"""Rows of many requests in few calls of the model: a queue, and the one thread that may touch the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from openbook.answers import Encoded, Text, fields

Work = Callable[[list[Any]], Sequence[Any]]  # encoded rows in, one answer for each out
Encode = Callable[[Sequence[Text]], list[Encoded]]
Observe = Callable[[int, int, float], None]  # rows, tokens with padding, seconds of a batch

READERS = 2  # threads for long texts, so that one of them does not hold the next
SHORT = 2_000  # characters that are encoded at once: handing them to a thread takes longer


class Job:
    """The rows of one request. Its future has the answers in their order; cancelling it takes the rows away."""

    def __init__(self, work: Work):
        self.work = work
        self.future: Future[list[Any]] = Future()
        self.encoded: Sequence[Any] = ()
        self.answers: list[Any] = []
        self.left: list[int] = []  # rows not taken yet, the longest last

    def begin(self, encoded: Sequence[Any]) -> None:
        self.encoded, self.answers = encoded, [None] * len(encoded)
        self.missing = len(encoded)
        self.left = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))

    def tell(self, places: Sequence[int], answers: Sequence[Any]) -> None:
        for place, answer in zip(places, answers, strict=True):
            self.answers[place] = answer
        self.missing -= len(places)
        if not self.missing and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.answers)

    def fail(self, error: BaseException) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


Batch = list[tuple[Job, list[int]]]  # jobs, and the places of the rows taken from each


def take(waiting: deque[Job], budget: int) -> Batch:
    """The next batch: rows of the first job, and of others that ask for the same, up to `budget` padded tokens.

    At least one row is taken. A job that does not fit goes on behind the others, so that none waits for a large one.
    """
    batch: Batch = []
    aside: list[Job] = []
    behind: list[Job] = []
    rows = longest = 0
    full = False
    for job in waiting:
        if job.future.done():  # cancelled, or failed in an earlier part
            continue
        if full or (batch and job.work != batch[0][0].work):
            aside.append(job)
            continue
        places: list[int] = []
        while job.left and not full:
            longer = max(longest, len(job.encoded[job.left[-1]]))
            if rows and longer * (rows + 1) > budget:
                full = True
            else:
                places.append(job.left.pop())
                rows, longest = rows + 1, longer
        if places:
            batch.append((job, places))
        if job.left:
            (behind if places else aside).append(job)
    waiting.clear()
    waiting.extend((*aside, *behind))
    return batch


class Batcher:
    """Takes jobs from any thread. Encodes them, then answers them on its own thread, in batches it finds waiting."""

    def __init__(self, batch_tokens: int, observe: Observe = lambda rows, tokens, seconds: None):
        self._budget, self._observe = batch_tokens, observe
        self._waiting: deque[Job] = deque()
        self._ready = threading.Condition()
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, "encode")
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Text], encode: Encode, work: Work) -> Job:
        """Answer rows by `work`, which is called on the model's thread with some rows of several jobs."""
        job = Job(work)
        if sum(len(text) for row in rows for text in fields(row)) <= SHORT:
            self._encode(job, encode, rows)
        else:
            self._readers.submit(self._encode, job, encode, rows)
        return job

    def call(self, function: Callable[[], Any]) -> Job:
        """Run a function on the model's thread, between batches. Its result is the job's only answer."""
        job = Job(lambda rows: [function()])  # a work of its own: nothing shares its batch
        job.begin([()])
        self._put(job)
        return job

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self, patience: float) -> None:
        """Answer what waits, and stop. Whatever is still at work after `patience` seconds is left behind."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._thread.join(patience)

    def _encode(self, job: Job, encode: Encode, rows: Sequence[Text]) -> None:
        if job.future.cancelled():
            return
        try:
            job.begin(encode(rows))
        except Exception as error:
            job.fail(error)
        else:
            self._put(job)

    def _put(self, job: Job) -> None:
        with self._ready:
            self._waiting.append(job)
            self._ready.notify()

    def _serve(self) -> None:
        while True:
            with self._ready:
                while not self._waiting and not self._closed:
                    self._ready.wait()
                if not self._waiting:
                    return
                batch = take(self._waiting, self._budget)
            if batch:
                self._answer(batch)

    def _answer(self, batch: Batch) -> None:
        """When a batch of several jobs fails, each is tried alone: a row that breaks the model breaks its own job."""
        rows = [job.encoded[place] for job, places in batch for place in places]
        began = time.perf_counter()
        try:
            answers = batch[0][0].work(rows)
            if len(answers) != len(rows):
                raise RuntimeError(f"{len(answers)} answers to {len(rows)} rows")
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].fail(error)
            else:
                for one in batch:
                    self._answer([one])
            return
        if tokens := len(rows) * max(map(len, rows)):  # none of a function
            self._observe(len(rows), tokens, time.perf_counter() - began)
        start = 0
        for job, places in batch:
            job.tell(places, answers[start : start + len(places)])
            start += len(places)
