"""An experiment on task-agnostic students: arms that differ in teacher or text, each distilled under several seeds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from openbook.agnostic import AgnosticRecipe
from openbook.config import Settings, UsageError
from openbook.manifest import resolved
from openbook.recipe import explain, lay, validate_as

Overrides = dict[str, Any]  # dotted key of a recipe -> value


class AgnosticArm(Settings):
    """What differs from the shared recipe."""

    title: str
    set: Overrides = Field({}, description="dotted keys laid over the recipe")
    set_by_scale: dict[str, Overrides] = Field({}, description="further keys that differ between sizes of the grid")


class DeclaredContrast(Settings):
    """A claim about arms, tested for every student on the tasks of every role."""

    name: str
    claim: str
    weights: dict[str, float] = Field(description="by arm; they add up to 0, such as {B: 1, A: -1}")


class AgnosticGrid(Settings):
    """The file of an experiment whose recipe names `students`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str
    recipe: dict[str, Any] = Field(description="what all arms share; `name` and `seed` are filled in")
    scales: dict[str, Overrides] = Field(description="sizes; the first is for processors, the last for GPUs")
    arms: dict[str, AgnosticArm]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field(description="of the distillation")
    plain: str = Field(description="the arm whose teacher learned no task")
    multi_task: str = Field(description="the arm whose teacher learned them all")
    contrasts: tuple[DeclaredContrast, ...] = ()

    @model_validator(mode="after")
    def seeds_differ(self) -> Self:
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds: {twice[0]} is there twice; name every seed once")
        return self

    @model_validator(mode="after")
    def arms_are_known(self) -> Self:
        named = [self.plain, self.multi_task, *(arm for one in self.contrasts for arm in one.weights)]
        for arm in named:
            if arm not in self.arms:
                raise ValueError(f"{arm!r} is none of arms: {', '.join(self.arms)}")
        for one in self.contrasts:
            if not any(one.weights.values()) or abs(sum(one.weights.values())) > 1e-9:
                raise ValueError(f"contrast {one.name!r}: the weights {one.weights} do not add up to 0, such as 1, -1")
        return self


def is_agnostic(raw: Any) -> bool:
    """Whether the file of an experiment is about task-agnostic students."""
    return isinstance(raw, dict) and isinstance(raw.get("recipe"), dict) and "students" in raw["recipe"]


def agnostic_grid(raw: Any, path: Path) -> AgnosticGrid:
    try:
        return AgnosticGrid.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  {problem}" for problem in explain(error, AgnosticGrid))
        raise UsageError(f"{path}:\n{problems}") from None


def recipe_of(grid: AgnosticGrid, arm: str, scale: str, seed: int) -> AgnosticRecipe:
    """The recipe of one arm and seed, checked."""
    raw = copy.deepcopy(grid.recipe)
    own = grid.arms[arm]
    for origin, overrides in (
        (f"scales.{scale}", grid.scales[scale]),
        (f"arms.{arm}", own.set),
        (f"arms.{arm}", own.set_by_scale.get(scale, {})),
    ):
        for dotted, value in overrides.items():
            lay(raw, dotted, copy.deepcopy(value), origin)
    raw |= {"name": f"{grid.name}-{arm}", "seed": seed}
    return resolved(validate_as(AgnosticRecipe, raw, f"arm {arm}"))
