"""A predictor that answers at once without a model: to test the server alone."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Encoded, Text, fields
from openbook.config import UsageError
from openbook.knowledge_base.answering import Retrieval
from openbook.knowledge_base.editing import Edit
from openbook.knowledge_base.interpolate import Evidence, evidence
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase

LENGTH = 64  # tokens, one a word


@dataclass
class StandIn:
    """What a text says depends on that text alone; its book has one entry, or those that were remembered."""

    labels: tuple[str, ...] | None = ("no", "yes")
    seconds: float = 0.0  # that every batch takes
    kind: str = "classification"
    entries: dict[str, str] = field(default_factory=lambda: {"first": "the first entry"})  # text by id
    generation: int = 1

    @property
    def book(self) -> Any:
        return SimpleNamespace(base=self.base, retrieval=Retrieval(top_k=3, temperature=1.0, beta=0.5))

    @property
    def base(self) -> KnowledgeBase:
        count, width = len(self.entries), len(self.labels or " ")
        values = np.tile(np.eye(width, dtype=np.float32)[-1], (count, 1))  # (M, C)
        keys = np.ones((count, 1), np.float32)
        return KnowledgeBase(
            keys, values, tuple(self.entries), tuple(self.entries.values()), {"generation": self.generation}
        )

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        words = [" ".join(fields(row)).split() for row in rows]
        return [Encoded([zlib.crc32(word.encode()) for word in row[:LENGTH]], [], len(row) > LENGTH) for row in words]

    def answer(self, encoded: Sequence[Encoded]) -> NDArray[Any]:
        time.sleep(self.seconds)
        numbers = np.array([sum(row.ids) % 1000 / 1000 for row in encoded])
        if self.labels is None:
            return numbers[:, None]
        others = len(self.labels) - 1
        return np.concatenate([np.outer(1 - numbers, np.full(others, 1 / others)), numbers[:, None]], axis=1)

    def evidence(self, encoded: Sequence[Encoded]) -> list[Evidence]:
        count = min(3, len(self.entries))
        hits = Hits(np.tile(np.arange(count), (len(encoded), 1)), np.full((len(encoded), count), 0.5, np.float32))
        return evidence(self.base, hits, self.answer(encoded), 1.0, 0.5)

    def remember(self, texts: Any, labels: Any = None, ids: Sequence[str] | None = None) -> Edit:
        names = list(ids or map(str, texts))
        if taken := [name for name in names if name in self.entries]:
            raise UsageError(f"id {taken[0]!r} is there already; choose another")
        self.entries |= {name: "\t".join(fields(text)) for name, text in zip(names, texts, strict=True)}
        return self.edited("add", added=len(names))

    def forget(self, ids: Sequence[str]) -> Edit:
        for name in ids:
            if name not in self.entries or list(ids).count(name) > 1:
                raise UsageError(f"id {name!r} is not in the knowledge base, or is named more than once")
        for name in ids:
            del self.entries[name]
        return self.edited("remove", removed=len(ids))

    def edited(self, what: str, added: int = 0, removed: int = 0) -> Edit:
        self.generation += 1
        return Edit(what, self.generation, len(self.entries), False, added, removed)

    def name(self, answer: NDArray[Any]) -> str | float:
        return float(answer[0]) if self.labels is None else self.labels[int(answer.argmax())]
