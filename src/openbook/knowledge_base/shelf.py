"""The book as a predictor holds it: the newest generation of a folder, its settings of retrieval, its index."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from openbook.knowledge_base.answering import ALONE, Retrieval
from openbook.knowledge_base.index import Index, open_index, previous_rows
from openbook.knowledge_base.store import Reader, load
from openbook.types import KnowledgeBase

INDEX = "index"  # folder beside the segments: a cache


@dataclass(frozen=True)
class Book:
    """One generation, ready to be looked things up in."""

    base: KnowledgeBase
    retrieval: Retrieval
    index: Index


def build_index(folder: Path) -> Index:
    """Keep an index beside the book in a folder, if it is so large that one is of use."""
    base = load(folder)
    return open_index(base.keys, folder=folder / INDEX, basis=base.basis)


class Shelf:
    """Where a predictor finds its book: in memory, or in a folder that may be edited meanwhile. Threads share it."""

    def __init__(self, source: KnowledgeBase | Path):
        self._reader = Reader(source) if isinstance(source, Path) else None
        self._given = None if isinstance(source, Path) else source
        self._lock = threading.Lock()
        self._book: Book | None = None

    @property
    def folder(self) -> Path | None:
        return None if self._reader is None else self._reader.folder

    def book(self) -> Book:
        """The newest generation. Raises UsageError when its folder cannot be used."""
        base = self._given if self._reader is None else self._reader.current()
        assert base is not None
        held = self._book
        if held is None or held.base is not base:
            with self._lock:
                held = self._book = self._opened(base, self._book)
        return held

    def _opened(self, base: KnowledgeBase, before: Book | None) -> Book:
        """Of an edited base, what was indexed stays so. Building an index takes long: here one is only looked for."""
        if before is not None and before.base is base:
            return before
        if before is None or before.index.built is None or before.base.keys.shape[1] != base.keys.shape[1]:
            folder = None if self.folder is None else self.folder / INDEX
            index = open_index(base.keys, folder=folder, basis=base.basis, build=False)
        else:
            index = before.index.edited(base.keys, previous_rows(before.base.ids, base.ids), base.basis)
        written = base.manifest.get("retrieval")
        return Book(base, ALONE if written is None else Retrieval.from_manifest(written), index)
