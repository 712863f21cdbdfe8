"""Independent jobs side by side: one process each, with its share of the cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, connection, get_context, parent_process
from threading import Thread
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
    others = set(active_children())
    threads = max(1, torch.get_num_threads() // workers)
    context = get_context("spawn")
    done = context.Array("q", len(jobs), lock=False)
    with (
        track(what, updates) as advance,
        ProcessPoolExecutor(workers, context, initializer=set_up, initargs=(threads, done)) as pool,
    ):
        futures = [pool.submit(call, work, place, job) for place, job in enumerate(jobs)]
        try:
            watch(futures, lambda: advance(sum(done)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(active_children()) - others:
                worker.terminate()
                worker.join()
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
    Thread(target=die_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """A worker may be at work or waiting for it when its parent is killed; neither would notice."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def call(work: Callable[..., None], place: int, job: Job) -> None:
    def progress(updates: int) -> None:
        _done[place] = updates

    work(*job, progress)
