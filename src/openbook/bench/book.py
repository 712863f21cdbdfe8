"""What the open book costs: time beside the student's own, bytes beside the student's, accuracy of compact forms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from openbook.answers import Text, probabilities_of
from openbook.backends.pytorch import TorchBackend
from openbook.bench.book_accuracy import JUDGED, accuracy_of_run, accuracy_of_synthetic
from openbook.bench.book_edits import timed_edit
from openbook.bench.book_targets import (
    ALONE,
    COMPACT,
    EXACT,
    LARGEST,
    POLICY,
    SKIPPING,
    accuracy_targets,
    edit_target,
    fitting,
    targets,
)
from openbook.bench.measure import Rival, median, threads_of_children
from openbook.bench.synthetic_book import CLASSES, MAX_LENGTH, forms_of, near, synthetic_book
from openbook.config import StudentSettings, UsageError
from openbook.console import console
from openbook.knowledge_base import forms
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.index import Index, exact_index, open_index, tie_aware_recall
from openbook.knowledge_base.search import Hits
from openbook.models.encoder import Head
from openbook.models.student import load_tokenizer, new_student
from openbook.types import KnowledgeBase

SHAPES = {  # random weights: they take as long as learned ones
    "6 x 768": StudentSettings(architecture="bert", layers=6, hidden_size=768, heads=12, intermediate_size=3072),
    "3 x 128": StudentSettings(layers=3, hidden_size=128, heads=4),  # the quick start's
}
SIZES = (2_500, 10_000, 67_000, 393_000)  # entries: RTE, CoLA, SST-2, MNLI
CALLS = {1: 200, 32: 100}  # timed calls by batch size (specification, section 2.14)
WARM = 20  # calls before the clock starts
JUDGES = 1_000  # queries that tell the recall, at most
STAGES = ("tokenise", "forward", "search", "combine")
HNSW_ENTRY = 400  # bytes of a node and its links: 272 where it has 32 (specification, section 2.12)

clock = time.perf_counter


@dataclass(frozen=True)
class Arm:
    """One way to open the book."""

    base: KnowledgeBase
    index: Index
    retrieval: Retrieval
    built_seconds: float


def run(
    tokenizer: str,
    texts: Sequence[Text],
    folder: Path,
    sizes: Sequence[int] = SIZES,
    shapes: Mapping[str, StudentSettings] = SHAPES,
    calls: Mapping[int, int] = CALLS,
    model: Path | None = None,
    k: int = 16,
    threads: int = 1,
    edited: tuple[int, int] = (67_000, 1_000),
) -> dict[str, Any]:
    """Time every student with every size of book; weigh all forms; add entries to a large book.

    `tokenizer` names the model whose word-pieces the students read and which embeds new entries; `texts` are what they
    are asked. Books are synthetic clustered keys, and so are queries: answers mean nothing. Accuracy is that of the
    finished run in `model`, on its held-out rows, or else of synthetic labels; and of the form that fits in a quarter
    of each student, for the largest book up to 67 k. `folder` keeps graphs between calls.
    Raises UsageError where there are fewer texts than the largest batch.
    """
    if len(texts) < max(calls):
        raise UsageError(
            f"there are {len(texts)} texts to ask, but batches of {max(calls)}; name a task with more rows"
        )
    timings = [
        timed_book(name, shape, size, tokenizer, texts, folder, calls, k, threads)
        for name, shape in shapes.items()
        for size in sizes
    ]
    accuracy = [accuracy_of_run(model) if model else accuracy_of_synthetic(k)]
    largest = [one for one in timings if one["entries"] == max((size for size in sizes if size <= LARGEST), default=0)]
    accuracy += [accuracy_of_synthetic(k, one["entries"], one["width"], [fitting(one)]) for one in largest]
    edit = timed_edit(tokenizer, texts, folder, *edited, threads)
    return {
        "texts": len(texts),
        "k": k,
        "machine": {"cores": os.cpu_count(), "threads": threads, "torch": torch.__version__, "dtype": "fp32"},
        "timings": timings,
        "accuracy": accuracy,
        "targets": [*targets(timings), *accuracy_targets(accuracy), edit_target(edit)],
        "edit": edit,
    }


def timed_book(
    name: str,
    shape: StudentSettings,
    size: int,
    tokenizer: str,
    texts: Sequence[Text],
    folder: Path,
    calls: Mapping[int, int],
    k: int,
    threads: int,
) -> dict[str, Any]:
    """One student with one book, in a process of its own; within it, all ways to open the book take turns."""
    with threads_of_children(threads):
        rival = Rival(f"{name}, {size}", open_student, shape, size, tokenizer, texts, folder, k, threads)
        facts: dict[str, Any] = rival.ask((0, 0))[1]
        by_batch = {str(batch): rival.ask((batch, count))[1] for batch, count in calls.items()}
        peak = rival.close()
    for batch, arms in by_batch.items():
        told = {arm: f"{100 * one['overhead_p50']:.1f} %" for arm, one in arms.items() if arm != ALONE}
        console.print(f"{name}, {size:,} entries, batch {batch}: {told}", markup=False)
    return {"student": name, "entries": size, **facts, "peak_bytes": peak, "batches": by_batch}


def open_student(
    shape: StudentSettings, size: int, tokenizer: str, texts: Sequence[Text], folder: Path, k: int, threads: int
) -> Callable[[tuple[int, int]], dict[str, Any]]:
    """Answers (batch size, calls) with times, and (0, 0) with what does not depend on them."""
    torch.set_num_threads(threads)
    pieces = load_tokenizer(tokenizer)
    pieces.model_max_length = MAX_LENGTH
    student = new_student(shape, Head(CLASSES), pieces, len(pieces), MAX_LENGTH, seed=0)
    backend = TorchBackend(student, pieces)
    base = synthetic_book(size, student.embedding_width)
    arms = arms_of(base, typical_confidence(backend, texts), folder / f"{size}x{student.embedding_width}", k, threads)
    queries = near(base.keys, len(texts))
    held = sum(weight.numel() * weight.element_size() for weight in student.parameters())

    def answer_to(request: tuple[int, int]) -> dict[str, Any]:
        batch, calls = request
        if not batch:
            return facts(base, arms, queries, held)
        return summary(turns(backend, arms, texts, queries, batch, calls))

    return answer_to


def arms_of(base: KnowledgeBase, theta: float, folder: Path, k: int, threads: int) -> dict[str, Arm]:
    """Exact search, what the policy chooses, the same with about half of the texts skipped, and exact search in 64."""
    plain = Retrieval(top_k=k, temperature=0.1, beta=0.5)
    started = clock()
    index = open_index(base.keys, folder=folder, threads=threads)
    seconds = clock() - started
    skipping = replace(plain, skip="confident", theta=theta)
    arms = {EXACT: Arm(base, exact_index(base.keys, None, "asked for"), plain, 0.0)}
    if index.kind != "exact":
        arms[POLICY] = Arm(base, index, plain, seconds)
    arms[SKIPPING] = Arm(base, index, skipping, seconds)
    if base.keys.shape[1] > 64:
        constants = forms.fit(base.keys, COMPACT)
        keys = forms.decode(forms.encode(base.keys, COMPACT, constants), COMPACT, constants)
        small = replace(base, keys=keys, basis=constants["basis"])
        started = clock()
        index = open_index(keys, folder=folder / COMPACT, basis=small.basis, threads=threads)
        arms[COMPACT] = Arm(small, index, plain, clock() - started)
    return arms


def turns(
    backend: TorchBackend, arms: Mapping[str, Arm], texts: Sequence[Text], queries: NDArray[Any], batch: int, calls: int
) -> dict[str, list[dict[str, float]]]:
    """The stages' seconds of every call; all arms answer a batch before the next one comes, in a changing order."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (ALONE, *arms)}
    order = list(found)
    random = np.random.default_rng(0)
    for number in range(WARM + calls):
        rows = random.choice(len(texts), batch, replace=False)
        order = [*order[1:], order[0]]
        for name in order:
            stages = one_call(backend, arms.get(name), [texts[row] for row in rows], queries[rows])
            if number >= WARM:
                found[name].append(stages)
    return found


def one_call(backend: TorchBackend, arm: Arm | None, rows: list[Text], queries: NDArray[Any]) -> dict[str, float]:
    """Seconds of each stage of answering a batch, and the share of it that was looked up."""
    started = clock()
    batch = backend.batch(backend.encode(rows))
    tokenised = clock()
    with torch.inference_mode():
        said = backend.encoder(batch)
    outputs = probabilities_of(said.logits.numpy())
    heard = clock()
    if arm is None:
        return {"tokenise": tokenised - started, "forward": heard - tokenised, "total": heard - started}
    searching = 0.0

    def search(asked: NDArray[Any], k: int, exclude: Sequence[Iterable[int]] | None) -> Hits:
        nonlocal searching
        begun = clock()
        hits = arm.index.search(asked, k, exclude)
        searching += clock() - begun
        return hits

    answered = answer(outputs, queries, arm.base, arm.retrieval, search)
    done = clock()
    return {
        "tokenise": tokenised - started,
        "forward": heard - tokenised,
        "search": searching,
        "combine": done - heard - searching,
        "total": done - started,
        "retrieved": float(answered.retrieved.mean()),
    }


def summary(found: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Milliseconds and overheads of every arm. Overhead = p50 with the book / p50 without - 1, likewise p95."""
    told: dict[str, Any] = {}
    for name, calls in found.items():
        p50, p95 = (float(np.quantile([call["total"] for call in calls], share)) for share in (0.5, 0.95))
        stages = {one: round(1e3 * median([call.get(one, 0.0) for call in calls]), 4) for one in STAGES}
        told[name] = {"p50": 1e3 * p50, "p95": 1e3 * p95, "stages": stages}
        if name != ALONE:
            told[name]["overhead_p50"] = p50 / (told[ALONE]["p50"] / 1e3) - 1
            told[name]["overhead_p95"] = p95 / (told[ALONE]["p95"] / 1e3) - 1
            told[name]["retrieved"] = float(np.mean([call["retrieved"] for call in calls]))
    return told


def facts(base: KnowledgeBase, arms: Mapping[str, Arm], queries: NDArray[Any], student_bytes: int) -> dict[str, Any]:
    entries, width = base.keys.shape
    distinct = {id(arm.index): arm for arm in arms.values()}  # two arms share one
    recalls = {place: recall_of(arm, queries) for place, arm in distinct.items()}
    sizes = {form: forms.size_of(entries, width, base.values.shape[1], form) for form in forms_of(width)}
    indexes = {
        name: {
            "kind": arm.index.kind,
            "reason": arm.index.reason,
            "recall": recalls[id(arm.index)],
            "recall_when_built": arm.index.recall,
            "parameters": dict(arm.index.parameters),
            "efforts": {str(number): effort for number, effort in arm.index.efforts.items()},
            "seconds_to_open": arm.built_seconds,
            "bytes": index_bytes(arm.index),
        }
        for name, arm in arms.items()
    }
    return {"student_bytes": student_bytes, "width": width, "book_bytes": sizes, "indexes": indexes}


def recall_of(arm: Arm, queries: NDArray[Any]) -> float:
    """Tie-aware, of the neighbours of what is asked: an index knows its recall of other queries only."""
    if arm.index.kind == "exact":
        return 1.0
    exact = exact_index(arm.index.keys, arm.index.basis, "")
    return tie_aware_recall(*(one.search(queries[:JUDGES], arm.retrieval.top_k) for one in (arm.index, exact)))


def index_bytes(index: Index) -> int:
    """What an index holds in memory beside the keys: its own copy of them, a byte a number, and its graph."""
    if index.kind == "exact":
        return 0
    entries, width = index.keys.shape
    beside = HNSW_ENTRY * entries if index.kind == "hnsw" else 8 * entries + 4 * width * index.parameters["lists"]
    return int(entries * width + beside)


def typical_confidence(backend: TorchBackend, texts: Sequence[Text]) -> float:
    """The median of the student's largest probability: to skip from there on skips about half of the texts."""
    with torch.inference_mode():
        said = backend.encoder(backend.batch(backend.encode(texts[: max(CALLS)])))
    return float(np.median(probabilities_of(said.logits.numpy()).max(axis=1)))


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows."""
    machine = result["machine"]
    title = f"milliseconds, {machine['threads']} threads, random weights and synthetic keys, k = {result['k']}"
    speed = Table("student", "entries", "batch", "book", "p50", "p95", "overhead", *STAGES, "looked up", title=title)
    for one in result["timings"]:
        for batch, arms in one["batches"].items():
            for name, told in arms.items():
                kind = f"{name} ({one['indexes'][name]['kind']})" if name in one["indexes"] else name
                over = f"{100 * told['overhead_p50']:+.1f} %" if name != ALONE else ""
                cells = [f"{told[fact]:.2f}" for fact in ("p50", "p95")]
                stages = [f"{told['stages'][stage]:.2f}" for stage in STAGES]
                share = f"{100 * told['retrieved']:.0f} %" if name != ALONE else ""
                speed.add_row(one["student"], f"{one['entries']:,}", batch, kind, *cells, over, *stages, share)
    sizes = Table("student", "entries", "student, MB", *result["timings"][0]["book_bytes"], title="book, MB")
    for one in result["timings"]:
        columns = [
            f"{one['book_bytes'][form] / 1e6:.2f}" if form in one["book_bytes"] else ""
            for form in result["timings"][0]["book_bytes"]
        ]
        sizes.add_row(one["student"], f"{one['entries']:,}", f"{one['student_bytes'] / 1e6:.1f}", *columns)
    qualities = [quality_of(judged) for judged in result["accuracy"]]
    edit = result["edit"]
    title = f"seconds to add {edit['added']:,} entries to {edit['entries']:,} ({edit['index']})"
    edits = Table("embed texts", "write", "load", "follow in index", "found", title=title)
    parts = [f"{edit[name]:.3f}" for name in ("embed_seconds", "add_seconds", "load_seconds", "index_seconds")]
    edits.add_row(*parts, f"{100 * edit['found']:.0f} %")
    aims = Table("target", "found", "at most", "", title="targets")
    for aim in result["targets"]:
        aims.add_row(aim["what"], f"{aim['found']:.4f}", f"{aim['at_most']:.2f}", "met" if aim["met"] else "MISSED")
    return [speed, sizes, *qualities, edits, aims]


def quality_of(judged: Mapping[str, Any]) -> Table:
    opened = ", ".join(f"{name} {value}" for name, value in judged["retrieval"].items())
    closed = "; tuning had closed the book: judged with the best setting that opens it" if judged["closed"] else ""
    title = f"{judged['metric']} of {judged['keys']} keys, {judged['width']} wide, {judged['rows']:,} rows"
    quality = Table("form", "MB", "recall", "neighbours", "points lost", "with student", "points lost", title=title)
    quality.caption = opened + closed
    for form, told in judged["forms"].items():
        cells = ["" if told[fact] is None else f"{told[fact]:.4f}" for fact in JUDGED]
        quality.add_row(form, f"{told['bytes'] / 1e6:.2f}", *cells)
    return quality
