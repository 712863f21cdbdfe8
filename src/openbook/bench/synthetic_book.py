"""A made-up book of any size: keys around centres, with labels that depend on their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openbook.answers import probabilities_of
from openbook.knowledge_base.search import normalise
from openbook.types import KnowledgeBase

CLASSES = ("negative", "positive")  # SST-2's, which has 67 k entries
CENTRES = 48  # of keys
MAX_LENGTH = 128  # word-pieces


def synthetic_book(entries: int, width: int) -> KnowledgeBase:
    """Unit keys around centres, and soft labels.

    Directions vary in energies that fall as 1 / rank, as those of the keys of trained students were measured to (RTE to
    SST-2): graphs and compact forms live on that.
    """
    random = np.random.default_rng(0)
    spread = spread_of(width)
    centres = normalise(random.normal(size=(CENTRES, width)) * spread).astype(np.float32)
    own = random.integers(len(centres), size=entries)
    keys = random.standard_normal((entries, width), dtype=np.float32)
    keys *= (0.8 * spread).astype(np.float32)
    keys += centres[own]
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return KnowledgeBase(
        keys=keys,
        values=soft_labels(keys).astype(np.float32),
        ids=tuple(map(str, range(entries))),
        texts=("",) * entries,
        manifest={"kind": "classification", "labels": list(CLASSES), "key_space": "synthetic"},
    )


def spread_of(width: int) -> NDArray[np.float64]:
    """Standard deviations (d,) of a random vector of length about one."""
    energies = 1 / np.arange(1, width + 1)
    return np.asarray(np.sqrt(energies / energies.sum()))


def soft_labels(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """What depends on the place of a vector (n, d), also within a cluster -> (n, C)."""
    directions = np.random.default_rng(2).normal(size=(vectors.shape[1], len(CLASSES))).astype(np.float32)
    return probabilities_of(4 * vectors @ directions)


def near(keys: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Queries (count, d): keys, moved by a third of their length in a random direction."""
    random = np.random.default_rng(1)
    noise = noise_of(random, count, keys.shape[1])
    return (keys[random.integers(len(keys), size=count)] + noise).astype(np.float32)


def noise_of(random: np.random.Generator, count: int, width: int) -> NDArray[np.float64]:
    return np.asarray(0.33 * normalise(random.normal(size=(count, width)) * spread_of(width)))


def forms_of(width: int) -> list[str]:
    sized = [
        f"{kind}-{size}" for kind in ("pca", "pq", "opq") for size in (32, 64) if size < width and width % size == 0
    ]
    return ["fp32", "fp16", "sq8", *sized]
