"""The benchmark of texts of another kind: kept is what was made of the same, and both kinds of keys are tried."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "new_domain.py"
ROWS = [(f"text {place}", "old") for place in range(40)]
NEW = [(f"new {place}", "new") for place in range(30)]
REPORTED = [(f"reported {place}", "new") for place in range(3)]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path / "data"))
    spec = importlib.util.spec_from_file_location("new_domain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DRAWS", {10: 2})
    return module


def settings_of(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe that a student is made with."""
    made: list[Any] = []
    monkeypatch.setattr(script, "execute", lambda recipe, folder, until: made.append((recipe, until)))
    script.student_of("it", ROWS, NEW, ["old", "new"], folder)
    [(recipe, until)] = made
    assert until == "build-kb"
    return recipe


def test_the_book_is_the_teachers_until_it_is_made_the_students(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.KEYS == ("teacher", "student")
    assert settings_of(script, tmp_path, monkeypatch).knowledge_base.keys == "teacher"


def test_a_kept_draw_is_of_the_same_recipe_and_rows(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tried = settings_of(script, tmp_path, monkeypatch), []
    task = SimpleNamespace(holdout=[SimpleNamespace(text=text) for text, _ in ROWS[:20]])

    def by_book(run: Path, keys: str, learn: Any, choose: Any, test: Any, place: Path) -> dict[str, Any]:
        tried.append((keys, len(learn), sum(label == "new" for _, label in choose)))
        return {"after": {}}

    monkeypatch.setattr(script, "by_book", by_book)
    monkeypatch.setattr(script, "by_training", lambda *given: tried.append("training") or {"after": {}})
    monkeypatch.setattr(script, "Run", lambda recipe, folder: SimpleNamespace(task=task, task_digest="1"))
    monkeypatch.setattr(script, "load_recipe", lambda path: recipe)

    def compared(pool: Any = NEW) -> list[Any]:
        tried.clear()
        told = script.compare(tmp_path / "run", pool, ROWS, {"target": REPORTED}, tmp_path / "draws")
        assert len(told) == 2
        return list(tried)

    assert compared() == [("teacher", 8, 2), ("student", 8, 2), "training"] * 2
    assert compared() == []
    assert len(compared(NEW[:20])) == 6, "other rows"
    recipe = recipe.model_copy(update={"seeds": (1,)})
    assert len(compared(NEW[:20])) == 6, "another recipe"
    (tmp_path / "draws" / "10-0" / "book-student.json").write_text("{}")  # it does not say of what it was made
    assert compared(NEW[:20]) == [("student", 8, 2)]
    monkeypatch.setattr(script, "WEIGHTS", (1,))
    assert compared(NEW[:20]) == [("teacher", 8, 2), ("student", 8, 2)] * 2, "trainings know no weights"


def test_a_text_is_drawn_once_and_not_where_it_is_held_already(script: ModuleType) -> None:
    rows = [("One", "a"), ("two", "b"), ("one ", "c"), ("three", "a"), ("four", "a")]
    others = [[("THREE", "d")], [("five", "a"), ("Four", "a")]]
    assert script.distinct(rows, others) == [("One", "a"), ("two", "b")]


def test_a_part_adds_to_what_is_there(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PARTS", {name: lambda folder, name=name: {name: []} for name in script.PARTS})
    monkeypatch.setattr(script.torch, "set_num_threads", lambda number: None)
    output = tmp_path / "found.json"
    for parts in (["intents"], ["emotions", "reviews"]):
        asked = [word for part in parts for word in ("--part", part)]
        monkeypatch.setattr(sys, "argv", ["new_domain.py", "--output", str(output), *asked])
        script.main()
    assert list(json.loads(output.read_text())["results"]) == ["intents", "emotions", "reviews"]


def test_what_is_withheld_is_only_in_the_pool(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {str(place): f"label {place}" for place in range(6)}
    monkeypatch.setattr(script, "labels_of", lambda task: labels)
    monkeypatch.setattr(script, "rows_of", lambda task, split, names: [(split, name) for name in names.values()])
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        script, "student_of", lambda name, train, test, known, folder: seen.update(train=train, known=known)
    )
    monkeypatch.setattr(script, "compare", lambda run, pool, old, test, folder: seen.update(pool=pool, test=test))
    script.emotions(tmp_path)
    new, old = ({label for _, label in seen[rows]} for rows in ("pool", "train"))
    assert (len(new), len(old), new & old) == (2, 4, set())
    assert set(seen["known"]) == new | old
    assert {name: {label for _, label in rows} for name, rows in seen["test"].items()} == {
        "new labels": new,
        "old labels": old,
    }
