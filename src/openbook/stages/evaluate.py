"""Models x seeds on the test split -> scores, differences with intervals, size, speed, and a few answers explained."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.answers import Answers, Text, outputs_of
from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import read_json, write_json
from openbook.config import Kind, WholeKind
from openbook.console import track
from openbook.courses import CORPUS, KD, LABELS, OPEN_BOOK, STUDENTS, TEACHER
from openbook.inference import answers_of
from openbook.keys import queries_in
from openbook.knowledge_base import store
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.search import search_of
from openbook.loading import load
from openbook.metrics import agreement, paired_difference, score
from openbook.models.encoder import load_finished
from openbook.predictor import OpenBook
from openbook.student_keys import is_by_student, queries, rekeyed
from openbook.types import Example, KnowledgeBase
from openbook.workspace import Run

COMPARED = (
    (KD, LABELS),
    (CORPUS, LABELS),
    (CORPUS, KD),
    (CORPUS, TEACHER),
    (OPEN_BOOK, CORPUS),
    (OPEN_BOOK, TEACHER),
)
BATCH = 32


def inputs(run: Run) -> dict[str, Any]:
    return {"task": run.task_digest, "metric": run.task.metric, "settings": run.recipe.evaluate.model_dump(mode="json")}


def build(run: Run, folder: Path) -> None:
    outputs = all_outputs(run)
    gold = np.array([example.label for example in run.task.test])
    with threads_set_to(run.recipe.evaluate.threads):
        timings = time_models(run)
    models = [describe(run, name, outputs, gold, timings[name]) for name in outputs]
    compared = [(a, b, paired_difference(run.task.metric, outputs[a], outputs[b], gold)) for a, b in COMPARED]
    results = {
        "task": run.task.name,
        "kind": run.task.kind,
        "metric": run.task.metric,
        "split": "test",
        "rows": len(gold),
        "labels": run.task.labels,
        "seeds": list(run.recipe.seeds),
        "models": models,
        "comparisons": [
            {"a": a, "b": b, "difference": found.mean, "low": found.low, "high": found.high} for a, b, found in compared
        ],
        "timing": timing_conditions(run),
    }
    write_json(folder / "results.json", results)
    write_json(folder / "examples.json", explained(run, gold))
    for name, one in outputs.items():
        np.save(folder / f"{name}.npy", np.stack(one))  # (seeds, n, C)


def all_outputs(run: Run) -> dict[str, list[NDArray[Any]]]:
    """Probabilities (n, C) of every model on the test rows, one array a seed; the teacher has one."""
    base = store.load(run.folder / "knowledge_base")
    tuned = read_json(run.folder / "knowledge_base" / "tuning.json")
    teacher = load_finished(str(run.folder / TEACHER))
    heard = answers_of(teacher, run.tokens("test-for-teacher", run.task.test, run.teacher_tokenizer))
    outputs: dict[str, list[NDArray[Any]]] = {TEACHER: [outputs_of(heard, run.task.kind)]}
    texts = run.tokens("test", run.task.test, run.tokenizer)
    outputs |= {name: [] for name in (*STUDENTS, OPEN_BOOK)}
    with track("reading the test split", len(STUDENTS) * len(run.recipe.seeds)) as advance:
        for name in STUDENTS:
            for seed in run.recipe.seeds:
                backend = TorchBackend.load(run.folder / "students" / name / f"seed-{seed}")
                answers = answers_of(backend.encoder, texts)
                outputs[name].append(outputs_of(answers, run.task.kind))
                if name == CORPUS:
                    own = rekeyed(base, backend) if is_by_student(base) else base
                    asked = queries(own, answers.embedding, queries_in(backend.folder))
                    outputs[OPEN_BOOK].append(with_book(answers, asked, run.task.kind, own, tuned[str(seed)]))
                advance(sum(map(len, outputs.values())))
    return outputs


def with_book(
    answers: Answers, asked: NDArray[Any], kind: str, base: KnowledgeBase, tuned: dict[str, Any]
) -> NDArray[Any]:
    """By exact search: an approximate index would add a difference of its own to what is reported."""
    retrieval = Retrieval.from_manifest(tuned["retrieval"])
    return answer(outputs_of(answers, kind), asked, base, retrieval, search_of(base)).outputs


def describe(
    run: Run, name: str, outputs: dict[str, list[NDArray[Any]]], gold: NDArray[Any], timing: dict[str, Any]
) -> dict[str, Any]:
    scores = [score(run.task.metric, one, gold) for one in outputs[name]]
    folder = run.folder / (TEACHER if name == TEACHER else "student")
    book = {"book_bytes": book_bytes(run)} if name == OPEN_BOOK else {}
    return {
        "name": name,
        "scores": scores,
        "mean": statistics.mean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "parameters": sum(weight.numel() for weight in load_finished(str(folder)).parameters()),
        "bytes": folder_bytes(folder, ".safetensors"),
        **book,
        **timing,
        "agreement": agreements(run.task.kind, outputs[name], outputs[TEACHER][0]),
    }


def agreements(kind: Kind, outputs: list[NDArray[Any]], teacher: NDArray[Any]) -> float | None:
    """Share of texts that get the teacher's label, or labels, over all seeds; scores of a regression have none."""
    return None if kind == "regression" else statistics.mean(agreement(one, teacher, kind) for one in outputs)


def book_bytes(run: Run) -> int:
    """Of keys and values; texts are counted apart, since they serve the reader."""
    files = read_json(run.folder / "knowledge_base" / "manifest.json")["files"]
    return sum(file["bytes"] for name, file in files.items() if name.endswith(".npy"))


def folder_bytes(folder: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"*{suffix}"))


def time_models(run: Run) -> dict[str, dict[str, Any]]:
    """Latency of single texts and throughput of batches, tokenising included; the models take turns in every round."""
    settings = run.recipe.evaluate
    rows = [as_text(example) for example in run.task.test]
    singles, many = rows[: settings.latency_rows], rows[: settings.throughput_rows]
    book = OpenBook.from_pretrained(run.folder)
    alone = OpenBook(book.backend)
    teacher = OpenBook(load(run.folder / TEACHER, "torch"))
    timed = {TEACHER: teacher, CORPUS: alone, OPEN_BOOK: book}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    rates: dict[str, list[float]] = {name: [] for name in timed}
    with track("timing", settings.repeats) as advance:
        for model in timed.values():
            model.predict_proba(singles)
        for done in range(settings.repeats):
            for row in singles:
                for name, model in timed.items():
                    seconds[name].append(stopwatch(lambda model=model, row=row: model.predict_proba(row)))  # type: ignore[misc]
            for name, model in timed.items():
                model.predict_proba(many[:BATCH])  # the model before has filled the caches with its own weights
                rates[name].append(len(many) / stopwatch(lambda model=model: model.predict_proba(many)))  # type: ignore[misc]
            advance(done + 1)
    found = {name: summary(seconds[name], rates[name]) for name in timed}
    return {**found, LABELS: found[CORPUS], KD: found[CORPUS]}  # the same shape


@contextmanager
def threads_set_to(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stopwatch(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summary(seconds: list[float], rates: list[float]) -> dict[str, Any]:
    p50, p95 = (float(q) * 1000 for q in np.quantile(seconds, (0.5, 0.95)))
    return {"latency_ms": {"p50": p50, "p95": p95}, "throughput": statistics.median(rates)}


def timing_conditions(run: Run) -> dict[str, Any]:
    return {
        "threads": run.recipe.evaluate.threads,
        "batch_size": BATCH,
        "repeats": run.recipe.evaluate.repeats,
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
    }


def as_text(example: Example) -> Text:
    return example.text if example.text_pair is None else (example.text, example.text_pair)


def explained(run: Run, gold: NDArray[Any]) -> list[dict[str, Any]]:
    """A few test rows with their neighbours: those the book decided first, then wrong ones, then right ones."""
    book = OpenBook.from_pretrained(run.folder)
    rows = [as_text(example) for example in run.task.test]
    told = book.explain(rows)
    records = []
    for row, explanation, truth in zip(rows, told, gold, strict=True):
        found = explanation.evidence
        right = None if run.kind == "regression" else same(explanation.prediction, named(run, truth))
        neighbours = [
            {
                "text": neighbour.text,
                "label": book.name(neighbour.value),
                "similarity": neighbour.similarity,
                "weight": neighbour.weight,
                "contribution": neighbour.contribution,
            }
            for neighbour in found.neighbours[:5]
        ]
        records.append(
            {
                "text": row if isinstance(row, str) else " | ".join(row),
                "gold": named(run, truth),
                "prediction": explanation.prediction,
                "alone": explanation.alone,
                "probability": float(found.result[found.predicted]),
                "decisive": found.decisive,
                "right": right,
                "neighbours": neighbours,
            }
        )
    records.sort(key=lambda record: (not record["decisive"], record["right"] is not False))
    return varied(records, run.recipe.evaluate.examples)


def named(run: Run, truth: Any) -> str | float | list[str]:
    """A gold label as answers are: its name, the score, or the names of those that apply."""
    labels = run.task.labels or ()
    by_kind: dict[WholeKind, Callable[[], str | float | list[str]]] = {
        "classification": lambda: labels[int(truth)],
        "regression": lambda: float(truth),
        "multi_label": lambda: [name for name, applies in zip(labels, truth, strict=True) if applies],
    }
    return by_kind[run.kind]()


def same(answer: str | float | list[str], gold: str | float | list[str]) -> bool:
    """Whether an answer names what is gold; the order of several labels means nothing."""
    return set(answer) == set(gold) if isinstance(answer, list) and isinstance(gold, list) else answer == gold


def varied(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to a third decided by the book, up to a third wrong, the rest right."""
    third = max(1, count // 3)
    decisive = [record for record in records if record["decisive"]][:third]
    wrong = [record for record in records if record["right"] is False and record not in decisive][:third]
    chosen = decisive + wrong
    return (
        chosen
        + [record for record in records if record not in chosen and record["right"] is not False][: count - len(chosen)]
    )
