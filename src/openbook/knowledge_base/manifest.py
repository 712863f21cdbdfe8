"""What a knowledge base says of itself: its manifest, with the files it is made of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openbook.config import UsageError, WholeKind

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
FLAT = {"keys": "keys.npy", "values": "values.npy", "ids": "ids.json", "texts": "texts.json"}  # all of version 1
DTYPES = {  # of the stored keys
    "fp32": "float32",
    "fp16": "float16",
    "pca": "float16",
    "sq8": "uint8",
    "pq": "uint8",
    "opq": "uint8",
}
STALE_SHARE = 0.1  # of the entries: tuned settings no longer hold when more have changed (specification, section 2.10)
TRAIN = "train"  # where entries come from that do not say it

Fields = Mapping[str, Any]
Model = TypeVar("Model", bound=BaseModel)


class StoredFile(BaseModel):
    """What a file must be to be trusted."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Segment(BaseModel):
    """Entries that were written together: their number, and the file of each of their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    M: int
    keys: str
    values: str
    ids: str
    texts: str | None = None  # absent: no entry has one
    weights: str | None = None  # absent: each counts once
    origins: str | None = None  # absent: all from the training rows

    def files(self) -> dict[str, str]:
        """The name of each field's file."""
        return {name: value for name, value in self if name != "M" and value is not None}


class Tally(BaseModel):
    """What has changed since the settings of retrieval were tuned."""

    model_config = ConfigDict(frozen=True)

    entries: int  # that there were then
    added: int = 0
    removed: int = 0
    relabelled: int = 0
    swapped: bool = False

    def is_stale(self) -> bool:
        return self.swapped or self.added + self.removed + self.relabelled > STALE_SHARE * self.entries


class Log(BaseModel):
    """The part of the change log that counts: what a crash left behind it does not."""

    model_config = ConfigDict(frozen=True)

    bytes: int = 0
    sha256: str = ""  # of the digest before the last line, followed by the line


class Description(BaseModel):
    """What a knowledge base is. Entries of the caller's own are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: WholeKind
    labels: tuple[str, ...] | None  # in the order of the values' columns; None in regression
    key_space: str  # digest of all that decides where a text's key lies
    M: int  # entries
    d: int  # dimensions of a query
    C: int  # columns of a value
    contains_text: bool  # also of removed entries whose text still lies in a file

    @model_validator(mode="after")
    def columns_fit_kind(self) -> Self:
        if self.kind == "regression" and (self.labels is not None or self.C != 1):
            raise ValueError(f"kind regression needs C=1 and labels None, not C={self.C} and labels {self.labels}")
        if self.kind != "regression" and len(self.labels or ()) != self.C:
            raise ValueError(f"labels {self.labels} against C={self.C} columns of the values")
        return self


class Manifest(Description):
    """What a generation of a knowledge base is, and which files it consists of."""

    schema_version: Literal[2]
    form: str
    dtype: str  # of the stored keys
    origins: dict[str, int]  # number of entries of each
    generation: int
    parent: str | None  # sha256 of the manifest of the generation before
    since_tuning: Tally
    stale: bool  # whether the settings of retrieval have to be tuned again
    segments: tuple[Segment, ...]
    constants: dict[str, str]  # what the form needs to decode keys: name -> file
    removed: str | None  # the file of the removed entries' rows, counted through all segments
    files: dict[str, StoredFile]
    changes: Log

    @model_validator(mode="after")
    def form_is_known(self) -> Self:
        if not re.fullmatch(r"fp32|fp16|sq8|(pca|pq|opq)-\d{1,6}", self.form) or self.dtype != dtype_of(self.form):
            raise ValueError(f"form {self.form!r} with keys of dtype {self.dtype!r}; this openbook knows no such form")
        return self

    @model_validator(mode="after")
    def files_are_those_named(self) -> Self:
        named = sorted(self.names())
        if sorted(self.files) != named:
            raise ValueError(f"files are {sorted(self.files)}, but it is made of {named}")
        strange = [name for name, file in self.files.items() if not is_name_of(name, file)]
        if strange:
            raise ValueError(f"files: {strange} are no names of data files with these digests")
        return self

    def names(self) -> set[str]:
        """Of all data files."""
        return named(self.segments, self.constants, self.removed)

    def extras(self) -> dict[str, Any]:
        """The caller's own entries."""
        return dict(self.model_extra or {})


def read_manifest(folder: Path) -> Manifest:
    """The manifest, one of version 1 in today's terms. Raises UsageError naming the fields that cannot be used."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; is this the folder of a knowledge base?") from error
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise UsageError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and content.get("schema_version") == 1:
        content = {**content, **_of_version_1(content.get("M"))}
    return parsed(Manifest, content, path)


def is_name_of(name: str, file: StoredFile) -> bool:
    """Whether a file of this content has this name, which leads nowhere else."""
    return name in FLAT.values() or bool(re.fullmatch(rf"data/[a-z]+-{re.escape(file.sha256[:16])}\.(npy|json)", name))


def named(segments: Iterable[Segment], constants: Mapping[str, str], removed: str | None) -> set[str]:
    """The files that these are made of."""
    own = {removed} if removed else set()
    return own.union(constants.values(), *(segment.files().values() for segment in segments))


def dtype_of(form: str) -> str:
    """The dtype a form stores keys in; empty if it is not known."""
    return DTYPES.get(form.partition("-")[0], "")


def origin_counts(origins: Sequence[str], count: int) -> dict[str, int]:
    """How many of `count` entries come from where."""
    return dict(sorted(Counter(origins).items())) if origins else {TRAIN: count} if count else {}


def parsed(model: type[Model], content: Any, source: Path | str) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'it'} (found {_short(problem['input'])}): {problem['msg']}"
            for problem in error.errors()
        ]
        raise UsageError(f"{source} cannot be used: {'; '.join(problems)}") from error


def expect(name: str, promised: object, found: object) -> None:
    if promised != found:
        raise UsageError(f"{name}: the manifest says {promised}, found {found}; build the knowledge base again")


def _of_version_1(count: Any) -> dict[str, Any]:
    """What a flat folder's manifest leaves unsaid."""
    return {
        "schema_version": SCHEMA_VERSION,
        "form": "fp32",
        "dtype": DTYPES["fp32"],
        "origins": {TRAIN: count},
        "generation": 0,
        "parent": None,
        "since_tuning": {"entries": count},
        "stale": False,
        "segments": [{"M": count, **FLAT}],
        "constants": {},
        "removed": None,
        "changes": {},
    }


def _short(value: object) -> str:
    return "nothing" if isinstance(value, dict) else repr(value)
