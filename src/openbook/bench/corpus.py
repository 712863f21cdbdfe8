"""Bank, index and retrieval at the size of a real corpus: seconds, memory, and speed against other BM25 engines."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from openbook.bench.measure import Rival, measured, median
from openbook.bench.rivals import K1, NEEDED, RIVALS, THREADS, B, open_ours
from openbook.checkpoint import fingerprint, read_json, write_json
from openbook.config import CorpusSettings, TaskSettings, UsageError
from openbook.console import console
from openbook.data.sources import digest, documents
from openbook.data.tasks import TaskData, load_task, unreported_texts
from openbook.retrieval.anchors import anchors_of
from openbook.retrieval.bank import Bank, build_bank
from openbook.retrieval.bm25 import Index
from openbook.retrieval.passages import LeakGuard, key

OURS = "openbook"
CLOSE = 1e-3  # of two scores of one hit, one of them in float32
WARM = 64  # queries before the clock starts


def run(
    settings: CorpusSettings,
    tasks: Sequence[str],
    rivals: Sequence[str],
    k: int,
    anchors: int,
    rounds: int,
    folder: Path,
) -> dict[str, Any]:
    """Build bank and index with the clock running, then let every engine answer the same anchors in turns.

    What was built in `folder` from the same sources is kept, with what it took; remove it to measure again.
    Raises UsageError for a rival that is not installed.
    """
    for name in rivals:
        if importlib.util.find_spec(NEEDED[name]) is None:
            raise UsageError(f"--rival {name} is not installed; pip install 'openbook[bench]', or leave it out")
    loaded = {name: load_task(TaskSettings(name=name)) for name in tasks}
    guarded = evaluation_texts(loaded)
    place = folder / fingerprint([[digest(source) for source in settings.sources], guarded])[:12]
    workers = os.cpu_count() or 1

    def bank_into(target: Path) -> None:
        texts = chain.from_iterable(documents(one, f"corpus.sources.{i}") for i, one in enumerate(settings.sources))
        guard = LeakGuard(guarded, settings.leak_ngram)
        build_bank(texts, guard, settings, target, target.with_name("scratch"), workers)

    built = timed(place / "bank", bank_into)
    bank = Bank.load(place / "bank")
    indexed = timed(place / "index", lambda target: Index.build(bank.shards, target, K1, B, workers))
    for name in rivals:
        timed(place / name, lambda target, name=name: RIVALS[name][0](bank.shards, target))  # type: ignore[misc]
    keys = {key(text) for text in guarded}
    queries = {
        name: sample([a.text for a in anchors_of(task.train, settings, keys)], anchors) for name, task in loaded.items()
    }
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": workers, "threads": THREADS},
        "bank": {"sentences": len(bank), "counts": bank.counts, **built},
        "index": {
            "bytes": sum(path.stat().st_size for path in (place / "index").rglob("*") if path.is_file()),
            **indexed,
        },
        "k": k,
        "rounds": rounds,
        "search": compare(queries, rivals, k, rounds, place),
    }


def evaluation_texts(tasks: Mapping[str, TaskData]) -> list[str]:
    rows = (row for task in tasks.values() for row in (*task.holdout, *task.test))
    reported = (text for row in rows for text in (row.text, row.text_pair) if text is not None)
    return sorted({*reported, *chain.from_iterable(unreported_texts(TaskSettings(name=name)) for name in tasks)})


def sample(texts: Sequence[str], count: int) -> list[str]:
    return random.Random(0).sample(list(texts), min(count, len(texts)))


def timed(folder: Path, build: Callable[[Path], object]) -> dict[str, float]:
    """Seconds and peak memory of building a folder, from now or from when it was built."""
    facts = folder.with_name(f"{folder.name}.json")
    if not facts.exists():
        console.print(f"building {folder.name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with measured() as peak:
            build(folder)
        write_json(facts, {"seconds": round(peak.seconds, 1), "peak_bytes": peak.bytes})
    told: dict[str, float] = read_json(facts)
    return told


def compare(
    queries: Mapping[str, list[str]], names: Sequence[str], k: int, rounds: int, folder: Path
) -> dict[str, Any]:
    """Anchors a second of every engine on every task: medians over rounds in which the engines take turns."""
    engines = [Rival(OURS, open_ours, folder / "index", k)]
    engines += [Rival(name, RIVALS[name][1], folder / name, k) for name in names]
    found: dict[str, Any] = {}
    for task, texts in queries.items():
        rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
        hits: dict[str, Any] = {}
        for engine in engines:
            engine.ask(texts[:WARM])
        for _ in range(rounds):
            for engine in engines:
                seconds, hits[engine.name] = engine.ask(texts)
                rates[engine.name].append(len(texts) / seconds)
        found[task] = {
            "anchors": len(texts),
            "anchors_per_second": {name: round(median(of), 1) for name, of in rates.items()},
            "ratio": {
                name: round(median([a / b for a, b in zip(rates[OURS], rates[name], strict=True)]), 2) for name in names
            },
            "same_hits": {name: round(same_hits(hits[OURS], hits[name]), 4) for name in names},
        }
        console.print(f"{task}: {found[task]['anchors_per_second']}", markup=False)
    peaks = {engine.name: engine.close() for engine in engines}
    return {"tasks": found, "peak_bytes": peaks}


def same_hits(
    ours: tuple[list[list[int]], list[list[float]]], theirs: tuple[list[list[int]], list[list[float]]]
) -> float:
    """Share of our hits that the other has too; where its scores are equal to ours, ties may have fallen otherwise."""
    shared = total = 0
    for own, scores, other, given in zip(*ours, *theirs, strict=True):
        total += len(own)
        tied = len(own) == len(other) and all(abs(a - b) < CLOSE for a, b in zip(scores, given, strict=True))
        shared += len(own) if tied else len(set(own) & set(other))
    return shared / total if total else 1.0


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows."""
    made = Table("", "seconds", "peak memory, GB", title=f"{result['bank']['sentences']:,} sentences")
    for name in ("bank", "index"):
        made.add_row(name, f"{result[name]['seconds']:.0f}", f"{result[name]['peak_bytes'] / 1e9:.1f}")
    search = result["search"]
    engines = list(search["peak_bytes"])
    speed = Table("anchors a second", *engines, title=f"k = {result['k']}, {result['machine']['threads']} threads")
    for task, facts in search["tasks"].items():
        cells = [f"{facts['anchors_per_second'][OURS]:.0f}"]
        for name in engines[1:]:
            rate, ratio, same = (facts[fact][name] for fact in ("anchors_per_second", "ratio", "same_hits"))
            cells.append(f"{rate:.0f} (we: {ratio:.1f} x; same hits {100 * same:.1f} %)")
        speed.add_row(task, *cells)
    speed.add_row("peak memory, GB", *(f"{peak / 1e9:.1f}" for peak in search["peak_bytes"].values()))
    return [made, speed]
