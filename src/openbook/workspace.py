"""A run: its recipe, its folder, and what several stages read in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers import AutoConfig

from openbook.checkpoint import building, digest_folder, fingerprint, is_fresh
from openbook.config import Recipe, UsageError, WholeKind
from openbook.data.batches import Tokenised, tokenise
from openbook.data.sources import digest, locate_model
from openbook.data.tasks import TaskData, load_task, unreported_texts
from openbook.keys import digest_of_rules
from openbook.models.encoder import Head
from openbook.models.student import load_tokenizer
from openbook.recipe import dump_recipe
from openbook.types import Example

RUN_FILE = "run.yaml"
WHOLE_KINDS: tuple[WholeKind, ...] = get_args(WholeKind)


@dataclass(frozen=True)
class Workspace:
    """The folder of a recipe, and the pretrained teacher that the recipe names."""

    recipe: Any
    folder: Path

    @property
    def owner(self) -> dict[str, str]:
        """What a folder belongs to, by key of the recipe: any other change makes stages stale, no more."""
        return {"name": self.recipe.name}

    @cached_property
    def teacher_location(self) -> str:
        try:
            return locate_model(self.recipe.teacher.model)
        except UsageError as error:
            raise UsageError(f"teacher.{error}") from None

    @cached_property
    def teacher_config(self) -> Any:
        """The teacher's shape; its weights stay unread."""
        try:
            return AutoConfig.from_pretrained(self.teacher_location, revision=self.recipe.teacher.revision)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"teacher.model={self.teacher_location!r} has no configuration that transformers can read here"
                f" ({str(error).splitlines()[0]}); name a model folder, or a Hub id that this machine has or can fetch"
            ) from error

    @cached_property
    def teacher_digest(self) -> str:
        """Of the pretrained weights: by content for a folder, by name and revision for the Hub."""
        location = Path(self.teacher_location)
        if location.is_dir():
            return digest_folder(location)
        return fingerprint([self.teacher_location, self.recipe.teacher.revision])

    def claim(self) -> None:
        """Write the resolved recipe into the folder. Raises UsageError if another recipe's run lives there."""
        self.check_owner()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{RUN_FILE}.partial"
        aside.write_text(dump_recipe(self.recipe), encoding="utf-8")
        aside.replace(self.folder / RUN_FILE)

    def check_owner(self) -> None:
        try:
            written = yaml.safe_load((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        for key, value in self.owner.items():
            theirs = written
            for part in key.split("."):
                theirs = theirs.get(part) if isinstance(theirs, dict) else None
            if theirs != value:
                raise UsageError(
                    f"{self.folder} was made by another recipe: its {key} is {theirs!r}, this one's is {value!r};"
                    " give this run another folder with --run-dir, or remove that one"
                )


@dataclass(frozen=True)
class Run(Workspace):
    """One recipe at work in one folder."""

    recipe: Recipe

    @property
    def owner(self) -> dict[str, str]:
        return {"name": self.recipe.name, "task.name": self.recipe.task.name}

    @cached_property
    def task(self) -> TaskData:
        return load_task(self.recipe.task)

    @property
    def kind(self) -> WholeKind:
        """Raises UsageError for a kind that only task-agnostic students can be fine-tuned to."""
        kind = next((kind for kind in WHOLE_KINDS if kind == self.task.kind), None)
        if kind is None:
            raise UsageError(
                f"task.kind={self.task.kind}: a recipe for one task teaches classification, regression and multi_label;"
                " for other kinds distil task-agnostic students (a recipe with `students`), and fine-tune those"
            )
        return kind

    @cached_property
    def other_task(self) -> TaskData:
        """The task whose texts are the queries of `corpus.select: other_task`."""
        assert self.recipe.corpus.other is not None
        return load_task(self.recipe.corpus.other)

    @cached_property
    def evaluation_texts(self) -> list[str]:
        """Every text of every split that a score comes from, of all tasks that are named: none may enter the bank."""
        named = [self.recipe.task, *self.recipe.corpus.also_guard]
        tasks = [self.task, *(load_task(settings) for settings in named[1:])]
        rows = chain.from_iterable(chain(task.holdout, task.test) for task in tasks)
        reported = (text for row in rows for text in (row.text, row.text_pair, *row.options) if text is not None)
        return sorted({*reported, *chain.from_iterable(map(unreported_texts, named))})

    @cached_property
    def task_digest(self) -> str:
        """Changes with any row that was read, its label, or the split it is in."""
        rows = {
            split: [(e.id, e.text, e.text_pair, e.label) for e in getattr(self.task, split)]
            for split in ("train", "holdout", "test")
        }
        return fingerprint({"rows": rows, "labels": self.task.labels, "max_length": self.recipe.task.max_length})

    @cached_property
    def head(self) -> Head:
        return Head(self.task.labels, self.task.kind == "multi_label")

    @cached_property
    def tokenizer(self) -> Any:
        """The student's: the teacher's, unless the recipe names another."""
        if self.recipe.student.tokenizer is not None:
            return self.cutting(load_tokenizer(self.recipe.student.tokenizer))
        return self.teacher_tokenizer

    @cached_property
    def teacher_tokenizer(self) -> Any:
        return self.cutting(load_tokenizer(self.teacher_location, self.recipe.teacher.revision))

    def cutting(self, tokenizer: Any) -> Any:
        """The tokenizer that is saved beside a model cuts texts where this run did, whoever uses it."""
        tokenizer.model_max_length = self.recipe.task.max_length
        return tokenizer

    @cached_property
    def shares_tokenizer(self) -> bool:
        return tokenizer_digest(self.tokenizer) == tokenizer_digest(self.teacher_tokenizer)

    @cached_property
    def corpus_digest(self) -> str:
        return fingerprint(
            [digest(source, f"corpus.sources.{i}") for i, source in enumerate(self.recipe.corpus.sources)]
        )

    def tokens(self, name: str, examples: Sequence[Example], tokenizer: Any) -> Tokenised:
        """The examples as word-pieces: tokenised once, then mapped from disk."""
        rows = [(e.id, e.text, e.text_pair, e.label) for e in examples]
        inputs = {
            "rows": fingerprint(rows),
            "tokenizer": tokenizer_digest(tokenizer),
            "max_length": self.recipe.task.max_length,
        }
        folder = self.folder / "tokens" / f"{name}-{fingerprint(inputs)[:12]}"
        if not is_fresh(folder, inputs):
            with building(folder, inputs) as partial:
                tokenise(examples, tokenizer, self.recipe.task.max_length, partial)
        return Tokenised.load(folder)


def tokenizer_digest(tokenizer: Any) -> str:
    """Of vocabulary and rules, as `digest_of_rules`."""
    return digest_of_rules(tokenizer.backend_tokenizer.to_str())
