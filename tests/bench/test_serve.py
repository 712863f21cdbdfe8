"""Loads ask as often as they say, time every answer from when it was due, and engines take turns over the same rows."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from openbook.answers import Text
from openbook.bench import load, serve
from openbook.config import UsageError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bodies that were sent; each is answered after five milliseconds, and every tenth is refused."""
    bodies: list[Any] = []

    async def answer(session: Any, url: str, body: Any, seen: load.Seen, since: float) -> None:
        bodies.append(body)
        refused = len(bodies) % 10 == 0
        await asyncio.sleep(0.005)
        if refused:
            seen.failures["429"] = seen.failures.get("429", 0) + 1
        else:
            seen.seconds.append(time.perf_counter() - since)

    monkeypatch.setattr(load, "_ask", answer)
    return bodies


def test_a_counted_load_asks_just_so_often_and_goes_round_the_texts(asked: list[Any]) -> None:
    seen = load.counted("http://nowhere", ["a", "b", "c"], connections=4, requests=50)
    assert len(asked) == 50
    assert asked[:7] == ["a", "b", "c", "a", "b", "c", "a"]
    assert (len(seen.seconds), seen.failures) == (45, {"429": 5})
    assert seen.per_second == pytest.approx(45 / seen.elapsed)


def test_a_closed_load_keeps_every_connection_busy_until_its_time_is_over(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load._session

    def slowly(connections: int) -> Any:
        time.sleep(0.05)
        return opened(connections)

    monkeypatch.setattr(load, "_session", slowly)  # its own time is none of the load's
    seen = load.closed("http://nowhere", ["a"], connections=8, seconds=0.2)
    assert 0.2 <= seen.elapsed < 2
    assert len(asked) >= 8


def test_an_open_load_times_from_when_a_request_was_due(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = load.open_loop("http://nowhere", ["a"], rate=200, seconds=0.5)
    assert len(asked) == 100
    told = seen.told()
    assert told["requests"] == 90
    assert 0.005 <= told["p50"] <= told["p95"] <= told["p99"]
    assert load.open_loop("http://nowhere", ["a"], rate=200, seconds=0.5, seed=1).elapsed != seen.elapsed


def test_engines_answer_the_same_rows_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(serve, "clock", lambda: now[0])
    heard: dict[str, list[list[Text]]] = {serve.TEACHER: [], "student, torch": [], "fast": []}

    def engine(name: str, seconds: float) -> serve.Engine:
        def answer(rows: list[Text]) -> None:
            heard[name].append(rows)
            now[0] += seconds

        return answer

    engines = {serve.TEACHER: engine(serve.TEACHER, 0.02), "student, torch": engine("student, torch", 0.01)}
    engines["fast"] = engine("fast", 0.002)
    found = serve.turns(engines, [f"text {row}" for row in range(20)], batch=4, rounds=3)
    assert heard[serve.TEACHER] == heard["student, torch"] == heard["fast"]
    assert [len(rows) for rows in heard["fast"]] == [4] * (serve.WARM + 3)
    assert found[serve.TEACHER]["times_the_teacher"] == pytest.approx(1)
    assert found["student, torch"]["times_the_teacher"] == pytest.approx(2)
    assert found["fast"]["times_the_torch_student"] == pytest.approx(5)
    assert found["fast"]["rows_a_second"] == pytest.approx(2000)


def told(p99: float) -> dict[str, Any]:
    return {"requests": 9, "per_second": 90.0, "p50": 0.01, "p95": 0.02, "p99": p99, "failures": {}}


def test_half_the_load_is_the_median_of_several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stall of the machine decides the p99 of its window, not that of the server."""
    rates: list[float] = []
    stalls = iter([0.03, 9.0, 0.04, 0.05, 0.02])

    def window(url: str, bodies: Any, rate: float, seconds: float, seed: int) -> load.Seen:
        rates.append(rate)
        seen, p99 = load.Seen([0.0]), next(stalls)
        monkeypatch.setattr(seen, "told", lambda: told(p99))
        return seen

    def closed(url: str, bodies: Any, connections: int, seconds: float) -> load.Seen:
        return load.Seen([0.01] * connections, elapsed=1.0)

    monkeypatch.setattr(load, "open_loop", window)
    monkeypatch.setattr(load, "closed", closed)
    found = serve.loaded("http://nowhere", None, ["a"], 1.0, soak=0)  # type: ignore[arg-type]
    assert found["saturation"] == max(serve.CONNECTIONS)
    assert rates == [max(serve.CONNECTIONS) / 2] * serve.WINDOWS
    assert found["half"]["p99"] == 0.04


def test_memory_is_read_after_every_tenth_of_the_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        held = 100

        def memory_info(self) -> Any:
            self.held += 7
            return type("Info", (), {"rss": self.held})

    counts: list[int] = []

    def counted(url: str, bodies: Any, connections: int, requests: int) -> load.Seen:
        counts.append(requests)
        return load.Seen([0.1], {"503": 2}, 1.0)

    monkeypatch.setattr(load, "counted", counted)
    found = serve.soaked("http://nowhere", Process(), ["a"], 1000)  # type: ignore[arg-type]
    assert counts == [100] * 10
    assert (found["failures"], found["grown"]) == (20, 63)


def test_the_tables_tell_engines_and_servers(capsys: pytest.CaptureFixture[str]) -> None:
    engine = {
        "p50": 0.01, "p95": 0.02, "rows_a_second": 100.0, "times_the_teacher": 2.5, "times_the_torch_student": 1.5,
    }  # fmt: skip
    closed = {str(count): told(0.05) for count in serve.CONNECTIONS}
    soak = {"requests": 50_000, "failures": 0, "bytes": [1, 2], "grown": 1_500_000}
    server = {"closed": closed, "saturation": 90.0, "half": told(0.05), "soak": soak}
    result = {"engines": {"1": {"fast": engine}}, "servers": {"onnx": server}, "threads": 1, "rounds": 3}
    console = Console(width=200)
    for table in serve.tables(result):
        console.print(table)
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ fast │ 10.00 │ 20.00 │ 100 │ 2.5 │ 1.5 │" in shown
    assert "90 (50.0)" in shown
    assert "10.0 / 50.0" in shown


def test_a_run_without_teacher_or_export_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no teacher/ to compare with"):
        serve.run(tmp_path, ["a"])
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="config.json cannot be read"):
        serve.run(tmp_path, ["a"])


def test_pairs_are_given_as_each_engine_takes_them() -> None:
    assert serve.as_pair("a") == "a"
    assert serve.as_pair(("a", "b")) == {"text": "a", "text_pair": "b"}
    assert np.isnan(load.Seen(elapsed=1.0).told()["p50"])
