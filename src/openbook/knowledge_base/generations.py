"""Data files that never change, and one manifest that names those that count: a folder that is never half edited."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.knowledge_base.manifest import (
    FLAT,
    MANIFEST,
    SCHEMA_VERSION,
    TRAIN,
    Fields,
    Log,
    Manifest,
    Segment,
    StoredFile,
    Tally,
    dtype_of,
    expect,
    named,
    origin_counts,
    parsed,
)

CHANGES = "changes.jsonl"
DATA = "data"
PATIENCE = 5.0  # seconds a second writer waits for the first

Constants = dict[str, NDArray[np.float32]]


class MissingFile(UsageError):
    """A file that the manifest names is not there: damage, or a writer was quicker than this reader."""


@dataclass(frozen=True)
class Rows:
    """Entries on their way to or from the disk: a knowledge base's fields, the keys as stored or as compared."""

    keys: NDArray[Any]  # (M, .)
    values: NDArray[np.float32]  # (M, C)
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    weights: NDArray[np.float32] | None
    origins: tuple[str, ...]

    def take(self, kept: NDArray[np.bool_]) -> Rows:
        """The rows of which `kept` (M,) is true; all of them without a copy."""
        if kept.all():
            return self
        return Rows(
            self.keys[kept],
            self.values[kept],
            tuple(compress(self.ids, kept)),
            tuple(compress(self.texts, kept)),
            None if self.weights is None else self.weights[kept],
            tuple(compress(self.origins, kept)),
        )

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """One after the other; a single one without a copy."""
        if len(parts) == 1:
            return parts[0]
        weights: NDArray[np.float32] | None = None
        origins: tuple[str, ...] = ()
        if any(part.weights is not None for part in parts):
            weights = np.concatenate(
                [np.ones(len(part.ids), np.float32) if part.weights is None else part.weights for part in parts]
            )
        if any(part.origins for part in parts):
            origins = tuple(chain.from_iterable(part.origins or (TRAIN,) * len(part.ids) for part in parts))
        return Rows(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.values for part in parts]),
            tuple(chain.from_iterable(part.ids for part in parts)),
            tuple(chain.from_iterable(part.texts for part in parts)),
            weights,
            origins,
        )


def read_file(folder: Path, manifest: Manifest, name: str) -> Any:
    """A data file that is as the manifest promises: an array, or a tuple of strings."""
    path, promised = folder / name, manifest.files[name]
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing; build the knowledge base again") from error
    with stream:
        expect(f"{path}: bytes", promised.bytes, os.fstat(stream.fileno()).st_size)
        expect(f"{path}: sha256", promised.sha256, hashlib.file_digest(stream, "sha256").hexdigest())
        stream.seek(0)
        return _array(stream, path) if name.endswith(".npy") else _strings(stream, path)


def read_constants(folder: Path, manifest: Manifest) -> Constants:
    constants = {name: read_file(folder, manifest, file) for name, file in manifest.constants.items()}
    for name, array in constants.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise UsageError(f"constants.{name} is not made of finite float32 numbers; build the knowledge base again")
    return constants


def read_rows(folder: Path, manifest: Manifest, segment: Segment) -> Rows:
    """A segment's entries, keys as stored."""
    return rows_of(segment, {name: read_file(folder, manifest, file) for name, file in segment.files().items()})


def rows_of(segment: Segment, contents: Mapping[str, Any]) -> Rows:
    """A segment's entries, given the contents of its files."""
    absent = {"texts": ("",) * segment.M, "weights": None, "origins": ()}
    return Rows(**{**absent, **contents})


def alive(folder: Path, manifest: Manifest) -> NDArray[np.bool_]:
    """Which rows, counted through all segments, were not removed."""
    kept = np.ones(sum(segment.M for segment in manifest.segments), dtype=np.bool_)
    if manifest.removed:
        rows = read_file(folder, manifest, manifest.removed)
        if rows.dtype != np.int64 or rows.ndim != 1 or not ((rows >= 0) & (rows < len(kept))).all():
            raise UsageError(f"{folder / manifest.removed}: some rows do not exist; build the knowledge base again")
        kept[rows] = False
    return kept


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer. The operating system ends it with the process. Raises UsageError if another keeps at it."""
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UsageError(
            f"another process has been writing for {PATIENCE:g} seconds and holds {lock.lock_file}; try again later"
        ) from error
    try:
        yield
    finally:
        lock.release()


def put(folder: Path, name: str, content: NDArray[Any] | Sequence[str]) -> tuple[str, StoredFile]:
    """Write a data file that stays as it is, named by its content. It means nothing until a manifest names it."""
    aside = folder / DATA / f".{name}.partial"
    with aside.open("w+b") as stream:
        if isinstance(content, np.ndarray):
            np.lib.format.write_array(stream, np.ascontiguousarray(content), allow_pickle=False)
        else:
            stream.write(json.dumps(content, ensure_ascii=False, indent=0).encode("utf-8", "surrogatepass"))
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    file = f"{DATA}/{name}-{digest[:16]}.{'npy' if isinstance(content, np.ndarray) else 'json'}"
    os.replace(aside, folder / file)
    return file, StoredFile(bytes=size, sha256=digest)


def put_rows(folder: Path, rows: Rows) -> tuple[Segment, dict[str, StoredFile]]:
    """Write entries whose keys are in their stored form."""
    contents: dict[str, Any] = {"keys": rows.keys, "values": rows.values, "ids": rows.ids}
    contents |= {"texts": rows.texts} if any(rows.texts) else {}
    contents |= {} if rows.weights is None else {"weights": rows.weights}
    contents |= {"origins": rows.origins} if rows.origins else {}
    written = {name: put(folder, name, content) for name, content in contents.items()}
    segment = Segment(M=len(rows.ids), **{name: file for name, (file, _) in written.items()})
    return segment, dict(written.values())


def put_whole(folder: Path, rows: Rows, constants: Constants, form: str) -> dict[str, Any]:
    """Write entries that are to be all there is, and return what a manifest says of them."""
    segment, files = put_rows(folder, rows)
    stored = {name: put(folder, name, array) for name, array in constants.items()}
    return {
        "M": segment.M,
        "form": form,
        "contains_text": segment.texts is not None,
        "origins": origin_counts(rows.origins, segment.M),
        "segments": (segment,),
        "constants": {name: file for name, (file, _) in stored.items()},
        "removed": None,
        "files": files | dict(stored.values()),
    }


def commit(
    folder: Path, before: Manifest | None, content: Fields, event: Fields | None, keep_before: bool = True
) -> Manifest:
    """Make `content` the folder's next generation, all at once, and remove files that nobody needs any more.

    Whatever happens on the way, the folder holds the generation before or this one. The files of the generation before
    are kept, for readers that are busy with it, unless `keep_before` is false.
    """
    tally = Tally.model_validate(content["since_tuning"])
    derived: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dtype": dtype_of(content["form"]),
        "generation": 0 if before is None else before.generation + 1,
        "parent": None if before is None else hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        "since_tuning": tally,
        "stale": tally.is_stale(),
        "changes": Log(),
    }
    if before is not None and event is not None:
        stamp = {"generation": derived["generation"], "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        derived["changes"] = _log(folder, before.changes, {**stamp, **event})
    names = named(content["segments"], content["constants"], content["removed"])
    derived["files"] = {name: content["files"][name] for name in sorted(names)}
    manifest = parsed(Manifest, {**content, **derived}, folder / MANIFEST)
    _sync(folder / DATA)
    aside = folder / ".manifest.partial"
    with aside.open("w", encoding="utf-8", newline="\n") as stream:
        json.dump(manifest.model_dump(mode="json"), stream, ensure_ascii=False, sort_keys=True, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    now = time.time_ns()  # the file system's own clock ticks too slowly to tell two edits apart
    os.utime(aside, ns=(now, now))
    _sync(folder)
    os.replace(aside, folder / MANIFEST)
    _sync(folder)
    _clean(folder, manifest.names() | (before.names() if before is not None and keep_before else set()))
    return manifest


def read_log(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The change log, oldest first. Raises UsageError if it is not what was written."""
    if not manifest.changes.bytes:
        return []
    try:
        lines = (folder / CHANGES).read_bytes()[: manifest.changes.bytes].splitlines(keepends=True)
    except FileNotFoundError as error:
        raise UsageError(f"{folder / CHANGES} is missing; restore it, or save the knowledge base elsewhere") from error
    digest = ""
    for line in lines:
        digest = _chained(digest, line)
    expect(f"{folder / CHANGES}: sha256", manifest.changes.sha256, digest)
    return [json.loads(line) for line in lines]


def _array(stream: IO[bytes], path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UsageError(f"{path} is not a plain array: {error}") from error


def _strings(stream: IO[bytes], path: Path) -> tuple[str, ...]:
    try:
        strings = json.loads(stream.read().decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise UsageError(f"{path} is not a list of strings")
    return tuple(strings)


def _log(folder: Path, before: Log, event: Fields) -> Log:
    """Write a line behind those that count."""
    line = json.dumps(event, sort_keys=True).encode() + b"\n"
    with open(os.open(folder / CHANGES, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
        if stream.seek(0, os.SEEK_END) < before.bytes:
            raise UsageError(f"{folder / CHANGES} is shorter than the manifest says; restore it before the next edit")
        stream.truncate(before.bytes)
        stream.seek(before.bytes)
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
    return Log(bytes=before.bytes + len(line), sha256=_chained(before.sha256, line))


def _chained(digest: str, line: bytes) -> str:
    return hashlib.sha256(digest.encode() + line).hexdigest()


def _clean(folder: Path, kept: Iterable[str]) -> None:
    """Remove data files that are not to be kept, also those that a crash left."""
    there = [f"{DATA}/{path.name}" for path in (folder / DATA).iterdir()]
    for name in {*there, *FLAT.values()} - set(kept):
        with suppress(OSError):  # a file that cannot be removed now is removed by a later edit
            (folder / name).unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make renames in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
