"""What it takes to add entries to a large book that is being read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openbook.answers import Text
from openbook.backends.pytorch import TorchBackend
from openbook.bench.measure import Rival, threads_of_children
from openbook.bench.synthetic_book import MAX_LENGTH, synthetic_book
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.index import open_index, previous_rows
from openbook.models.encoder import load_headless
from openbook.models.student import load_tokenizer
from openbook.types import KnowledgeBase

BATCH = 32  # texts that are embedded together

clock = time.perf_counter


def timed_edit(
    tokenizer: str, texts: Sequence[Text], folder: Path, entries: int, added: int, threads: int
) -> dict[str, Any]:
    """Seconds until `added` entries are found in a book of `entries`, beside those of embedding their texts."""
    with threads_of_children(threads):
        rival = Rival("edit", open_edit, tokenizer, texts, folder, entries, added, threads)
        told: dict[str, Any] = rival.ask("all")[1]
        rival.close()
    return told


def open_edit(
    tokenizer: str, texts: Sequence[Text], folder: Path, entries: int, added: int, threads: int
) -> Callable[[str], dict[str, Any]]:
    torch.set_num_threads(threads)
    model, pieces = load_headless(tokenizer).eval(), load_tokenizer(tokenizer)
    pieces.model_max_length = MAX_LENGTH
    reading = TorchBackend(model, pieces)
    whole = synthetic_book(entries + added, model.width)
    old, new = part(whole, slice(entries)), part(whole, slice(entries, None))
    store.save(old, folder / "edited")
    reader = store.Reader(folder / "edited")
    index = open_index(reader.current().keys, folder=folder / "edited-index", threads=threads)

    def answer_to(request: str) -> dict[str, Any]:
        started = clock()
        with torch.inference_mode():
            for first in range(0, added, BATCH):
                rows = range(first, min(first + BATCH, added))
                model(reading.batch(reading.encode([texts[row % len(texts)] for row in rows])))
        embedded = clock()
        editing.add(folder / "edited", new)
        written = clock()
        now = reader.current()
        loaded = clock()
        follower = index.edited(now.keys, previous_rows(old.ids, now.ids))
        followed = clock()
        hits = follower.search(new.keys[:32], 1)
        return {
            "entries": entries,
            "added": added,
            "index": index.kind,
            "embed_seconds": embedded - started,
            "add_seconds": written - embedded,
            "load_seconds": loaded - written,
            "index_seconds": followed - loaded,
            "found": float((hits.similarities[:, 0] > 1 - 1e-5).mean()),
        }

    return answer_to


def part(base: KnowledgeBase, rows: slice) -> KnowledgeBase:
    return replace(base, keys=base.keys[rows], values=base.values[rows], ids=base.ids[rows], texts=base.texts[rows])
