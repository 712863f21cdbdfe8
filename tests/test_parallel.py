"""Jobs in processes of their own: all are done, the first error stops the rest, and no one outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from openbook.parallel import map_jobs, run_jobs

MODULE = """
import os
import sys
import time
from pathlib import Path

def leave_a_trace(path, progress):
    progress(3)
    Path(path).touch()

def fail_or_wait(path, progress):
    if path is None:
        raise FloatingPointError("the loss is nan at step 3 (gold nan)")
    time.sleep(120)
    Path(path).touch()

def add(constant, number, seconds=0):
    time.sleep(seconds)
    return constant + number

def divide(number, seconds=0):
    time.sleep(seconds)
    return 1 // number

def describe_worker():
    return os.getpid(), "torch" in sys.modules, os.environ.get("OMP_NUM_THREADS")

def say_who_and_wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(120)
"""
PARENT = """
import sys
from openbook.parallel import map_jobs
import jobs_of_this_test

if __name__ == "__main__":
    list(map_jobs(jobs_of_this_test.say_who_and_wait, [(sys.argv[1],)] * 2, 2))
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "jobs_of_this_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("jobs_of_this_test", None)
    import jobs_of_this_test

    return jobs_of_this_test


def wait_until(true: Any) -> None:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < 100
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_job_is_done(tmp_path: Path, jobs: Any) -> None:
    traces = [tmp_path / f"trace-{number}" for number in range(3)]
    run_jobs(jobs.leave_a_trace, [(str(trace),) for trace in traces], 1, "leaving traces", 9)
    assert all(trace.exists() for trace in traces)
    assert active_children() == []


def test_the_first_error_stops_the_rest_and_is_raised(tmp_path: Path, jobs: Any) -> None:
    trace, started = tmp_path / "trace", time.monotonic()
    with pytest.raises(FloatingPointError, match="nan at step 3"):
        run_jobs(jobs.fail_or_wait, [(str(trace),), (None,)], 2, "waiting", 2)
    assert time.monotonic() - started < 100  # the other job takes longer
    assert not trace.exists()
    wait_until(lambda: not active_children())  # the pool's own thread may still be reaping the last of them


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs_which_are_drawn_as_needed(jobs: Any, workers: int) -> None:
    drawn = 0

    def endless() -> Iterator[tuple[int, float]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn, 0.3 if drawn == 1 else 0  # the first is done last

    results = map_jobs(jobs.add, endless(), workers, once=(100,))
    for expected in range(101, 110):
        assert next(results) == expected
        assert drawn <= expected - 100 + 2 * workers
    results.close()
    wait_until(lambda: not active_children())


def test_one_worker_is_this_process_and_others_are_not(jobs: Any) -> None:
    (here, *_), *_ = map_jobs(jobs.describe_worker, [()], 1)
    (there, has_torch, threads), *_ = map_jobs(jobs.describe_worker, [()], 2)
    assert here == os.getpid() != there
    assert not has_torch  # it takes seconds, and not all work needs it
    assert threads == "1"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_raised_and_stops_the_rest(jobs: Any, workers: int) -> None:
    results = map_jobs(jobs.divide, [(1,), (0,), *[(1, 120)] * 9], workers)
    started = time.monotonic()
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert time.monotonic() - started < 100
    wait_until(lambda: not active_children())


def test_an_error_among_the_jobs_is_raised(jobs: Any) -> None:
    def broken() -> Iterator[tuple[int]]:
        yield (1,)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(map_jobs(jobs.divide, broken(), 2))
    wait_until(lambda: not active_children())


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path, jobs: Any) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(pids)])
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_alive(int(path.name)) for path in pids.iterdir()))
