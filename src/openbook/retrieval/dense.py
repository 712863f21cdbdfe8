"""Dense retrieval: unit sentence vectors on disk and their exact inner products; ties by position, also at the cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.retrieval.hits import HitTable, Progress

Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # n texts -> (n, d)
Found = tuple[NDArray[np.int64], NDArray[np.float64]]  # positions and scores of B queries, each (B, hits)

AT_ONCE = 8192  # texts embedded, or vectors multiplied, at once
CELLS = 1 << 23  # rough scores held at once, at some 20 bytes each
SPARE = 16  # rough hits beyond k that are scored exactly
GROWTH = 4  # times as many rough hits for a query that they did not settle


@dataclass(frozen=True)
class DenseIndex:
    """Scores are float64 inner products of a query's unit vector with the unit vectors of the bank, which are fp16."""

    shards: tuple[NDArray[np.float16], ...]  # each (n_i, d), mapped from disk; together the bank in order
    embed: Embed

    @classmethod
    def build(
        cls,
        shards: Sequence[Path],
        folder: Path,
        embed: Embed,
        scratch: Path,
        encoder: str,
        progress: Progress | None = None,
    ) -> Self:
        """Embeds the column `text` of Parquet files, which together are the bank in order.

        `encoder` names what `embed` computes. A file of vectors is named for its texts and encoder: those that an
        interrupted call left in `folder` are kept. `scratch` lies on the same disk. `progress` hears the number of
        sentences done so far. Raises UsageError, naming the text, for a vector without direction.
        """
        tell: Progress = progress or (lambda done: None)
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        shards = [shard for shard in shards if pq.read_metadata(shard).num_rows]
        names, done = [_name(shard, encoder) for shard in shards], 0
        for shard, name in zip(shards, names, strict=True):
            if not (folder / name).exists():
                for count in _embed_shard(shard, scratch / name, embed):
                    tell(done + count)
                os.replace(scratch / name, folder / name)
            tell(done := done + pq.read_metadata(shard).num_rows)
        width = np.load(folder / names[0], mmap_mode="r", allow_pickle=False).shape[1] if names else 0
        described = {"encoder": encoder, "width": width, "vectors": names}
        (folder / "index.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        return cls.load(folder, embed, encoder)

    @classmethod
    def load(cls, folder: Path, embed: Embed, encoder: str) -> Self:
        """An index as `build` left it. Raises UsageError for another encoder's, and for one that is not whole."""
        try:
            described = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            shards = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in described["vectors"]]
            if any((*shard.shape[1:], shard.dtype) != (described["width"], np.float16) for shard in shards):
                raise ValueError(f"not all of its vectors have {described['width']} numbers of float16")
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} holds no whole dense index ({error}); build it again") from error
        if described["encoder"] != encoder:
            raise UsageError(
                f"corpus.encoder={encoder!r}: the vectors in {folder} are those of {described['encoder']!r}; name that"
                " encoder, or build the index again"
            )
        return cls(tuple(shards), embed)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def search(
        self, queries: Sequence[str], k: int, excluded: Sequence[int] = (), progress: Progress | None = None
    ) -> HitTable:
        """The k sentences of largest inner product with each query by (-score, position); fewer if the bank has fewer.

        Sentences at the `excluded` positions are passed over. The vectors are read once for a thousand queries or so;
        neither that number, nor blocks, nor shards change a bit. `progress` hears the number of queries done so far.
        """
        hidden = np.zeros(len(self), dtype=bool)
        hidden[np.asarray(excluded, dtype=np.int64)] = True
        keep = min(k, len(self) - int(hidden.sum()))
        positions = np.empty((len(queries), keep), dtype=np.int64)
        scores = np.empty((len(queries), keep))
        order = sorted(range(len(queries)), key=queries.__getitem__)  # theirs may not decide who is embedded with whom
        done = 0
        for rows in self._batches(order if keep else (), keep + SPARE):
            texts = [queries[row] for row in rows]
            vectors = _unit(self.embed(texts), texts)
            if (wide := vectors.shape[1]) != (own := self.shards[0].shape[1]):
                raise UsageError(
                    f"corpus.encoder makes vectors of {wide} numbers, the index holds {own}; build it again"
                )
            positions[rows], scores[rows] = self._best(vectors, keep, keep + SPARE, hidden)
            done += len(rows)
            if progress:
                progress(done)
        return HitTable(np.arange(len(queries) + 1) * keep, positions.ravel(), scores.ravel())

    def _batches(self, rows: Sequence[int], size: int) -> Iterator[list[int]]:
        """As many at a time as their rough scores allow: `size` hits and a block of the bank each."""
        step = max(1, CELLS // (size + min(AT_ONCE, len(self))))
        return (list(rows[start : start + step]) for start in range(0, len(rows), step))

    def _best(self, queries: NDArray[np.float32], keep: int, size: int, hidden: NDArray[np.bool_]) -> Found:
        """The best out of the `size` roughly best, or of more for queries of which these may lack one."""
        visible = len(self) - int(hidden.sum())
        size = min(size, visible)
        places, floor = self._roughly_best(queries, size, hidden)
        exact = self._exact(queries, places)
        order = np.argsort(-exact, axis=1, kind="stable")[:, :keep]  # ties stay ascending
        positions, scores = np.take_along_axis(places, order, 1), np.take_along_axis(exact, order, 1)
        if size < visible:
            rounding = queries.shape[1] * 2.0**-23  # twice the bound for a float32 sum of d products of unit vectors
            unsure = np.flatnonzero(floor + rounding >= scores[:, -1])
            for rows in self._batches(unsure.tolist(), size * GROWTH):
                positions[rows], scores[rows] = self._best(queries[rows], keep, size * GROWTH, hidden)
        return positions, scores

    def _roughly_best(
        self, queries: NDArray[np.float32], size: int, hidden: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ascending positions (B, size) of the best in float32, and a score (B,) that no other exceeds."""
        scores = np.full((len(queries), size), -np.inf, dtype=np.float32)
        places = np.zeros(scores.shape, dtype=np.int64)
        for start, block in self._blocks():
            product = queries @ block.T  # (B, R)
            product[:, hidden[start : start + len(block)]] = -np.inf
            both = np.concatenate([scores, product], axis=1)
            best = np.argpartition(both, -size, axis=1)[:, -size:]
            earlier = np.take_along_axis(places, np.minimum(best, size - 1), 1)
            scores, places = np.take_along_axis(both, best, 1), np.where(best < size, earlier, best - size + start)
        return np.sort(places, axis=1), scores.min(axis=1)

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first, shard in zip(self._firsts(), self.shards, strict=False):
            for start in range(0, len(shard), AT_ONCE):
                yield first + start, np.asarray(shard[start : start + AT_ONCE], dtype=np.float32)

    def _firsts(self) -> list[int]:
        """The position at which each shard begins, and the end."""
        return [0, *accumulate(map(len, self.shards))]

    def _exact(self, queries: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Inner products (B, P) of each query with the vectors at its places, in the order of the bank."""
        flat = places.ravel()
        scores, order = np.empty(len(flat)), np.argsort(flat, kind="stable")
        firsts = self._firsts()
        ends = np.searchsorted(flat[order], firsts)
        for shard, first, start, end in zip(self.shards, firsts, ends, ends[1:], strict=False):
            for hits in np.array_split(order[start:end], -(-(end - start) // AT_ONCE) or 1):
                vectors, owners = shard[flat[hits] - first], queries[hits // places.shape[1]]
                scores[hits] = np.vecdot(vectors.astype(np.float64), owners.astype(np.float64))
        return scores.reshape(places.shape)


def _name(shard: Path, encoder: str) -> str:
    """Of the file that holds the vectors of a Parquet file's texts."""
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(encoder.encode())
    return f"{digest.hexdigest()[:32]}.npy"


def _embed_shard(shard: Path, path: Path, embed: Embed) -> Iterator[int]:
    """Writes the vectors of a Parquet file's texts, and yields how many are done so far."""
    vectors: NDArray[np.float16] | None = None
    done = 0
    with pq.ParquetFile(shard) as file:
        for batch in file.iter_batches(AT_ONCE, columns=["text"]):
            texts = batch.column("text").to_pylist()
            made = _unit(embed(texts), texts)
            if vectors is None:
                shape = (file.metadata.num_rows, made.shape[1])
                vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            vectors[done : done + len(texts)] = made
            done += len(texts)
            yield done


def _unit(vectors: NDArray[np.float32], texts: Sequence[str]) -> NDArray[np.float32]:
    """Rows (n, d) scaled to length 1. Raises UsageError for zero and what is not finite, naming the text."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt(np.vecdot(wide, wide))  # (n,)
    broken = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(broken):
        raise UsageError(
            f"corpus.encoder makes a vector of length {lengths[broken[0]]} of {texts[broken[0]][:200]!r}, which points"
            " nowhere; take another encoder, or take the text out"
        )
    return np.asarray(wide / lengths[:, None], dtype=np.float32)
