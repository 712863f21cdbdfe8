"""A made-up book of any size: keys around centres, with labels that depend on their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openbook.answers import probabilities_of
from openbook.knowledge_base.search import normalise
from openbook.types import KnowledgeBase

CLASSES = tuple("abcdef")


MAX_LENGTH = 128  # word-pieces


def synthetic_book(entries: int, width: int) -> KnowledgeBase:
    """Unit keys around eight centres a class, and soft labels."""
    random = np.random.default_rng(0)
    centres = normalise(random.normal(size=(8 * len(CLASSES), width))).astype(np.float32)
    own = random.integers(len(centres), size=entries)
    keys = random.standard_normal((entries, width), dtype=np.float32)
    keys *= 0.8 / width**0.5
    keys += centres[own]
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return KnowledgeBase(
        keys=keys,
        values=soft_labels(keys).astype(np.float32),
        ids=tuple(map(str, range(entries))),
        texts=("",) * entries,
        manifest={"kind": "classification", "labels": list(CLASSES), "key_space": "synthetic"},
    )


def soft_labels(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """What depends on the place of a vector (n, d), also within a cluster -> (n, C)."""
    directions = np.random.default_rng(2).normal(size=(vectors.shape[1], len(CLASSES))).astype(np.float32)
    return probabilities_of(4 * vectors @ directions)


def near(keys: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Queries (count, d): keys, moved by a third of their length in a random direction."""
    random = np.random.default_rng(1)
    noise = normalise(random.normal(size=(count, keys.shape[1])))
    return (keys[random.integers(len(keys), size=count)] + 0.33 * noise).astype(np.float32)


def forms_of(width: int) -> list[str]:
    sized = [f"{kind}-{size}" for kind in ("pca", "pq") for size in (32, 64) if size < width and width % size == 0]
    return ["fp32", "fp16", "sq8", *sized]
