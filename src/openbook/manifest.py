"""Tasks of one's own from a YAML file that lists them, checked before the first row of any is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openbook.agnostic import AgnosticRecipe
from openbook.config import Settings, TaskSettings, UsageError
from openbook.data.tasks import describe_task
from openbook.recipe import explain, parse_yaml


class _Entry(Settings):
    task: TaskSettings  # under the key that it has in a recipe, so that messages name `task.family`, ...


def load_manifest(path: Path) -> dict[str, TaskSettings]:
    """The tasks of a manifest by name, in its order: a YAML list whose entries have the keys of a recipe's `task`.

    An entry may be as short as `- name: sst2` for a task that is built in. Raises one UsageError that names every
    entry with an unknown key, a bad value, a name used before, or columns that are missing.
    """
    entries = _entries(path)
    tasks: dict[str, TaskSettings] = {}
    problems: list[str] = []
    for place, entry in enumerate(entries, start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        found = list(_read(entry, tasks))
        title = f"entry {place}" + (f" ({name})" if name else "")
        problems += [f"  {title}: {problem}" for problem in found]
    if problems:
        raise UsageError("\n".join([f"{path}:", *problems]))
    return tasks


def resolved(recipe: AgnosticRecipe) -> AgnosticRecipe:
    """The recipe with the tasks that it only names as its manifest describes them."""
    if recipe.manifest is None:
        return recipe
    known = load_manifest(Path(recipe.manifest))

    def described(tasks: tuple[TaskSettings, ...]) -> tuple[TaskSettings, ...]:
        return tuple(known.get(task.name, task) if task.model_fields_set == {"name"} else task for task in tasks)

    fine_tune, own = recipe.fine_tune, recipe.students_learn
    few = fine_tune.few.model_copy(update={"tasks": described(fine_tune.few.tasks)})
    seen = None if fine_tune.known is None else described(fine_tune.known)
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"tasks": described(recipe.teacher.tasks)}),
            "text": recipe.text.model_copy(update={"task_text": described(recipe.text.task_text)}),
            "students_learn": own and own.model_copy(update={"tasks": described(own.tasks)}),
            "fine_tune": fine_tune.model_copy(
                update={
                    "tasks": described(fine_tune.tasks),
                    "teacher_tasks": described(fine_tune.teacher_tasks),
                    "few": few,
                    "known": seen,
                }
            ),
        }
    )


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); name a YAML file, in UTF-8, that lists tasks") from error
    entries = parse_yaml(text, str(path))
    if not isinstance(entries, list) or not entries:
        held = "an empty list" if entries == [] else "nothing" if entries is None else f"a {type(entries).__name__}"
        raise UsageError(f"{path} holds {held}, not a list of tasks; begin every task with `- name: ...`")
    return entries


def _read(entry: Any, tasks: dict[str, TaskSettings]) -> Iterator[str]:
    """Add the task of an entry to the others, or yield what is wrong with it."""
    if not isinstance(entry, dict):
        yield f"{entry!r} is a {type(entry).__name__}, not a task; write `- name: {entry}`"
        return
    try:
        task = _Entry.model_validate({"task": entry}).task
        describe_task(task)
    except ValidationError as error:
        yield from explain(error)
    except UsageError as error:
        yield str(error)
    else:
        if task.name in tasks:
            yield f"task.name={task.name!r} is used before; give every task a name of its own"
        tasks[task.name] = task
