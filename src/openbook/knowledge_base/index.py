"""Exact search while it is fast, an approximate index of known recall above that, and edits without a rebuild."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from openbook.knowledge_base.graph import (
    EF_CONSTRUCTION,
    LINKS,
    arrays_of,
    empty_graph,
    graph_of,
    is_graph,
    load_faiss,
)
from openbook.knowledge_base.search import AT_ONCE, Hits, check, nearest, no_hits, normalise, prepare, rank

Kind = Literal["exact", "hnsw", "ivf"]

EXACT_MAX_BYTES = 32 << 20
EF_SEARCH = 32  # at least
PROBES = 8  # lists of IVF that are searched, at least
LEAST_RECALL = 0.99
MOST_EFFORT = 2048  # of efSearch and nprobe
TIE = 1e-6  # similarities this close are equal to whoever counts hits
SPARE = 2  # times as many rough hits as are asked for
SAMPLE = 1000  # queries that measure the recall
AWAY = 0.33  # of the length of a key: how far they are moved from it
FILE = "hnsw.npz"


@dataclass(frozen=True)
class _Built:
    """An index of faiss and what became of the rows it was built over."""

    engine: Any
    rows: NDArray[np.int64]  # (M,) where each built row is now, -1 if it is gone
    fresh: NDArray[np.int64]  # rows that it does not hold, ascending
    fresh_keys: NDArray[np.float32]
    present: NDArray[np.uint8] | None = None  # bits of the built rows that are still there; None: all


@dataclass(frozen=True)
class Index:
    """How the keys of one book are searched. Searching changes nothing: threads may share an index."""

    kind: Kind
    keys: NDArray[np.float32]  # (M, d), or (M, r) with a basis
    basis: NDArray[np.float32] | None
    recall: float  # tie-aware, measured after it was built, the least for any number of neighbours; 1 if exact
    parameters: Mapping[str, int]
    efforts: Mapping[int, int]  # efSearch or nprobe by the number of neighbours it suffices for, ascending
    reason: str  # why it is of this kind
    built: _Built | None = None

    def search(self, queries: NDArray[Any], k: int, exclude: Sequence[Iterable[int]] | None = None) -> Hits:
        """As `search.search`: similarities are exact, ties in the order of positions, missing hits -1 and -inf.

        queries (B, d) -> Hits (B, min(k, M)). An approximate index may miss a neighbour, as `recall` says how often;
        whatever it found too few for is searched exactly. Raises UsageError for queries that cannot be compared.
        """
        hidden = [[]] * len(queries) if exclude is None else [list(places) for places in exclude]
        check(queries, self.keys if self.basis is None else self.basis.T, k, hidden)
        return self._nearest(prepare(queries, self.basis), k, hidden)

    def edited(
        self, keys: NDArray[np.float32], previous: NDArray[np.int64], basis: NDArray[np.float32] | None = None
    ) -> Index:
        """The index of an edited book, without building anything: keys (M', d), and where each row was here, or -1.

        `previous_rows` tells where. New rows, and those whose key is another, are searched exactly beside the old
        index; rows that are not in `previous` are never found. `recall` stays what was measured. Once most of the
        indexed rows are gone, or the `basis` is another one, search is exact: build it again then.
        """
        other = basis is not None and not np.array_equal(basis, () if self.basis is None else self.basis)
        if other or keys.shape[1] != self.keys.shape[1]:
            return exact_index(keys, basis, "the keys have another basis than those that were indexed")
        if self.built is None:
            return replace(self, keys=keys)
        now = np.full(len(self.keys) + 1, -1, dtype=np.int64)  # its last element answers for rows gone earlier
        kept = np.flatnonzero(previous >= 0)
        for rows in np.array_split(kept, 1 + len(kept) // AT_ONCE):
            same = rows[(keys[rows] == self.keys[previous[rows]]).all(axis=1)]
            now[previous[same]] = same
        rows = now[self.built.rows]
        present = rows >= 0
        if 2 * present.sum() < len(rows):
            return exact_index(keys, self.basis, "most of the rows that were indexed are gone")
        fresh = np.setdiff1d(np.arange(len(keys)), rows[present], assume_unique=True)
        bits = None if present.all() else np.packbits(present, bitorder="little")
        return replace(self, keys=keys, built=_Built(self.built.engine, rows, fresh, keys[fresh], bits))

    def extended(self, keys: NDArray[np.float32]) -> Index:
        """The index of the same rows and of those that follow them."""
        previous = np.arange(len(keys), dtype=np.int64)
        return self.edited(keys, np.where(previous < len(self.keys), previous, -1))

    def _nearest(self, queries: NDArray[np.float64], k: int, exclude: Sequence[Sequence[int]]) -> Hits:
        if self.built is None:
            return nearest(queries, self.keys, k, exclude)
        count = len(self.keys)
        pairs = [row * count + place for row, places in enumerate(exclude) for place in places]
        excluded = np.unique(np.array(pairs, dtype=np.int64))  # of a query and a position
        hidden = np.bincount(excluded // max(1, count), minlength=len(queries))  # (B,)
        wanted = SPARE * k + int(hidden.max(initial=0))
        if SPARE * wanted >= len(self.built.rows):
            return nearest(queries, self.keys, k, exclude)
        hits = no_hits(len(queries), min(k, count))
        rows, places = self._candidates(self.built, queries, k, wanted, exclude)
        allowed = ~np.isin(rows * count + places, excluded)
        rank(rows[allowed], places[allowed], queries, self.keys, hits)
        short = (hits.positions >= 0).sum(axis=1) < np.minimum(k, count - hidden)
        for row in np.flatnonzero(short).tolist():
            alone = nearest(queries[[row]], self.keys, k, [exclude[row]])
            hits.positions[row], hits.similarities[row] = alone.positions[0], alone.similarities[0]
        return hits

    def _candidates(
        self, built: _Built, queries: NDArray[np.float64], k: int, wanted: int, exclude: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of queries and positions of keys: what the engine found, and the best of the keys that it lacks."""
        least = next((effort for most, effort in self.efforts.items() if k <= most), max(self.efforts.values()))
        effort = least if self.kind == "ivf" else max(least, wanted)
        how = _parameters(self.kind, effort, self.parameters["threads"], built.present)
        _, found = built.engine.search(queries.astype(np.float32), wanted, params=how)
        rows, ranks = np.nonzero(found >= 0)  # faiss gives -1 where it lacks one
        places = built.rows[found[rows, ranks]]
        if not len(built.fresh):
            return rows, places
        hidden = [np.flatnonzero(np.isin(built.fresh, out)) for out in exclude]
        new = nearest(queries, built.fresh_keys, k, hidden).positions
        new_rows, new_ranks = np.nonzero(new >= 0)
        return np.append(rows, new_rows), np.append(places, built.fresh[new[new_rows, new_ranks]])


def open_index(
    keys: NDArray[np.float32],
    kind: Literal["auto", "exact", "hnsw", "ivf"] = "auto",
    exact_max_bytes: int = EXACT_MAX_BYTES,
    folder: Path | None = None,
    *,
    basis: NDArray[np.float32] | None = None,
    queries: NDArray[Any] | None = None,
    k: int = 32,
    threads: int = 1,
    build: bool = True,
) -> Index:
    """The index that the policy of the specification's section 2.4 chooses for keys (M, d), or the one asked for.

    `auto` is exact up to `exact_max_bytes` of keys, then HNSW (Malkov and Yashunin, 2018); `ivf` needs less memory
    beside the keys. efSearch and nprobe are the least with a tie-aware recall of .99, for one neighbour, for two, four
    and so on up to `k`, on up to 1,000 `queries` (B, d), by default the keys themselves, moved a little; where none has
    it, search is exact and `reason` says so.
    HNSW is kept in `folder` as plain arrays, which are checked and are used for these very keys only; else it is built
    again, or, without `build`, search is exact: for a few queries that is quicker. Building with several threads gives
    another graph each time.
    """
    if kind == "exact" or not len(keys):
        return exact_index(keys, basis, "asked for" if len(keys) else "there is nothing to search")
    if kind == "auto":
        if keys.nbytes <= exact_max_bytes:
            return exact_index(keys, basis, f"{keys.nbytes:,} bytes of keys are at most {exact_max_bytes:,}")
        if find_spec("faiss") is None:
            return exact_index(keys, basis, "faiss is not installed, which searches so many keys faster")
        kind = "hnsw"
    keys = np.ascontiguousarray(keys)
    kept = None if folder is None or kind != "hnsw" else _Kept(folder / FILE, _digest(keys, queries, k))
    if kept and (index := kept.read(keys, basis, threads)):
        return index
    if not build:
        return exact_index(keys, basis, "no index has been built for these keys")
    tests = _moved(keys) if queries is None else prepare(queries[:SAMPLE], basis)
    index = _raised(_build(keys, basis, kind, threads), tests, k)
    if kept:
        with suppress(OSError):  # a folder that cannot be written to costs time, no more
            kept.write(index)
    return index


def exact_index(keys: NDArray[np.float32], basis: NDArray[np.float32] | None, reason: str) -> Index:
    return Index("exact", keys, basis, 1.0, {}, {}, reason)


def previous_rows(before: Sequence[str], now: Sequence[str]) -> NDArray[np.int64]:
    """Where the entries with the ids `now` were among the ids `before`; -1 for new ones."""
    rows = {id: row for row, id in enumerate(before)}
    return np.array([rows.get(id, -1) for id in now], dtype=np.int64)


def tie_aware_recall(found: Hits, exact: Hits) -> float:
    """Share of hits whose similarity is at least the exact K-th less 1e-6: equal keys may stand for each other."""
    if not exact.similarities.size:
        return 1.0
    return float((found.similarities >= exact.similarities[:, -1:] - TIE).mean())


def _build(keys: NDArray[np.float32], basis: NDArray[np.float32] | None, kind: Kind, threads: int) -> Index:
    """An index whose recall and efforts are unknown. Rough similarities are of keys in a byte a dimension."""
    faiss = load_faiss()
    faiss.omp_set_num_threads(threads)
    count, width = keys.shape
    if kind == "hnsw":
        engine, parameters = empty_graph(width), {"threads": threads}
    else:
        lists = max(1, min(round(4 * count**0.5), count // 39))  # faiss warns below 39 vectors a list
        engine = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
        )
        parameters = {"threads": threads, "lists": lists}
    engine.train(keys)
    engine.add(keys)
    reason = "asked for, or more keys than are searched exactly"
    return Index(kind, keys, basis, 0.0, parameters, {}, reason, _whole(engine, keys))


def _raised(index: Index, queries: NDArray[np.float64], k: int) -> Index:
    """The index with the least efforts that reach the recall, or an exact one."""
    best = nearest(queries, index.keys, k, [()] * len(queries))
    numbers = [1 << power for power in range((k - 1).bit_length())] + [k]
    efforts, recalls, least = {}, [], EF_SEARCH if index.kind == "hnsw" else PROBES
    for number in numbers:
        exact = Hits(best.positions[:, :number], best.similarities[:, :number])

        def recall_of(effort: int, number: int = number, exact: Hits = exact) -> float:
            tried = replace(index, efforts={number: effort})
            return tie_aware_recall(tried._nearest(queries, number, [()] * len(queries)), exact)

        least, recall = _least_effort(recall_of, least, min(MOST_EFFORT, index.parameters.get("lists", MOST_EFFORT)))
        if recall < LEAST_RECALL:
            reason = f"the recall of {index.kind} is {recall:.3f} for {number} neighbours at effort {least}, too low"
            return exact_index(index.keys, index.basis, reason)
        efforts[number] = least
        recalls.append(recall)
    return replace(index, efforts=efforts, recall=min(recalls))


def _least_effort(recall_of: Callable[[int], float], low: int, most: int) -> tuple[int, float]:
    """The least effort of at least `low` that has the recall, to an eighth, and its recall; else the most."""
    high = min(low, most)
    recall = recall_of(high)
    while recall < LEAST_RECALL and high < most:
        low, high = high, min(2 * high, most)
        recall = recall_of(high)
    while recall >= LEAST_RECALL and high - low > max(1, high // 8):
        middle = (low + high) // 2
        found = recall_of(middle)
        if found >= LEAST_RECALL:
            high, recall = middle, found
        else:
            low = middle
    return high, recall


def _moved(keys: NDArray[np.float32]) -> NDArray[np.float64]:
    """Up to 1,000 keys, each moved by a third of its length along the difference of two others.

    In a random direction, few keys are: recall would look better than it is for texts.
    """
    random = np.random.default_rng(0)
    chosen, ones, others = (keys[random.choice(len(keys), min(SAMPLE, len(keys)))].astype(np.float64) for _ in range(3))
    away = AWAY * np.linalg.norm(chosen, axis=1, keepdims=True)
    return np.asarray(chosen + away * normalise(ones - others))


def _parameters(kind: Kind, effort: int, threads: int, present: NDArray[np.uint8] | None) -> Any:
    faiss = load_faiss()
    faiss.omp_set_num_threads(threads)  # of the calling thread
    selected = {} if present is None else {"sel": faiss.IDSelectorBitmap(present)}
    if kind == "ivf":
        return faiss.SearchParametersIVF(nprobe=effort, **selected)
    return faiss.SearchParametersHNSW(efSearch=effort, **selected)


def _whole(engine: Any, keys: NDArray[np.float32]) -> _Built:
    return _Built(engine, np.arange(len(keys)), np.empty(0, dtype=np.int64), keys[:0])


def _digest(keys: NDArray[np.float32], queries: NDArray[Any] | None, k: int) -> str:
    """Of all that decides what is built."""
    told = hashlib.sha256(json.dumps([5, keys.shape, k, LINKS, EF_CONSTRUCTION, queries is None]).encode())
    for array in (keys, keys[:0] if queries is None else queries):
        told.update(np.ascontiguousarray(array).view(np.uint8).data)
    return told.hexdigest()


@dataclass(frozen=True)
class _Kept:
    """An HNSW graph on disk: levels and links, not the keys. What faiss itself would write is unsafe to read."""

    path: Path
    digest: str

    def read(self, keys: NDArray[np.float32], basis: NDArray[np.float32] | None, threads: int) -> Index | None:
        """The index as it was written; None if there is none, it is of other keys, or it is not whole."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                levels, links, told = arrays["levels"], arrays["links"], json.loads(str(arrays["told"]))
            if told["digest"] != self.digest:
                return None
            if told["kind"] == "exact":
                return exact_index(keys, basis, str(told["reason"]))
            efforts = {int(number): int(effort) for number, effort in told["efforts"]}
            entry, recall, reason = int(told["entry"]), float(told["recall"]), str(told["reason"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return None
        if not is_graph(levels, links, entry, len(keys)) or not _are_efforts(efforts):
            return None
        whole = _whole(graph_of(keys, levels, links, entry), keys)
        return Index("hnsw", keys, basis, recall, {"threads": threads}, efforts, reason, whole)

    def write(self, index: Index) -> None:
        told = {"digest": self.digest, "kind": index.kind, "reason": index.reason, "recall": index.recall}
        levels = links = np.empty(0, dtype=np.int32)
        if index.built:
            levels, links, entry = arrays_of(index.built.engine)
            told |= {"entry": entry, "efforts": list(index.efforts.items())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".part", delete=False) as file:
            np.savez(file, allow_pickle=False, levels=levels, links=links, told=np.array(json.dumps(told)))
        os.replace(file.name, self.path)


def _are_efforts(efforts: Mapping[int, int]) -> bool:
    return list(efforts) == sorted(efforts) != [] and all(1 <= effort <= MOST_EFFORT for effort in efforts.values())
