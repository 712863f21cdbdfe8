"""Task text + index -> hits: what every text of the task finds, once, for every k, budget and form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openbook.checkpoint import SCRATCH, fingerprint
from openbook.console import track
from openbook.engines import open_engine
from openbook.retrieval.anchors import anchors_of, save_anchors
from openbook.retrieval.bank import Bank
from openbook.retrieval.hits import HitTable
from openbook.retrieval.passages import key
from openbook.types import Example
from openbook.workspace import Run

KEYS = {"anchor_mode", "anchor_min_words", "language", "k_max", "select", "other"}
AT_ONCE = 4096  # anchors searched between two marks to resume from


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.corpus.model_dump(mode="json", include=KEYS)
    settings["select"] = settings["select"] == "other_task"
    rows = [(e.id, e.text, e.text_pair, e.label) for e in asking(run)]
    return {"rows": fingerprint(rows), "settings": settings}


def asking(run: Run) -> list[Example]:
    """The training rows whose texts are the queries."""
    return run.other_task.train if run.recipe.corpus.select == "other_task" else run.task.train


def build(run: Run, folder: Path) -> None:
    settings = run.recipe.corpus
    anchors = anchors_of(asking(run), settings, {key(text) for text in run.evaluation_texts})
    own = Bank.load(run.folder / "bank").positions_of(anchor.key for anchor in anchors).tolist()
    engine = open_engine(run)
    parts: list[HitTable] = []
    with track("retrieving", len(anchors)) as advance:
        for first in range(0, len(anchors), AT_ONCE):
            part = folder / SCRATCH / f"hits-{first}"
            if not part.exists():
                queries = [anchor.text for anchor in anchors[first : first + AT_ONCE]]
                save_whole(engine.search(queries, settings.k_max, own, counting_from(first, advance)), part)
            parts.append(HitTable.load(part))
    HitTable.joined(parts).save(folder)
    save_anchors(anchors, folder)


def counting_from(before: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: advance(before + done)


def save_whole(found: HitTable, folder: Path) -> None:
    """Written aside and renamed: a folder that is there is whole."""
    aside = folder.with_name(f".{folder.name}")
    aside.mkdir(exist_ok=True)
    found.save(aside)
    aside.rename(folder)
