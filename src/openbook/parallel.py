"""Independent jobs side by side: in processes of their own, which die with this one."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

from openbook.console import track

Progress = Callable[[int], None]  # told how many updates are done
Job = tuple[Any, ...]
Result = TypeVar("Result")

SPAWN = get_context("spawn")
IN_FLIGHT = 2  # jobs a worker: one at work, one waiting for it

_done: Any = None  # set once in every worker process of `run_jobs`: updates done, one number a job
_once: Job = ()  # set once in every worker process of `map_jobs`


def run_jobs(work: Callable[..., None], jobs: Sequence[Job], workers: int, what: str, updates: int) -> None:
    """Call `work(*job, progress)` for every job, `workers` at a time; the first error stops the rest and is raised.

    Each worker has its share of the cores and dies with this process: a killed run leaves no one writing behind it.
    """
    import torch  # here and below: workers of `map_jobs` do not wait for it

    threads = max(1, torch.get_num_threads() // workers)
    done = SPAWN.Array("q", len(jobs), lock=False)
    with track(what, updates) as advance, workers_of(workers, set_up, (threads, done)) as pool:
        futures = [pool.submit(call, work, place, job) for place, job in enumerate(jobs)]
        watch(futures, lambda: advance(sum(done)))


def run_group(work: Callable[..., None], job: Job, processes: int, advance: Progress) -> None:
    """Call `work(*job, progress)` in processes that train one model together (torch.distributed, gloo or NCCL).

    Each finds its rank through an `Accelerator`. `advance` hears the first one's progress; the first error is raised.
    """
    import torch

    threads = max(1, torch.get_num_threads() // processes)
    done = SPAWN.Array("q", processes, lock=False)
    with TemporaryDirectory() as folder, workers_of(processes, set_up, (threads, done)) as pool:
        meeting = f"file://{folder}/meeting"
        futures = [pool.submit(join, work, job, rank, processes, meeting) for rank in range(processes)]
        told = 0

        def look() -> None:
            nonlocal told
            while told < done[0]:
                told += 1
                advance(told)

        watch(futures, look)


def map_jobs(
    work: Callable[..., Result], jobs: Iterable[Job], workers: int, *, once: tuple[Any, ...] = ()
) -> Iterator[Result]:
    """`work(*once, *job)` of every job, in the order of the jobs, `workers` at a time with one thread each.

    Jobs are drawn as they are needed, a few at a time; `once` is sent to each worker once. The first error stops the
    rest and is raised. One worker is this process.
    """
    if workers == 1:
        for job in jobs:
            yield work(*once, *job)
        return
    with workers_of(workers, set_up_once, (once,)) as pool:
        waiting: deque[Future[Result]] = deque()
        for job in jobs:
            waiting.append(pool.submit(call_once, work, job))
            if len(waiting) == IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def workers_of(workers: int, initializer: Callable[..., None], arguments: Job) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers are stopped at once if the block ends with an error."""
    others = set(active_children())
    with ProcessPoolExecutor(workers, SPAWN, initializer=initializer, initargs=arguments) as pool:
        try:
            yield pool
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
    import torch

    global _done
    _done = done
    torch.set_num_threads(threads)
    Thread(target=die_with_parent, daemon=True).start()


def set_up_once(once: Job) -> None:
    global _once
    _once = once
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what the work imports yet
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


def join(work: Callable[..., None], job: Job, rank: int, processes: int, meeting: str) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate asks for them; they meet in a file
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # or accelerate gives every process all cores
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=processes)
    try:
        call(work, rank, job)
    finally:
        torch.distributed.destroy_process_group()


def call_once(work: Callable[..., Result], job: Job) -> Result:
    return work(*_once, *job)
