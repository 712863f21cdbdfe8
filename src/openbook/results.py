"""The results of a grid of trainings as they lie in a folder: the plan, and one JSON a training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openbook.config import UsageError
from openbook.row_answers import RowAnswers

Key = tuple[str, str, int]  # task, arm, seed
GRID = "grid.json"
NEEDED = ("name", "title", "scale", "baseline", "arms", "tasks")
AGAIN = "let `openbook experiment` write it anew"


@dataclass(frozen=True)
class Results:
    """The plan, and the final trainings there are so far. Scores are fractions."""

    folder: Path
    grid: Mapping[str, Any]
    found: Mapping[Key, Mapping[str, Any]]
    rows: Mapping[Key, RowAnswers] = field(default_factory=dict)  # what was said of each reported row, where kept

    def tasks(self, *arms: str) -> list[str]:
        """Those that all these arms are planned for."""
        planned = [self.grid["arms"][arm].get("tasks") for arm in arms]
        return [task for task in self.grid["tasks"] if all(tasks is None or task in tasks for tasks in planned)]

    def arms(self, task: str) -> list[str]:
        return [arm for arm in self.grid["arms"] if task in self.tasks(arm)]

    def seeds(self, task: str) -> list[int]:
        return list(self.grid["tasks"][task]["seeds"])

    def metrics(self, task: str) -> list[str]:
        """The one that counts first."""
        first = self.grid["tasks"][task]["metric"]
        return list(dict.fromkeys([first, *self.grid["tasks"][task].get("metrics", ())]))

    def plan(self) -> list[Key]:
        tasks = self.grid["tasks"]
        return [(task, arm, seed) for task in tasks for arm in self.arms(task) for seed in self.seeds(task)]

    def done(self, task: str, arm: str) -> dict[int, Mapping[str, Any]]:
        """Trainings that did not fail, by seed."""
        found = {seed: self.found.get((task, arm, seed)) for seed in self.seeds(task)}
        return {seed: run for seed, run in found.items() if run is not None and run["status"] == "ok"}

    def scores(self, task: str, arm: str, metric: str | None = None) -> dict[int, float]:
        """By seed; of the metric that counts unless another is named."""
        name = metric or self.metrics(task)[0]
        return {seed: run["scores"][name] for seed, run in self.done(task, arm).items()}

    def pending(self, tasks: Sequence[str], arms: Sequence[str]) -> int:
        """Planned trainings of these arms that have neither succeeded nor failed."""
        return sum(key not in self.found and key[0] in tasks and key[1] in arms for key in self.plan())

    def census(self) -> dict[str, Any]:
        """Final trainings planned, done, failed and still to come; and files that belong to none of them."""
        failed = [run for run in self.found.values() if run["status"] == "failed"]
        planned = {self.folder / task / arm / f"seed-{seed}.json" for task, arm, seed in self.plan()}
        outside = set(self.folder.glob("*/*/seed-*.json")) - planned
        return {
            "planned": len(planned),
            "ok": len(self.found) - len(failed),
            "failed": [{key: run.get(key) for key in ("task", "arm", "seed", "error")} for run in failed],
            "missing": [list(key) for key in self.plan() if key not in self.found],
            "outside": sorted(path.relative_to(self.folder).as_posix() for path in outside),
        }

    def note(self, *path: str) -> dict[str, Any] | None:
        """Another file of the folder; None if it is not there (yet)."""
        file = self.folder.joinpath(*path)
        return _read(file) if file.exists() else None


def load(folder: Path) -> Results:
    """Read the plan and the planned trainings. Raises UsageError for what is absent, broken or not what it says."""
    grid = _read(folder / GRID)
    _check_grid(grid, folder / GRID)
    results = Results(folder, grid, {})
    paths = {key: folder / key[0] / key[1] / f"seed-{key[2]}.json" for key in results.plan()}
    found = {key: _training(path, key, results.metrics(key[0])) for key, path in paths.items() if path.exists()}
    rows = {key: kept for key in found if (kept := _rows(folder, key, found[key], results.metrics(key[0])[0]))}
    return Results(folder, grid, found, rows)


def rows_file(folder: Path, key: Key) -> Path:
    """Where the answers of a final training lie: beside the records of all trainings, small, and not to be kept."""
    task, arm, seed = key
    return folder / task / arm / "runs" / f"seed-{seed}.npz"


def _rows(folder: Path, key: Key, run: Mapping[str, Any], metric: str) -> RowAnswers | None:
    """None where there are none, or those of another training: then they do not give its score."""
    path = rows_file(folder, key)
    if run["status"] != "ok" or not path.exists():
        return None
    kept = RowAnswers.load(path)
    return kept if kept.gives(metric, run["scores"][metric]) else None


def _check_grid(grid: Mapping[str, Any], path: Path) -> None:
    lacking = [key for key in NEEDED if key not in grid]
    if lacking:
        raise UsageError(f"{path} lacks {', '.join(lacking)}; {AGAIN}")
    titles = [task["title"] for task in grid["tasks"].values()]
    if len(set(titles)) < len(titles):
        raise UsageError(f"{path}: two tasks have the same title ({', '.join(titles)}); give each its own")
    for place, kind, name in _names_used(grid):
        if name not in grid[kind]:
            raise UsageError(f"{path}: {place} names {name!r}, which is none of {', '.join(grid[kind])}; {AGAIN}")
    for share in (share for curve in grid.get("curves", ()) for line in curve["series"].values() for share in line):
        if not re.fullmatch(r"\d+(\.\d+)?", share):
            raise UsageError(f"{path}: a curve has the share {share!r}, not a number such as 0.5; {AGAIN}")


def _names_used(grid: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "baseline", "arms", grid["baseline"]
    for hypothesis in grid.get("hypotheses", ()):
        yield from ((f"hypothesis {hypothesis['name']}", "arms", arm) for pair in hypothesis["pairs"] for arm in pair)
    for curve in grid.get("curves", ()):
        yield "a curve", "tasks", curve["task"]
        yield from (("a curve", "arms", arm) for line in curve["series"].values() for arm in line.values())


def _training(path: Path, key: Key, metrics: Sequence[str]) -> dict[str, Any]:
    """One final training; one that succeeded has a finite score in every metric."""
    run = _read(path)
    if (run.get("task"), run.get("arm"), run.get("seed")) != key:
        raise UsageError(f"{path} holds the result of another training; remove it and run again")
    if run.get("status") not in ("ok", "failed"):
        raise UsageError(f"{path}: status is {run.get('status')!r}, neither 'ok' nor 'failed'; {AGAIN}")
    for metric in metrics if run["status"] == "ok" else ():
        score = run.get("scores", {}).get(metric)
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise UsageError(f"{path}: scores.{metric} is {score!r}, not a number; remove it and run again")
    return run


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is not there; name a folder that `openbook experiment` wrote") from None
    except ValueError as error:
        raise UsageError(f"{path} is not whole JSON ({error}); remove it and run again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, not an object; remove it and run again")
    return value
