"""What a student asks its book by, and books whose keys are its own embeddings rather than its teacher's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Text
from openbook.backends.base import Backend
from openbook.checkpoint import fingerprint
from openbook.config import UsageError
from openbook.keys import Map
from openbook.knowledge_base.search import normalise
from openbook.types import KnowledgeBase

STUDENT = "student"  # what a manifest says of such keys


def is_by_student(base: KnowledgeBase) -> bool:
    return bool(base.manifest.get("keyed_by") == STUDENT)


def queries(base: KnowledgeBase, embedding: NDArray[Any], own: Map | None) -> NDArray[Any]:
    """What a student asks this book by: its embedding (n, d), or its own projection of it where keys are a teacher's.

    Raises UsageError for a projection of another width.
    """
    if own is None or is_by_student(base):
        return embedding
    weight, bias = own
    if weight.shape[1] != embedding.shape[1]:
        raise UsageError(f"the student's projection reads {weight.shape[1]} numbers, and it tells {embedding.shape[1]}")
    return embedding @ weight.T + bias


def space(backend: Backend, otherwise: str) -> str:
    """The key space of the books of these very weights; `otherwise` where they are not known."""
    return otherwise if backend.weights is None else fingerprint([STUDENT, backend.weights])


def rekeyed(base: KnowledgeBase, backend: Backend) -> KnowledgeBase:
    """The same entries, found where this student itself puts their texts: a text that comes again finds its own entry.

    Raises UsageError for a base that keeps no texts.
    """
    if not any(base.texts):
        raise UsageError("the book keeps no texts that the student could read; build it with its texts")
    keys = normalise(backend.run(backend.encode(rows_of(base))).embedding).astype(np.float32)
    manifest = {name: value for name, value in base.manifest.items() if name != "form"} | {"keyed_by": STUDENT}
    if "key_space" in manifest:
        manifest["key_space"] = space(backend, manifest["key_space"])
    return replace(base, keys=keys, basis=None, manifest=manifest)


def rows_of(base: KnowledgeBase) -> list[Text]:
    """Texts as the student reads them: a book of pairs keeps the two texts of each joined by a tab."""
    pair = base.manifest.get("pair", all("\t" in text for text in base.texts))
    parts = (text.partition("\t") for text in base.texts) if pair else ()
    return [(first, second) for first, _, second in parts] if pair else list(base.texts)
