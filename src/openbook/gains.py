"""What a multi-task teacher gives its students: means by role and family, gains beside the teacher's, and contrasts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import get_args

import numpy as np

from openbook.config import UsageError
from openbook.data.roles import Role
from openbook.metrics import Difference, holm, with_p

TEACHER = "teacher"  # in the place of a student: the arm's teacher itself, fine-tuned on the task
SMALLEST_GAIN = 0.002  # of a teacher: what is transferred of less than 0.2 points is noise
DRAWS = 10_000  # of the bootstrap

Cells = Sequence[Sequence[Sequence[float]]]  # task -> distillation seed -> a difference for each fine-tuning


@dataclass(frozen=True)
class Score:
    """One fine-tuning on one task. The value is a fraction, as everywhere; 84 points are 0.84."""

    arm: str
    student: str  # its shape, such as `6L384H`, or `teacher`
    task: str
    role: Role  # with regard to one list of training sets, for all arms
    family: str
    shots: int | None  # examples a class; None: the whole train split
    draw: int | None
    teacher_seed: int | None  # None: a teacher that was not trained on tasks
    distillation_seed: int | None  # None: the teacher itself
    seed: int  # of the fine-tuning
    metric: str
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and -1 <= self.value <= 1):
            run = f"{self.metric} of arm {self.arm!r} on {self.task!r} with seed {self.seed}"
            raise UsageError(f"{run} is {self.value}; scores are fractions: 0.84, not 84 points")


@dataclass(frozen=True)
class Gain:
    """What the multi-task teacher and its student are above the plain teacher and its student. All are fractions."""

    teacher: float
    student: float
    gap_plain: float  # teacher above student
    gap_multi_task: float
    ratio: float | None  # the student's gain over the teacher's; None: not defined


@dataclass(frozen=True)
class Group:
    """Tasks with equal weight: all of a role, those of one family in it, or a single one."""

    role: Role
    shots: int | None
    family: str | None  # None: every family of the role
    task: str | None  # None: all of them
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A line of the gain report. A mean is None as long as the arm lacks a score on one of the tasks."""

    group: Group
    student: str
    means: Mapping[str, float | None]  # by arm
    gain: Gain | None  # None beside a teacher, and where one of the four means is


@dataclass(frozen=True)
class Contrast:
    """A declared comparison: B - A is {"B": 1, "A": -1}; an interaction weighs four arms."""

    name: str
    weights: Mapping[str, float]  # by arm; they add up to 0
    student: str
    role: Role
    shots: int | None = None

    def __post_init__(self) -> None:
        if not any(self.weights.values()) or abs(sum(self.weights.values())) > 1e-9:
            raise UsageError(
                f"contrast {self.name!r}: the weights {dict(self.weights)} do not add up to 0, such as 1, -1"
            )


@dataclass(frozen=True)
class Evidence:
    """What the scores say about a contrast. With one distillation seed it is about that pair of checkpoints only."""

    contrast: Contrast
    tasks: tuple[str, ...]  # compared, with equal weight
    missing: tuple[str, ...]  # tasks of the role without one complete pair
    distillations: int  # seeds that all of these tasks have
    pairs: int  # fine-tunings compared
    planned: int  # of those that any of the arms has
    difference: float | None
    low: float | None = None  # a single pair has a difference, but no interval
    high: float | None = None
    p: float | None = None
    p_holm: float = 1.0


def gain(teacher_plain: float, teacher_multi_task: float, student_plain: float, student_multi_task: float) -> Gain:
    """Gains, gaps, and the share of the teacher's gain that reaches the student. Fractions in and out.

    The ratio is None (not defined) when the teacher's gain is below 0.2 points in size (F22).
    """
    teacher, student = teacher_multi_task - teacher_plain, student_multi_task - student_plain
    ratio = student / teacher if abs(teacher) > SMALLEST_GAIN - 1e-9 else None
    return Gain(teacher, student, teacher_plain - student_plain, teacher_multi_task - student_multi_task, ratio)


def report(scores: Iterable[Score], plain: str, multi_task: str) -> list[Row]:
    """Means of every arm by role, by family within a role, and by task, with the gain of arm `multi_task` over `plain`.

    Within a task all runs weigh the same, within a group all tasks. There is no mean over roles (multi-task infused
    distillation, section 7.2), and few-shot scores are apart by the number of shots. Raises UsageError for runs that
    occur twice, and for tasks whose role, family or metric differs between runs.
    """
    known = _checked(scores)
    arms = list(dict.fromkeys(score.arm for score in known))
    runs: dict[tuple[str, str, str, int | None], list[float]] = defaultdict(list)
    for score in known:
        runs[score.arm, score.student, score.task, score.shots].append(score.value)

    def mean(arm: str, student: str, group: Group) -> float | None:
        found = [runs.get((arm, student, task, group.shots)) for task in group.tasks]
        return statistics.fmean(statistics.fmean(values or ()) for values in found) if all(found) else None

    rows = []
    for group in _groups(known):
        for student in dict.fromkeys(score.student for score in known):
            means = {arm: mean(arm, student, group) for arm in arms}
            four = [mean(arm, model, group) for model in (TEACHER, student) for arm in (plain, multi_task)]
            values = [value for value in four if value is not None]
            rows.append(Row(group, student, means, gain(*values) if len(values) == 4 and student != TEACHER else None))
    return rows


def contrasts(scores: Iterable[Score], declared: Sequence[Contrast]) -> list[Evidence]:
    """The declared contrasts with 95 % intervals, and p after Holm's correction, for which an unknown p counts as 1.

    Arms are paired by task, draw, distillation seed and fine-tuning seed. Teacher seeds are averaged first, since a
    plain teacher has none; a run without all teacher seeds of its arm makes no pair. Of the distillation seeds those
    count that have a pair on every task. Evaluation rows are not drawn: `metrics.paired_difference` does that.
    """
    known = _checked(scores)
    found = [_judged(known, contrast) for contrast in declared]
    corrected = holm([1.0 if one.p is None else one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def crossed_difference(cells: Cells, null: float = 0.0, draws: int = DRAWS, seed: int = 0) -> tuple[Difference, float]:
    """Mean over tasks and distillation seeds of mean differences, its 95 % interval, and the p of its being `null`.

    Percentile bootstrap: tasks and distillation seeds are drawn with replacement, each for itself, since one distilled
    student is fine-tuned on every task (the pigeonhole bootstrap: Owen, 2007); then fine-tunings within each cell.
    p as in `metrics.hierarchical_difference`, which is the case of one distillation; it is at least 2^(1 - n) for n
    cells, or, with one distillation, n differences. Raises UsageError for an empty cell or fewer than two differences.
    """
    counts = np.array([[len(cell) for cell in row] for row in cells])  # (T, D)
    if counts.ndim != 2 or counts.sum() < 2 or not counts.all():
        raise UsageError(f"cells of {counts.tolist()} differences have no interval; fill every cell, with two in all")
    slots = np.arange(counts.max())
    values = np.zeros((*counts.shape, len(slots)))
    values[slots < counts[..., None]] = [one for row in cells for cell in row for one in cell]
    observed = float((values.sum(axis=2) / counts).mean())

    random, means = np.random.default_rng(seed), np.zeros(draws)
    tasks, distillations = (random.integers(size, size=(size, draws)) for size in counts.shape)
    for task in tasks:
        for distillation in distillations:
            here = counts[task, distillation][:, None]  # (draws, 1)
            drawn = (random.random((draws, len(slots))) * here).astype(np.int64)
            picked = values[task[:, None], distillation[:, None], drawn]
            means += np.where(slots < here, picked, 0).sum(axis=1) / here[:, 0]
    means /= counts.size
    return with_p(observed, means, null, counts.size if counts.shape[1] > 1 else int(counts.sum()))


def _checked(scores: Iterable[Score]) -> list[Score]:
    """The scores, if no run is there twice and each task is judged in one way."""
    known = list(scores)
    if not known:
        raise UsageError("there is no score to report; fine-tune a student first")
    runs: set[tuple[object, ...]] = set()
    facts: dict[tuple[str, int | None], Score] = {}
    for score in known:
        run = astuple(score)[:-1]
        if run in runs:
            raise UsageError(f"a run is there twice, so it would count twice: {score}")
        runs.add(run)
        first = facts.setdefault((score.task, score.shots), score)
        for fact in ("role", "family", "metric"):
            ours, theirs = getattr(score, fact), getattr(first, fact)
            if ours != theirs:
                where = f"task {score.task!r}, arms {first.arm!r} and {score.arm!r}"
                raise UsageError(f"{where}: {fact} is {theirs!r} and {ours!r}; give every arm the same")
    return known


def _groups(scores: Sequence[Score]) -> list[Group]:
    """Roles in their usual order, each with its families, each with its tasks."""
    tree: dict[tuple[Role, int | None], dict[str, dict[str, None]]] = {}
    order = {role: place for place, role in enumerate(get_args(Role))}
    for score in sorted(scores, key=lambda score: (order[score.role], score.shots or 0)):
        tree.setdefault((score.role, score.shots), {}).setdefault(score.family, {})[score.task] = None
    groups = []
    for (role, shots), families in tree.items():
        everything = tuple(task for tasks in families.values() for task in tasks)
        groups.append(Group(role, shots, None, None, everything))
        for family, tasks in families.items():
            groups.append(Group(role, shots, family, None, tuple(tasks)))
            groups += [Group(role, shots, family, task, (task,)) for task in tasks]
    return groups


def _judged(scores: Sequence[Score], contrast: Contrast) -> Evidence:
    """Its evidence, as if it were the only contrast."""
    cells, planned = _differences(scores, contrast)
    compared = {task: found for task, found in cells.items() if found}
    shared = sorted(set.intersection(*map(set, compared.values())), key=str) if compared else []
    table = [[found[seed] for seed in shared] for found in compared.values()]
    differences = [one for row in table for cell in row for one in cell]
    evidence = Evidence(
        contrast=contrast,
        tasks=tuple(compared),
        missing=tuple(task for task in cells if task not in compared),
        distillations=len(shared),
        pairs=len(differences),
        planned=planned,
        difference=next(iter(differences), None),
    )
    if len(differences) < 2:
        return evidence
    found, p = crossed_difference(table)
    return replace(evidence, difference=found.mean, low=found.low, high=found.high, p=p, p_holm=p)


def _differences(scores: Sequence[Score], contrast: Contrast) -> tuple[dict[str, dict[int | None, list[float]]], int]:
    """Differences by task and distillation seed, and how many there would be if no run were missing."""
    units: dict[tuple[str, int | None, int | None, int], dict[str, dict[int | None, float]]] = {}
    teachers: dict[str, set[int | None]] = {arm: set() for arm, weight in contrast.weights.items() if weight}
    for score in scores:
        asked = (score.student, score.role, score.shots) == (contrast.student, contrast.role, contrast.shots)
        if asked and score.arm in teachers:
            unit = units.setdefault((score.task, score.distillation_seed, score.draw, score.seed), {})
            unit.setdefault(score.arm, {})[score.teacher_seed] = score.value
            teachers[score.arm].add(score.teacher_seed)
    cells: dict[str, dict[int | None, list[float]]] = {task: {} for task, *_ in units}
    for (task, distillation, _, _), arms in units.items():
        if all(arm in arms and set(arms[arm]) == seeds for arm, seeds in teachers.items()):
            difference = sum(contrast.weights[arm] * statistics.fmean(runs.values()) for arm, runs in arms.items())
            cells[task].setdefault(distillation, []).append(difference)
    return cells, len(units)
