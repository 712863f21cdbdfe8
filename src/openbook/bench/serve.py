"""What a shipped student costs: its engines beside the teacher's and a plain pipeline, and its server under load."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.table import Table

from openbook.answers import Text, fields
from openbook.backends.base import BACKENDS
from openbook.bench import load
from openbook.bench.measure import median
from openbook.config import UsageError
from openbook.console import console
from openbook.loading import load as load_backend
from openbook.predictor import OpenBook

BATCHES = (1, 32)
CONNECTIONS = (1, 4, 16, 64)
SOAK = 50_000  # requests
WARM = 3  # calls before the clock starts
SECONDS = 5.0  # of a load
WINDOWS = 5  # of half the load, whose medians count: one stall of a shared machine would decide a single p99
TEACHER, PIPELINE = "teacher, torch", "student, pipeline"
clock = time.perf_counter

Engine = Callable[[list[Text]], Any]


def run(
    model: Path, texts: Sequence[Text], rounds: int = 30, seconds: float = SECONDS, soak: int = SOAK, threads: int = 1
) -> dict[str, Any]:
    """Time engines by turns in this process, then load servers one after the other; `texts` are what is asked.

    Raises UsageError for a run that lacks its teacher or its exports, before anything is timed.
    """
    check(model)
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"threads": threads, "texts": len(texts), "rounds": rounds, "seconds_a_load": seconds}
    found["engines"] = {str(batch): turns(engines_of(model, threads), texts, batch, rounds) for batch in BATCHES}
    found["servers"] = {}
    bodies = [{"texts": [row if isinstance(row, str) else list(row)]} for row in texts]
    for name, command in servers_of(model, threads).items():
        with served(command) as (url, process):
            found["servers"][name] = loaded(url, process, bodies, seconds, soak if name == "onnx-int8" else 0)
        console.print(f"{name}: {found['servers'][name]['saturation']:.0f} requests a second", markup=False)
    return found


def check(model: Path) -> None:
    if not (model / "teacher" / "config.json").is_file():
        raise UsageError(f"--model {model} has no teacher/ to compare with; name a run folder such as runs/quickstart")
    for name in BACKENDS[1:]:
        load_backend(model / "student", name)


def engines_of(model: Path, threads: int) -> dict[str, Engine]:
    """Teacher, every engine of the student alone and with its book, and a pipeline of transformers."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(model / "student"), top_k=None, truncation=True)
    engines: dict[str, Engine] = {
        TEACHER: OpenBook(load_backend(model / "teacher", "torch", threads)).predict_proba,
        PIPELINE: lambda rows: classify([as_pair(row) for row in rows], batch_size=len(rows)),
    }
    for name in BACKENDS:
        whole = OpenBook.from_pretrained(model, name, threads)
        engines[f"student, {name}"] = OpenBook(whole.backend).predict_proba
        if whole.book is not None:
            engines[f"open book, {name}"] = whole.predict_proba
    return engines


def as_pair(row: Text) -> Any:
    """A pair as a pipeline takes it."""
    return row if isinstance(row, str) else dict(zip(("text", "text_pair"), fields(row), strict=True))


def turns(engines: Mapping[str, Engine], texts: Sequence[Text], batch: int, rounds: int) -> dict[str, Any]:
    """Every engine answers the same rows before the next rows come, in a changing order."""
    random, order = np.random.default_rng(0), list(engines)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(WARM + rounds):
        rows = [texts[place] for place in random.choice(len(texts), batch, replace=len(texts) < batch)]
        order = [*order[1:], order[0]]
        for name in order:
            started = clock()
            engines[name](rows)
            if number >= WARM:
                seconds[name].append(clock() - started)
    teacher = median(seconds[TEACHER])
    return {
        name: {
            "p50": median(taken), "p95": float(np.percentile(taken, 95)), "rows_a_second": batch / median(taken),
            "times_the_teacher": teacher / median(taken),
            "times_the_torch_student": median(seconds["student, torch"]) / median(taken),
        }
        for name, taken in seconds.items()
    }  # fmt: skip


def servers_of(model: Path, threads: int) -> dict[str, list[str]]:
    """The command of every server, without its port."""
    ours = [sys.executable, "-m", "openbook", "serve", "--model", str(model), "--threads", str(threads)]
    plain = [sys.executable, "-m", "openbook.bench.plain_server", str(model / "student")]
    return {"pipeline": [*plain, "PORT", str(threads)]} | {
        name: [*ours, "--backend", name, "--port", "PORT"] for name in BACKENDS
    }


@contextmanager
def served(command: Sequence[str], patience: float = 60.0) -> Iterator[tuple[str, psutil.Process]]:
    """A server that is ready; it gets SIGTERM at the end. Raises RuntimeError if it does not start."""
    port = free_port()
    told = [str(port) if part == "PORT" else part for part in command]
    process = subprocess.Popen(told, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        url, ends = f"http://127.0.0.1:{port}", clock() + patience
        while not answers(f"{url}/ready"):
            if process.poll() is not None or clock() > ends:
                raise RuntimeError(f"{' '.join(told)} did not become ready (exit status {process.poll()})")
            time.sleep(0.1)
        yield f"{url}/predict", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == load.GOOD)
    except (urllib.error.URLError, OSError):
        return False


def loaded(url: str, process: psutil.Process, bodies: Sequence[Any], seconds: float, soak: int) -> dict[str, Any]:
    """As many requests as each number of connections makes; then half of the most a second; then very many."""
    load.closed(url, bodies, 4, min(seconds, 2.0))  # warm
    by_connections = {str(count): load.closed(url, bodies, count, seconds).told() for count in CONNECTIONS}
    saturation = max(one["per_second"] for one in by_connections.values())
    windows = [load.open_loop(url, bodies, saturation / 2, seconds, seed=place).told() for place in range(WINDOWS)]
    half = {name: median([one[name] for one in windows]) for name in ("per_second", "p50", "p95", "p99")}
    found: dict[str, Any] = {"closed": by_connections, "saturation": saturation, "half": half, "windows": windows}
    if soak:
        found["soak"] = soaked(url, process, bodies, soak)
    return found


def soaked(url: str, process: psutil.Process, bodies: Sequence[Any], requests: int, parts: int = 10) -> dict[str, Any]:
    """Memory of the server after each tenth of many requests, in bytes."""
    memory, failures = [], 0
    for _ in range(parts):
        seen = load.counted(url, bodies, 16, requests // parts)
        failures += sum(seen.failures.values())
        memory.append(process.memory_info().rss)
    return {"requests": requests, "failures": failures, "bytes": memory, "grown": memory[-1] - memory[0]}


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    for batch, engines in result["engines"].items():
        table = Table(title=f"Batches of {batch}, {result['threads']} thread(s), {result['rounds']} turns: medians")
        for name in ("engine", "ms", "p95 ms", "texts a second", "x teacher", "x torch student"):
            table.add_column(name, justify="left" if name == "engine" else "right")
        for name, one in engines.items():
            table.add_row(
                name, f"{1e3 * one['p50']:.2f}", f"{1e3 * one['p95']:.2f}", f"{one['rows_a_second']:,.0f}",
                f"{one['times_the_teacher']:.1f}", f"{one['times_the_torch_student']:.1f}",
            )  # fmt: skip
        yield table
    table = Table(title="Servers, one text a request")
    for name in ("server", *(f"{count} conn., a second (p99 ms)" for count in CONNECTIONS), "half load p50 / p99 ms"):
        table.add_column(name, justify="left" if name == "server" else "right")
    for name, one in result["servers"].items():
        rates = (f"{told['per_second']:,.0f} ({1e3 * told['p99']:.1f})" for told in one["closed"].values())
        table.add_row(name, *rates, f"{1e3 * one['half']['p50']:.1f} / {1e3 * one['half']['p99']:.1f}")
        if "soak" in one:
            console.print(
                f"{name}: after {one['soak']['requests']:,} requests {one['soak']['grown'] / 1e6:+.1f} MB,"
                f" {one['soak']['failures']} failures",
                markup=False,
            )
    yield table
