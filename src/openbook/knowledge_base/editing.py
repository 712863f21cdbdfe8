"""Edits of a knowledge base while students look things up in it: each is a new generation, switched to all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openbook.config import UsageError
from openbook.knowledge_base.generations import (
    Rows,
    alive,
    commit,
    locked,
    put,
    put_rows,
    put_whole,
    read_constants,
    read_file,
    read_log,
    read_rows,
)
from openbook.knowledge_base.manifest import (
    TRAIN,
    Description,
    Fields,
    Manifest,
    Segment,
    Tally,
    origin_counts,
    read_manifest,
)
from openbook.knowledge_base.store import (
    check_given,
    check_values,
    described,
    differences,
    has_unit_keys,
    load,
    stored_rows,
    whole,
)
from openbook.types import KnowledgeBase

SEGMENTS = 32  # more than these are joined, so that a thousand small edits do not make a thousand files
TUNED = ("retrieval", "tuned_on", "tuning")  # entries of a manifest that belong to the student, whatever the book


@dataclass(frozen=True)
class Edit:
    """What an edit did, and what the knowledge base is since."""

    what: str
    generation: int
    entries: int
    stale: bool  # whether the settings of retrieval have to be tuned again
    added: int = 0
    removed: int = 0
    relabelled: int = 0


@dataclass(frozen=True)
class Difference:
    """The ids that tell two knowledge bases apart, each in the order of its base."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    relabelled: tuple[str, ...]  # another value
    rewritten: tuple[str, ...]  # another text, weight or origin, or another key where both keep keys in one form


def add(folder: str | Path, entries: KnowledgeBase) -> Edit:
    """Append entries: keys (n, d) of length one, from the teacher and projection of this base, and values (n, C).

    The cost is that of the new entries; those that were there are not read, but for their ids. Raises UsageError, and
    changes nothing, for entries of another key space or other labels, ids that are taken, and what `save` refuses.
    """
    return _append(Path(folder), entries, "add")


def merge(folder: str | Path, other: KnowledgeBase | str | Path) -> Edit:
    """Append all entries of another knowledge base, which must not share an id. Raises UsageError as `add` does."""
    return _append(Path(folder), _loaded(other), "merge")


def remove(folder: str | Path, ids: Sequence[str]) -> Edit:
    """Take entries out of every later answer. Their text stays in a file until `compact`.

    Raises UsageError, and changes nothing, for an unknown id.
    """
    with _editing(folder) as (here, before):
        places = _places(here, before, ids)
        kept = alive(here, before)
        kept[places] = False
        file, stored = put(here, "removed", np.flatnonzero(~kept))
        origins = np.array(_column(here, before, "origins", TRAIN), dtype=np.object_)[places]
        changes = {
            "M": before.M - len(places),
            "origins": dict(Counter(before.origins) - Counter(origins.tolist())),
            "removed": file,
            "files": {file: stored},
        }
        return _finish(here, before, changes, {"what": "remove", "ids": list(ids)}, removed=len(places))


def relabel(folder: str | Path, ids: Sequence[str], values: ArrayLike) -> Edit:
    """Give entries other values (n, C) and keep their keys. The change log keeps the old values.

    Raises UsageError, and changes nothing, for an unknown id and for values that are no soft labels or scores.
    """
    given = np.asarray(values, dtype=np.float32)
    with _editing(folder) as (here, before):
        places = _places(here, before, ids)
        if given.shape != (len(ids), before.C):
            raise UsageError(
                f"values: the shape is {given.shape}, but {len(ids)} ids need {(len(ids), before.C)}; "
                f"give a row for each id, in the order of the labels {before.labels}"
            )
        check_values(given, before, len(ids))
        segments, files, old = _with_values(here, before, places, given)
        event = {"what": "relabel", "ids": list(ids), "before": old.tolist(), "after": given.tolist()}
        return _finish(here, before, {"segments": segments, "files": files}, event, relabelled=len(ids))


def swap(folder: str | Path, other: KnowledgeBase | str | Path) -> Edit:
    """Put another domain's entries in place of all, with what their manifest says of them.

    The settings of retrieval stay and are stale. Entries in memory that name no form are stored in the folder's. To
    swap back restores every answer. Raises UsageError, and changes nothing, for a base of another key space or labels.
    """
    base = _loaded(other)
    about = _described(base, "swap")
    with _editing(folder) as (here, before):
        _refuse_strangers(before, about)
        form = base.manifest.get("form", before.form)
        rows, constants = whole(base, about, form)
        provenance = {name: value for name, value in about if name not in TUNED}
        settings = {name: value for name, value in before.extras().items() if name in TUNED}
        changes = {**provenance, **settings, **put_whole(here, rows, constants, form)}
        changes["since_tuning"] = before.since_tuning.model_copy(update={"swapped": True})
        event = {"what": "swap", "entries_before": before.M}
        return _finish(here, before, changes, event, forget=set(before.extras()))


def rekey(folder: str | Path, base: KnowledgeBase) -> Edit:
    """Put other keys in place of all, in full precision, with what the manifest of `base` says of them.

    `base` has the folder's entries in their order. The settings of retrieval stay and are stale. Raises UsageError, and
    changes nothing, where another process has edited the folder meanwhile.
    """
    with _editing(folder) as (here, before):
        if load(here).ids != base.ids:
            raise UsageError(f"{here} was edited while its keys were made; nothing was changed: do it again")
        rows, constants = whole(base, described(base), "fp32")
        known = {name: base.manifest[name] for name in ("keyed_by", "key_space") if name in base.manifest}
        changes = {**known, **put_whole(here, rows, constants, "fp32")}
        changes["since_tuning"] = before.since_tuning.model_copy(update={"swapped": True})
        return _finish(here, before, changes, {"what": "rekey"})


def compact(folder: str | Path, form: str | None = None) -> Edit:
    """Write one segment again, without what was removed, and delete all other files; store keys in `form` if given.

    Raises UsageError if the present form has lost what another one needs.
    """
    with _editing(folder) as (here, before):
        if form is None or form == before.form:
            form, constants = before.form, read_constants(here, before)
            rows = Rows.join([read_rows(here, before, segment) for segment in before.segments])
            rows = rows.take(alive(here, before))
        else:
            base = load(here)
            rows, constants = whole(base, described(base), form)
        changes = put_whole(here, rows, constants, form)
        return _finish(here, before, changes, {"what": "compact", "form": form}, keep_before=False)


def settle(
    folder: str | Path,
    retrieval: Mapping[str, Any] | None = None,
    tuned_on: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> Edit:
    """Store newly tuned settings of retrieval, or confirm the present ones: from now on they are not stale.

    `weights` says how much every entry of an origin counts from now on.
    """
    with _editing(folder) as (here, before):
        changes: dict[str, Any] = {"since_tuning": Tally(entries=before.M)}
        if weights:
            changes["segments"], changes["files"] = _with_weights(here, before, weights)
        if retrieval is not None:
            changes["retrieval"] = dict(retrieval)
        if tuned_on is not None:
            changes["tuned_on"] = tuned_on
        return _finish(here, before, changes, {"what": "settle", **({"weights": dict(weights)} if weights else {})})


def changes(folder: str | Path) -> tuple[dict[str, Any], ...]:
    """The change log, oldest edit first: `generation`, `when` and `what`, with ids and, for re-labels, old values.

    Raises UsageError for a log that was tampered with.
    """
    return tuple(read_log(Path(folder), read_manifest(Path(folder))))


def diff(one: KnowledgeBase, two: KnowledgeBase) -> Difference:
    """What has to be added to, removed from and changed in `one` to make it `two`."""
    if one.values.shape[1] != two.values.shape[1]:
        raise UsageError(f"labels: {one.manifest['labels']} and {two.manifest['labels']}; compare bases of one task")
    ones, twos = ({id: row for row, id in enumerate(base.ids)} for base in (one, two))
    shared = [id for id in one.ids if id in twos]
    rows, others = [ones[id] for id in shared], [twos[id] for id in shared]
    relabelled = (one.values[rows] != two.values[others]).any(axis=1)
    rewritten = np.array([_apart(one, row, two, other) for row, other in zip(rows, others, strict=True)], np.bool_)
    if one.keys.shape[1] == two.keys.shape[1] and one.manifest.get("form") == two.manifest.get("form"):
        rewritten |= (one.keys[rows] != two.keys[others]).any(axis=1)
    return Difference(
        added=tuple(id for id in two.ids if id not in ones),
        removed=tuple(id for id in one.ids if id not in twos),
        relabelled=tuple(shared[place] for place in np.flatnonzero(relabelled)),
        rewritten=tuple(shared[place] for place in np.flatnonzero(rewritten)),
    )


@contextmanager
def _editing(folder: str | Path) -> Iterator[tuple[Path, Manifest]]:
    """The folder and its newest generation, while no other process may write."""
    here = Path(folder)
    read_manifest(here)  # no lock is left where no knowledge base is
    with locked(here):
        yield here, read_manifest(here)


def _finish(
    folder: Path,
    before: Manifest,
    changes: Fields,
    event: Fields,
    forget: set[str] | None = None,
    keep_before: bool = True,
    **counts: int,
) -> Edit:
    """Commit what differs from the generation before; `forget` names entries that must not outlive it."""
    kept = {name: value for name, value in before if name not in (forget or ())}
    counted = {name: getattr(before.since_tuning, name) + count for name, count in counts.items()}
    content = {**kept, "since_tuning": before.since_tuning.model_copy(update=counted), **changes}
    content["files"] = before.files | changes.get("files", {})
    now = commit(folder, before, content, {**event, "entries": content["M"]}, keep_before)
    return Edit(event["what"], now.generation, now.M, now.stale, **counts)


def _append(folder: Path, entries: KnowledgeBase, what: str) -> Edit:
    about = _described(entries, what)
    with _editing(folder) as (here, before):
        _refuse_strangers(before, about)
        held = entries.manifest.get("form", "fp32")
        unit = has_unit_keys(before.form, before.extras()) or has_unit_keys(held, entries.manifest)
        check_given(entries, about, unit)
        _refuse_taken(here, before, entries.ids)
        constants = read_constants(here, before)
        if entries.basis is not None and not np.array_equal(entries.basis, constants.get("basis", ())):
            raise UsageError("the entries' keys were projected to another basis; give keys in full, as the teacher has")
        segment, files = put_rows(here, stored_rows(entries, before.form, constants))
        origins = Counter(before.origins) + Counter(origin_counts(entries.origins, segment.M))
        grown = {
            "M": before.M + segment.M,
            "contains_text": before.contains_text or segment.texts is not None,
            "origins": dict(sorted(origins.items())),
            "segments": (*before.segments, segment),
            "files": before.files | files,
        }
        joined = _joined(here, before.model_copy(update=grown))
        return _finish(here, before, grown | joined, {"what": what, "ids": list(entries.ids)}, added=segment.M)


def _joined(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What changes where there are too many segments: those at the end that are small beside all behind them are one.

    Entries are so written again as often as the logarithm of their number, and the large ones hardly ever.
    """
    sizes = [segment.M for segment in manifest.segments]
    if len(sizes) <= SEGMENTS:
        return {}
    first = next(
        place for place, size in enumerate(sizes) if size <= sum(sizes[place + 1 :]) or place == len(sizes) - 2
    )
    start, kept = sum(sizes[:first]), alive(folder, manifest)
    rows = Rows.join([read_rows(folder, manifest, segment) for segment in manifest.segments[first:]])
    segment, files = put_rows(folder, rows.take(kept[start:]))
    removed, earlier = None, np.flatnonzero(~kept[:start])
    if len(earlier):
        removed, stored = put(folder, "removed", earlier)
        files[removed] = stored
    return {
        "segments": (*manifest.segments[:first], segment),
        "removed": removed,
        "files": manifest.files | files,
    }


def _with_values(
    folder: Path, manifest: Manifest, places: NDArray[np.int64], given: NDArray[np.float32]
) -> tuple[tuple[Segment, ...], dict[str, Any], NDArray[np.float32]]:
    """The segments with other values (n, C) at `places` (n,), the new files, and what stood there before."""
    segments, files, old, start = [], {}, np.empty_like(given), 0
    for segment in manifest.segments:
        own = (places >= start) & (places < start + segment.M)
        if own.any():
            values = read_file(folder, manifest, segment.values)
            check_values(values, manifest, segment.M)
            old[own] = values[places[own] - start]
            values[places[own] - start] = given[own]
            file, stored = put(folder, "values", values)
            segments.append(segment.model_copy(update={"values": file}))
            files[file] = stored
        else:
            segments.append(segment)
        start += segment.M
    return tuple(segments), files, old


def _with_weights(
    folder: Path, manifest: Manifest, weights: Mapping[str, float]
) -> tuple[tuple[Segment, ...], dict[str, Any]]:
    """The segments with one weight for all entries of an origin, and the new files."""
    segments, files = [], {}
    for segment in manifest.segments:
        found = {name: read_file(folder, manifest, segment.files()[name])
                 for name in ("origins", "weights") if name in segment.files()}  # fmt: skip
        origins = np.array(found.get("origins", (TRAIN,) * segment.M))
        held = found.get("weights", np.ones(segment.M, np.float32))
        given = held.copy()
        for origin, weight in weights.items():
            given[origins == origin] = weight
        if not np.array_equal(given, held):
            file, files[file] = put(folder, "weights", given)
            segment = segment.model_copy(update={"weights": file})
        segments.append(segment)
    return tuple(segments), files


def _places(folder: Path, manifest: Manifest, ids: Sequence[str]) -> NDArray[np.int64]:
    """The rows of these entries, counted through all segments. Raises UsageError for an unknown or repeated id."""
    known = _rows_by_id(folder, manifest)
    unknown = [id for id in ids if id not in known]
    if unknown or not ids:
        raise UsageError(
            f"ids: {len(unknown)} of {len(ids)} are not in {folder} (the first is {unknown[0]!r}); nothing was changed"
            if unknown
            else "ids: none are given; name at least one entry"
        )
    if len(set(ids)) < len(ids):
        raise UsageError(f"ids: {Counter(ids).most_common(1)[0][0]!r} is named more than once; name each entry once")
    return np.array([known[id] for id in ids], dtype=np.int64)


def _refuse_taken(folder: Path, manifest: Manifest, ids: Sequence[str]) -> None:
    known = _rows_by_id(folder, manifest)
    taken = [id for id in ids if id in known]
    if taken:
        raise UsageError(
            f"ids: {len(taken)} of {len(ids)} are taken in {folder} (the first is {taken[0]!r}); nothing was changed: "
            "remove the old entries first, re-label them, or leave them out"
        )


def _rows_by_id(folder: Path, manifest: Manifest) -> dict[str, int]:
    kept = alive(folder, manifest).tolist()
    return {id: row for row, id in enumerate(_column(folder, manifest, "ids", "")) if kept[row]}


def _column(folder: Path, manifest: Manifest, name: str, absent: str) -> list[str]:
    """A field of strings, of all rows counted through all segments."""
    found: list[str] = []
    for segment in manifest.segments:
        file = segment.files().get(name)
        found.extend(read_file(folder, manifest, file) if file else [absent] * segment.M)
    return found


def _refuse_strangers(before: Manifest, about: Description) -> None:
    for name, held, given in differences(dict(before), dict(about)):
        raise UsageError(
            f"{name} of the entries is {given!r}, but that of the knowledge base is {held!r}; nothing was changed: "
            "make them with this knowledge base's teacher, projection and task"
        )


def _described(base: KnowledgeBase, what: str) -> Description:
    if not base.ids:
        raise UsageError(f"there is nothing to {what}: the knowledge base that was given is empty")
    return described(base)


def _loaded(base: KnowledgeBase | str | Path) -> KnowledgeBase:
    return load(base) if isinstance(base, str | Path) else base


def _apart(one: KnowledgeBase, row: int, two: KnowledgeBase, other: int) -> bool:
    return any(
        _given(getattr(one, name), row, absent) != _given(getattr(two, name), other, absent)
        for name, absent in (("texts", ""), ("weights", 1.0), ("origins", TRAIN))
    )


def _given(column: Any, row: int, absent: object) -> object:
    return absent if column is None or len(column) == 0 else column[row]
