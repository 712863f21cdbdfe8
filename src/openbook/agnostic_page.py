"""The page of an experiment on task-agnostic students: contrasts first, then every score behind them, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from openbook.checkpoint import read_json
from openbook.config import UsageError
from openbook.gains import TEACHER, Contrast, Evidence, Row, Score, contrasts, report
from openbook.markdown import environment

NONE = "–"
HELD = 0.05  # the corrected p from which on a difference is not shown

Columns = dict[str, list[str]]


def publish(results: Path, page: Path) -> None:
    """Write the page of a folder of results. Raises UsageError for results that cannot be read."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(results), encoding="utf-8")


def render(results: Path) -> str:
    try:
        grid = read_json(results / "grid.json")
        records = [read_json(path) for path in sorted(results.glob("*/seed-*.json"))]
        scores = scores_of(records)
        lost = [row for record in records for row in record["rows"] if row["status"] != "ok"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{results} holds no results that can be read ({error!r}); run the experiment again"
        ) from error
    known = report(scores, grid["plain"], grid["multi_task"]) if scores else []
    run = [arm for arm in grid["arms"] if any(record["arm"] == arm for record in records)]
    asked = [one for one in grid["contrasts"] if set(one["weights"]) <= set(run)]
    context = {
        "g": grid,
        "asked": asked,
        "unasked": [one["name"] for one in grid["contrasts"] if one not in asked],
        "done": {arm: sorted(r["seed"] for r in records if r["arm"] == arm) for arm in grid["arms"]},
        "evidence": evidence_table(declared(asked, scores)),
        "roles": [(role, role_table(run, rows)) for role, rows in by_role(known).items()],
        "teacher": teacher_table(grid, records),
        "students": student_table(records),
        "drift": next((r["drift"] for r in records if r.get("drift")), None),
        "layers": layer_table(records),
        "lost": lost,
        "trainings": len(scores) + len(lost),
    }
    return re.sub(r"\n{3,}", "\n\n", environment().get_template("agnostic_experiment.md.j2").render(context))


def scores_of(records: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The fine-tunings that came to an end.

    An arm's teacher has no distillation seed, and is told with every one; the first counts, as a teacher that had to be
    trained again may differ in a digit.
    """
    found: dict[Score, Score] = {}
    for record, row in ((one, row) for one in records for row in one["rows"] if row["status"] == "ok"):
        score = Score(
            arm=record["arm"],
            student=row["model"],
            task=row["task"],
            role=row["role"],
            family=row["family"],
            shots=row["shots"],
            draw=row["number"],
            teacher_seed=0 if record["teacher"] else None,
            distillation_seed=None if row["model"] == TEACHER else record["seed"],
            seed=row["seed"],
            metric=row["metric"],
            value=row["scores"][row["metric"]],
        )
        found.setdefault(replace(score, value=0), score)
    return list(found.values())


def declared(claims: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> list[tuple[str, Evidence]]:
    """Every claim for every student and role that has scores, corrected together."""
    places = sorted({(s.student, s.role, s.shots) for s in scores if s.student != TEACHER}, key=str)
    asked = [(one["name"], Contrast(one["name"], one["weights"], *place)) for one in claims for place in places]
    found = contrasts(scores, [contrast for _, contrast in asked]) if asked else []
    return [(name, evidence) for (name, _), evidence in zip(asked, found, strict=True)]


def evidence_table(found: Sequence[tuple[str, Evidence]]) -> Columns:
    columns: Columns = {
        name: [] for name in ("contrast", "student", "tasks", "points", "95 % interval", "p", "p (Holm)", "shown")
    }
    for name, one in found:
        interval = NONE if one.low is None or one.high is None else f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
        role = one.contrast.role if one.contrast.shots is None else f"{one.contrast.role}, {one.contrast.shots} shots"
        cells = (
            name,
            one.contrast.student,
            f"{role} ({len(one.tasks)})",
            NONE if one.difference is None else f"{100 * one.difference:+.1f}",
            interval,
            NONE if one.p is None else f"{one.p:.3f}",
            NONE if one.p is None else f"{one.p_holm:.3f}",
            verdict(one),
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return columns


def verdict(one: Evidence) -> str:
    if one.low is None or one.high is None or one.difference is None:
        return "too few runs"
    if one.p_holm >= HELD or one.low <= 0 <= one.high:
        return "no difference shown"
    return "higher" if one.difference > 0 else "lower"


def by_role(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        shots = "" if row.group.shots is None else f", {row.group.shots} shots"
        found.setdefault(f"{row.group.role}{shots}", []).append(row)
    return found


def role_table(arms: Sequence[str], rows: Sequence[Row]) -> Columns:
    """Means of every arm that was run: of the role, of its families, of each task; students below each other."""
    columns: Columns = {
        "tasks": [],
        "model": [],
        **{arm: [] for arm in arms},
        "gain": [],
        "of the teacher's": [],
    }
    several = [row for row in rows if row.group.family is None or row.group.task or len(row.group.tasks) > 1]
    for row in several:  # the mean of a single task is that task
        group = row.group
        columns["tasks"].append(group.task or (f"{group.family}: mean" if group.family else "mean"))
        columns["model"].append(row.student)
        for arm in arms:
            value = row.means.get(arm)
            columns[arm].append(NONE if value is None else f"{100 * value:.1f}")
        columns["gain"].append(NONE if row.gain is None else f"{100 * row.gain.student:+.1f}")
        ratio = None if row.gain is None else row.gain.ratio
        columns["of the teacher's"].append(NONE if ratio is None else f"{100 * ratio:.0f} %")
    return columns


def teacher_table(grid: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Columns:
    """What the teacher of many tasks scores with its own heads, beside a guess and the plain teacher on each alone."""
    of_arm = {record["arm"]: record for record in records}
    many, plain = (of_arm.get(grid[arm], {"teacher": {}, "rows": ()}) for arm in ("multi_task", "plain"))
    told: Mapping[str, Any] = many["teacher"]
    alone = [row for row in (*plain["rows"], *plain.get("teacher_rows", ())) if row["model"] == TEACHER]
    return {
        "task": list(told),
        "metric": [one["metric"] for one in told.values()],
        "rows": [str(one["rows"]) for one in told.values()],
        "passes": [f"{one['passes']:.1f}" for one in told.values()],
        "near duplicates dropped": [str(one["near_duplicates"]) for one in told.values()],
        "a guess": [f"{100 * one['guess']:.1f}" for one in told.values()],
        "set aside": [f"{100 * one['score']:.1f}" for one in told.values()],
        "reported": [f"{100 * many['heads'][task][one['metric']]:.1f}" for task, one in told.items()],
        "plain teacher on it alone": [mean_of(alone, task) for task in told],
    }


def mean_of(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    """Of the fine-tunings on all rows of a task that came to an end."""
    found = [
        row["scores"][row["metric"]]
        for row in rows
        if row["task"] == task and row["shots"] is None and row["status"] == "ok"
    ]
    return f"{100 * fmean(found):.1f}" if found else NONE


def student_table(records: Sequence[Mapping[str, Any]]) -> Columns:
    """How the distillations ended, and how far the teacher had moved before them."""
    lines = [(r, name, one) for r in records for name, one in r["students"].items()]
    moved = [((r.get("drift") or {}).get("students") or {}).get(name, {}) for r, name, _ in lines]
    relations = list(dict.fromkeys(part for one in moved for part in one if part != "loss"))
    return {
        "arm": [r["arm"] for r, _, _ in lines],
        "seed": [str(r["seed"]) for r, _, _ in lines],
        "student": [name for _, name, _ in lines],
        "updates": [str(one["updates"]) for _, _, one in lines],
        "loss at the end": [f"{one['loss']:.4f}" for _, _, one in lines],
        "drift of the teacher": [told_of(one, "loss") for one in moved],
        **{f"of it {relation}": [told_of(one, relation) for one in moved] for relation in relations},
    }


def layer_table(records: Sequence[Mapping[str, Any]]) -> Columns:
    """The drift of every arm's teacher, layer by layer."""
    moved = {r["arm"]: r["drift"]["layers"] for r in records if (r.get("drift") or {}).get("layers")}
    layers = list(dict.fromkeys(layer for one in moved.values() for layer in one))
    told = {f"layer {layer}": [told_of(one.get(layer, {}), "loss") for one in moved.values()] for layer in layers}
    return {"arm": list(moved), **told} if moved else {}


def told_of(moved: Mapping[str, float], part: str) -> str:
    return f"{moved[part]:.4f}" if part in moved else NONE
