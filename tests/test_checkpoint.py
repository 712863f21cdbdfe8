"""Artefacts appear whole or not at all, wherever a crash happens."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openbook import checkpoint
from openbook.checkpoint import (
    MANIFEST,
    SCRATCH,
    building,
    digest_folder,
    fingerprint,
    is_fresh,
    open_artifact,
    partial_folder,
    read_json,
    retired_folder,
    write_json,
)

OLD, NEW = {"recipe": "old"}, {"recipe": "new"}


class Crash(BaseException):
    """The power goes: no handler of the code under test may see it as an error of its own."""


def build(folder: Path, inputs: dict[str, Any], text: str | None = None) -> None:
    with building(folder, inputs) as partial:
        (partial / "deep").mkdir(exist_ok=True)
        (partial / "deep" / "answer.txt").write_text(text or inputs["recipe"])
        (partial / SCRATCH / "step").write_text("1")


def stop(folder: Path, inputs: dict[str, Any], error: BaseException) -> None:
    with building(folder, inputs) as partial:
        (partial / "half").write_text("old")
        (partial / SCRATCH / "checkpoint").write_text("7")
        raise error


def content(folder: Path) -> str:
    artifact = open_artifact(folder)
    assert artifact is not None
    return (artifact.folder / "deep" / "answer.txt").read_text()


def test_files_that_a_library_wrote_for_their_owner_alone_are_shared_as_their_folder_is(tmp_path: Path) -> None:
    with building(tmp_path / "a", OLD) as partial:
        (partial / "model").write_text("weights")
        (partial / "model").chmod(0o600)
    (tmp_path / "other").write_text("as the umask has it")
    assert (tmp_path / "a" / "model").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_finished_folder_holds_its_files_and_what_went_in(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert open_artifact(folder) is None
    build(folder, OLD)
    artifact = open_artifact(folder)
    assert artifact is not None
    assert artifact.manifest["inputs"] == OLD
    assert artifact.manifest["fingerprint"] == fingerprint(OLD)
    assert artifact.manifest["files"] == {"deep/answer.txt": 3}
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "deep"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert is_fresh(folder, OLD)
    assert not is_fresh(folder, NEW)


def test_nothing_is_seen_before_the_block_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with building(folder, OLD) as partial:
        (partial / "answer.txt").write_text("old")
        assert not folder.exists()
        assert partial.parent == tmp_path  # one file system: the rename is one operation
        assert open_artifact(folder) is None
    assert open_artifact(folder) is not None


def test_an_error_leaves_the_old_artefact_and_the_scratch_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    build(folder, OLD)
    with pytest.raises(OSError, match="full"):
        stop(folder, NEW, OSError(errno.ENOSPC, "disk full"))
    assert content(folder) == "old"
    with building(folder, NEW) as partial:
        assert (partial / SCRATCH / "checkpoint").read_text() == "7"


def test_what_other_inputs_left_is_thrown_away(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(Crash):
        stop(folder, OLD, Crash())
    with building(folder, NEW) as partial:
        assert not (partial / "half").exists()
        assert not (partial / SCRATCH / "checkpoint").exists()


def crash_at(monkeypatch: pytest.MonkeyPatch, count: int, before: bool) -> Callable[[], int]:
    """Die at the `count`-th change of the disk, before or after it happened; tells how many there were."""
    seen = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            mine = seen  # a change may consist of others
            if mine == count and before:
                raise Crash
            result = change(*arguments, **options)
            if mine == count:
                raise Crash
            return result

        return wrapper

    for module, name in (
        (checkpoint.os, "rename"),
        (checkpoint.os, "replace"),
        (checkpoint.os, "fsync"),
        (checkpoint.shutil, "rmtree"),
    ):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for name in ("write_text", "mkdir", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    return lambda: seen


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("exists", [True, False], ids=["rebuild", "first"])
def test_a_crash_at_any_step_leaves_the_old_artefact_or_the_new(tmp_path: Path, exists: bool, before: bool) -> None:
    outcomes = []
    for count in range(1, 100):
        folder = tmp_path / str(count) / "a"
        folder.parent.mkdir()
        if exists:
            build(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            steps = crash_at(patch, count, before)
            crashed = True
            try:
                build(folder, NEW)
                crashed = False
            except Crash:
                pass
            total = steps()
        if not crashed:
            assert total == count - 1
            break
        artifact = open_artifact(folder)
        outcomes.append(None if artifact is None else content(folder))
        assert outcomes[-1] in (("old", "new") if exists else (None, "new"))
        assert is_fresh(folder, NEW) == (outcomes[-1] == "new")
        build(folder, NEW, "again")
        assert content(folder) == "again"
        assert sorted(p.name for p in folder.parent.iterdir()) == ["a"]
    assert len(outcomes) >= 8
    assert outcomes == sorted(outcomes, key=lambda text: text == "new")  # once new, always new
    assert outcomes[0] != outcomes[-1]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_crash_while_a_crash_is_mended_loses_nothing(tmp_path: Path, before: bool) -> None:
    for count in range(1, 20):
        folder = tmp_path / str(count) / "a"
        folder.parent.mkdir()
        build(folder, OLD)
        os.rename(folder, retired_folder(folder))  # where the first crash came: the old is away, the new not in place
        build(tmp_path / str(count) / "b", NEW)
        os.rename(tmp_path / str(count) / "b", partial_folder(folder))
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, count, before)
            try:
                open_artifact(folder)
                assert count > 1
                break
            except Crash:
                pass
        assert content(folder) == "new"
    else:
        pytest.fail("it crashed every time")


def test_a_retired_folder_alone_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    build(folder, OLD)
    os.rename(folder, retired_folder(folder))
    assert content(folder) == "old"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "answer.txt").write_text("ol"),
        lambda folder: (folder / "deep" / "answer.txt").unlink(),
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20]),
        lambda folder: (folder / MANIFEST).write_text(""),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text(json.dumps({**read_json(folder / MANIFEST), "format": 0})),
        lambda folder: (folder / MANIFEST).unlink(),
    ],
    ids=["truncated", "missing", "manifest cut", "manifest empty", "no text", "no object", "format", "no manifest"],
)
def test_a_damaged_folder_is_not_opened_and_is_built_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = tmp_path / "a"
    build(folder, OLD)
    damage(folder)
    assert open_artifact(folder) is None
    assert not is_fresh(folder, OLD)
    build(folder, OLD)
    assert content(folder) == "old"


def test_a_file_written_aside_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": "ä"})

    def refuse(*arguments: Any) -> None:
        raise Crash

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(Crash):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": "ä"}


def test_a_fingerprint_knows_content_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_the_digest_of_a_folder_follows_names_and_bytes(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return digest_folder(tmp_path / name)

    first = folder("1", {"a": "x", "b/c": "y"})
    assert folder("2", {"b/c": "y", "a": "x", ".cache": "z"}) == first
    assert folder("3", {"a": "x", "b/d": "y"}) != first
    assert folder("4", {"a": "y", "b/c": "x"}) != first
