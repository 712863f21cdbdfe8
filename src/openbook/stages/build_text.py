"""General text -> blocks of word-pieces that students are distilled on; with a control, some text of the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from openbook.agnostic import TextSettings
from openbook.agnostic_run import AgnosticRun, lengths_of, task_of
from openbook.checkpoint import fingerprint, write_json
from openbook.config import UsageError
from openbook.data.blocks import Cut, Document, draw_documents, pieces_per_character, write_blocks
from openbook.data.sources import digest, documents
from openbook.workspace import tokenizer_digest


def inputs(run: AgnosticRun) -> dict[str, Any]:
    text = run.recipe.text
    return {
        "settings": text.model_dump(mode="json", exclude={"sources", "task_text"}),
        "sources": [digest(source, f"text.sources.{place}") for place, source in enumerate(text.sources)],
        "task_text": fingerprint([list(documents_of_tasks(text))]) if text.task_share else None,
        "tokenizer": tokenizer_digest(run.tokenizer),
    }


def check(run: AgnosticRun) -> None:
    """Blocks fit the teacher's positions."""
    text = run.recipe.text
    positions = getattr(run.teacher_config, "max_position_embeddings", None)
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
    text = run.recipe.text
    told: dict[str, Any] = {}
    for name, length, share in lengths_of(text):
        budget = round(text.budget_tokens * share)
        how = Cut(length, text.pair_share, text.least, text.seed)
        told[name] = asdict(how) | write_blocks(mixed(run, budget, name), run.tokenizer, how, budget, folder / name)
    write_json(folder / "statistics.json", told)


def mixed(run: AgnosticRun, budget: int, name: str) -> Iterator[Document]:
    """Documents of about `budget` word-pieces; short and long blocks are cut from other ones."""
    text = run.recipe.text
    kinds = (general_documents, 1 - text.task_share), (documents_of_tasks, text.task_share)
    for documents_of, share in kinds:
        if share:
            read = partial(documents_of, text)
            density = pieces_per_character(read(), run.tokenizer)
            yield from draw_documents(read, round(budget * share), density, f"{text.seed}/{name}")


def general_documents(text: TextSettings) -> Iterable[Document]:
    for place, source in enumerate(text.sources):
        yield from documents(source, f"text.sources.{place}")


def documents_of_tasks(text: TextSettings) -> Iterable[Document]:
    """The tasks' training rows without their labels; a pair is one document."""
    for settings in text.task_text:
        for row in task_of(settings).train:
            yield row.id, row.text if row.text_pair is None else f"{row.text} {row.text_pair}"
