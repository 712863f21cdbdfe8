"""Jobs in processes of their own: all are done, and the first error stops the rest."""

import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from openbook.parallel import run_jobs

MODULE = """
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
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "jobs_of_this_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import jobs_of_this_test

    return jobs_of_this_test


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
    while active_children():  # the pool's own thread may still be reaping the last of them
        assert time.monotonic() - started < 100
        time.sleep(0.1)
