"""General text + task text -> contextualized corpus: sentences, leak guard, BM25, merge, rank, budget, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openbook.checkpoint import write_json
from openbook.console import track
from openbook.data.sources import documents
from openbook.retrieval.bm25 import Index
from openbook.retrieval.contextualize import anchors_of, contextualize
from openbook.retrieval.passages import LeakGuard, build_bank
from openbook.retrieval.statistics import describe
from openbook.types import Example
from openbook.workspace import Run, tokenizer_digest


def inputs(run: Run) -> dict[str, Any]:
    return {
        "task": run.task_digest,
        "sources": run.corpus_digest,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "settings": run.recipe.corpus.model_dump(mode="json", exclude={"sources"}),
    }


def check(run: Run) -> None:
    """Every source can be found and read."""
    for number, source in enumerate(run.recipe.corpus.sources):
        next(documents(source, f"corpus.sources.{number}"), None)


def build(run: Run, folder: Path) -> None:
    settings, task = run.recipe.corpus, run.task
    guard = LeakGuard(texts_of([*task.holdout, *task.test]), settings.leak_ngram)
    with track("splitting documents into sentences") as advance:
        bank, counts = build_bank(all_documents(run), guard, settings, advance)
    index = Index.build([passage.text for passage in bank], settings.k1, settings.b)
    anchors = anchors_of(task.train, settings, guard.keys)
    with track("retrieving", len(anchors)) as advance:
        corpus = contextualize(bank, index, anchors, settings, lambda texts: count_tokens(run, list(texts)), advance)
    chosen = [passage.text for passage in corpus.passages]
    sample = [passage.text for passage in bank[: len(chosen)]]
    task_texts = [anchor.text for anchor in anchors]
    described = describe({"corpus": chosen, "random": sample, "task": task_texts}, task_texts, settings.seed)
    pq.write_table(pa.Table.from_pylist([asdict(passage) for passage in corpus.passages]), folder / "passages.parquet")
    write_json(folder / "statistics.json", {**corpus.statistics, "bank": counts, "described": described})


def all_documents(run: Run) -> Iterator[tuple[str, str]]:
    for number, source in enumerate(run.recipe.corpus.sources):
        yield from documents(source, f"corpus.sources.{number}")


def texts_of(examples: list[Example]) -> list[str]:
    return [text for example in examples for text in (example.text, example.text_pair) if text is not None]


def count_tokens(run: Run, texts: list[str]) -> list[int]:
    """Word-pieces of each sentence as the student will read it: cut, without special tokens."""
    room = run.recipe.task.max_length - run.tokenizer.num_special_tokens_to_add()
    encoded = run.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=room)
    return [len(row) for row in encoded["input_ids"]]
