"""A finished student -> ONNX graphs in fp32 and int8 beside it, each proven against torch before it is there."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from openbook.answers import Encoded, Text
from openbook.backends.base import Backend, BackendName
from openbook.backends.onnx import EXPORT, FILES, RECORD, OnnxBackend
from openbook.backends.onnx import read as read_object
from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import digest_file, exchange, finish_renaming, partial_folder, sync, write_json
from openbook.config import RunError, UsageError
from openbook.knowledge_base import store
from openbook.models.graph import graph_of, in_int8, refuse_unexportable, save_graph
from openbook.parity import cases, in_cases, prove_close, prove_equal
from openbook.student_keys import rows_of

FORMAT = 1
READ = ("config.json", "tokenizer.json", "tokenizer_config.json")  # what an engine reads besides the graph
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LEAST_OPSET = 18
FEWEST, MOST = 32, 1000  # rows that parity is proven on
TIMED = {"batch 1": 1, "batch 32": 32}
ROUNDS, ROWS_OF_ONE = 9, 8


@dataclass(frozen=True)
class Wish:
    """What is to be exported, and how much of torch's answers int8 must keep."""

    int8: bool = True
    opset: int | None = None  # None: the exporter's own choice
    agreement: float = 0.98  # share of equal classes; in regression, correlation


def export(folder: Path, wish: Wish, rows: Sequence[Text] | None = None) -> dict[str, Any]:
    """Write `student/onnx` inside `folder`, and return its record: `export.json`.

    `rows` are real texts or pairs to prove parity on; by default those of the book. Raises UsageError before anything
    is loaded, and RunError where fp32 is not what torch is: nothing is written then. Where int8 is not near enough,
    fp32 is written alone, and the record's `parity` says why.
    """
    student = checked_student(folder, wish)
    texts = spread(texts_of_book(folder / "knowledge_base") if rows is None else list(rows))
    weights = digest_file(student / "model.safetensors")
    live = TorchBackend.load(student)
    encoded = live.encode(texts)
    with staging(student) as stage, one_thread():
        made = stage / EXPORT
        graph = graph_of(live.encoder, wish.opset)
        record: dict[str, Any] = {
            "format": FORMAT,
            "weights": weights,
            "inputs": [value.name for value in graph.graph.inputs],
            "outputs": [value.name for value in graph.graph.outputs],
            "max_length": live.max_length,
            "pad": live.pieces.pad,
            "opset": graph.opset_imports[""],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *NEEDED)},
        }
        engines, parity = proven(live, graph, stage, record, encoded, wish)
        timing = timed(engines, encoded)
        record |= {
            "parity": parity,
            "timing": timing,  # milliseconds a row, on one thread
            "recommended": min(timing, key=lambda name: math.prod(timing[name].values())),
        }
        describe(made, record)
        if digest_file(student / "model.safetensors") != weights:
            raise RunError(f"{student} changed while it was exported; export again when it is finished")
        sync(made)
        exchange(made, student / EXPORT)
    return record


def checked_student(folder: Path, wish: Wish) -> Path:
    """The student's folder. Raises UsageError for one that cannot be exported, and for wishes that cannot be met."""
    student = folder / "student"
    if not (student / "config.json").is_file() or not (student / "model.safetensors").is_file():
        raise UsageError(
            f"--model {folder} holds no finished student/ folder; name a run folder such as runs/quickstart"
        )
    if wish.opset is not None and wish.opset < LEAST_OPSET:
        raise UsageError(
            f"--opset {wish.opset} is too old for the exporter; give {LEAST_OPSET} or more, or leave it out"
        )
    if not 0 < wish.agreement <= 1:
        raise UsageError(f"--agreement {wish.agreement:g} is no share; give a number above 0, and at most 1")
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"{', '.join(absent)} is not installed, which export needs: pip install 'openbook[export]'")
    refuse_unexportable(str(read_object(student / "config.json").get("model_type")))
    return student.resolve()


def texts_of_book(folder: Path) -> list[Text]:
    base = store.load(folder) if (folder / "manifest.json").is_file() else None
    if base is None or not any(base.texts):
        raise UsageError(f"{folder} holds no texts to prove parity on; give --rows FILE with real ones")
    return rows_of(base)


def spread(texts: Sequence[Text]) -> list[Text]:
    """At most `MOST` of the texts, evenly spread. Raises UsageError for too few."""
    if len(texts) < FEWEST:
        raise UsageError(f"there are {len(texts)} rows to prove parity on; give --rows FILE with {FEWEST} or more")
    return [texts[place] for place in np.linspace(0, len(texts) - 1, min(MOST, len(texts)), dtype=int)]


@contextmanager
def staging(student: Path) -> Iterator[Path]:
    """A hidden folder that engines take for the student's, with room for the export; gone afterwards.

    What an export that was killed had left is thrown away, or put back where it was about to be exchanged.
    """
    place = student / EXPORT
    stage = partial_folder(place)
    lock = FileLock(student / f".{EXPORT}.lock")
    try:
        with lock.acquire(timeout=0):
            finish_renaming(place)
            shutil.rmtree(stage, ignore_errors=True)
            (stage / EXPORT).mkdir(parents=True)
            for name in READ:
                shutil.copyfile(student / name, stage / name)
            try:
                yield stage
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except Timeout as error:
        raise UsageError(f"{student} is being exported by another process; wait until it is done") from error


def proven(
    live: TorchBackend, graph: Any, stage: Path, record: dict[str, Any], encoded: Sequence[Encoded], wish: Wish
) -> tuple[dict[str, Backend], dict[str, Any]]:
    """Write the graphs; the engines that may be used, torch among them, and what was found of them.

    Raises RunError if fp32 is not equal to torch. An int8 that is not near enough is removed.
    """
    whole = list(in_cases(encoded, TIMED["batch 32"]))
    cut_rows = list(cases(encoded, live.max_length))
    engine = opened(graph, stage, record, "onnx")
    engines: dict[str, Backend] = {"torch": live, "onnx": engine}
    parity: dict[str, Any] = {"rows": len(encoded), "cases": len(whole) + len(cut_rows), "longest": live.max_length}
    parity["onnx"] = prove_equal("onnx", live.run, engine.run, [*whole, *cut_rows])
    if wish.int8:
        try:
            small = opened(in_int8(graph), stage, record, "onnx-int8")
            kind = live.about.kind
            parity["onnx-int8"] = prove_close("onnx-int8", live.run, small.run, whole, cut_rows, kind, wish.agreement)
            engines["onnx-int8"] = small
        except RunError as error:
            parity["onnx-int8"] = {"refused": str(error)}
            for path in (stage / EXPORT).glob(f"{FILES['onnx-int8']}*"):
                path.unlink()
    return engines, parity


def opened(graph: Any, stage: Path, record: dict[str, Any], name: BackendName) -> OnnxBackend:
    """Write a graph and run it as users will. Raises RunError if ONNX Runtime refuses it."""
    save_graph(graph, stage / EXPORT / FILES[name])
    describe(stage / EXPORT, record)
    try:
        return OnnxBackend(stage, name, threads=1)
    except UsageError as error:
        raise RunError(f"{name} was exported, but ONNX Runtime cannot run it: {error}") from error


def describe(made: Path, record: dict[str, Any]) -> None:
    """Write the record with the digests of the files that are there now."""
    files = sorted(path for path in made.iterdir() if path.name != RECORD)
    record["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": digest_file(path)} for path in files}
    write_json(made / RECORD, record)


def timed(engines: Mapping[str, Backend], encoded: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Milliseconds a row of every engine, alone and in batches of 32: medians of rounds in which they take turns."""
    found: dict[str, dict[str, float]] = {name: {} for name in engines}
    for shape, size in TIMED.items():
        rows = encoded[: max(size, ROWS_OF_ONE)]
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS + 1):
            for name, engine in engines.items():
                started = time.perf_counter()
                for start in range(0, len(rows), size):
                    engine.run(rows[start : start + size])
                seconds[name].append(time.perf_counter() - started)
        for name, taken in seconds.items():  # without the first round, which warms up
            found[name][shape] = round(1000 * statistics.median(taken[1:]) / len(rows), 4)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
