"""The book as a predictor holds it."""

from pathlib import Path

import numpy as np
import pytest

from openbook.knowledge_base import editing, store
from openbook.knowledge_base.answering import ALONE
from openbook.knowledge_base.index import open_index
from openbook.knowledge_base.search import normalise
from openbook.knowledge_base.shelf import Shelf, build_index
from openbook.types import KnowledgeBase

ABOUT = {"kind": "classification", "labels": ("no", "yes"), "key_space": "space"}


def base_of(count: int, seed: int = 0, start: int = 0) -> KnowledgeBase:
    random = np.random.default_rng(seed)
    keys = normalise(random.normal(size=(count, 16))).astype(np.float32)
    values = np.eye(2, dtype=np.float32)[random.integers(0, 2, count)]
    names = tuple(f"t/{start + row}" for row in range(count))
    return KnowledgeBase(keys, values, names, names, ABOUT)


def test_a_book_in_memory_is_opened_once() -> None:
    shelf = Shelf(base_of(9))
    assert shelf.folder is None
    assert shelf.book() is shelf.book()
    assert shelf.book().retrieval == ALONE, "what was never tuned is not opened"


def test_an_edit_is_seen_and_nothing_else_makes_it_open_the_book_anew(tmp_path: Path) -> None:
    store.save(base_of(9), tmp_path)
    shelf = Shelf(tmp_path)
    before = shelf.book()
    assert shelf.book() is before
    editing.add(tmp_path, base_of(2, seed=1, start=9))
    assert shelf.book().base.ids[-2:] == ("t/9", "t/10")
    assert before.base.ids[-1] == "t/8", "whoever has the old generation keeps it"
    query = base_of(2, seed=1, start=9).keys[:1]
    assert shelf.book().index.search(query, 1).positions.tolist() == [[9]]


def test_an_index_is_built_with_the_book_and_only_looked_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_index, "__defaults__", ("auto", 1000, None))  # bytes of keys that are searched exactly
    base = base_of(600)
    store.save(base, tmp_path)
    assert Shelf(tmp_path).book().index.kind == "exact", "none was built"
    assert build_index(tmp_path).kind == "hnsw"
    shelf = Shelf(tmp_path)
    assert shelf.book().index.kind == "hnsw"
    editing.add(tmp_path, base_of(3, seed=1, start=600))
    editing.remove(tmp_path, ["t/5"])
    edited = shelf.book()
    assert edited.index.kind == "hnsw", "what was indexed stays so"
    new = base_of(3, seed=1, start=600)
    assert edited.index.search(new.keys, 1).positions[:, 0].tolist() == [599, 600, 601]
    nearest = edited.index.search(base.keys[5:6], 1)
    assert nearest.similarities[0, 0] < 0.999, "what was removed is not found"
    assert Shelf(tmp_path).book().index.kind == "exact", "another process finds no index of these keys"
