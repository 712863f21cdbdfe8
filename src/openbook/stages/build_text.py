"""General text -> blocks of word-pieces that students are distilled on; with a control, some text of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from openbook.agnostic_run import AgnosticRun, lengths_of, task_of
from openbook.checkpoint import fingerprint, write_json
from openbook.config import UsageError
from openbook.data.blocks import Cut, Document, Part, draw_documents, pieces_per_character, write_blocks
from openbook.data.sources import digest, documents
from openbook.models.encoder import positions_of
from openbook.workspace import tokenizer_digest


def inputs(run: AgnosticRun) -> dict[str, Any]:
    text = run.recipe.text
    return {
        "settings": text.model_dump(mode="json", exclude={"sources", "task_text"}),
        "sources": [digest(source, f"text.sources.{place}") for place, source in enumerate(text.sources)],
        "task_text": fingerprint([list(documents_of_tasks(run))]) if text.task_share else None,
        "tokenizer": tokenizer_digest(run.tokenizer),
    }


def check(run: AgnosticRun) -> None:
    """Blocks fit the teacher's positions."""
    text = run.recipe.text
    positions = positions_of(run.teacher_config)
    longest = text.long_length or text.length
    if positions is not None and longest > positions:
        key = "long_length" if text.long_length else "length"
        raise UsageError(
            f"text.{key}={longest} is more than the teacher reads, {positions} word-pieces; lower it, or choose another"
            " teacher.model"
        )
    for place, source in enumerate(text.sources):  # there is such a file, and it has text
        next(iter(documents(source, f"text.sources.{place}")), None)


def build(run: AgnosticRun, folder: Path) -> None:
    told: dict[str, Any] = {}
    for name, length, share in lengths_of(run.recipe.text):
        parts = parts_of(run, name, length, round(run.recipe.text.budget_tokens * share))
        settings = {**asdict(parts[0].how), "budgets": {part.name: part.budget for part in parts}}
        told[name] = settings | write_blocks(parts, run.tokenizer, folder / name)
    write_json(folder / "statistics.json", told)


def parts_of(run: AgnosticRun, name: str, length: int, budget: int) -> list[Part]:
    """General text and, as a control, text of the tasks, each with its share; short and long blocks have their own.

    A row of a task may be as short as it is; a general document's end may not.
    """
    text = run.recipe.text
    how = Cut(length, text.pair_share, text.least, text.seed)
    of_tasks = round(budget * text.task_share)
    parts = [Part("text.sources", drawn(run, general_documents, budget - of_tasks, name), how, budget - of_tasks)]
    if of_tasks:
        rows = drawn(run, documents_of_tasks, of_tasks, name)
        parts.append(Part("text.task_text", rows, replace(how, least=1), of_tasks))
    return parts


def drawn(
    run: AgnosticRun, documents_of: Callable[[AgnosticRun], Iterable[Document]], tokens: int, name: str
) -> Iterator[Document]:
    read = partial(documents_of, run)
    density = pieces_per_character(read(), run.tokenizer)
    return draw_documents(read, tokens, density, f"{run.recipe.text.seed}/{name}")


def general_documents(run: AgnosticRun) -> Iterable[Document]:
    for place, source in enumerate(run.recipe.text.sources):
        yield from documents(source, f"text.sources.{place}")


def documents_of_tasks(run: AgnosticRun) -> Iterable[Document]:
    """The tasks' training rows without their labels; a pair is one document. None nearly equals a reported row."""
    tasks = run.recipe.text.task_text
    near = run.duplicates(tasks).ids
    for settings in tasks:
        for row in task_of(settings).train:
            if row.id not in near:
                yield row.id, row.text if row.text_pair is None else f"{row.text} {row.text_pair}"
