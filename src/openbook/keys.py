"""Where a text lies in a knowledge base and what it says there, both from a teacher's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from openbook.answers import SAID
from openbook.checkpoint import digest_file, fingerprint
from openbook.config import UsageError
from openbook.knowledge_base.search import normalise

PROJECTION = "projection.safetensors"
QUERIES = "queries.safetensors"  # in the folder of a student with a projection of its own
BLOCK_ROWS = 1 << 13  # embeddings in double precision at once

Map = tuple[NDArray[np.float32], NDArray[np.float32]]  # W (d, d'), b (d,)


def parts_of(teacher: Path, tokenizer: str, max_length: int) -> dict[str, str]:
    """All of a teacher that decides where it puts a text, by content: its folder, its tokenizer's rules as JSON."""
    weights = {path.name: digest_file(path) for path in sorted(teacher.glob("*.safetensors"))}
    return {"teacher": fingerprint(weights), "tokenizer": digest_of_rules(tokenizer), "max_length": str(max_length)}


def projection_part(outputs: Path) -> dict[str, str]:
    """The map to keys, by content."""
    return {"projection": digest_file(outputs / PROJECTION)}


def digest_of_rules(tokenizer: str) -> str:
    """Of vocabulary and rules; the truncation and padding that the last call left behind do not count."""
    rules = json.loads(tokenizer)
    return fingerprint({name: part for name, part in rules.items() if name not in ("truncation", "padding")})


def projection_in(outputs: Path) -> Map:
    """W (d, d_t) and b (d,) of the map from teacher embeddings to keys."""
    weights = load_file(outputs / PROJECTION)
    return weights["weight"], weights["bias"]


def save_queries(student: Path, own: Map | None) -> None:
    """Write a student's own projection beside its weights, if it has one."""
    if own is not None:
        save_file({"weight": np.ascontiguousarray(own[0]), "bias": own[1]}, student / QUERIES)


def queries_in(student: Path | None) -> Map | None:
    """The projection in a student's folder, if it has one. Raises UsageError for a file that is none."""
    if student is None or not (student / QUERIES).is_file():
        return None
    try:
        weights = load_file(student / QUERIES)
        weight, bias = weights["weight"], weights["bias"]
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{student / QUERIES} is no projection ({error}); put the student's own file there") from error
    if (
        weight.ndim != 2
        or bias.shape != weight.shape[:1]
        or not (np.isfinite(weight).all() and np.isfinite(bias).all())
    ):
        raise UsageError(f"{student / QUERIES} holds {weight.shape} and {bias.shape}, not W (d, d) and b (d,), or NaN")
    return weight, bias


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
