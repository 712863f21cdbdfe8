"""Knowledge bases as they are saved, loaded, and read by a service while somebody edits them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook import types
from openbook.config import UsageError
from openbook.knowledge_base.forms import decode, encode, fit
from openbook.knowledge_base.generations import (
    Constants,
    MissingFile,
    Rows,
    alive,
    commit,
    locked,
    put_whole,
    read_constants,
    read_file,
    rows_of,
)
from openbook.knowledge_base.manifest import (
    DTYPES,
    MANIFEST,
    TRAIN,
    Description,
    Fields,
    Manifest,
    Segment,
    expect,
    parsed,
    read_manifest,
)

EXACT = ("fp32", "fp16")  # the forms in which a key of length one keeps it
LENGTH_TOLERANCE = 1e-3  # half precision is off by 2^-11 at most
SUM_TOLERANCE = 1e-4  # far above the rounding of softmaxes in fp32


@dataclass(frozen=True)
class KnowledgeBase(types.KnowledgeBase):
    """A knowledge base that was read from a folder, or is to be saved in one."""

    constants: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # what its form encodes keys with

    @staticmethod
    def from_pretrained(folder: str | Path) -> KnowledgeBase:
        """Read a folder that `save_pretrained`, `openbook run` or an edit wrote. See `load`."""
        return load(folder)

    def save_pretrained(self, folder: str | Path, form: str | None = None) -> None:
        """Write a folder that `from_pretrained` reads. See `save`."""
        save(self, folder, form)


def save(base: types.KnowledgeBase, folder: str | Path, form: str | None = None) -> None:
    """Write a knowledge base whose manifest names `kind`, `labels` and `key_space`; the rest of it is derived here.

    `form` is one of `forms`; by default the base's own, or fp32. What the folder held before becomes its last
    generation. Raises UsageError for a base that `load` would refuse, before anything is written.
    """
    folder = Path(folder)
    form = form or str(base.manifest.get("form", "fp32"))
    about = described(base)
    rows, constants = whole(base, about, form)
    tally = base.manifest.get("since_tuning", {"entries": about.M})
    with locked(folder):
        before = None
        with suppress(UsageError):  # nothing there, or nothing that could be read
            before = read_manifest(folder)
        content = {**base.manifest, **about.model_dump(), **put_whole(folder, rows, constants, form)}
        event = None if before is None else {"what": "save", "entries": about.M}
        commit(folder, before, {**content, "since_tuning": tally}, event)


def load(folder: str | Path) -> KnowledgeBase:
    """Read a knowledge base. Raises UsageError naming what differs from the manifest, or what cannot be used.

    Entries stand in the order they were added in, and removed ones are left out: to remove what was added restores
    every answer bit for bit. An entry that is removed and added again stands last, after others just as similar.
    """
    return Reader(folder).current()


class Reader:
    """What a service asks for its knowledge base: always the newest generation, read without waiting for a writer.

    A look costs microseconds when nothing changed; else only new files are read. Threads may share one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._manifest = str(self.folder / MANIFEST)
        self._lock = threading.Lock()
        self._held: tuple[tuple[int, ...], KnowledgeBase] | None = None
        self._constants: dict[str, str] = {}
        self._files: dict[str, Any] = {}  # contents by name, which their digest is part of

    def current(self) -> KnowledgeBase:
        """The newest generation. Raises UsageError when it cannot be used, as `load` does."""
        seen, held = self._stamp(), self._held
        if held is None or held[0] != seen:
            with self._lock:
                held = self._held
                if held is None or held[0] != seen:
                    held = self._held = (seen, self._read())
        return held[1]

    @property
    def generation(self) -> int:
        return int(self.current().manifest["generation"])

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._manifest)
        except FileNotFoundError as error:
            raise UsageError(f"{self._manifest} is missing; is this the folder of a knowledge base?") from error
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> KnowledgeBase:
        while True:
            manifest = read_manifest(self.folder)
            try:
                return self._assembled(manifest)
            except MissingFile:
                if read_manifest(self.folder) == manifest:
                    raise

    def _assembled(self, manifest: Manifest) -> KnowledgeBase:
        if manifest.constants != self._constants:  # stored keys may mean something else
            self._files, self._constants = {}, manifest.constants
        constants = read_constants(self.folder, manifest)
        if "basis" in constants:
            rank = int(manifest.form.removeprefix("pca-"))
            expect("constants.basis", (manifest.d, rank), constants["basis"].shape)
        rows = Rows.join([self._part(manifest, segment, constants) for segment in manifest.segments])
        self._files = {name: content for name, content in self._files.items() if name in manifest.files}
        start = 0
        for segment in manifest.segments:  # views of the whole, so that keys are held once
            self._files[segment.keys] = rows.keys[start : start + segment.M]
            start += segment.M
        rows = rows.take(alive(self.folder, manifest))
        expect("ids", manifest.M, len(rows.ids))
        check_distinct(rows.ids)
        if not manifest.contains_text:
            expect("contains_text", False, any(rows.texts))
        return KnowledgeBase(
            keys=rows.keys,
            values=rows.values,
            ids=rows.ids,
            texts=rows.texts,
            manifest=manifest.model_dump(mode="json"),
            weights=rows.weights,
            origins=rows.origins,
            basis=constants.get("basis"),
            constants=constants,
        )

    def _part(self, manifest: Manifest, segment: Segment, constants: Constants) -> Rows:
        fresh = {name: file for name, file in segment.files().items() if file not in self._files}
        for name, file in fresh.items():
            content = read_file(self.folder, manifest, file)
            self._files[file] = _decoded(content, manifest, segment, constants) if name == "keys" else content
        rows = rows_of(segment, {name: self._files[file] for name, file in segment.files().items()})
        if fresh:
            basis = constants.get("basis")
            width = manifest.d if basis is None else basis.shape[1]
            check_rows(rows, manifest, segment.M, width, unit=has_unit_keys(manifest.form, manifest.extras()))
        return rows


def check_fits(
    base: types.KnowledgeBase,
    key_space: str,
    labels: Sequence[str] | None,
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Refuse a base made for another student: its keys lie elsewhere, or its labels differ in name or order.

    `made_from` names the digests that `key_space` was computed from, such as `teacher` and `tokenizer`; where the base
    has them too (its manifest's `made_from`), the message says which of them differs.
    """
    needed = {"labels": labels, "key_space": key_space, "made_from": made_from}
    for name, held, wanted in differences(base.manifest, needed):
        raise UsageError(
            f"{name} of the knowledge base is {held!r}, but the student's is {wanted!r}; "
            "build the knowledge base with this student's teacher and task"
        )


def differences(one: Fields, two: Fields) -> list[tuple[str, Any, Any]]:
    """What two manifests disagree in, of the fields that make bases strangers: (name, value of one, value of two)."""
    ones, twos = one.get("made_from") or {}, two.get("made_from") or {}
    pairs = [(name, ones[name], twos[name]) for name in ones if name in twos]
    pairs += [(name, one.get(name), two[name]) for name in ("kind", "labels", "key_space", "d") if name in two]
    plain = [(name, *(list(value) if name == "labels" and value else value for value in pair)) for name, *pair in pairs]
    return [(name, first, second) for name, first, second in plain if first != second]


def described(base: types.KnowledgeBase) -> Description:
    """The description of a base in memory. Raises UsageError where its manifest contradicts it."""
    derived = {
        "M": len(base.ids),
        "d": base.keys.shape[-1] if base.basis is None else len(base.basis),
        "C": base.values.shape[-1],
        "contains_text": any(base.texts),
    }
    return parsed(Description, {**base.manifest, **derived}, "the manifest of the knowledge base to be saved")


def whole(base: types.KnowledgeBase, about: Description, form: str) -> tuple[Rows, Constants]:
    """A base as it is stored in a form, and the form's constants. Raises UsageError for what cannot be stored so."""
    held = base.manifest.get("form", "fp32")
    rank = None if base.basis is None else base.basis.shape[1]
    if held != form and (held not in EXACT or rank is not None):
        raise UsageError(
            f"form={form!r}: the keys of this knowledge base lie in form {held!r}, which has lost what other forms "
            f"need; keep {held!r}, or build the knowledge base again"
        )
    check_given(base, about, unit=has_unit_keys(held, base.manifest))
    constants = {"basis": base.basis} if base.basis is not None else _constants(base, form)
    return stored_rows(base, form, constants), constants


def stored_rows(base: types.KnowledgeBase, form: str, constants: Constants) -> Rows:
    """A base's entries as a form stores them: encoded, or already projected to the form's basis."""
    codes = encode(base.keys, form, constants) if base.basis is None else base.keys.astype(DTYPES["pca"])
    origins = () if set(base.origins) <= {TRAIN} else base.origins
    return Rows(codes, base.values, base.ids, base.texts, base.weights, origins)


def has_unit_keys(form: str, manifest: Fields) -> bool:
    """Whether keys have length one: those of compact forms and of prototypes have not."""
    return form in EXACT and "prototypes_of" not in manifest


def check_given(base: types.KnowledgeBase, about: Description, unit: bool) -> None:
    """Raise UsageError for a base in memory that cannot be used."""
    rows = Rows(base.keys, base.values, base.ids, base.texts, base.weights, base.origins)
    width = about.d if base.basis is None else base.basis.shape[1]
    check_rows(rows, about, about.M, width, unit)
    check_distinct(base.ids)


def check_rows(rows: Rows, about: Description, count: int, width: int, unit: bool) -> None:
    """Raise UsageError for entries that cannot be used: keys (count, width) as compared, of length one if `unit`."""
    for name in ("ids", "texts"):
        expect(name, count, len(getattr(rows, name)))
    expect("origins", count if rows.origins else 0, len(rows.origins))
    expect("keys", ("float32", (count, width)), (rows.keys.dtype.name, rows.keys.shape))
    lengths = np.linalg.norm(rows.keys, axis=1)
    _refuse_rows("keys: the length", lengths, ~(np.abs(lengths - 1) <= LENGTH_TOLERANCE), "must be 1", unit)
    _refuse_rows("keys: the length", lengths, ~np.isfinite(lengths) | (lengths == 0), "must be a number above 0")
    check_values(rows.values, about, count)
    if rows.weights is not None:
        expect("weights", ("float32", (count,)), (rows.weights.dtype.name, rows.weights.shape))
        wrong = ~np.isfinite(rows.weights) | (rows.weights < 0)
        _refuse_rows("weights: the weight", rows.weights, wrong, "must be a number, and not below 0")


def check_values(values: NDArray[Any], about: Description, count: int) -> None:
    """Raise UsageError for values that are no soft labels (count, C), or no scores (count, 1).

    Those of several labels are probabilities each by itself, and need not sum to 1.
    """
    expect("values", ("float32", (count, about.C)), (values.dtype.name, values.shape))
    if about.kind == "regression":
        _refuse_rows("values: the score", values[:, 0], ~np.isfinite(values[:, 0]), "must be finite")
        return
    if about.kind == "multi_label":
        outside: NDArray[np.bool_] = ~((values >= 0) & (values <= 1))
        places = outside.argmax(axis=1)  # the first in each row
        strange = values[np.arange(count), places]
        _refuse_rows("values: a probability", strange, np.asarray(outside.any(axis=1)), "must lie between 0 and 1")
        return
    sums, least = values.sum(axis=1), values.min(axis=1, initial=1)
    _refuse_rows("values: the sum", sums, ~(np.abs(sums - 1) <= SUM_TOLERANCE), "must be 1")
    _refuse_rows("values: a probability", least, least < 0, "must not be below 0")


def check_distinct(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise UsageError(f"ids: {name!r} is the id of {times} entries; give each entry an id of its own")


def _refuse_rows(what: str, found: NDArray[Any], wrong: NDArray[np.bool_], demand: str, applies: bool = True) -> None:
    rows = np.flatnonzero(wrong)
    if applies and len(rows):
        raise UsageError(
            f"{what} of row {rows[0]} is {found[rows[0]]}, but it {demand} "
            f"({len(rows)} of {len(found)} rows are wrong); mend it, or build the knowledge base again"
        )


def _constants(base: types.KnowledgeBase, form: str) -> Constants:
    """Those the base was read with where they still give its very keys, so that to save it again changes no byte."""
    own = dict(base.constants) if isinstance(base, KnowledgeBase) and base.manifest.get("form") == form else {}
    if own and np.array_equal(decode(encode(base.keys, form, own), form, own), base.keys):
        return own
    return fit(base.keys, form)


def _decoded(codes: Any, manifest: Manifest, segment: Segment, constants: Constants) -> NDArray[np.float32]:
    expect("keys", (manifest.dtype, segment.M), (codes.dtype.name, len(codes) if codes.ndim == 2 else codes.shape))
    try:
        return decode(codes, manifest.form, constants)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"keys do not fit the constants of form {manifest.form!r}: {error}") from error
