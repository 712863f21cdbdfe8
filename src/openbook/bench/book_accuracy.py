"""What the compact forms of a book cost in accuracy: of a finished run, or of a synthetic book."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import probabilities_of
from openbook.bench.synthetic_book import CLASSES, forms_of, near, soft_labels, synthetic_book
from openbook.config import UsageError
from openbook.knowledge_base import forms, store
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.index import exact_index, tie_aware_recall
from openbook.knowledge_base.interpolate import Search
from openbook.knowledge_base.search import Hits, normalise
from openbook.metrics import score
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe
from openbook.types import KnowledgeBase
from openbook.workspace import RUN_FILE, Run

JUDGED = ("recall", "neighbours", "neighbours_points_lost", "with_student", "with_student_points_lost")


def accuracy_of_synthetic(k: int) -> dict[str, Any]:
    base = synthetic_book(20_000, 128)
    queries = near(base.keys, 1_000)
    gold = soft_labels(queries).argmax(axis=1)
    retrieval = Retrieval(top_k=k, temperature=0.1, beta=0.5)
    outputs = np.full((len(gold), len(CLASSES)), 1 / len(CLASSES))
    return {
        "keys": "synthetic",
        "metric": "accuracy",
        "forms": scores(base, queries, outputs, gold, "accuracy", retrieval),
    }


def accuracy_of_run(model: Path, k: int) -> dict[str, Any]:
    """The forms of a finished run's book, judged on the rows that its settings were tuned on, not on the test rows."""
    task = Run(load_recipe(model / RUN_FILE), model).task
    book = OpenBook.from_pretrained(model)
    if book.base is None or book.base.manifest.get("form", "fp32") not in store.EXACT:
        raise UsageError(
            f"--model {model} has no knowledge base with whole keys to compare forms with; name another run"
        )
    rows = [(row.text if row.text_pair is None else (row.text, row.text_pair)) for row in task.holdout]
    heard = book.read(rows)
    outputs = heard.logits if task.kind == "regression" else probabilities_of(heard.logits)
    gold = np.array([row.label for row in task.holdout])
    retrieval = Retrieval.from_manifest(
        book.base.manifest.get("retrieval") or {"top_k": k, "temperature": 0.1, "beta": 0.5}
    )
    found = scores(book.base, heard.embedding, outputs, gold, task.metric, retrieval)
    return {"keys": str(model), "rows": len(rows), "metric": task.metric, "forms": found}


def scores(
    base: KnowledgeBase,
    queries: NDArray[Any],
    outputs: NDArray[Any],
    gold: NDArray[Any],
    metric: str,
    retrieval: Retrieval,
) -> dict[str, dict[str, float]]:
    """By form: tie-aware recall of the exact neighbours, the metric of neighbours alone and with the student, bytes.

    Points are hundredths of the metric, lost against fp32.
    """
    exact = exact_index(base.keys, None, "").search(queries, retrieval.top_k)
    trusted = replace(retrieval, skip="none")
    alone = replace(trusted, mode="constant", beta=0.0)
    found: dict[str, dict[str, float]] = {}
    for form in forms_of(base.keys.shape[1]):
        constants = forms.fit(base.keys, form)
        keys = forms.decode(forms.encode(base.keys, form, constants), form, constants)
        hits = exact_index(keys, constants.get("basis"), "").search(queries, retrieval.top_k)
        exactly = (normalise(queries)[:, None] * base.keys[hits.positions]).sum(axis=2).astype(np.float32)
        told = {
            name: score(metric, answer(outputs, queries, base, how, given(hits)).outputs, gold)
            for name, how in (("neighbours", alone), ("with_student", trusted))
        }
        first = found.get("fp32", told)
        found[form] = {
            "recall": tie_aware_recall(Hits(hits.positions, exactly), exact),
            **told,
            **{f"{name}_points_lost": 100 * (first[name] - told[name]) for name in told},
            "bytes": float(forms.size_of(len(base.ids), base.keys.shape[1], base.values.shape[1], form)),
        }
    return found


def given(hits: Hits) -> Search:
    """A search that has been made."""
    return lambda queries, k, exclude: hits
