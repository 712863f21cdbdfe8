"""What opening a book did in a grid: how often it was opened, how far it was trusted, and which answers it changed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from openbook.metrics import OF_KIND
from openbook.results import Results

Opening = Mapping[str, Any]


def openings(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and arm, of arms whose students open a book: `students`, how many `opened` theirs, and means.

    `beta` is the share of the student, over those that opened theirs; `gain` that on held-out rows of what was chosen
    there; `better` and `worse` are rows of the reported split that opening the book put right or wrong, a student,
    also where it was not worth it.
    """
    found = {
        task: {arm: _opening(list(_books(results, task, arm))) for arm in results.arms(task)}
        for task in results.grid["tasks"]
    }
    return {task: {arm: one for arm, one in arms.items() if one} for task, arms in found.items() if any(arms.values())}


def by_similarity(results: Results) -> dict[str, list[dict[str, float]]]:
    """By arm, over all tasks of classes and seeds: what opening did to each tenth of the rows, the farthest first.

    Scores are left out: nearly every one comes nearer to the truth or goes farther, so they would outnumber answers.
    """
    found = {}
    for arm in results.grid["arms"]:
        tasks = [task for task in results.tasks(arm) if results.metrics(task)[0] not in OF_KIND["regression"]]
        books = [book for task in tasks for book in _books(results, task, arm)]
        if books:
            tenths = zip(*(book["if_opened"]["buckets"] for book in books), strict=False)
            found[arm] = [_pooled(tenth) for tenth in tenths]
    return found


def _books(results: Results, task: str, arm: str) -> Iterable[Opening]:
    return (run["book"] for run in results.done(task, arm).values() if run.get("book"))


def _opening(books: list[Opening]) -> dict[str, Any]:
    if not books:
        return {}
    opened = [book for book in books if book["kept"]]
    effects = [book["if_opened"] for book in books]
    return {
        "students": len(books),
        "opened": len(opened),
        "beta": statistics.fmean(book["retrieval"]["beta"] for book in opened) if opened else None,
        "gain": statistics.fmean(book["gain_held_out"] for book in books),
        "entries": statistics.fmean(book["entries"] for book in books),
        **{what: statistics.fmean(effect[what] for effect in effects) for what in ("better", "worse", "rows")},
    }


def _pooled(buckets: Iterable[Mapping[str, float]]) -> dict[str, float]:
    known = list(buckets)
    counts = {what: sum(bucket[what] for bucket in known) for what in ("better", "worse", "rows")}
    return {"similarity": statistics.fmean(bucket["similarity"] for bucket in known), **counts}
