"""Where a text lies in a knowledge base and what it says there, both from a teacher's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from openbook.answers import SAID
from openbook.knowledge_base.search import normalise

PROJECTION = "projection.safetensors"
BLOCK_ROWS = 1 << 13  # embeddings in double precision at once


def projection_in(outputs: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """W (d, d_t) and b (d,) of the map from teacher embeddings to keys."""
    weights = load_file(outputs / PROJECTION)
    return weights["weight"], weights["bias"]


def keys_of(outputs: Path, embeddings: NDArray[Any]) -> NDArray[np.float32]:
    """Unit keys (n, d) = normalize(W h + b) of the fine-tuned teacher's embeddings (n, d_t) (ReAugKD, Zhang et al.)."""
    weight, bias = (array.astype(np.float64) for array in projection_in(outputs))
    keys = [normalise(block @ weight.T + bias).astype(np.float32) for block in in_blocks(embeddings)]
    return np.concatenate([np.empty((0, len(bias)), np.float32), *keys])


def in_blocks(rows: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Rows in double precision, not all of them at once."""
    return (rows[first : first + BLOCK_ROWS].astype(np.float64) for first in range(0, len(rows), BLOCK_ROWS))


def values_of(kind: str, logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float32]:
    """Soft labels (n, C) of a teacher, of several labels each by itself; in regression its scores (n, 1)."""
    return SAID[kind](logits if kind == "regression" else logits / temperature).astype(np.float32)
