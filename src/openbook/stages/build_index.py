"""Bank -> index: what retrieval searches, by words, by sentence embeddings, or both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from openbook.checkpoint import SCRATCH
from openbook.console import track
from openbook.engines import VECTORS, WORDS, encoder_name
from openbook.models.sentence import sentence_encoder
from openbook.retrieval.bank import Bank
from openbook.retrieval.bm25 import Index
from openbook.retrieval.dense import DenseIndex
from openbook.workspace import Run


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.corpus
    by_words = settings.model_dump(mode="json", include={"k1", "b"}) if settings.engine != "dense" else None
    return {"engine": settings.engine, "words": by_words, "encoder": encoder_name(run)}


def build(run: Run, folder: Path) -> None:
    settings, bank = run.recipe.corpus, Bank.load(run.folder / "bank")
    if settings.engine != "dense":
        with track("indexing words, shard by shard", len(bank.shards)) as advance:
            Index.build(bank.shards, folder / WORDS, settings.k1, settings.b, os.cpu_count() or 1, advance)
    if settings.engine != "bm25":
        name = encoder_name(run)
        assert name is not None
        with track("embedding sentences", len(bank)) as advance:
            scratch = folder / SCRATCH
            DenseIndex.build(bank.shards, folder / VECTORS, sentence_encoder(name), scratch, name, advance)
