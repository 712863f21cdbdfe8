"""What a grid of trainings shows, in numbers: scores, paired differences, verdicts on its hypotheses, cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.metrics import hierarchical_difference, holm
from openbook.openings import by_similarity, openings
from openbook.results import Results, load
from openbook.row_answers import RowAnswers, mcnemar_of, redrawn, same_rows

Drawn = NDArray[np.float64]
KEPT = ("name", "title", "scale", "baseline", "arms", "tasks", "tune", "budget", "bank", "student", "machine")
LAST_LESSON = "task"  # of every student; what it reads before that is its first lesson
LEVEL = 0.05  # of p, after Holm's correction
SAME_COST = 0.01  # the share by which the cost of an arm may differ from the baseline's


def summarise(folder: Path) -> dict[str, Any]:
    """Every number of the results, as JSON holds it: `cells` (by task and arm), `hypotheses`, `curves`, ...

    Scores and differences are fractions; what is missing is None and counted. Raises UsageError as `load` does.
    """
    results = load(folder)
    cells = {task: {arm: _cell(results, task, arm) for arm in results.arms(task)} for task in results.grid["tasks"]}
    averages = {arm: _average(results, arm) for arm in results.grid["arms"] if results.tasks(arm) == list(cells)}
    return {
        **{key: results.grid.get(key) for key in KEPT},
        "runs": results.census(),
        "teachers": {task: results.note(task, "teacher.json") for task in cells},
        "cells": cells,
        "averages": averages,
        "best": {task: _best(results, [task], arms) for task, arms in cells.items()},
        "best_average": _best(results, list(cells), averages),
        "hypotheses": _hypotheses(results),
        "cost": {task: _cost(results, task) for task in cells},
        "curves": [_curve(results, curve) for curve in results.grid.get("curves", ())],
        "corpora": {task: {arm: results.note(task, arm, "corpus.json") for arm in cells[task]} for task in cells},
        "books": openings(results),
        "by_similarity": by_similarity(results),
        "tuning": {task: {arm: results.note(task, arm, "tuning.json") for arm in cells[task]} for task in cells},
    }


def compare(results: Results, a: str, b: str, tasks: Sequence[str], null: float = 0.0) -> dict[str, Any]:
    """How much better arm `a` is than arm `b` with equal seeds: over tasks and seeds, then in each task over its seeds.

    `p` is that of a difference of `null`. `planned`, `pairs` and `pending` count pairs planned, pairs compared, and
    trainings still to come. `rows` says whether rows were drawn too, which takes the answers of every training of both;
    then, of classes, `mcnemar` has the exact p of every pair.
    """
    by_task = {task: _differences(results, task, a, b) for task in tasks}
    drawn = {task: _drawn(results, task, a, b) for task in tasks}
    return {
        "a": a,
        "b": b,
        "planned": sum(len(results.seeds(task)) for task in tasks),
        "pending": results.pending(tasks, (a, b)),
        **_evidence(list(by_task.values()), null, list(drawn.values())),
        "tasks": {
            task: {
                "planned": len(results.seeds(task)),
                "smallest": min(found, default=None),
                "largest": max(found, default=None),
                "rows": drawn[task] is not None,
                "mcnemar": _mcnemar(results, task, a, b) if drawn[task] is not None else None,
                **_evidence([found], null, [drawn[task]]),
            }
            for task, found in by_task.items()
        },
    }


def _differences(results: Results, task: str, a: str, b: str) -> list[float]:
    first, second = results.scores(task, a), results.scores(task, b)
    return [first[seed] - second[seed] for seed in _seeds(results, task, a, b)]


def _seeds(results: Results, task: str, a: str, b: str) -> list[int]:
    first, second = results.scores(task, a), results.scores(task, b)
    return [seed for seed in first if seed in second]


def _drawn(results: Results, task: str, a: str, b: str) -> Drawn | None:
    """The differences (R, seeds) on other draws of the rows; None where the answers of a training are not known."""
    pairs = _answers(results, task, a, b)
    if not pairs:
        return None
    metric = results.metrics(task)[0]
    return np.stack([redrawn(first, metric) - redrawn(second, metric) for first, second in pairs], axis=1)


def _mcnemar(results: Results, task: str, a: str, b: str) -> list[float] | None:
    pairs = _answers(results, task, a, b)
    return None if pairs[0][0].classes == 1 else [mcnemar_of(*pair) for pair in pairs]


def _answers(results: Results, task: str, a: str, b: str) -> list[tuple[RowAnswers, RowAnswers]]:
    """Of every pair of trainings; none of them if one is missing."""
    seeds = _seeds(results, task, a, b)
    found = [(results.rows.get((task, a, seed)), results.rows.get((task, b, seed))) for seed in seeds]
    whole = [(one, two) for one, two in found if one is not None and two is not None and same_rows(one, two)]
    return whole if len(whole) == len(seeds) else []


def _evidence(groups: Sequence[Sequence[float]], null: float, redrawn: Sequence[Drawn | None]) -> dict[str, Any]:
    """Of the tasks that have pairs; a single pair has a difference, but no interval."""
    known = [group for group in groups if group]
    pairs = sum(map(len, known))
    if pairs < 2:
        return {"pairs": pairs, "difference": known[0][0] if known else None, "low": None, "high": None, "p": None}
    drawn = [one for one, group in zip(redrawn, groups, strict=True) if group]
    found, p = hierarchical_difference(known, null, redrawn=drawn)
    return {"pairs": pairs, "difference": found.mean, "low": found.low, "high": found.high, "p": p}


def _hypotheses(results: Results) -> list[dict[str, Any]]:
    """Every hypothesis with its pairs, its p, the p that Holm's correction leaves of it, and the verdict."""
    tested = [_tested(results, hypothesis) for hypothesis in results.grid.get("hypotheses", ())]
    corrected = holm([one["p"] for one in tested])
    return [{**one, "p_holm": p, "verdict": _verdict(one, p)} for one, p in zip(tested, corrected, strict=True)]


def _tested(results: Results, hypothesis: Mapping[str, Any]) -> dict[str, Any]:
    """All its pairs have to hold, so its p is their largest; a pair unknown or on the wrong side counts as 1."""
    null = -hypothesis["margin"] / 100 if hypothesis["test"] == "not_worse" else 0.0
    pairs = [compare(results, a, b, results.tasks(a, b), null) for a, b in hypothesis["pairs"]]
    p = [1.0 if one["p"] is None or one["pending"] or one["difference"] <= null else one["p"] for one in pairs]
    return {**hypothesis, "null": null, "pairs": pairs, "p": max(p, default=1.0)}


def _verdict(tested: Mapping[str, Any], corrected: float) -> str:
    pairs, null = tested["pairs"], tested["null"]
    if any(pair["pending"] for pair in pairs):
        return "unfinished"
    if any(pair["p"] is not None and pair["p"] < LEVEL and pair["high"] < null for pair in pairs):
        return "does not hold"
    return "holds" if corrected < LEVEL and all(pair["low"] > null for pair in pairs) else "not shown"


def _best(results: Results, tasks: Sequence[str], means: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The arm with the highest mean, if it is clearly above the next and nothing is pending."""
    ranked = sorted((arm for arm in means if means[arm]["mean"] is not None), key=lambda arm: -means[arm]["mean"])
    if len(ranked) < 2 or results.pending(tasks, list(means)):
        return None
    lead = compare(results, ranked[0], ranked[1], tasks)
    return ranked[0] if lead["p"] is not None and lead["p"] < LEVEL and lead["low"] > 0 else None


def _cell(results: Results, task: str, arm: str) -> dict[str, Any]:
    done, scores = list(results.done(task, arm).values()), results.scores(task, arm)
    first = [_first_lesson(run.get("final_terms") or {}) for run in done]
    names = dict.fromkeys(name for terms in first for name in terms if name != "loss")
    return {
        "planned": len(results.seeds(task)),
        "scores": {str(seed): score for seed, score in scores.items()},
        **_spread(scores.values()),
        "metrics": {name: _spread(results.scores(task, arm, name).values()) for name in results.metrics(task)},
        "agreement": _mean(run.get("agreement") for run in done),
        "terms": {name: _mean(terms.get(name) for terms in first) for name in names},
        "seconds": _mean(run.get("seconds") for run in done),
        "rates": [dict(rates) for rates in dict.fromkeys(tuple((run.get("rates") or {}).items()) for run in done)],
    }


def _first_lesson(terms: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """Of the lesson before the last one; general distillation may stand before it."""
    return next((terms[lesson] for lesson in reversed(list(terms)) if lesson != LAST_LESSON), {})


def _spread(scores: Iterable[float]) -> dict[str, float | None]:
    known = list(scores)
    return {"mean": _mean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _average(results: Results, arm: str) -> dict[str, Any]:
    """Mean over tasks of the means over seeds; None as long as one task has no score."""
    tasks = results.tasks(arm)
    by_task = [list(results.scores(task, arm).values()) for task in tasks]
    mean = statistics.fmean(map(statistics.fmean, by_task)) if all(by_task) else None
    return {"mean": mean, "runs": sum(map(len, by_task)), "planned": sum(len(results.seeds(task)) for task in tasks)}


def _cost(results: Results, task: str) -> dict[str, Any]:
    """Each arm's deviation from the baseline in tokens and in steps, as a share: of the lesson that deviates more.

    An arm whose number is not known is left out. `unlike` are those without a lesson that the baseline has, or the
    other way round; `above` those that deviate by more than 1 %.
    """
    baseline, unlike = results.grid["baseline"], set()
    shares: dict[str, dict[str, float]] = {"tokens": {}, "steps": {}}
    for what, found in shares.items():
        reference = _spent(results, task, baseline, what)
        for arm in results.arms(task):
            spent = _spent(results, task, arm, what)
            if spent is None or reference is None or arm == baseline:
                continue
            pairs = list(zip(spent, reference, strict=True))
            if any((own == 0) != (other == 0) for own, other in pairs):
                unlike.add(arm)
            else:
                found[arm] = max((abs(own / other - 1) for own, other in pairs if other), default=0.0)
    above = {arm for found in shares.values() for arm, share in found.items() if share > SAME_COST}
    return {**shares, "unlike": sorted(unlike), "above": sorted(above)}


def _spent(results: Results, task: str, arm: str, what: str) -> tuple[float, float] | None:
    """Mean over seeds of what the first lessons and the last one took."""
    runs = [run[what] for run in results.done(task, arm).values() if run.get(what)]
    if not runs:
        return None
    last = statistics.fmean(run.get(LAST_LESSON) or 0 for run in runs)
    return statistics.fmean(sum(number or 0 for number in run.values()) for run in runs) - last, last


def _curve(results: Results, curve: Mapping[str, Any]) -> dict[str, Any]:
    """Scores over the share of a corpus, and for each series what its best share gains over the whole."""
    task = curve["task"]
    series = {}
    for name, arms in curve["series"].items():
        points = [{"share": float(share), "arm": arm, **_cell(results, task, arm)} for share, arm in arms.items()]
        series[name] = sorted(points, key=lambda point: point["share"])
    return {**curve, "series": series, "peaks": {name: _peak(results, task, points) for name, points in series.items()}}


def _peak(results: Results, task: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The share that is best on held-out rows with the first seed (section 7.3), and its gain on the reported ones."""
    seed = results.seeds(task)[0]
    held_out = [results.done(task, point["arm"]).get(seed, {}).get("holdout") for point in points]
    known = [score for score in held_out if score is not None]
    if len(known) < len(points):
        return None
    best = points[known.index(max(known))]
    return {"share": best["share"], "gain": compare(results, best["arm"], points[-1]["arm"], [task])}
