"""General text -> bank: clean, unique sentences in random order on disk, none of them near an evaluation text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openbook.checkpoint import SCRATCH, fingerprint
from openbook.console import track
from openbook.data.sources import documents
from openbook.retrieval import bank
from openbook.retrieval.passages import LeakGuard
from openbook.workspace import Run

KEYS = {"language", "min_words", "max_words", "leak_ngram", "near_duplicates", "seed"}


def inputs(run: Run) -> dict[str, Any]:
    return {
        "sources": run.corpus_digest,
        "evaluation_texts": fingerprint(run.evaluation_texts),
        "settings": run.recipe.corpus.model_dump(mode="json", include=KEYS),
    }


def check(run: Run) -> None:
    """Every source can be found and read."""
    for number, source in enumerate(run.recipe.corpus.sources):
        next(documents(source, f"corpus.sources.{number}"), None)


def build(run: Run, folder: Path) -> None:
    settings = run.recipe.corpus
    guard = LeakGuard(run.evaluation_texts, settings.leak_ngram)
    with track("splitting documents into sentences") as advance:
        bank.build_bank(all_documents(run), guard, settings, folder, folder / SCRATCH, os.cpu_count() or 1, advance)


def all_documents(run: Run) -> Iterator[tuple[str, str]]:
    for number, source in enumerate(run.recipe.corpus.sources):
        yield from documents(source, f"corpus.sources.{number}")
