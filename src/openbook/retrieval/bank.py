"""The bank: documents in, clean and unique sentences out, shuffled, in shards on disk.

An external merge sort by digest. Every sentence has a 16-byte digest of its key, keyed by the seed: in the order of
the digests sentences are shuffled, and those with one key stand together. Documents are cut into chunks, each sorted
alone; then each shard collects its range of digests from all chunks. Memory depends on the sizes of a chunk and a
shard only, and the outcome neither on them nor on how many processes work.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import compress, islice, pairwise
from pathlib import Path
from shutil import move
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openbook.config import CorpusSettings, UsageError
from openbook.parallel import map_jobs
from openbook.retrieval.passages import LeakGuard, band_hashes, key, lex, sentences
from openbook.types import Passage

COUNTED = (
    "documents", "sentences", "too_short", "too_long", "not_text", "leaked", "duplicate", "near_duplicate", "kept"
)  # fmt: skip
LEAST_LETTERS = 0.5  # of the non-blank characters: below it a line is a table, a number or markup
CHUNK = 4_000_000  # characters that one job splits into sentences
SHARD = 250_000  # sentences, about 35 MB
COMPARED = 8  # on 164,000 sentences of Wikipedia it finds 99.8 % of the pairs of Jaccard similarity 0.8, and 1 96 %
PARTS = 4  # that the band hashes of a shard are cut into
LONGEST_PIECE = 20_000  # characters; sentencex takes quadratic time on a line without blanks
PIECE_ENDS = ("\n", ". ", "。", " ")  # where, the best first
AT_ONCE = 512  # sentences the leak guard looks at together
BATCH = 16_384  # sentences whose MinHashes are computed together
WIDTH = 16  # bytes of a digest
MANIFEST = "bank.json"

SCHEMA = pa.schema(
    {"digest": pa.binary(WIDTH), "text": pa.string(), "document": pa.string(), "words": pa.int32()}
)  # of chunks and shards

Digests = NDArray[np.void]  # V16, compared byte by byte


@dataclass(frozen=True)
class Bank:
    """Unique sentences in a seeded random order, numbered from 0: a prefix of the bank is a uniform sample of it."""

    folder: Path
    counts: dict[str, int]  # what went in, what each filter removed, what was kept
    rows: tuple[int, ...]  # of every shard
    seed: int

    @classmethod
    def load(cls, folder: Path) -> Self:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls(folder, manifest["counts"], tuple(manifest["rows"]), manifest["seed"])

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def shards(self) -> tuple[Path, ...]:
        """Parquet files with the columns digest, text, document and words, in the order of the bank."""
        return tuple(_shard(self.folder, number) for number in range(len(self.rows)))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The position of the first sentence of every shard, and the end of the last: (S + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    def texts(self, positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The sentences at some positions, in any order and repeated at will; IndexError beyond the bank."""
        texts: list[str] = self._take(positions, ["text"])["text"].to_pylist()
        return texts

    def passages(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Passage]:
        """The same with their ids and the documents they come from."""
        rows = self._take(positions, ["text", "document"])
        return list(_passages(positions, rows))

    def prefix(self) -> Iterator[Passage]:
        """All sentences in the order of the bank, a batch in memory at a time."""
        for path, start in zip(self.shards, self._starts.tolist(), strict=False):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["text", "document"]):
                    yield from _passages(range(start, start + len(batch)), batch)
                    start += len(batch)

    def lengths(self) -> NDArray[np.int32]:
        """The number of `lex` words of every sentence: (len(bank),)."""
        columns = [pq.read_table(path, columns=["words"])["words"].to_numpy() for path in self.shards]
        return np.concatenate([np.empty(0, np.int32), *columns])

    def positions_of(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """Where the sentences with these keys are, ascending; keys that the bank does not hold are left out."""
        wanted = np.unique(np.frombuffer(b"".join(map(_digest_of(self.seed), keys)), f"V{WIDTH}"))
        found = [np.empty(0, np.int64)]
        for path, start in zip(self.shards if len(wanted) else (), self._starts, strict=False):
            digests = _digests(pq.read_table(path, columns=["digest"]))
            places = np.searchsorted(digests, wanted).clip(max=len(digests) - 1)
            found.append(start + places[digests[places] == wanted])
        return np.concatenate(found)

    def _take(self, positions: Sequence[int] | NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Rows at some positions, read shard by shard."""
        wanted = np.asarray(positions, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"positions from {wanted.min()} to {wanted.max()} in a bank of {len(self)} sentences")
        order = np.argsort(wanted, kind="stable")
        bounds = np.searchsorted(wanted[order], self._starts)
        parts = [SCHEMA.empty_table().select(columns)]
        for shard, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if low < high:
                table = pq.read_table(self.shards[shard], columns=columns)
                parts.append(table.take(wanted[order[low:high]] - self._starts[shard]))
        return pa.concat_tables(parts).take(np.argsort(order, kind="stable"))


def build_bank(
    documents: Iterable[tuple[str, str]],
    guard: LeakGuard,
    settings: CorpusSettings,
    folder: Path,
    scratch: Path,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    *,
    chunk_characters: int = CHUNK,
    shard_rows: int = SHARD,
) -> Bank:
    """All sentences of (id, text) documents that pass the filters, unique by key, in a seeded order (section 2.1).

    `progress` hears the number of documents read so far. Every file in `scratch` is named after what it is made of,
    so that a call goes on where a killed one stopped; the caller removes the folder. A bank without a sentence
    raises UsageError.
    """
    for needed in (scratch, folder / "shards"):
        needed.mkdir(parents=True, exist_ok=True)
    counts = Counter(dict.fromkeys(COUNTED, 0))
    used = settings.model_dump_json(include={"language", "min_words", "max_words", "near_duplicates", "seed"})
    inputs = guard.digest() + used

    def jobs() -> Iterator[tuple[Path, list[tuple[str, str]]]]:
        for number, (read, pieces) in enumerate(_chunks(documents, chunk_characters)):
            yield scratch / f"chunk-{number:06d}-{_fingerprint(inputs, pieces)}.arrow", pieces
            counts["documents"] = read
            if progress:
                progress(read)

    chunks = _make(_sift, jobs(), workers, (guard, settings))
    for chunk in chunks:
        counts.update(json.loads(_read(chunk).schema.metadata[b"counts"]))
    if not counts["kept"]:
        raise _empty(counts, settings)
    total = -(-counts["kept"] // shard_rows)
    build = _fingerprint(str(total), [(chunk.name, "") for chunk in chunks])
    form = "arrow" if settings.near_duplicates else "parquet"
    shards = _make(
        _merge, [(scratch / f"unique-{n:05d}-{build}.{form}", n) for n in range(total)], workers, (chunks, total)
    )
    rows = [_rows(shard) for shard in shards]
    counts["duplicate"] = counts["kept"] - sum(rows)
    if settings.near_duplicates:
        shards = _without_near_duplicates(shards, settings.near_duplicates, scratch, build, workers)
        counts["near_duplicate"] = sum(rows) - sum(rows := [_rows(shard) for shard in shards])
    counts["kept"] = sum(rows)
    for number, shard in enumerate(compress(shards, rows)):  # none without a sentence
        move(shard, _shard(folder, number))
    rows = list(filter(None, rows))
    with _aside(folder / MANIFEST) as path:
        manifest = {"counts": {name: counts[name] for name in COUNTED}, "rows": rows, "seed": settings.seed}
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Bank.load(folder)


def _chunks(documents: Iterable[tuple[str, str]], characters: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Pieces of documents with the ids of those, about `characters` at a time, and the number of documents so far."""
    pieces: list[tuple[str, str]] = []
    read = size = 0
    for read, (document, text) in enumerate(documents, start=1):
        for piece in _pieces(text):
            pieces.append((document, piece))
            size += len(piece)
            if size >= characters:
                yield read, pieces
                pieces, size = [], 0
    if pieces or read == 0:
        yield read, pieces


def _pieces(text: str) -> Iterator[str]:
    """A document as it is, or parts of a long one, cut at line ends or else where a sentence seems to end."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        ends = (text.rfind(end, start, start + LONGEST_PIECE) + len(end) for end in PIECE_ENDS)
        stop = next((end for end in ends if end > start + 1), start + LONGEST_PIECE)
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def _sift(guard: LeakGuard, settings: CorpusSettings, path: Path, pieces: Sequence[tuple[str, str]]) -> None:
    """Write the sentences that pass the filters, unique and sorted by digest, with the filters' counts."""
    counts: Counter[str] = Counter()
    digest_of = _digest_of(settings.seed)
    unique: dict[bytes, tuple[str, str, int]] = {}
    candidates = _candidates(pieces, settings, counts)
    while batch := list(islice(candidates, AT_ONCE)):
        leaked = guard.blocked([name for name, _ in batch])
        counts["leaked"] += int(leaked.sum())
        counts["kept"] += len(batch) - int(leaked.sum())
        for name, row in compress(batch, ~leaked):
            unique.setdefault(digest_of(name), row)
    digests = sorted(unique)
    columns = list(zip(*(unique[digest] for digest in digests), strict=True)) or [(), (), ()]
    schema = SCHEMA.with_metadata({"counts": json.dumps(counts)})
    _write(pa.table([digests, *map(list, columns)], schema), path)


def _merge(chunks: Sequence[Path], shards: int, path: Path, shard: int) -> None:
    """Write one shard: its range of digests from all chunks, and of each key the first occurrence."""
    table = _range(chunks, shard, shards)
    digests = _digests(table)
    order = np.argsort(digests, kind="stable")
    first = np.ones(len(order), np.bool_)
    first[1:] = digests[order[1:]] != digests[order[:-1]]
    _write(table.take(order[first]), path)


def _range(paths: Sequence[Path], part: int, parts: int) -> pa.Table:
    """A copy of those rows of sorted files whose digests are in one of equally wide ranges, file after file."""
    copies = []
    for path in paths:
        table = _read(path)
        leading = _digests(table).view(">u4")[:: WIDTH // 4].astype(np.uint64)
        start, stop = np.searchsorted(leading * np.uint64(parts) >> np.uint64(32), [part, part + 1])
        copies.append(table.take(np.arange(start, stop)).replace_schema_metadata())
    return pa.concat_tables(copies)


def _without_near_duplicates(
    shards: list[Path], threshold: float, scratch: Path, build: str, workers: int
) -> list[Path]:
    """The shards without the sentences that resemble an earlier one, be that one left out itself or not.

    Compared are sentences that share a band of MinHashes, each with the `COMPARED` before it in the band.
    """
    starts = np.cumsum([0, *map(_rows, shards)])
    parts = PARTS * len(shards)

    def files(name: str, count: int) -> list[tuple[Path, int]]:
        return [(scratch / f"{name}-{number:05d}-{build}.{form_of[name]}", number) for number in range(count)]

    form_of = {"bands": "arrow", "pairs": "arrow", "distinct": "parquet"}
    bands = _make(_band, files("bands", len(shards)), workers, (threshold, shards, starts))
    pairs = _make(_pair, files("pairs", parts), workers, (bands, parts))
    return _make(_distinct, files("distinct", len(shards)), workers, (threshold, shards, starts, pairs))


def _band(threshold: float, shards: Sequence[Path], starts: NDArray[np.int64], path: Path, shard: int) -> None:
    """Write (band hash, position) of all sentences of a shard."""
    found, position = [], starts[shard]
    for batch in _read(shards[shard]).select(["text"]).to_batches(max_chunksize=BATCH):
        hashes = band_hashes([key(text) for text in batch["text"].to_pylist()], threshold)
        found.append(_joined(hashes, np.repeat(position + np.arange(len(batch)), hashes.shape[1])))
        position += len(batch)
    _write_pairs(found, path)


def _pair(bands: Sequence[Path], parts: int, path: Path, part: int) -> None:
    """Write (later, earlier) positions of the sentences to be compared that one range of band hashes holds."""
    hashes, positions = _split(np.sort(_digests(_range(bands, part, parts))))
    found = []
    for back in range(1, COMPARED + 1):
        same = hashes[back:] == hashes[:-back]
        found.append(_joined(positions[back:][same], positions[:-back][same]))
    _write_pairs(found, path)


def _distinct(
    threshold: float,
    shards: Sequence[Path],
    starts: NDArray[np.int64],
    pairs: Sequence[Path],
    path: Path,
    shard: int,
) -> None:
    """Write the sentences of a shard of which no earlier one has as many of the words, measured by Jaccard."""
    table, found = _read(shards[shard]), []
    for file in pairs:
        later, earlier = _split(_digests(_read(file)))
        own = slice(*np.searchsorted(later, starts[shard : shard + 2]))
        found.append(_joined(later[own], earlier[own]))
    later, earlier = _split(np.unique(np.concatenate(found)))
    repeats = np.zeros(len(table), np.bool_)
    for other, (start, stop) in enumerate(pairwise(starts[: shard + 2])):
        inside = (earlier >= start) & (earlier < stop)
        rows = later[inside] - starts[shard]
        texts = [_read(shards[other])["text"].take(earlier[inside] - start), table["text"].take(rows)]
        words = [[set(lex(text)) for text in column.to_pylist()] for column in texts]
        similar = [len(one & two) / len(one | two) >= threshold for one, two in zip(*words, strict=True)]
        repeats[rows[np.array(similar, np.bool_)]] = True
    _write(table.filter(~repeats), path)


def _candidates(
    pieces: Iterable[tuple[str, str]], settings: CorpusSettings, counts: Counter[str]
) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """Key, and (sentence, document, number of words), of what is text and neither too short nor too long."""
    for document, piece in pieces:
        for sentence in sentences(piece, settings.language):
            words = lex(sentence)
            fault = _fault(sentence, words, settings)
            counts["sentences"] += 1
            if fault:
                counts[fault] += 1
            else:
                yield " ".join(words), (sentence, document, len(words))


def _fault(sentence: str, words: Sequence[str], settings: CorpusSettings) -> str | None:
    """The first filter that refuses the sentence, if any."""
    if len(words) < settings.min_words:
        return "too_short"
    if len(words) > settings.max_words:
        return "too_long"
    if sum(map(str.isalpha, sentence)) < LEAST_LETTERS * (len(sentence) - sentence.count(" ")):
        return "not_text"
    return None


def _empty(counts: Counter[str], settings: CorpusSettings) -> UsageError:
    found = ", ".join(f"{name}={counts[name]}" for name in COUNTED)
    return UsageError(
        f"corpus.sources: no sentence passed the filters ({found}); give more text, or check corpus.min_words="
        f"{settings.min_words}, corpus.max_words={settings.max_words} and corpus.language={settings.language}"
    )


def _shard(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.parquet"


def _passages(positions: Iterable[int], rows: Any) -> Iterator[Passage]:
    columns = rows["text"].to_pylist(), rows["document"].to_pylist()
    for position, text, document in zip(positions, *columns, strict=True):
        yield Passage(f"bank/{position:08d}", text, document)


def _digest_of(seed: int) -> Callable[[str], bytes]:
    """What sorts the bank: equal for equal keys, and otherwise as good as random."""
    start = blake2b(digest_size=WIDTH, key=blake2b(str(seed).encode()).digest())

    def digest_of(name: str) -> bytes:
        hashed = start.copy()
        hashed.update(name.encode())
        return hashed.digest()

    return digest_of


def _digests(table: pa.Table) -> Digests:
    column = table["digest"].combine_chunks()
    return np.frombuffer(column.buffers()[1] or b"", f"V{WIDTH}", len(column), column.offset * WIDTH)


def _joined(left: NDArray[Any], right: NDArray[Any]) -> Digests:
    """Pairs of numbers as 16 bytes that are sorted as the pairs would be."""
    return np.column_stack([left.ravel(), right.ravel()]).astype(">u8").view(f"V{WIDTH}").ravel()


def _split(pairs: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    left, right = pairs.view(">u8").reshape(-1, 2).astype(np.int64).T
    return left, right


def _write_pairs(pairs: Sequence[Digests], path: Path) -> None:
    """Sorted, each once."""
    unique = np.unique(np.concatenate(pairs))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), len(unique), [None, pa.py_buffer(unique)])
    _write(pa.table({"digest": column}), path)


def _fingerprint(inputs: str, parts: Iterable[tuple[str, str]]) -> str:
    total = blake2b(inputs.encode(), digest_size=8)
    for name, text in parts:
        total.update(f"{len(name)} {len(text)} {name}{text}".encode())
    return total.hexdigest()


def _make(
    work: Callable[..., None], jobs: Iterable[tuple[Path, Any]], workers: int, once: tuple[Any, ...]
) -> list[Path]:
    """Call `work(*once, path, job)` for every (path, job) whose file is not there yet. Returns all paths."""
    paths: list[Path] = []

    def missing() -> Iterator[tuple[Path, Any]]:
        for path, job in jobs:
            paths.append(path)
            if not path.exists():
                yield path, job

    for _ in map_jobs(work, missing(), workers, once=once):
        pass
    return paths


def _read(path: Path) -> pa.Table:
    """An Arrow file, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _rows(path: Path) -> int:
    rows: int = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else len(_read(path))
    return rows


def _write(table: pa.Table, path: Path) -> None:
    with _aside(path) as aside:
        if path.suffix == ".parquet":
            compression = {name: "none" if name == "digest" else "zstd" for name in table.column_names}
            pq.write_table(table, aside, compression=compression, use_dictionary=["document"])
        else:
            with pa.ipc.new_file(str(aside), table.schema) as file:
                file.write_table(table)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place to write to; it becomes `path` when the block ends without an error."""
    aside = path.with_name(f".{path.name}.partial")
    yield aside
    os.replace(aside, path)
