"""An experiment as a grid: arms x tasks x seeds from one file, every cell a recipe of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from openbook.config import Recipe, Settings, UsageError
from openbook.recipe import explain, lay, parse_yaml, validate_recipe

Overrides = dict[str, Any]  # dotted key of a recipe -> value
Rates = tuple[float, ...]  # one value for every coordinate that is tuned


class BookReading(Settings):
    """How the book of a trained student is opened, chosen on the held-out rows; controls included."""

    values: Literal["stored", "permuted", "prior"] = Field(
        "stored", description="what the entries say: what is stored, that of another entry, or the mean of all"
    )
    keys: Literal["teacher", "student"] = Field("teacher", description="whose embeddings the entries are found by")
    queries: Literal["student", "ridge"] = Field(
        "student", description="the student's embeddings, or these mapped to the keys by ridge regression"
    )
    beta: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share of the student, below 1 and the same for every text; tuned if absent"
    )
    modes: tuple[Literal["constant", "gate", "bucket"], ...] = ("constant",)
    skips: tuple[Literal["none", "safe", "confident"], ...] = ("none",)
    form: str = Field("fp32", description="of the keys: fp32, fp16, sq8, pca-64, opq-64, pq-64 or other numbers")
    prototypes: Annotated[int, Field(ge=1)] | None = Field(None, description="so many means in place of the entries")
    closed: bool = Field(False, description="a control: no book, but a bias for every class, tuned alike")


class ArmSettings(Settings):
    """One column of the table: what differs from the shared recipe."""

    title: str
    set: Overrides = Field({}, description="dotted keys laid over the recipe")
    set_by_task: dict[str, Overrides] = Field({}, description="further keys that differ between tasks")
    set_by_scale: dict[str, Overrides] = Field({}, description="further keys that differ between sizes of the grid")
    tasks: tuple[str, ...] | None = Field(None, description="only these; all if absent")
    rates_from: str | None = Field(None, description="take the rates that another arm was tuned to")
    students_of: str | None = Field(None, description="train nothing: the students of that arm, which open a book")
    book: BookReading = Field(BookReading(), description="how, where `students_of` is given")


class GridTask(Settings):
    """One row of the table."""

    title: str
    set: Overrides
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]


class Coordinate(Settings):
    """One hyper-parameter that every arm gets tuned, with the same values for all."""

    name: str
    keys: Annotated[tuple[str, ...], Field(min_length=1, description="dotted keys that get the value, where present")]
    values: Annotated[tuple[float, ...], Field(min_length=1)]


class Hypothesis(Settings):
    """A claim about pairs of arms."""

    name: str
    claim: str
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    test: Literal["greater", "not_worse"] = "greater"
    margin: float = Field(0.0, description="points that `not_worse` allows")


class Curve(Settings):
    """Scores over the share of a corpus: a series is a map from share to arm."""

    title: str
    task: str
    series: dict[str, dict[Annotated[float, Field(gt=0, le=1)], str]]


class Grid(Settings):
    """The file of an experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str
    recipe: dict[str, Any] = Field(description="what all cells share; `name` and `seeds` are filled in")
    scales: dict[str, Overrides] = Field(
        description="sizes of the grid; the first is for processors, the last for GPUs"
    )
    tasks: dict[str, GridTask]
    arms: dict[str, ArmSettings]
    baseline: str
    tune: tuple[Coordinate, ...] = ()
    tuning_seed: int = 0
    hypotheses: tuple[Hypothesis, ...] = ()
    curves: tuple[Curve, ...] = ()

    def arms_of(self, task: str) -> list[str]:
        return [name for name, arm in self.arms.items() if arm.tasks is None or task in arm.tasks]

    def readers_of(self, trained: Cell) -> list[str]:
        """The arms that open a book for this student."""
        return [arm for arm in self.arms_of(trained.task) if self.arms[arm].students_of == trained.arm]

    def tuned_as(self, arm: str) -> str:
        """The arm whose rates an arm has: another's, if it says so or has another's students."""
        trained = self.arms[arm].students_of or arm
        return self.arms[trained].rates_from or trained

    def tasks_of(self, arm: str) -> list[str]:
        """The tasks an arm is run on."""
        return [task for task in self.tasks if arm in self.arms_of(task)]


@dataclass(frozen=True)
class Cell:
    """One training: an arm on a task with a seed and rates."""

    task: str
    arm: str
    seed: int
    rates: Rates
    recipe: Recipe

    @property
    def label(self) -> str:
        return "-".join([f"{rate:g}" for rate in self.rates] or ["fixed"])


def load_grid(path: Path) -> Grid:
    """Read and check the file. Raises UsageError naming key, value and fix, also for names that do not fit together."""
    return grid_of(raw_grid(path), path)


def raw_grid(path: Path) -> Any:
    """The file of an experiment of either kind, as YAML reads it."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        shipped = ", ".join(str(p) for p in sorted(Path("experiments").glob("*.yaml"))) or "none in ./experiments"
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name an experiment file (here: {shipped})"
        ) from error


def grid_of(raw: Any, path: Path) -> Grid:
    try:
        grid = Grid.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{path}:\n" + "\n".join(f"  {problem}" for problem in explain(error))) from None
    for place, kind, name in names_used(grid):
        if name not in getattr(grid, kind):
            raise UsageError(
                f"{path}: {place} names {name!r}, which is none of {kind}: {', '.join(getattr(grid, kind))}"
            )
    for name, arm in grid.arms.items():
        if arm.students_of is not None and grid.arms[arm.students_of].students_of is not None:
            raise UsageError(
                f"{path}: arms.{name}.students_of={arm.students_of!r} trains nothing either; name the arm whose"
                " students both of them have"
            )
    return grid


def names_used(grid: Grid) -> Iterator[tuple[str, str, str]]:
    """(where, in which part of the file it should be, name) of every mention."""
    yield "baseline", "arms", grid.baseline
    for name, arm in grid.arms.items():
        yield from ((f"arms.{name}.tasks", "tasks", task) for task in (*(arm.tasks or ()), *arm.set_by_task))
        yield from ((f"arms.{name}.set_by_scale", "scales", scale) for scale in arm.set_by_scale)
        for key in ("rates_from", "students_of"):
            if (other := getattr(arm, key)) is not None:
                yield f"arms.{name}.{key}", "arms", other
    for hypothesis in grid.hypotheses:
        yield from ((f"hypotheses.{hypothesis.name}", "arms", arm) for pair in hypothesis.pairs for arm in pair)
    for curve in grid.curves:
        yield "curves", "tasks", curve.task
        yield from (("curves", "arms", arm) for points in curve.series.values() for arm in points.values())


def middle(grid: Grid) -> Rates:
    """Where tuning starts: the middle value of every coordinate."""
    return tuple(coordinate.values[len(coordinate.values) // 2] for coordinate in grid.tune)


def coordinates_of(grid: Grid, task: str, arm: str, scale: str) -> list[int]:
    """The coordinates that exist in an arm's recipe: without a corpus there is no rate to read it with."""
    raw = raw_recipe(grid, task, arm, scale)
    return [place for place, one in enumerate(grid.tune) if any(reads(raw, key) for key in one.keys)]


def cell(grid: Grid, task: str, arm: str, scale: str, seed: int, rates: Rates) -> Cell:
    """The recipe of one training, checked."""
    raw = raw_recipe(grid, task, arm, scale)
    for coordinate, rate in zip(grid.tune, rates, strict=True):
        for key in coordinate.keys:
            if reads(raw, key):
                lay(raw, key, rate, f"tune.{coordinate.name}")
    raw |= {"name": f"{grid.name}-{task}-{arm}", "seeds": [seed]}
    return Cell(task, arm, seed, rates, validate_recipe(raw, f"arm {arm} on {task}"))


def raw_recipe(grid: Grid, task: str, arm: str, scale: str) -> dict[str, Any]:
    """The shared recipe with scale, task, the arm that trains and the arm itself laid over it, in this order."""
    raw = copy.deepcopy(grid.recipe)
    layers = [(f"scales.{scale}", grid.scales[scale]), (f"tasks.{task}", grid.tasks[task].set)]
    for name in filter(None, (grid.arms[arm].students_of, arm)):
        own = grid.arms[name]
        each = (own.set, own.set_by_task.get(task, {}), own.set_by_scale.get(scale, {}))
        layers += [(f"arms.{name}", overrides) for overrides in each]
    for origin, overrides in layers:
        for dotted, value in overrides.items():
            lay(raw, dotted, copy.deepcopy(value), origin)
    return raw


def reads(raw: Mapping[str, Any], dotted: str) -> bool:
    """Whether the training a key belongs to takes place: `distill.general` may be absent, a corpus may be unread."""
    training: Any = raw
    for part in dotted.split(".")[:2]:
        training = training.get(part) if isinstance(training, Mapping) else None
    return isinstance(training, Mapping) and training.get("optim", {}).get("epochs") != 0
