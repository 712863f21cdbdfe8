"""Arms of a grid that train nothing: how much better the students of another arm answer when they open a book."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Answers, outputs_of
from openbook.grid import BookReading
from openbook.inference import answers_of
from openbook.knowledge_base import forms
from openbook.knowledge_base.answering import Answered, Retrieval, answer
from openbook.knowledge_base.controls import biased, class_bias, flattened, permuted
from openbook.knowledge_base.interpolate import scaled
from openbook.knowledge_base.search import normalise, search_of
from openbook.knowledge_base.tuning import CORPUS as FROM_CORPUS
from openbook.knowledge_base.tuning import (
    Choices,
    HeldOut,
    HitCache,
    Tuned,
    collect,
    tune,
)
from openbook.lessons import joined
from openbook.metrics import METRICS, agreement, score
from openbook.models.encoder import Encoder
from openbook.stages.build_kb import filled
from openbook.types import KnowledgeBase
from openbook.workspace import Run

SPLITS = ("train", "holdout", "test")
READING = 2  # of `consult`: what it told of a book before is another, so such arms answer again
PARTS = ("logits", "embedding", "labels")
BUCKETS = 10  # of equal size, by the similarity of the nearest entry
RIDGE = 1e-2  # of the mean square of the embeddings


@dataclass(frozen=True)
class Heard:
    """What one student says of every split, in the order of its rows."""

    train: Answers
    holdout: Answers
    test: Answers

    @classmethod
    def of(cls, run: Run, student: Encoder) -> Heard:
        rows = {split: getattr(run.task, split) for split in SPLITS}
        return cls(**{split: answers_of(student, run.tokens(split, rows[split], run.tokenizer)) for split in SPLITS})

    @classmethod
    def load(cls, path: Path) -> Heard:
        with np.load(path, allow_pickle=False) as found:
            parts = {split: [found[f"{split}-{part}"] for part in PARTS] for split in SPLITS}
        return cls(**{split: Answers(*arrays) for split, arrays in parts.items()})

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            arrays = {f"{s}-{part}": getattr(getattr(self, s), part) for s in SPLITS for part in PARTS}
            np.savez(file, allow_pickle=False, **arrays)


def consult(
    run: Run, heard: Heard, how: BookReading, seed: int, teacher: NDArray[Any]
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Scores of a student with its book on both splits; how it was opened, and what that did. Teacher (n, C).

    Beside them its answers to the reported rows (n, C).
    """
    gold, metric = heard.test.labels, METRICS[run.task.metric].function
    alone = {split: outputs_of(getattr(heard, split), run.kind) for split in ("holdout", "test")}
    if how.closed:
        bias = class_bias(alone["holdout"], heard.holdout.labels, metric)
        holdout, told = biased(alone["holdout"], bias), biased(alone["test"], bias)
        return judged(run, told, gold, teacher) | {"holdout": metric(holdout, heard.holdout.labels)}, told
    base = book_of(run, heard, how, seed)
    queries = queries_of(heard, base, how)
    caches = found_by(run, heard, alone["holdout"], queries(heard.holdout), base)
    tuned = tuned_on(run, caches, how, keep=how.beta is not None)
    asked = queries(heard.test)

    def opened(retrieval: Retrieval, omega: float) -> tuple[Answered, KnowledgeBase]:
        counted = scaled(base, FROM_CORPUS, omega)
        return answer(alone["test"], asked, counted, retrieval, search_of(counted)), counted

    answered, counted = opened(tuned.retrieval, tuned.omega)
    anyway, wide = opened(*opening_of(tuned if tuned.kept else tuned_on(run, caches, how, keep=True)))
    nearest = search_of(wide)(asked, 1, None).similarities.max(axis=1, initial=-np.inf)
    book = {
        "retrieval": tuned.retrieval.to_manifest(),
        "kept": tuned.kept,
        "gain_held_out": tuned.gain,
        "standard_error": tuned.standard_error,
        "omega": tuned.omega,
        "entries": len(counted.ids),
        "searched": float(answered.retrieved.mean()),
        "if_opened": effect(alone["test"], anyway.outputs, gold, nearest),
    }
    held_out = tuned.score if tuned.kept else tuned.baseline_score
    return judged(run, answered.outputs, gold, teacher) | {"holdout": held_out, "book": book}, answered.outputs


def judged(run: Run, told: NDArray[Any], gold: NDArray[Any], teacher: NDArray[Any]) -> dict[str, Any]:
    return {
        "scores": {metric: score(metric, told, gold) for metric in run.task.metrics},
        "agreement": None if run.kind == "regression" else agreement(told, teacher, run.kind),
    }


def book_of(run: Run, heard: Heard, how: BookReading, seed: int) -> KnowledgeBase:
    """The book that the recipe describes, changed as the arm wants it."""
    base, _ = filled(run)
    if how.keys == "student":
        base = replace(base, keys=normalise(heard.train.embedding).astype(np.float32))
    if how.values == "permuted":
        base = permuted(base, seed)
    if how.values == "prior":
        base = flattened(base)
    if how.prototypes is not None:
        base = forms.prototypes(base, how.prototypes, seed, run.kind)
    constants = forms.fit(base.keys, how.form)
    keys = forms.decode(forms.encode(base.keys, how.form, constants), how.form, constants)
    return replace(base, keys=keys, basis=constants.get("basis"))


def queries_of(heard: Heard, base: KnowledgeBase, how: BookReading) -> Callable[[Answers], NDArray[np.float64]]:
    """How a student's embeddings (n, d) become queries (n, d)."""
    if how.queries == "student":
        return lambda said: normalise(said.embedding)
    x = normalise(heard.train.embedding)
    ridge = RIDGE * np.square(x).mean() * len(x) * np.eye(x.shape[1])
    turn = np.linalg.solve(x.T @ x + ridge, x.T @ base.keys[: len(x)].astype(np.float64))
    return lambda said: normalise(normalise(said.embedding) @ turn)


def found_by(
    run: Run, heard: Heard, outputs: NDArray[Any], queries: NDArray[Any], base: KnowledgeBase
) -> dict[float, HitCache]:
    """What the held-out rows find in the book, by omega."""
    rows = run.task.holdout
    held_out = HeldOut(tuple(row.id for row in rows), tuple(joined(row) for row in rows), heard.holdout.labels)
    return collect(held_out, outputs, queries, base, search_of)


def tuned_on(run: Run, caches: Mapping[float, HitCache], how: BookReading, keep: bool) -> Tuned:
    """What is best of all that the arm may choose; `keep` opens the book for any gain, or for a given beta."""
    if how.beta is None:
        choices = Choices(how.modes, how.skips, one_se=not keep)
    else:
        choices = Choices(skips=how.skips, betas=(how.beta,), one_se=not keep)
    reported = [row.id for row in run.task.test]
    return tune(caches, METRICS[run.task.metric].function, run.kind, reported, choices)


def opening_of(tuned: Tuned) -> tuple[Retrieval, float]:
    """How to open the book, and how often its corpus counts: as chosen, or else the best that opens it at all."""
    if tuned.kept:
        return tuned.retrieval, tuned.omega
    cell = next(one for one in tuned.table if one.beta < 1)
    return Retrieval(cell.top_k, cell.temperature, cell.beta), cell.omega


def effect(alone: NDArray[Any], told: NDArray[Any], gold: NDArray[Any], nearest: NDArray[np.float32]) -> dict[str, Any]:
    """What opening the book did to the reported rows: right before and after, by the nearest entry's similarity.

    In regression, rows count as better or worse by their squared error.
    """
    if told.shape[1] == 1:
        before, after = -np.square(alone[:, 0] - gold), -np.square(told[:, 0] - gold)
    else:
        before, after = (np.equal(one.argmax(1), gold).astype(float) for one in (alone, told))
    order = np.argsort(nearest, kind="stable")
    return {
        "better": int((after > before).sum()),
        "worse": int((after < before).sum()),
        "rows": len(gold),
        "buckets": [
            {
                "similarity": float(nearest[rows].mean()),
                "better": int((after > before)[rows].sum()),
                "worse": int((after < before)[rows].sum()),
                "rows": len(rows),
            }
            for rows in np.array_split(order, BUCKETS)
            if len(rows)
        ],
    }
