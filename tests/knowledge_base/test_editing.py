import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base import editing
from openbook.knowledge_base.editing import add, changes, compact, diff, merge, relabel, remove, settle, swap
from openbook.knowledge_base.interpolate import neighbour_average
from openbook.knowledge_base.search import search
from openbook.knowledge_base.store import Reader, load, save
from openbook.types import KnowledgeBase

QUERY = np.array([(0.8, 0.6)])
FORMS = ("fp32", "fp16", "pca-1", "sq8", "pq-1", "opq-1")


@pytest.fixture
def folder(base, tmp_path) -> Path:
    save(base, tmp_path / "kb")
    return tmp_path / "kb"


@pytest.fixture
def more(base) -> KnowledgeBase:
    """F7's new entry, and a twin of t/0."""
    return entries(base, {"t/4": (0.8, 0.6), "t/5": (1, 0)}, [(0.1, 0.9), (0.3, 0.7)])


@pytest.fixture
def other(base) -> KnowledgeBase:
    """Another domain's base."""
    there = entries(base, {"o/0": (0, 1), "o/1": (0.8, 0.6), "o/2": (1, 0)}, [(1, 0), (0, 1), (0.5, 0.5)])
    return replace(there, manifest={**there.manifest, "licence": "MIT", "retrieval": {"top_k": 9}})


def entries(base, keys: dict, values: list) -> KnowledgeBase:
    return KnowledgeBase(
        keys=np.float32(list(keys.values())),
        values=np.float32(values),
        ids=tuple(keys),
        texts=tuple(f"text of {name}" for name in keys),
        manifest=base.manifest,
    )


def average(base, k=2) -> np.ndarray:
    queries = QUERY if base.basis is None else QUERY @ base.basis
    assert base.basis is None or queries.shape[1] == base.keys.shape[1]
    hits = search(QUERY, base.keys if base.basis is None else base.keys @ base.basis.T, k)
    return neighbour_average(hits, base.values, 0.5)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def data_files(folder: Path) -> set[str]:
    return {name for name in contents(folder) if name.startswith("data/")}


def same(one, two) -> None:
    """Every entry is the same, bit for bit, and in the same place."""
    assert (one.ids, one.texts, one.origins) == (two.ids, two.texts, two.origins)
    for name in ("keys", "values", "weights", "basis"):
        first, second = getattr(one, name), getattr(two, name)
        assert (first is None) == (second is None), name
        assert first is None or (first.shape, first.tobytes()) == (second.shape, second.tobytes()), name


def test_updates_of_the_worked_example(base, folder):
    before = average(base)
    relabel(folder, ["t/2"], [(0, 1)])
    np.testing.assert_allclose(average(load(folder)), [(0.378608, 0.621392)], atol=1e-6)
    np.testing.assert_allclose(average(load(folder)) - before, 0.579324 * np.array([(-0.6, 0.6)]), atol=1e-6)
    relabel(folder, ["t/2"], [(0.6, 0.4)])
    assert average(load(folder)).tobytes() == before.tobytes()
    remove(folder, ["t/2"])
    np.testing.assert_allclose(average(load(folder)), [(0.619081, 0.380919)], atol=1e-6)
    add(folder, entries(base, {"t/2": (0.6, 0.8)}, [(0.6, 0.4)]))
    add(folder, entries(base, {"t/4": (0.8, 0.6)}, [(0.1, 0.9)]))
    np.testing.assert_allclose(average(load(folder)), [(0.340005, 0.659995)], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_to_remove_what_was_added_restores_every_answer(base, more, tmp_path, form):
    folder = tmp_path / "kb"
    save(base, folder, form)
    before = load(folder)
    add(folder, more)
    assert load(folder).ids == (*base.ids, *more.ids)
    assert average(load(folder)).tobytes() != average(before).tobytes()
    remove(folder, more.ids)
    same(load(folder), before)
    compact(folder)
    same(load(folder), before)


def test_an_entry_removed_and_added_again_stands_behind_its_twins(base, folder, more):
    add(folder, more)
    assert search(base.keys[[0]], load(folder).keys, 2).positions.tolist() == [[0, 5]]
    remove(folder, ["t/0"])
    add(folder, entries(base, {"t/0": (1, 0)}, [(0.9, 0.1)]))
    now = load(folder)
    assert [now.ids[place] for place in search(base.keys[[0]], now.keys, 2).positions[0]] == ["t/5", "t/0"]


def test_an_edit_says_what_it_did(folder, more):
    done = add(folder, more)
    assert (done.what, done.generation, done.entries, done.added, done.stale) == ("add", 1, 6, 2, True)
    done = remove(folder, ["t/1", "t/4"])
    assert (done.what, done.generation, done.entries, done.removed) == ("remove", 2, 4, 2)
    done = relabel(folder, ["t/0"], [(0, 1)])
    assert (done.what, done.generation, done.entries, done.relabelled) == ("relabel", 3, 4, 1)
    assert load(folder).manifest["since_tuning"] == {
        "entries": 4,
        "added": 2,
        "removed": 2,
        "relabelled": 1,
        "swapped": False,
    }


def test_the_change_log_keeps_ids_and_old_values(folder, more):
    assert changes(folder) == ()
    add(folder, more)
    relabel(folder, ["t/5", "t/0"], [(0, 1), (1, 0)])
    remove(folder, ["t/0"])
    first, second, third = changes(folder)
    assert (first["what"], first["ids"], first["generation"], first["entries"]) == ("add", ["t/4", "t/5"], 1, 6)
    assert second["ids"] == ["t/5", "t/0"]
    np.testing.assert_allclose(second["before"], [(0.3, 0.7), (0.9, 0.1)], atol=1e-6)
    assert second["after"] == [[0, 1], [1, 0]]
    assert (third["what"], third["ids"], third["entries"]) == ("remove", ["t/0"], 5)
    assert third["when"].endswith("Z")


def test_a_change_log_that_was_tampered_with_is_refused(folder, more):
    add(folder, more)
    remove(folder, ["t/0"])
    log = folder / "changes.jsonl"
    data = log.read_bytes()
    log.write_bytes(data.replace(b"t/0", b"t/1"))
    with pytest.raises(UsageError, match="changes.jsonl: sha256"):
        changes(folder)
    log.write_bytes(data[:-1])
    with pytest.raises(UsageError, match="changes.jsonl is shorter"):
        remove(folder, ["t/1"])
    assert load(folder).manifest["generation"] == 2
    log.write_bytes(data + b"what a crash left")
    assert [change["what"] for change in changes(folder)] == ["add", "remove"]
    remove(folder, ["t/1"])
    assert [change["ids"] for change in changes(folder)[1:]] == [["t/0"], ["t/1"]]
    log.unlink()
    with pytest.raises(UsageError, match="changes.jsonl is missing"):
        changes(folder)


def test_weights_and_origins_come_along_and_are_counted(base, folder, more):
    weighted = replace(more, weights=np.float32([2, 0.5]), origins=("corpus", "train"))
    add(folder, weighted)
    now = load(folder)
    assert now.weights.tolist() == [1, 1, 1, 1, 2, 0.5]
    assert now.origins == ("train",) * 4 + ("corpus", "train")
    assert now.manifest["origins"] == {"corpus": 1, "train": 5}
    remove(folder, ["t/4", "t/0"])
    assert load(folder).manifest["origins"] == {"train": 4}
    assert load(folder).weights.tolist() == [1, 1, 1, 0.5]
    compact(folder)
    assert load(folder).weights.tolist() == [1, 1, 1, 0.5]
    assert load(folder).manifest["origins"] == {"train": 4}


def test_each_generation_names_the_one_before(folder, more):
    before = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    add(folder, more)
    assert load(folder).manifest["parent"] == before
    assert load(folder).manifest["licence"] == "CC0"


def test_settings_are_stale_when_more_than_a_tenth_has_changed(base, tmp_path):
    folder = tmp_path / "kb"
    many = {f"m/{number}": (1, 0) for number in range(20)}
    save(entries(base, many, [(1, 0)] * 20), folder)
    assert not add(folder, entries(base, {"n": (1, 0)}, [(1, 0)])).stale
    assert not remove(folder, ["m/0"]).stale
    assert relabel(folder, ["m/1"], [(0, 1)]).stale
    assert load(folder).manifest["stale"] is True
    save(load(folder), tmp_path / "copy")
    assert load(tmp_path / "copy").manifest["stale"] is True
    assert not settle(folder, {"top_k": 3}).stale
    assert load(folder).manifest["retrieval"] == {"top_k": 3}
    assert not relabel(folder, ["m/1", "m/2"], [(0, 1), (0, 1)]).stale
    assert relabel(folder, ["m/1"], [(0, 1)]).stale
    assert not settle(folder).stale
    assert load(folder).manifest["retrieval"] == {"top_k": 3}


def test_merge_appends_another_base(base, folder, other, tmp_path):
    save(other, tmp_path / "other", "fp16")
    done = merge(folder, tmp_path / "other")
    now = load(folder)
    assert (done.what, done.added, now.ids) == ("merge", 3, (*base.ids, *other.ids))
    assert now.keys[4:].tobytes() == other.keys.astype(np.float16).astype(np.float32).tobytes()
    assert "retrieval" not in now.manifest
    with pytest.raises(UsageError, match="3 of 3 are taken.*'o/0'"):
        merge(folder, other)


@pytest.mark.parametrize("form", FORMS)
def test_to_swap_back_restores_every_answer(base, other, tmp_path, form):
    here, there, home = tmp_path / "here", tmp_path / "there", tmp_path / "home"
    tuned = replace(base, manifest={**base.manifest, "retrieval": {"top_k": 2}})
    save(tuned, here, form)
    shutil.copytree(here, home)
    save(other, there, "fp16")
    before = load(here)
    done = swap(here, there)
    assert (done.what, done.entries, done.stale) == ("swap", 3, True)
    same(load(here), load(there))
    manifest = load(here).manifest
    assert (manifest["licence"], manifest["retrieval"], manifest["form"]) == ("MIT", {"top_k": 2}, "fp16")
    swap(here, home)
    same(load(here), before)
    assert load(here).manifest["licence"] == "CC0"
    assert [change["what"] for change in changes(here)] == ["swap", "swap"]
    assert not settle(here).stale


def test_a_base_in_memory_is_swapped_in_in_the_folders_form(base, other, tmp_path):
    save(base, tmp_path / "kb", "sq8")
    swap(tmp_path / "kb", other)
    assert load(tmp_path / "kb").manifest["form"] == "sq8"
    np.testing.assert_allclose(load(tmp_path / "kb").keys, other.keys, atol=1 / 255)


def test_compaction_leaves_one_segment_and_nothing_of_what_was_removed(folder, more):
    add(folder, more)
    remove(folder, ["t/4", "t/0"])
    before = load(folder)
    assert any(b"text of t/4" in data for data in contents(folder).values())
    compact(folder)
    same(load(folder), before)
    assert data_files(folder) == set(load(folder).manifest["files"])
    assert len(load(folder).manifest["segments"]) == 1
    assert load(folder).manifest["removed"] is None
    assert not any(b"text of t/4" in data or b"east" in data for data in contents(folder).values())


def test_compaction_notices_that_no_text_is_left(base, folder):
    remove(folder, base.ids)
    assert load(folder).manifest["contains_text"] is True
    compact(folder)
    assert (load(folder).ids, load(folder).manifest["contains_text"]) == ((), False)


@pytest.mark.parametrize("form", FORMS[1:])
def test_compaction_into_another_form_is_saving_in_it(base, folder, more, tmp_path, form):
    add(folder, more)
    remove(folder, ["t/1"])
    save(load(folder), tmp_path / "other", form)
    compact(folder, form)
    same(load(folder), load(tmp_path / "other"))
    add(folder, entries(base, {"new": (0.6, 0.8)}, [(1, 0)]))
    np.testing.assert_allclose(load(folder).keys[-1], load(folder).keys[1], atol=0.01)
    if form != "fp16":
        with pytest.raises(UsageError, match=f"form='fp32'.*{form}"):
            compact(folder, "fp32")


def test_projected_entries_are_added_only_to_their_own_basis(base, more, tmp_path):
    for name, there in (("one", base), ("two", replace(more, ids=("a", "b")))):
        save(there, tmp_path / name, "pca-1")
    with pytest.raises(UsageError, match="another basis"):
        merge(tmp_path / "one", tmp_path / "two")
    own = load(tmp_path / "one")
    add(tmp_path / "one", replace(own, ids=("a", "b", "c", "d")))
    assert load(tmp_path / "one").keys.tolist() == own.keys.tolist() * 2


def test_many_small_edits_do_not_make_many_files(base, folder, monkeypatch):
    monkeypatch.setattr(editing, "SEGMENTS", 4)
    ids = list(base.ids)
    for number in range(20):
        add(folder, entries(base, {f"n/{number}": (0.8, 0.6)}, [(number / 20, 1 - number / 20)]))
        ids.append(f"n/{number}")
        if number % 3 == 0:
            remove(folder, [ids.pop(number // 3)])
        assert len(load(folder).manifest["segments"]) <= 4
    now = load(folder)
    assert list(now.ids) == ids
    values = {f"n/{number}": np.float32(number / 20) for number in range(20)}
    assert all(now.values[row, 0] == values[name] for row, name in enumerate(now.ids) if name in values)
    assert len(data_files(folder)) < 40


def test_the_large_segment_stays_where_it_is(base, tmp_path, monkeypatch):
    monkeypatch.setattr(editing, "SEGMENTS", 3)
    save(entries(base, {f"m/{number}": (1, 0) for number in range(50)}, [(1, 0)] * 50), tmp_path / "kb")
    first = load(tmp_path / "kb").manifest["segments"][0]
    for number in range(12):
        add(tmp_path / "kb", entries(base, {f"n/{number}": (0, 1)}, [(1, 0)]))
        assert load(tmp_path / "kb").manifest["segments"][0] == first


def test_left_overs_go_but_the_generation_before_stays_readable(folder, more):
    (folder / "data" / "keys-0123456789abcdef.npy").write_bytes(b"of a writer that was killed")
    (folder / "tuning.json").write_text("not ours")
    before = data_files(folder) - {"data/keys-0123456789abcdef.npy"}
    add(folder, more)
    remove(folder, ["t/0"])
    middle = set(load(folder).manifest["files"])
    remove(folder, ["t/1"])
    after = set(load(folder).manifest["files"])
    assert before < data_files(folder) == middle | after
    assert (folder / "tuning.json").exists()


def test_the_first_edit_of_a_flat_folder_makes_it_a_new_one(base, folder, tmp_path, more):
    flat = tmp_path / "flat"
    flat.mkdir()
    manifest = load(folder).manifest
    names = {"keys": "keys.npy", "values": "values.npy", "ids": "ids.json", "texts": "texts.json"}
    files = {}
    for field, name in names.items():
        old = manifest["segments"][0][field]
        shutil.copy(folder / old, flat / name)
        files[name] = manifest["files"][old]
    old = {name: manifest[name] for name in ("kind", "labels", "key_space", "M", "d", "C", "contains_text", "licence")}
    (flat / "manifest.json").write_text(json.dumps({**old, "schema_version": 1, "files": files}))
    same(load(flat), base)
    add(flat, more)
    assert load(flat).manifest["schema_version"] == 2
    assert load(flat).manifest["licence"] == "CC0"
    assert load(flat).ids == (*base.ids, *more.ids)
    compact(flat)
    assert not {*names.values()} & set(contents(flat))
    assert load(flat).ids == (*base.ids, *more.ids)


def test_bases_are_compared_by_id(base, folder, more):
    assert diff(base, load(folder)) == editing.Difference((), (), (), ())
    add(folder, more)
    remove(folder, ["t/1"])
    relabel(folder, ["t/3", "t/0"], [(0, 1), (0, 1)])
    found = diff(base, load(folder))
    assert (found.added, found.removed, found.relabelled) == (("t/4", "t/5"), ("t/1",), ("t/0", "t/3"))
    assert found.rewritten == ()
    changed = replace(
        base, texts=("east", "SOUTH", *base.texts[2:]), weights=np.float32([1, 1, 2, 1]), keys=base.keys[[0, 1, 2, 0]]
    )
    assert diff(base, changed).rewritten == ("t/1", "t/2", "t/3")
    with pytest.raises(UsageError, match="labels"):
        diff(base, replace(base, values=base.values[:, :1]))


def renamed(base, **manifest):
    return replace(base, ids=tuple(f"x/{id}" for id in base.ids), manifest={**base.manifest, **manifest})


BAD = {
    "an unknown id to remove": (lambda folder, base: remove(folder, ["t/0", "t/9"]), "1 of 2 are not in.*'t/9'"),
    "no id to remove": (lambda folder, base: remove(folder, []), "none are given"),
    "an id twice": (lambda folder, base: remove(folder, ["t/0", "t/0"]), "'t/0' is named more than once"),
    "an unknown id to re-label": (lambda folder, base: relabel(folder, ["t/9"], [(1, 0)]), "1 of 1 are not in.*'t/9'"),
    "too few values": (lambda folder, base: relabel(folder, ["t/0"], [1]), r"shape is \(1,\).*\(1, 2\).*'no', 'yes'"),
    "a sum of 2": (lambda folder, base: relabel(folder, ["t/0"], [(1, 1)]), "sum of row 0 is 2"),
    "a NaN value": (lambda folder, base: relabel(folder, ["t/0"], [(np.nan, 1)]), "sum of row 0 is nan"),
    "an id that is taken": (lambda folder, base: add(folder, base), "4 of 4 are taken.*'t/0'"),
    "a doubled id": (
        lambda folder, base: add(folder, replace(base, ids=("a", "b", "c", "a"))),
        "'a' is the id of 2 entries",
    ),
    "nothing to add": (
        lambda folder, base: add(folder, replace(base, keys=base.keys[:0], values=base.values[:0], ids=(), texts=())),
        "nothing to add",
    ),
    "another key space": (lambda folder, base: add(folder, renamed(base, key_space="k2")), "key_space.*'k2'.*'k1'"),
    "another order of labels": (
        lambda folder, base: merge(folder, renamed(base, labels=["yes", "no"])),
        r"labels.*\['yes', 'no'\].*\['no', 'yes'\]",
    ),
    "another tokenizer": (
        lambda folder, base: swap(folder, renamed(base, made_from={"teacher": "t", "tokenizer": "other"})),
        "tokenizer of the entries is 'other'.*'v'",
    ),
    "another width": (
        lambda folder, base: swap(folder, replace(renamed(base), keys=np.eye(4, dtype=np.float32))),
        "d of the entries is 4.*is 2",
    ),
    "NaN keys": (
        lambda folder, base: add(folder, replace(renamed(base), keys=base.keys * np.float32(np.nan))),
        "length of row 0 is nan",
    ),
    "long keys": (lambda folder, base: add(folder, replace(renamed(base), keys=base.keys * 2)), "length of row 0 is 2"),
    "an unknown form": (lambda folder, base: compact(folder, "int4"), "form='int4'"),
    "an empty domain": (
        lambda folder, base: swap(folder, replace(base, keys=base.keys[:0], values=base.values[:0], ids=(), texts=())),
        "nothing to swap",
    ),
    "no folder": (lambda folder, base: merge(folder, folder / "nowhere"), "nowhere.*missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_edit_is_refused_by_name_and_changes_nothing(base, tmp_path, case):
    folder, (edit, message) = tmp_path / "kb", BAD[case]
    save(replace(base, manifest={**base.manifest, "made_from": {"teacher": "t", "tokenizer": "v"}}), folder)
    before = contents(folder)
    with pytest.raises(UsageError, match=message):
        edit(folder, base)
    assert contents(folder) == before


def test_an_edit_of_no_knowledge_base_leaves_nothing_behind(tmp_path):
    with pytest.raises(UsageError, match="manifest.json is missing"):
        remove(tmp_path, ["a"])
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("aaaadrcms"), st.integers(0, 9), st.integers(0, 20)), max_size=12))
def test_any_edits_in_any_order_do_what_they_say(base, tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("kb") / "kb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(editing, "SEGMENTS", 2)
        save(base, folder)
        wanted = dict(zip(base.ids, base.values[:, 0].tolist(), strict=True))
        reader, done = Reader(folder), 0
        for what, number, share in edits:
            done += carry_out(folder, base, wanted, what, f"e/{number}", share / 20)
            now = reader.current()
            assert list(now.ids) == list(wanted)
            np.testing.assert_allclose(now.values[:, 0], list(wanted.values()), atol=1e-6)
            assert now.manifest["generation"] == done == len(changes(folder))
    same(reader.current(), load(folder))


def carry_out(folder, base, wanted: dict, what: str, name: str, share: float) -> bool:
    """An edit, and the same in a plain dictionary; False if it makes no sense here."""
    old = list(wanted)[int(share * 20) % len(wanted)] if wanted else ""
    if what in "am" and name not in wanted:
        (add if what == "a" else merge)(folder, entries(base, {name: (0.8, 0.6)}, [(share, 1 - share)]))
        wanted[name] = share
    elif what == "d" and old:
        remove(folder, [old])
        wanted.pop(old)
    elif what == "r" and old:
        relabel(folder, [old], [(share, 1 - share)])
        wanted[old] = share
    elif what == "c":
        compact(folder)
    elif what == "s":
        swap(folder, entries(base, {name: (0.8, 0.6)}, [(share, 1 - share)]))
        wanted.clear()
        wanted[name] = share
    else:
        return False
    return True


EDITS = {
    "add": lambda folder, base: add(folder, renamed(base)),
    "add and join": lambda folder, base: add(folder, renamed(base)),
    "remove": lambda folder, base: remove(folder, ["t/0", "t/2"]),
    "relabel": lambda folder, base: relabel(folder, ["t/0", "y"], [(0, 1), (0, 1)]),
    "swap": lambda folder, base: swap(folder, renamed(base)),
    "compact": lambda folder, base: compact(folder, "sq8"),
    "settle": lambda folder, base: settle(folder, {"top_k": 1}),
    "save": lambda folder, base: save(renamed(base), folder),
}


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("name", EDITS)
def test_a_crash_at_any_step_leaves_the_old_or_the_new(base, tmp_path, monkeypatch, name):
    start, edit, countdown = tmp_path / "start", EDITS[name], [-1]
    monkeypatch.setattr(editing, "SEGMENTS", 2 if name == "add and join" else 32)

    def ticking(original, before):
        """Fails where the countdown ends: before the step on every even count, after it on every odd one."""

        def step(*arguments, **named):
            countdown[0] -= 1
            if countdown[0] == 0 and before:
                raise Crash
            result = original(*arguments, **named) if original is not os.fsync else None
            countdown[0] -= 1
            if countdown[0] == 0 and not before:
                raise Crash
            return result

        return step

    with monkeypatch.context() as patch:
        for function in (os.fsync, os.replace, os.utime, os.unlink):
            inner = ticking(function, before=False)
            patch.setattr(os, function.__name__, inner)
        save(base, start)
        add(start, entries(base, {"y": (0.6, 0.8)}, [(1, 0)]))
        remove(start, ["t/1"])
        old = load(start)
        for steps in range(1, 200):
            folder = tmp_path / str(steps)
            shutil.copytree(start, folder)
            countdown[0] = 2 * steps
            try:
                edit(folder, base)
            except Crash:
                pass
            else:
                break
            countdown[0] = -1
            now = load(folder)
            assert now.manifest["generation"] in (2, 3)
            if now.manifest["generation"] == 2:
                same(now, old)
                edit(folder, base)
            assert load(folder).manifest["generation"] == 3
            assert len(changes(folder)) == 3
            remove(folder, [load(folder).ids[-1]])
            named = set(load(folder).manifest["files"])
            compact(folder)
            assert data_files(folder) == set(load(folder).manifest["files"]), named
        new = load(folder)
        assert steps > 6
        again = tmp_path / "again"
        shutil.copytree(start, again)
        countdown[0] = -1
        edit(again, base)
        same(load(again), new)


def test_everything_is_on_the_disk_before_the_manifest_names_it(base, folder, more, monkeypatch):
    steps: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def synced(handle):
        steps.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed_to(source, target):
        steps.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed_to)
    add(folder, more)
    here = os.path.realpath(folder)
    switch = steps.index(("rename", str(folder / "manifest.json")))
    before = steps[:switch]
    renames = [place for place, (what, _) in enumerate(before) if what == "rename"]
    assert len(renames) == 4
    assert all(before[place - 1][0] == "sync" and before[place - 1][1].endswith(".partial") for place in renames)
    assert before.index(("sync", f"{here}/data")) > renames[-1]
    assert ("sync", f"{here}/changes.jsonl") in before
    assert before[-2:] == [("sync", f"{here}/.manifest.partial"), ("sync", here)]
    assert steps[switch + 1] == ("sync", here)


QUICKLY = """\
import runpy, sys, types
sys.modules["torch"] = types.SimpleNamespace(Tensor=object)  # which takes seconds to import, and is not used
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_writers(folder: Path, times: int, readers: int) -> None:
    """Kill a writer at random moments while others read; every generation must be whole, and none acknowledged lost."""
    random_of = random.Random(times)
    program = Path(__file__).with_name("crashing.py")
    command = [sys.executable, "-c", QUICKLY, str(program), str(folder)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    watching, last = [], 0

    def order(word: str) -> int:
        keeper.stdin.write(f"{word}\n")
        while not (line := heard()).startswith(word):
            assert line
        return int(line.split()[1])

    def heard() -> str:
        line = keeper.stdout.readline()
        assert not line.startswith("bad"), line
        return line

    try:
        watching += [order("watch") for _ in range(readers)]
        for _ in range(times):
            writer, acknowledged = order("write"), last
            for _ in range(random_of.randrange(3)):
                acknowledged = int(heard().split()[1])
            time.sleep(random_of.uniform(0, 0.02))
            os.kill(writer, signal.SIGKILL)
            while not (line := heard()).startswith("found"):
                assert line
                acknowledged = int(line.split()[1])
            _, found, _, logged = line.split()
            assert acknowledged <= int(found) <= acknowledged + 1
            assert found == logged
            last = int(found)
        assert last > times / 2
        for reader in watching:
            os.kill(reader, 0)  # still there, so it found nothing wrong
    finally:
        for process in (*watching, keeper.pid):
            os.kill(process, signal.SIGKILL)
        keeper.communicate()


def test_a_writer_that_is_killed_loses_nothing_and_readers_see_no_mixture(tmp_path):
    kill_writers(tmp_path / "kb", times=8, readers=2)


@pytest.mark.slow
def test_a_writer_that_is_killed_a_hundred_times_loses_nothing(tmp_path):
    kill_writers(tmp_path / "kb", times=100, readers=2)
