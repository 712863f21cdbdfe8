"""What opening books did is counted over students, and over all rows by how near their neighbours are."""

import json
from pathlib import Path
from typing import Any

import pytest

from openbook.experiment_page import render
from openbook.openings import by_similarity, openings
from openbook.results import load

ARMS = {"A1": {"title": "KD"}, "A5": {"title": "with the book"}, "A6": {"title": "on one task", "tasks": ["rte"]}}


def book_of(kept: bool, beta: float, gain: float, better: int, worse: int, nearest: float) -> dict[str, Any]:
    far = {"similarity": 0.2, "better": 0, "worse": worse, "rows": 10}
    near = {"similarity": nearest, "better": better, "worse": 0, "rows": 10}
    return {
        "retrieval": {"beta": beta}, "kept": kept, "gain_held_out": gain, "entries": 500,
        "if_opened": {"better": better, "worse": worse, "rows": 20, "buckets": [far, near]},
    }  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = {name: {"title": name.upper(), "metric": "accuracy", "seeds": [0, 1]} for name in ("rte", "cola")}
    write(
        tmp_path / "grid.json",
        {"name": "g", "title": "G", "scale": "s", "arms": ARMS, "tasks": tasks, "baseline": "A1"},
    )
    books = {
        ("rte", "A5", 0): book_of(True, 0.4, 0.02, 6, 1, 0.9),
        ("rte", "A5", 1): book_of(False, 1.0, 0.01, 2, 2, 0.7),
        ("cola", "A5", 0): book_of(False, 1.0, 0.0, 0, 4, 0.8),
    }
    for task, arm, seed in [*books, ("rte", "A1", 0)]:
        run = {"task": task, "arm": arm, "seed": seed, "status": "ok", "scores": {"accuracy": 0.5}}
        write(tmp_path / task / arm / f"seed-{seed}.json", run | {"book": books.get((task, arm, seed))})
    return tmp_path


def test_openings_are_counted_over_students(folder: Path) -> None:
    found = openings(load(folder))
    assert {task: list(arms) for task, arms in found.items()} == {"rte": ["A5"], "cola": ["A5"]}
    one = found["rte"]["A5"]
    assert (one["students"], one["opened"], one["beta"], one["entries"]) == (2, 1, 0.4, 500)
    assert (one["better"], one["worse"], one["rows"]) == (4, 1.5, 20)
    assert one["gain"] == pytest.approx(0.015)
    assert found["cola"]["A5"]["beta"] is None


def test_tenths_are_pooled_over_tasks_and_seeds(folder: Path) -> None:
    [far, near] = by_similarity(load(folder))["A5"]
    assert far == {"similarity": pytest.approx(0.2), "better": 0, "worse": 7, "rows": 30}
    assert near == {"similarity": pytest.approx(0.8), "better": 8, "worse": 0, "rows": 30}


def test_tenths_leave_out_scores_which_hardly_ever_stay_as_they_were(folder: Path) -> None:
    grid = json.loads((folder / "grid.json").read_text())
    grid["tasks"]["cola"]["metric"] = "spearmanr"
    write(folder / "grid.json", grid)
    [run] = (folder / "cola" / "A5").glob("*.json")
    write(run, json.loads(run.read_text()) | {"scores": {"spearmanr": 0.5}})
    [far, near] = by_similarity(load(folder))["A5"]
    assert (far["worse"], near["rows"]) == (3, 20)
    assert openings(load(folder))["cola"]["A5"]["worse"] == 4


def test_the_page_tells_them_where_there_is_a_book(folder: Path) -> None:
    page = render(folder)
    assert "## The books" in page
    assert "| RTE | A5 | 1 of 2 | 0.40 | +1.5 | 4.0 | 1.5 | 20 | 500 |" in " ".join(page.split("  "))
    assert "+26.7 (0.80)" in page
    for path in folder.glob("*/A5/*.json"):
        path.unlink()
    assert "## The books" not in render(folder)
