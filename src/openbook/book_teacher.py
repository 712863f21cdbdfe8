"""The teacher beside a book: what it says of texts, as long as it is the one that the book was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Answers, Text
from openbook.backends.base import Backend
from openbook.config import UsageError
from openbook.keys import keys_of, parts_of, projection_part
from openbook.knowledge_base.store import differences
from openbook.loading import load
from openbook.types import KnowledgeBase

OUTPUTS = "teacher_outputs"  # beside the knowledge base: where the map to its keys lies
LONGEST = 12  # letters of a digest that a message shows


@dataclass(frozen=True)
class BookTeacher:
    """A teacher in a run folder, digested when it was loaded."""

    engine: Backend
    run: Path
    parts: Mapping[str, str]  # what decides where it puts a text, by content

    @classmethod
    def beside(cls, run: Path) -> Self | None:
        """The teacher of a run folder, if it is there with its map to keys."""
        folder = run / "teacher"
        if not (folder / "config.json").is_file() or not (run / OUTPUTS).is_dir():
            return None
        engine = load(folder, "torch")
        rules = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return cls(engine, run, parts_of(folder, rules, engine.max_length))

    def check(self, base: KnowledgeBase, finds: bool) -> None:
        """Raise UsageError where it is not the one that `base` was made with, as far as `base` says.

        If it `finds` texts, and not only labels them, its map to keys counts too.
        """
        parts = {**self.parts, **(projection_part(self.run / OUTPUTS) if finds else {})}
        wanted = {"made_from": parts, "kind": self.engine.about.kind, "labels": self.engine.about.labels}
        for name, held, found in differences(base.manifest, wanted):
            raise UsageError(
                f"{name}: what lies beside the book is {shown(found)}, but the book was made with {shown(held)};"
                f" nothing was changed: put the old one back in {self.run}, or build the book again with the new one"
                " (`openbook build-kb`)"
            )

    def read(self, rows: Sequence[Text]) -> Answers:
        return self.engine.run(self.engine.encode(rows))

    def keys(self, heard: Answers) -> NDArray[np.float32]:
        """Where texts lie among the book's keys (n, d)."""
        return keys_of(self.run / OUTPUTS, heard.embedding)


def shown(part: Any) -> str:
    """A digest cut short; anything else, such as labels, as it is."""
    return f"{part[:LONGEST]}..." if isinstance(part, str) and len(part) > LONGEST else repr(part)
