"""The tasks that can be named in a recipe here and now, and where their rows would be read from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openbook.config import Kind, TaskSettings, UsageError
from openbook.data.roles import provenance
from openbook.data.sources import installed
from openbook.data.tasks import TASKS, Task, describe_task


@dataclass(frozen=True)
class KnownTask:
    """A line of `openbook tasks`."""

    name: str
    kind: Kind | None  # None: its folder is not as it should be, see `problem`
    family: str
    groups: frozenset[str]
    labels: int | None  # number of classes; None where there are none, or where only the rows tell
    metrics: tuple[str, ...]
    rows: Mapping[str, int] | None  # by split; None where counting would mean to read them
    found: str  # a folder of OPENBOOK_DATA, a package, or a data set on the Hub
    problem: str = ""  # why its folder cannot be read


def known_tasks() -> list[KnownTask]:
    """Built-in tasks, then those of the folder OPENBOOK_DATA. Nothing but their `task.json` is read."""
    folders = _folders()
    return [_known(name, folders.get(name)) for name in dict.fromkeys([*TASKS, *sorted(folders)])]


def _folders() -> dict[str, Path]:
    root = os.environ.get("OPENBOOK_DATA")
    folder = Path(root, "tasks") if root else None
    if folder is None or not folder.is_dir():
        return {}
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def _known(name: str, folder: Path | None) -> KnownTask:
    settings, problem = TaskSettings(name=name), ""
    task: Task | None = None
    try:
        task = describe_task(settings)
    except UsageError as error:
        problem = str(error)
    own = provenance(settings)
    return KnownTask(
        name=name,
        kind=task.kind if task else None,
        family=own.family,
        groups=own.groups,
        labels=len(task.labels) if task and task.labels else None,
        metrics=task.metrics if task else (),
        rows=_rows(folder) if folder else None,
        found=str(folder) if folder or task is None else _place(task),
        problem=problem,
    )


def _place(task: Task) -> str:
    """As `load_task` chooses: an installed package before the Hub."""
    if task.packaged is not None and (task.hub is None or installed(task.packaged[0].package)):
        return f"package {task.packaged[0].package}"
    return f"Hub {' '.join(part for part in (task.hub, task.config) if part)}"


def _rows(folder: Path) -> dict[str, int] | None:
    """What `task.json` says, which need not say it."""
    try:
        splits = json.loads((folder / "task.json").read_text(encoding="utf-8"))["splits"]
        return {str(split): int(rows) for split, rows in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
