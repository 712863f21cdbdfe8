"""A task-agnostic run: its recipe, its folder, and what several stages read in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import Any

from openbook.agnostic import AgnosticRecipe, NamedStudent, TextSettings
from openbook.checkpoint import building, fingerprint, is_fresh
from openbook.config import Kind, TaskSettings, UsageError
from openbook.data.batches import Tokenised, tokenise
from openbook.data.roles import Duplicates, near_duplicates
from openbook.data.sequences import Cutting, refuse_long_questions
from openbook.data.tasks import TaskData, load_task
from openbook.models.student import load_tokenizer
from openbook.types import Example
from openbook.workspace import Workspace, tokenizer_digest

LONGEST = 100  # questions, by their characters: one of them takes most word-pieces


@cache  # by settings: teacher, text and fine-tuning read the same rows
def task_of(settings: TaskSettings) -> TaskData:
    """A task that heads can be trained for.

    Raises UsageError, which names the task, for one that cannot be read, and for several labels a text: they have no
    head here.
    """
    try:
        task = load_task(settings)
    except UsageError as error:
        raise UsageError(f"tasks, {settings.name}: {error}") from None
    if task.kind == "multi_label":
        raise UsageError(
            f"tasks, {settings.name}: kind=multi_label is taught by a recipe for one task alone (it names `task`);"
            " write one, or leave the task out"
        )
    return task


def check_task(key: str, given: TaskSettings, tokenizer: Any, positions: int | None, reader: str, remedy: str) -> None:
    """Raise UsageError unless a task can be read, and its texts fit what reads them, of so many `positions`."""
    where = f"{key}, {given.name}"
    if positions is not None and given.max_length > positions:
        raise UsageError(
            f"{where}: max_length={given.max_length} is more than {reader}, {positions} word-pieces; lower it, or"
            f" {remedy}"
        )
    task = task_of(given)
    if task.kind == "span_extraction":
        rows = chain(task.train, task.holdout, task.test)
        longest = nlargest(LONGEST, rows, key=lambda row: len(row.text))
        try:
            refuse_long_questions(longest, tokenizer, Cutting(given.max_length, given.stride))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


@cache
def duplicates_of(learned: tuple[TaskSettings, ...], judged: tuple[TaskSettings, ...]) -> Duplicates:
    """Training rows of the first tasks that nearly equal a reported row of one of the second."""
    rows = chain.from_iterable(task_of(task).test for task in judged)
    return near_duplicates({task.name: task_of(task).train for task in learned}, rows)


@dataclass(frozen=True)
class AgnosticRun(Workspace):
    """One task-agnostic recipe at work in one folder."""

    recipe: AgnosticRecipe

    @property
    def learned(self) -> tuple[TaskSettings, ...]:
        """What the teacher learns, then what the students do."""
        students = self.recipe.students_learn
        return (*self.recipe.teacher.tasks, *(students.tasks if students else ()))

    def duplicates(self, tasks: tuple[TaskSettings, ...]) -> Duplicates:
        """Training rows of these tasks that nearly equal a row some score of this run comes from."""
        settings = self.recipe.fine_tune
        judged = (*self.learned, *settings.tasks, *settings.few.tasks, *settings.teacher_tasks)
        return duplicates_of(tasks, tuple(dict.fromkeys(judged)))

    @property
    def students_folder(self) -> Path:
        """Where the last stage that trains students leaves them."""
        return self.folder / ("students" if self.recipe.students_learn is None else "trained_students")

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's, which the students share: their relations are compared token by token."""
        return load_tokenizer(self.teacher_location, self.recipe.teacher.revision)

    @property
    def longest(self) -> int:
        """Word-pieces of the longest block that students read: so many positions they have."""
        return self.recipe.text.long_length or self.recipe.text.length

    def student(self, name: str) -> NamedStudent:
        return next(student for student in self.recipe.students if student.name == name)


def lengths_of(text: TextSettings) -> list[tuple[str, int, float]]:
    """Folder, length of the blocks in it, and share of the word-pieces, in the order they are read."""
    if text.long_length is None:
        return [("short", text.length, 1.0)]
    return [("short", text.length, 1 - text.long_share), ("long", text.long_length, text.long_share)]


def tokens_of_rows(
    folder: Path, settings: TaskSettings, kind: Kind, rows: Sequence[Example], tokenizer: Any, training: bool
) -> Tokenised:
    """Rows of a task as word-pieces: tokenised once below `folder`, then mapped from disk."""
    inputs = {
        "rows": fingerprint([repr(row) for row in rows]),
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": [settings.max_length, settings.stride, kind, training],
    }
    place = folder / "tokens" / f"{settings.name}-{fingerprint(inputs)[:16]}"
    if not is_fresh(place, inputs):
        with building(place, inputs) as partial:
            tokenise(rows, tokenizer, settings.max_length, partial, kind, settings.stride, training)
    return Tokenised.load(place)
