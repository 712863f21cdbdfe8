"""What a student was made from, and under which licence, as far as files and packages on this machine say it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

from openbook.config import TaskSettings, UsageError
from openbook.data.tasks import Task, describe_task

UNKNOWN = "not stated"
LONGEST = 80  # characters of a licence's name; a longer one is its whole text
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Ingredient:
    """One thing a student was made from."""

    role: str
    name: str
    licence: str


def ingredients(recipe: Mapping[str, Any]) -> list[Ingredient]:
    """Teacher, labelled data and general text of a resolved recipe, each named once in its role."""
    found = [_model("teacher", recipe["teacher"]["model"])] if "teacher" in recipe else []
    found += [_source("labelled text", source) for source in _task_sources(recipe.get("task") or {})]
    found += [_source("general text", source) for source in (recipe.get("corpus") or {}).get("sources", ())]
    return list(dict.fromkeys(found))


def task_of(settings: Mapping[str, Any]) -> Task | None:
    """What a recipe and the table of tasks say of a task; nothing if it cannot be told here."""
    try:
        return describe_task(TaskSettings.model_validate(settings))
    except (UsageError, ValueError):
        return None


def without_places(value: Any) -> Any:
    """A recipe without the folders of this machine: a local path becomes its last part."""
    if isinstance(value, dict):
        kind = value.get("kind")  # a path inside a package is the same on every machine
        kept = ("path",) if kind == "package" else ()
        last = ("path",) if kind == "file" else ()
        return {
            key: one if key in kept else Path(one).name if key in last else without_places(one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    return place_name(value) if isinstance(value, str) else value


def place_name(text: str) -> str:
    """The last part of a local path; a Hub id and any other text as it is."""
    starts_like_one = re.match(r"[.~/\\$]|\w:\\", text)
    looks_like_one = "/" in text and not HUB_ID.fullmatch(text) and not re.search(r"\s", text)
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if starts_like_one or looks_like_one else text


def _task_sources(task: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    given = [task[name] for name in ("train", "test") if task.get(name)]
    if given or "name" not in task:
        yield from given
        return
    known = task_of(task)
    if known is None:
        return
    if known.packaged is not None:
        yield known.packaged[0].model_dump()
    elif known.hub is not None:
        yield {"kind": "hub", "dataset": known.hub, "name": known.config}


def _source(role: str, source: Mapping[str, Any]) -> Ingredient:
    if source.get("kind") == "package":
        package = source["package"]
        return Ingredient(role, f"{Path(source['path']).name} of the package {package}", _of_package(package))
    if source.get("kind") == "hub":
        parts = (place_name(source["dataset"]), source.get("name"))
        return Ingredient(role, " ".join(part for part in parts if part), UNKNOWN)
    return Ingredient(role, f"{Path(source['path']).name}, a file", UNKNOWN)


def _model(role: str, model: str | Mapping[str, Any]) -> Ingredient:
    if isinstance(model, str):
        return Ingredient(role, place_name(model), _of_card(Path(model)) or UNKNOWN)
    try:
        folder = Path(str(distribution(model["package"]).locate_file(model["path"])))
    except PackageNotFoundError:
        return Ingredient(role, model["package"], UNKNOWN)
    own = _of_card(folder)
    return Ingredient(role, f"{model['package']} (package)", own or _of_package(model["package"]))


def _of_card(folder: Path) -> str | None:
    """What the model card in a folder says."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        said = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return str(said["license"]) if isinstance(said, dict) and said.get("license") else None


def _of_package(package: str) -> str:
    """What a package says of itself, which need not hold for all it carries."""
    try:
        said = distribution(package).metadata
    except PackageNotFoundError:
        return UNKNOWN
    classified = [name.split(" :: ")[-1] for name in said.get_all("Classifier") or () if name.startswith("License ::")]
    named = [said[name] for name in ("License-Expression", "License") if name in said]
    for found in (*named, *classified):
        if found and len(found) <= LONGEST:
            return f"{' '.join(found.split())} (the package)"
    return UNKNOWN
