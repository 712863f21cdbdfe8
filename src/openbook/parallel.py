"""Independent jobs side by side: one process each, with its share of the cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

import torch

from openbook.console import track

Progress = Callable[[int], None]  # told how many updates are done
Job = tuple[Any, ...]

_done: Any = None  # set once in every worker process: updates done, one number a job


def run_jobs(work: Callable[..., None], jobs: Sequence[Job], workers: int, what: str, updates: int) -> None:
    """Call `work(*job, progress)` for every job, `workers` at a time; the first error stops the rest and is raised.

    Each worker has its share of the cores and dies with this process: a killed run leaves no one writing behind it.
    """
    threads = max(1, torch.get_num_threads() // workers)
    context = get_context("spawn")
    done = context.Array("q", len(jobs), lock=False)
    with (
        track(what, updates) as advance,
        ProcessPoolExecutor(workers, context, initializer=set_up, initargs=(threads, done)) as pool,
    ):
        futures = [pool.submit(call, work, place, job, os.getpid()) for place, job in enumerate(jobs)]
        try:
            watch(futures, lambda: advance(sum(done)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def watch(futures: Sequence[Future[None]], look: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, timeout=0.5)
        for future in finished:
            future.result()
        look()


def set_up(threads: int, done: Any) -> None:
    global _done
    _done = done
    torch.set_num_threads(threads)


def call(work: Callable[..., None], place: int, job: Job, parent: int) -> None:
    def progress(updates: int) -> None:
        _done[place] = updates
        if os.getppid() != parent:
            os._exit(1)

    work(*job, progress)
