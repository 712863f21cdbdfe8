"""What a measurement needs: rivals in processes of their own that take turns, and the memory of a process tree."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

SAMPLED_EVERY = 0.2  # seconds


class Peak:
    """The largest memory of this process and its children while a block ran, in bytes (PSS: shared pages once)."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0


@contextmanager
def measured() -> Iterator[Peak]:
    peak, done, started = Peak(), threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(SAMPLED_EVERY):
            peak.bytes = max(peak.bytes, memory_of_tree())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak.seconds = time.perf_counter() - started
        done.set()
        watcher.join()


def memory_of_tree() -> int:
    total = 0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


class Rival:
    """Something that is opened once and asked often, in a process of its own: it shares no memory with the others."""

    def __init__(self, name: str, open_: Callable[..., Callable[[Any], Any]], *args: Any) -> None:
        self.name = name
        context = get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, open_, args), daemon=True)
        self._process.start()

    def ask(self, request: Any) -> tuple[float, Any]:
        """Seconds, and the answer. Raises RuntimeError if it failed."""
        self._line.send(request)
        answer = self._line.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer  # type: ignore[no-any-return]

    def close(self) -> int:
        """End the process; its peak memory in bytes."""
        self._line.send(None)
        peak: int = self._line.recv()
        self._process.join()
        return peak


def serve(line: Connection, open_: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    answer_to = open_(*args)
    while (request := line.recv()) is not None:
        try:
            started = time.perf_counter()
            answer = answer_to(request)
            line.send((time.perf_counter() - started, answer))
        except Exception as error:
            line.send(f"{type(error).__name__}: {error}")
    line.send(largest_memory())


def largest_memory() -> int:
    """Of this process so far, in bytes. Linux's `getrusage` would count what the parent held before it was forked."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return int(psutil.Process().memory_info().rss)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@contextmanager
def threads_of_children(threads: int) -> Iterator[None]:
    """Processes that start here take so many threads: libraries read these when they are first imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
