"""An HNSW graph of faiss as plain arrays and back: what faiss itself would write is unsafe to read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LINKS = 48  # of a node on the levels above the lowest, which has twice as many
EF_CONSTRUCTION = 400


def load_faiss() -> Any:
    """It is imported where an index is built or searched only; its own types lack half of it."""
    import faiss

    return faiss


def empty_graph(width: int) -> Any:
    """Rough similarities are of keys in a byte a dimension."""
    faiss = load_faiss()
    graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_8bit, LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    return graph


def arrays_of(engine: Any) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Levels of the nodes (M,), links of all of them, and the node where a search enters. The keys are not in it."""
    faiss, graph = load_faiss(), engine.hnsw
    return faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.neighbors), int(graph.entry_point)


def is_graph(levels: NDArray[Any], links: NDArray[Any], entry: int, count: int) -> bool:
    """Whether a search through these arrays reads only what is there; a damaged or hostile file is no graph."""
    if levels.dtype != np.int32 or links.dtype != np.int32 or levels.shape != (count,) or links.ndim != 1:
        return False
    if not 0 <= entry < count or levels.min() < 1 or levels.max() > 30 or levels[entry] != levels.max():
        return False
    ends = np.cumsum(LINKS * (levels.astype(np.int64) + 1))  # a node has twice as many links on the lowest level
    if len(links) != ends[-1] or links.min() < -1 or links.max() >= count:
        return False
    for level in range(1, int(levels.max())):  # above the lowest, a link must lead to a node of that level
        nodes = np.flatnonzero(levels > level)
        starts = ends[nodes] - LINKS * (levels[nodes].astype(np.int64) - level)
        linked = links[starts[:, None] + np.arange(LINKS)]
        if ((linked >= 0) & (levels[linked] <= level)).any():
            return False
    return True


def graph_of(keys: NDArray[np.float32], levels: NDArray[np.int32], links: NDArray[np.int32], entry: int) -> Any:
    """The very graph that was written, from arrays that `is_graph` accepts."""
    faiss = load_faiss()
    engine = empty_graph(keys.shape[1])
    engine.train(keys)
    engine.storage.add(keys)
    engine.ntotal = len(keys)
    faiss.copy_array_to_vector(levels, engine.hnsw.levels)
    engine.hnsw.max_level = engine.hnsw.prepare_level_tab(len(keys), True)
    faiss.memcpy(engine.hnsw.neighbors.data(), faiss.swig_ptr(links), links.nbytes)
    engine.hnsw.entry_point = entry
    return engine
