"""What the compact forms of a book cost in accuracy: of a finished run, or of a synthetic book."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import outputs_of
from openbook.bench.synthetic_book import forms_of, near, noise_of, soft_labels, synthetic_book
from openbook.config import UsageError
from openbook.knowledge_base import forms, store
from openbook.knowledge_base.adaptive import BETAS
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.index import exact_index, tie_aware_recall
from openbook.knowledge_base.interpolate import Search
from openbook.knowledge_base.search import Hits, normalise, search_of
from openbook.knowledge_base.tuning import TEMPERATURES, Choices, HeldOut, collect, tune
from openbook.lessons import joined
from openbook.metrics import METRICS, score
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe
from openbook.student_keys import queries
from openbook.types import KnowledgeBase
from openbook.workspace import RUN_FILE, Run

QUERIES = 10_000  # of a synthetic book
SHARE = 50  # entries a prototype
JUDGED = ("recall", "neighbours", "neighbours_points_lost", "with_student", "with_student_points_lost")


@dataclass(frozen=True)
class Asked:
    """Texts, as a book is asked by them, what the student says of them alone, and what is right."""

    queries: NDArray[Any]  # (n, d)
    outputs: NDArray[Any]  # (n, C)
    gold: NDArray[Any]  # (n,)
    metric: str

    def score(self, base: KnowledgeBase, how: Retrieval, search: Search) -> float:
        return score(self.metric, answer(self.outputs, self.queries, base, how, search).outputs, self.gold)


def accuracy_of_synthetic(k: int, entries: int = 20_000, width: int = 128, only: Sequence[str] = ()) -> dict[str, Any]:
    """Forms of a synthetic book, all or `only` these, for a student that sees its texts through noise."""
    base = synthetic_book(entries, width)
    texts = near(base.keys, QUERIES)
    gold = soft_labels(texts).argmax(axis=1)
    seen = texts + noise_of(np.random.default_rng(2), QUERIES, width)
    asked = Asked(texts, soft_labels(seen.astype(np.float32)), gold, "accuracy")
    plain = Retrieval(top_k=k, temperature=0.1, beta=0.5)
    warm = warmest(base, asked, plain)
    found = scores(base, asked, warm, only or forms_of(width))
    return {
        "keys": f"{entries:,} synthetic", "entries": entries, "width": width, "rows": QUERIES, "metric": "accuracy",
        "retrieval": warm.to_manifest(), "closed": False, "forms": found,
    }  # fmt: skip


def accuracy_of_run(model: Path) -> dict[str, Any]:
    """The forms of a finished run's book, judged on the rows that its settings were tuned on, not on the test rows.

    A book that tuning had closed loses nothing in any form: it is judged with the best setting that opens it.
    """
    task = Run(load_recipe(model / RUN_FILE), model).task
    book = OpenBook.from_pretrained(model)
    if book.base is None or book.base.manifest.get("form", "fp32") not in store.EXACT:
        raise UsageError(
            f"--model {model} has no knowledge base with whole keys to compare forms with; name another run"
        )
    rows = [(row.text if row.text_pair is None else (row.text, row.text_pair)) for row in task.holdout]
    heard, gold = book.read(rows), np.array([row.label for row in task.holdout])
    own = queries(book.base, heard.embedding, book.projection)
    asked = Asked(own, outputs_of(heard, book.kind), gold, task.metric)
    written = book.base.manifest.get("retrieval")
    retrieval = Retrieval.from_manifest(written) if written else None
    closed = retrieval is None or not retrieval.opens_book
    if retrieval is None or closed:
        held_out = HeldOut(tuple(row.id for row in task.holdout), tuple(map(joined, task.holdout)), gold)
        caches = collect(held_out, asked.outputs, asked.queries, book.base, search_of)
        choices = Choices(betas=BETAS[:-1], one_se=False)
        retrieval = tune({1.0: caches[1.0]}, METRICS[task.metric].function, book.kind, (), choices).retrieval
    found = scores(book.base, asked, retrieval, forms_of(book.base.keys.shape[1]))
    return {
        "keys": str(model), "entries": len(book.base.ids), "width": book.base.keys.shape[1], "rows": len(rows),
        "metric": task.metric, "retrieval": retrieval.to_manifest(), "closed": closed, "forms": found,
    }  # fmt: skip


def scores(
    base: KnowledgeBase, asked: Asked, retrieval: Retrieval, names: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """By form: tie-aware recall of the exact neighbours, the metric of neighbours alone and with the student, bytes.

    Points are hundredths of the metric, lost against fp32. The last row is of prototypes, which have no recall: all of
    them are looked up, with a temperature that is chosen on these rows, as the book's own was.
    """
    exact = exact_index(base.keys, None, "").search(asked.queries, retrieval.top_k)
    trusted = replace(retrieval, skip="none")
    found: dict[str, dict[str, float | None]] = {}

    def judged(told: dict[str, float], recall: float | None, bytes_: int) -> dict[str, float | None]:
        first = {name: found["fp32"][name] if found else told[name] for name in told}
        lost = {f"{name}_points_lost": 100 * ((first[name] or 0.0) - told[name]) for name in told}
        return {"recall": recall, **told, **lost, "bytes": float(bytes_)}

    width, classes = base.keys.shape[1], base.values.shape[1]
    for form in dict.fromkeys(["fp32", *names]):
        constants = forms.fit(base.keys, form)
        keys = forms.decode(forms.encode(base.keys, form, constants), form, constants)
        hits = exact_index(keys, constants.get("basis"), "").search(asked.queries, retrieval.top_k)
        exactly = (normalise(asked.queries)[:, None] * base.keys[hits.positions]).sum(axis=2).astype(np.float32)
        told = both_ways(base, asked, trusted, given(hits))
        recall = tie_aware_recall(Hits(hits.positions, exactly), exact)
        found[form] = judged(told, recall, forms.size_of(len(base.ids), width, classes, form))
    few = prototypes_of(base)
    if few is not None:
        every = replace(trusted, top_k=len(few.ids), mode="constant")
        warm = warmest(few, asked, every)
        told = both_ways(few, asked, warm, search_of(few))
        size = forms.size_of(len(few.ids), width, classes, "fp32", weighted=True)
        found[f"{len(few.ids):,} prototypes"] = judged(told, None, size)
    return found


def both_ways(base: KnowledgeBase, asked: Asked, retrieval: Retrieval, search: Search) -> dict[str, float]:
    ways = {"neighbours": replace(retrieval, mode="constant", beta=0.0), "with_student": retrieval}
    return {name: asked.score(base, how, search) for name, how in ways.items()}


def warmest(base: KnowledgeBase, asked: Asked, retrieval: Retrieval) -> Retrieval:
    """The same with the temperature that serves these rows best."""
    search = given(search_of(base)(asked.queries, retrieval.top_k, None))
    tried = [replace(retrieval, temperature=temperature) for temperature in TEMPERATURES]
    return max(tried, key=lambda how: asked.score(base, how, search))


def prototypes_of(base: KnowledgeBase) -> KnowledgeBase | None:
    """One entry in place of fifty, but some of every class; none of a book that is too small for it."""
    groups = max(forms.BINS, base.values.shape[1]) * len(set(base.origins) or {""})
    count = max(len(base.ids) // SHARE, groups)
    return forms.prototypes(base, count, 0, base.manifest["kind"]) if 2 * count <= len(base.ids) else None


def given(hits: Hits) -> Search:
    """A search that has been made."""
    return lambda queries, k, exclude: hits
