"""A grid of task-agnostic students from file to page: what arms share is made once, and what is done is skipped."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from openbook.agnostic_experiment import AgnosticExperiment, execute
from openbook.agnostic_grid import agnostic_grid, is_agnostic, recipe_of
from openbook.config import UsageError
from openbook.grid import raw_grid
from openbook.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("trials_here")

SHIPPED = Path(__file__).parents[1] / "experiments" / "mitkd.yaml"


@pytest.fixture(scope="session")
def grid_file(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = yaml.safe_load((many / "recipe.yaml").read_text())
    del recipe["name"]
    recipe["fine_tune"] |= {"learning_rates": [2.0e-3], "epochs": [2], "known": recipe["teacher"]["tasks"]}
    recipe["fine_tune"]["few"] |= {"draws": 1, "seeds": [3], "learning_rates": [1.0e-3]}
    recipe["fine_tune"]["teacher_seeds"] = [1]
    recipe["fine_tune"]["teacher_tasks"] = recipe["teacher"]["tasks"]
    recipe["teacher"]["mixture"]["passes"] = 1
    recipe["students"] = [recipe["students"][0]]
    grid = {
        "name": "tiny",
        "title": "A tiny grid",
        "recipe": recipe,
        "scales": {"small": {"distill.optim.tokens": 1000}, "large": {}},
        "arms": {"A": {"title": "plain", "set": {"teacher.tasks": []}}, "B": {"title": "many tasks"}},
        "plain": "A",
        "multi_task": "B",
        "seeds": [0, 1],
        "contrasts": [{"name": "B - A", "claim": "better students", "weights": {"B": 1, "A": -1}}],
    }
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(grid))))
    return path


def at(folder: Path, grid_file: Path) -> AgnosticExperiment:
    return AgnosticExperiment(
        agnostic_grid(raw_grid(grid_file), grid_file), "small", folder / "runs", folder / "results"
    )


@pytest.fixture(scope="session")
def done(grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agnostic")
    execute(at(folder, grid_file), None, folder / "page.md")
    return folder


def test_every_arm_and_seed_has_a_result(done: Path) -> None:
    for arm in ("A", "B"):
        for seed in (0, 1):
            record = json.loads((done / "results" / arm / f"seed-{seed}.json").read_text())
            assert {row["model"] for row in record["rows"]} == {"teacher", "small"}
            counts = Counter((row["model"], row["shots"]) for row in record["rows"])
            assert counts == {("small", None): 4, ("small", 4): 1, ("teacher", None): 2, ("teacher", 4): 1}
            assert {(row["model"], row["task"]) for row in record["teacher_rows"]} == {
                ("teacher", "scores"), ("teacher", "pairs"),
            }  # fmt: skip
            assert list(record["heads"]) == list(record["teacher"])
            assert list(record["teacher"]) == ([] if arm == "A" else ["reviews", "scores", "pairs"])
            assert record["students"]["small"]["updates"] > 3
            roles = {row["task"]: row["role"] for row in record["rows"] if row["shots"] is None}
            assert roles == {"reviews": "in-domain", "other": "leaky"}  # with regard to arm B's tasks, for A too


def test_arms_and_seeds_share_what_is_made_from_the_same(done: Path) -> None:
    store = done / "runs" / "store"
    assert {name: len(list((store / name).iterdir())) for name in ("teacher", "text", "students", "evaluation")} == {
        "teacher": 2, "text": 1, "students": 4, "evaluation": 4,
    }  # fmt: skip


def test_the_page_tells_claims_roles_and_teachers(done: Path) -> None:
    page = (done / "page.md").read_text()
    assert "| B - A | small | in-domain (1) |" in page
    assert "## Low-resource, seen, 4 shots" in page
    assert "| mean | teacher |" in page
    told = [line.split(" | ") for line in page.splitlines() if line.startswith(("| reviews | acc", "| scores | spear"))]
    assert [len(cells) for cells in told] == [9, 9]
    b, a = (json.loads((done / "results" / arm / "seed-1.json").read_text()) for arm in ("B", "A"))
    assert told[0][7] == f"{100 * b['heads']['reviews']['accuracy']:.1f}"
    alone = [row["scores"][row["metric"]] for row in a["teacher_rows"] if row["task"] == "scores"]
    assert told[1][8] == f"{100 * sum(alone) / len(alone):.1f} |"
    assert "{" not in page


def test_what_is_done_is_skipped(done: Path, grid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a stage ran again")

    monkeypatch.setattr("openbook.agnostic_experiment.perform", refuse)
    before = (done / "page.md").read_text()
    execute(at(done, grid_file), None, done / "page.md")
    assert (done / "page.md").read_text() == before


def test_the_shipped_experiment_is_a_grid_of_recipes() -> None:
    raw = raw_grid(SHIPPED)
    assert is_agnostic(raw)
    grid = agnostic_grid(raw, SHIPPED)
    for arm in grid.arms:
        for scale in grid.scales:
            recipe = recipe_of(grid, arm, scale, 1)
            assert (recipe.name, recipe.seed) == (f"mitkd-{arm}", 1)
    assert len(recipe_of(grid, "B", "reduced", 0).teacher.tasks) == 16
    assert not is_agnostic(raw_grid(SHIPPED.with_name("corpus.yaml")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": "Z"}, r"'Z' is none of arms: A, B"),
        ({"arms": {"A": {"title": "a", "sett": {}}, "B": {"title": "b"}}}, r"arms\.A\.sett: unknown key; did you mean"),
        ({"contrasts": [{"name": "x", "claim": "y", "weights": {"C": 1}}]}, r"'C' is none of arms"),
    ],
)
def test_a_bad_grid_is_refused(grid_file: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        agnostic_grid(raw_grid(grid_file) | change, grid_file)


def test_the_recipe_of_an_arm_is_the_shared_one_but_for_what_it_sets(grid_file: Path, many: Path) -> None:
    grid = agnostic_grid(raw_grid(grid_file), grid_file)
    plain, whole = recipe_of(grid, "A", "large", 0), recipe_of(grid, "B", "large", 0)
    assert plain.teacher.tasks == ()
    assert whole.teacher.tasks == load_recipe(many / "recipe.yaml").teacher.tasks
    assert plain.text == whole.text
