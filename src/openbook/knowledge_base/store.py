"""A knowledge base on disk: arrays and JSON, which run no code when read, and a manifest to check them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openbook.config import UsageError
from openbook.types import KnowledgeBase

SCHEMA_VERSION = 1
FILES = ("ids.json", "keys.npy", "texts.json", "values.npy")
TOLERANCE = 1e-4  # far above the rounding of float32 norms and softmaxes


class StoredFile(BaseModel):
    """What a file must be for the folder to be trusted."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a knowledge base is, and what its files must be. Entries of the caller's own are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    schema_version: Literal[1]
    kind: Literal["classification", "regression"]
    labels: tuple[str, ...] | None  # in the order of the values' columns; None in regression
    key_space: str  # digest of all that decides where a text's key lies
    M: int  # entries
    d: int  # dimensions of a key
    C: int  # columns of a value
    contains_text: bool
    files: dict[str, StoredFile]

    @model_validator(mode="after")
    def columns_fit_kind(self) -> Self:
        if self.kind == "regression" and (self.labels is not None or self.C != 1):
            raise ValueError(f"kind regression needs C=1 and labels None, not C={self.C} and labels {self.labels}")
        if self.kind == "classification" and len(self.labels or ()) != self.C:
            raise ValueError(f"labels {self.labels} against C={self.C} columns of the values")
        return self


def save(base: KnowledgeBase, folder: Path) -> None:
    """Write a knowledge base whose manifest names `kind`, `labels` and `key_space`; the rest of it is derived here.

    Raises UsageError for a base that `load` would refuse.
    """
    manifest = _describe(base)
    _check_contents(base, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "keys.npy", np.ascontiguousarray(base.keys), allow_pickle=False)
    np.save(folder / "values.npy", np.ascontiguousarray(base.values), allow_pickle=False)
    _write_json(folder / "ids.json", base.ids)
    _write_json(folder / "texts.json", base.texts)
    files = {name: _measure(folder / name).model_dump() for name in FILES}
    _write_json(folder / "manifest.json", {**manifest.model_dump(mode="json"), "files": files})


def load(folder: Path) -> KnowledgeBase:
    """Read a knowledge base. Raises UsageError naming what differs from the manifest, or what cannot be used."""
    manifest = _parse_manifest(_read_json(folder / "manifest.json"), folder / "manifest.json")
    _expect(f"{folder}: files", sorted(manifest.files), list(FILES))
    for name, promised in manifest.files.items():
        found = _measure(folder / name)
        _expect(f"{folder / name}: bytes", promised.bytes, found.bytes)
        _expect(f"{folder / name}: sha256", promised.sha256, found.sha256)
    base = KnowledgeBase(
        keys=_read_array(folder / "keys.npy"),
        values=_read_array(folder / "values.npy"),
        ids=_read_strings(folder / "ids.json"),
        texts=_read_strings(folder / "texts.json"),
        manifest=manifest.model_dump(mode="json"),
    )
    _check_contents(base, manifest)
    return base


def check_fits(base: KnowledgeBase, key_space: str, labels: Sequence[str] | None) -> None:
    """Refuse a base made for another student: its keys lie elsewhere, or its labels differ in name or order."""
    held = {"key_space": base.manifest["key_space"], "labels": _as_list(base.manifest["labels"])}
    needed = {"key_space": key_space, "labels": _as_list(labels)}
    for field in held:
        if held[field] != needed[field]:
            raise UsageError(
                f"{field} of the knowledge base is {held[field]!r}, but the student's is {needed[field]!r}; "
                "build the knowledge base with this student's teacher and task"
            )


def _describe(base: KnowledgeBase) -> Manifest:
    derived = {
        "schema_version": SCHEMA_VERSION,
        "M": len(base.ids),
        "d": base.keys.shape[-1],
        "C": base.values.shape[-1],
        "contains_text": any(base.texts),
        "files": {},
    }
    return _parse_manifest({**base.manifest, **derived}, "the manifest of the knowledge base to be saved")


def _check_contents(base: KnowledgeBase, manifest: Manifest) -> None:
    _expect("ids", manifest.M, len(base.ids))
    _expect("texts", manifest.M, len(base.texts))
    _expect("distinct ids", manifest.M, len(set(base.ids)))
    _expect("contains_text", manifest.contains_text, any(base.texts))
    _expect("keys", ("float32", (manifest.M, manifest.d)), (base.keys.dtype.name, base.keys.shape))
    _expect("values", ("float32", (manifest.M, manifest.C)), (base.values.dtype.name, base.values.shape))
    _check_rows("keys: the length", np.linalg.norm(base.keys, axis=1))
    if manifest.kind == "classification":
        _check_rows("values: the sum", base.values.sum(axis=1))
        if base.values.min(initial=0) < 0:
            raise UsageError(f"values: a probability is {base.values.min()}; build the knowledge base again")
    elif not np.isfinite(base.values).all():
        raise UsageError("values: a score is not finite; the teacher's outputs have overflowed")


def _check_rows(what: str, found: NDArray[Any]) -> None:
    """Every number (M,) must be 1; NaN is not."""
    wrong = np.flatnonzero(~(np.abs(found - 1) <= TOLERANCE))
    if len(wrong):
        raise UsageError(
            f"{what} of row {wrong[0]} is {found[wrong[0]]}, but it must be 1; build the knowledge base again"
        )


def _expect(field: str, promised: object, found: object) -> None:
    if promised != found:
        raise UsageError(f"{field}: the manifest says {promised}, found {found}; build the knowledge base again")


def _measure(path: Path) -> StoredFile:
    if not path.is_file():
        raise UsageError(f"{path} is missing; build the knowledge base again")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return StoredFile(bytes=path.stat().st_size, sha256=digest.hexdigest())


def _read_array(path: Path) -> NDArray[np.float32]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path} is not a plain array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path} is an archive, not a plain array")
    return array


def _read_strings(path: Path) -> tuple[str, ...]:
    strings = _read_json(path)
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise UsageError(f"{path} is not a list of strings")
    return tuple(strings)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; is this the folder of a knowledge base?") from error
    except ValueError as error:  # also what is not UTF-8
        raise UsageError(f"{path} is not JSON: {error}") from error


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, indent=1)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _parse_manifest(content: Any, source: Path | str) -> Manifest:
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'it'} (found {_short(problem['input'])}): {problem['msg']}"
            for problem in error.errors()
        ]
        raise UsageError(f"{source} cannot be used: {'; '.join(problems)}") from error


def _short(value: object) -> str:
    return "nothing" if isinstance(value, dict) else repr(value)


def _as_list(labels: Sequence[str] | None) -> list[str] | None:
    return None if labels is None else list(labels)
