"""BM25 in Lucene's form over any number of sentences: exact in float64, ties by position, also at the cut."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.retrieval import kernels
from openbook.retrieval.hits import HitTable, Progress
from openbook.retrieval.kernels import Arrays, Weights
from openbook.retrieval.passages import lex

ANALYZER = "lex"
COUNTING = "counting-"  # what a folder under construction begins with
BLOCK = 16_384  # texts whose sums fit the second-level cache
LENGTH_RATIO = 1.1  # between the longest and the shortest text of a block
FREQUENT = 1024  # texts; a word of more has a row in the block tables
QUERIES = 64  # handed to a thread at once
HITS = 1 << 20  # room for so many hits in a batch, at most
ROWS = 8192  # texts read at once
MOST_TEXTS = 1 << (32 - kernels.COUNT_BITS)


class Counted(NamedTuple):
    """One shard, its words numbered in order of appearance."""

    vocabulary: list[str]
    frequencies: NDArray[np.int64]  # (V,) texts of this shard that hold each word
    words: NDArray[np.int32]  # (W,) of all texts
    lengths: NDArray[np.int32]  # (n,) words a text


Part = Callable[[], Counted]  # loads a shard's counts
Allocate = Callable[[str, tuple[int, ...], Any], NDArray[Any]]  # from name, shape and dtype, all zeros


class Index:
    """Scores, for a query q and a text s (contextualized corpus, section 2.3; Lucene drops the usual factor k1 + 1),

        sum over the words w of q, repeated ones repeatedly, of idf(w) tf / (tf + k1 (1 - b + b |s| / L))
        idf(w) = ln(1 + (n - df + 0.5) / (df + 0.5))

    with n texts of mean length L, df of which hold w, and tf occurrences of w in s. Scores are rounded to 10 decimals
    before they are ordered, so that float64 sums which differ in the last bits tie.
    """

    def __init__(self, vocabulary: Sequence[str], arrays: Arrays, k1: float, b: float) -> None:
        self._number_of = {word: number for number, word in enumerate(vocabulary)}
        self._arrays = Arrays(*(_read_only(values) for values in arrays))
        self._weights = _weights(self._arrays, k1, b)

    def __len__(self) -> int:
        return len(self._arrays.positions)

    @classmethod
    def of(cls, texts: Sequence[str], k1: float, b: float) -> Self:
        """In memory, for banks that fit it."""
        counted = _count(texts)
        return cls(*_merge([lambda: counted], _in_memory), k1, b)

    @classmethod
    def build(
        cls,
        shards: Sequence[Path],
        folder: Path,
        k1: float,
        b: float,
        workers: int = 1,
        progress: Progress | None = None,
    ) -> Self:
        """Indexes the column `text` of Parquet files, which together are the bank in order, into a folder.

        The files do not depend on how the bank is cut into shards, of which each worker process reads one at a time.
        `progress` hears the number of shards done so far.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{COUNTING}*"):  # by a build that was killed
            shutil.rmtree(left)
        with TemporaryDirectory(dir=folder, prefix=COUNTING) as scratch:
            jobs = [(shard, Path(scratch) / str(number)) for number, shard in enumerate(shards)]
            for done, _ in enumerate(_in_processes(_count_shard, jobs, workers), start=1):
                if progress:
                    progress(done)
            vocabulary, _ = _merge([partial(_counted, target) for _, target in jobs], partial(_on_disk, folder))
        _write_json(folder / "vocabulary.json", vocabulary)
        _write_json(folder / "index.json", {"k1": k1, "b": b, "analyzer": ANALYZER})
        return cls.load(folder, k1, b)

    @classmethod
    def load(cls, folder: Path, k1: float, b: float) -> Self:
        """An index as `build` left it; its large arrays stay on disk. Other settings than its own raise UsageError."""
        built = _read_json(folder / "index.json")
        asked = {"k1": k1, "b": b, "analyzer": ANALYZER}
        if built != asked:
            raise UsageError(
                f"corpus.k1={k1}, corpus.b={b}: the index at {folder} was built with k1={built.get('k1')}, "
                f"b={built.get('b')} and analyzer {built.get('analyzer')!r} (now {ANALYZER!r}); "
                "set the same, or build it again"
            )
        vocabulary = _read_json(folder / "vocabulary.json")
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Arrays._fields)
        return cls(vocabulary, Arrays(*arrays), k1, b)

    def search(
        self,
        queries: Sequence[str],
        k: int,
        excluded: Sequence[int] = (),
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> HitTable:
        """The k best texts of each query by (-score, position); fewer if fewer share a word with it.

        Texts at the `excluded` positions are passed over, yet still count in n, df and L.
        `progress` hears the number of queries done so far. The hits do not depend on `threads` (all cores if None).
        """
        width = min(k, len(self))
        hidden = np.zeros(len(self), np.bool_)
        hidden[np.asarray(excluded, dtype=np.int64)] = True
        hidden = hidden[self._arrays.positions]
        size = max(1, min(QUERIES, HITS // max(1, width)))
        batches = [queries[start : start + size] for start in range(0, len(queries), size)]
        tables: list[HitTable] = []
        done = 0
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for table in pool.map(lambda batch: self._search(batch, width, hidden), batches):
                tables.append(table)
                done += len(table)
                if progress:
                    progress(done)
        return HitTable.joined(tables)

    def _search(self, queries: Sequence[str], width: int, hidden: NDArray[np.bool_]) -> HitTable:
        terms = [self._terms(query) for query in queries]
        starts = np.cumsum([0, *(len(words) for words, _ in terms)])
        words = np.concatenate([words for words, _ in terms])
        factors = np.concatenate([factors for _, factors in terms])
        scores, positions = np.zeros((len(queries), width)), np.zeros((len(queries), width), np.int64)
        counts = np.zeros(len(queries), np.int64)
        if width:
            kernels.search_many(
                self._arrays,
                self._weights,
                starts,
                words,
                factors,
                hidden,
                scores,
                positions,
                counts,
            )
        kept = np.arange(width) < counts[:, None]
        return HitTable(np.concatenate([[0], np.cumsum(counts)]), positions[kept], scores[kept])

    def _terms(self, query: str) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The known words of a query and idf times multiplicity, those first that cost most for what they can add."""
        counts = Counter(self._number_of[word] for word in lex(query) if word in self._number_of)
        words = np.fromiter(counts, np.int32, len(counts))
        factors = self._weights.idf[words] * np.fromiter(counts.values(), np.float64, len(counts))
        frequencies = self._arrays.word_starts[words + 1] - self._arrays.word_starts[words]
        order = np.lexsort((words, factors / frequencies))
        return words[order], factors[order]


def _weights(arrays: Arrays, k1: float, b: float) -> Weights:
    lengths, frequencies = np.diff(arrays.text_starts), np.diff(arrays.word_starts)
    idf = np.log(1 + (len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
    base, slope = k1 * (1 - b), k1 * b * len(lengths) / max(1, int(arrays.text_starts[-1]))
    counts = np.arange(kernels.MANY + 1)
    shortest = lengths[arrays.edges[:-1]]  # of each block
    saturation = counts / np.maximum(counts + (base + slope * shortest)[:, None], 1e-9)
    saturation[:, kernels.MANY] = 1
    golden = np.arange(len(shortest)) * (5**0.5 - 1) / 2 % 1  # multiples of the golden ratio spread evenly
    return Weights(idf, base, slope, saturation.astype(np.float32), np.argsort(golden, kind="stable"))


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    """One type for arrays in memory and on disk, so that the kernels are compiled once."""
    view = np.asarray(values).view()
    view.flags.writeable = False
    return view


def _in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    return np.zeros(shape, dtype)


def _on_disk(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    if 0 in shape:  # nothing to map
        np.save(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    return np.asarray(np.lib.format.open_memmap(path, "w+", dtype, shape))


def _count(texts: Iterable[str]) -> Counted:
    number_of: defaultdict[str, int] = defaultdict()
    number_of.default_factory = number_of.__len__  # a new word gets the next number
    numbers, sizes = array("i"), array("i")
    for text in texts:
        found = lex(text)
        sizes.append(len(found))
        numbers.extend(map(number_of.__getitem__, found))
    words, lengths = np.array(numbers, np.int32), np.array(sizes, np.int32)
    return Counted(list(number_of), kernels.count_texts(words, lengths, len(number_of)), words, lengths)


def _texts(shard: Path) -> Iterator[str]:
    for batch in pq.ParquetFile(shard).iter_batches(ROWS, columns=["text"]):
        yield from batch.column(0).to_pylist()


def _count_shard(shard: Path, target: Path) -> None:
    counted = _count(_texts(shard))
    target.mkdir()
    for name in Counted._fields[1:]:
        np.save(target / f"{name}.npy", getattr(counted, name))
    _write_json(target / "vocabulary.json", counted.vocabulary)


def _counted(target: Path) -> Counted:
    arrays = (np.load(target / f"{name}.npy", allow_pickle=False) for name in Counted._fields[1:])
    return Counted(_read_json(target / "vocabulary.json"), *arrays)


def _in_processes(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[None]:
    """Does the jobs, `workers` at a time, and yields as each is done."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            work(*job)
            yield
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            future.result()
            yield


def _merge(parts: Sequence[Part], allocate: Allocate) -> tuple[list[str], Arrays]:
    """The vocabulary and the arrays of all shards together, one shard in memory at a time."""
    vocabulary, frequencies, lengths = _totals(parts)
    order = np.argsort(lengths, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))

    def filled(name: str, values: NDArray[Any], dtype: Any) -> NDArray[Any]:
        target = allocate(name, values.shape, dtype)
        target[...] = values
        return target

    positions = filled("positions", order, np.int32)
    text_starts = filled("text_starts", _starts(lengths[order]), np.int64)
    word_starts = filled("word_starts", _starts(frequencies), np.int64)
    edges = filled("edges", _edges(lengths[order]), np.int64)
    text_words = allocate("text_words", (int(text_starts[-1]),), np.int32)
    postings = allocate("postings", (int(word_starts[-1]),), np.uint32)
    frequent = int(np.count_nonzero(frequencies >= FREQUENT))
    block_starts = allocate("block_starts", (frequent, len(edges)), np.int64)
    block_counts = allocate("block_counts", (frequent, len(edges) - 1), np.uint8)

    number_of = {word: number for number, word in enumerate(vocabulary)}
    first = 0
    for part in parts:
        own, _, words, sizes = part()
        numbers = np.fromiter(map(number_of.__getitem__, own), np.int32, len(own))
        kernels.place_texts(words, sizes, numbers, places[first : first + len(sizes)], text_starts, text_words)
        first += len(sizes)
    kernels.invert(text_starts, text_words, word_starts, postings)
    kernels.find_blocks(word_starts, postings, edges, block_starts, block_counts)
    return vocabulary, Arrays(
        positions, text_starts, text_words, word_starts, postings, edges, block_starts, block_counts
    )


def _totals(parts: Sequence[Part]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int32]]:
    """All words by (-df, first occurrence), their df, and the length of each text."""
    frequency_of: Counter[str] = Counter()
    lengths = [np.empty(0, np.int32)]
    for part in parts:
        own, frequencies, _, sizes = part()
        frequency_of.update(dict(zip(own, frequencies.tolist(), strict=True)))
        lengths.append(sizes)
    if (count := sum(map(len, lengths))) > MOST_TEXTS:
        raise UsageError(
            f"corpus.sources: {count:,} sentences are more than an index holds ({MOST_TEXTS:,}); give less"
        )
    vocabulary = sorted(frequency_of, key=frequency_of.__getitem__, reverse=True)
    frequencies = np.fromiter(map(frequency_of.__getitem__, vocabulary), np.int64, len(vocabulary))
    return vocabulary, frequencies, np.concatenate(lengths)


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _edges(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where blocks begin and end among texts of ascending length: at BLOCK texts, or as lengths differ too much."""
    edges = [0]
    while edges[-1] < len(lengths):
        longer = np.searchsorted(lengths, int(lengths[edges[-1]] * LENGTH_RATIO), side="right")
        edges.append(min(edges[-1] + BLOCK, int(longer)))
    return np.array(edges, np.int64)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
