"""A grid of task-agnostic students from file to page: what arms share is made once, and what is done is skipped."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from openbook import agnostic_experiment
from openbook.agnostic_experiment import AgnosticExperiment, drift_of, execute
from openbook.agnostic_grid import agnostic_grid, is_agnostic, recipe_of
from openbook.agnostic_page import publish
from openbook.config import UsageError
from openbook.data.batches import Tokenised
from openbook.grid import raw_grid
from openbook.pipeline import Step, perform
from openbook.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("trials_here")

SHIPPED = Path(__file__).parents[1] / "experiments" / "mitkd.yaml"


@pytest.fixture(scope="session")
def grid_file(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = yaml.safe_load((many / "recipe.yaml").read_text())
    del recipe["name"]
    recipe["fine_tune"] |= {"learning_rates": [2.0e-3], "epochs": [2], "known": recipe["teacher"]["tasks"]}
    recipe["fine_tune"]["few"] |= {"draws": 1, "seeds": [3], "learning_rates": [1.0e-3]}
    recipe["fine_tune"] |= {"teacher_seeds": [1], "teacher_learning_rates": [5.0e-4]}
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
    built: Counter[str] = Counter()

    def counted(run: Any, step: Step) -> None:
        built[step.stage.name] += not step.fresh
        perform(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agnostic_experiment, "perform", counted)
        execute(at(folder, grid_file), None, folder / "page.md")
    (folder / "built.json").write_text(json.dumps(built))
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
            rates = {(row["model"], row["shots"], row["learning_rate"]) for row in record["rows"]}
            assert rates == {
                ("small", None, 2e-3), ("small", 4, 1e-3), ("teacher", None, 5e-4), ("teacher", 4, 5e-4),
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
    built = json.loads((done / "built.json").read_text())
    assert built == {"train-teacher": 2, "build-text": 1, "distill": 4, "evaluate": 4}


def test_the_page_tells_claims_roles_and_teachers(done: Path) -> None:
    page = (done / "page.md").read_text()
    assert "for 1,000 word-pieces, read from 3,000 of general text (small scale)" in page
    assert "not answered yet" not in page
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


def test_a_claim_about_an_arm_that_was_not_run_is_named_and_costs_the_others_nothing(
    done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    file = tmp_path / "results" / "grid.json"
    grid = json.loads(file.read_text())
    grid["arms"]["C"] = "another"
    grid["contrasts"].append({"name": "C - B", "claim": "better yet", "weights": {"C": 1, "B": -1}})
    file.write_text(json.dumps(grid))
    publish(tmp_path / "results", tmp_path / "page.md")
    page, before = page_of(tmp_path), page_of(done)
    assert "Declared and not answered yet, since an arm of theirs has not been run: C - B." in page
    assert "- **C**: another (distillation seeds done: none of 0, 1)" in page
    added = [line for line in page if line not in before]
    assert len(added) == 2
    assert [line for line in before if line not in page] == []


def test_a_teacher_that_was_trained_again_counts_once(done: Path, tmp_path: Path) -> None:
    """On another machine its scores may differ in a digit from those told with an earlier distillation seed."""
    shutil.copytree(done / "results", tmp_path / "results")
    path = tmp_path / "results" / "B" / "seed-1.json"
    record = json.loads(path.read_text())
    told = [row for row in record["rows"] if row["model"] == "teacher"]
    for row in told:
        row["scores"][row["metric"]] -= 0.25
    path.write_text(json.dumps(record))
    publish(tmp_path / "results", tmp_path / "page.md")
    assert page_of(tmp_path) == page_of(done)


def test_what_is_done_is_skipped(done: Path, grid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a stage ran again")

    monkeypatch.setattr("openbook.agnostic_experiment.perform", refuse)
    monkeypatch.setattr("openbook.agnostic_experiment.drift", refuse)
    before = (done / "page.md").read_text()
    execute(at(done, grid_file), None, done / "page.md")
    assert (done / "page.md").read_text() == before


def test_the_drift_of_every_teacher_is_kept_and_told_beside_the_losses_of_its_students(done: Path) -> None:
    drifts = {
        (arm, seed): json.loads((done / "results" / arm / f"seed-{seed}.json").read_text())["drift"]
        for arm in ("A", "B")
        for seed in (0, 1)
    }
    assert drifts["A", 0]["students"]["small"] == {"loss": 0, "qq": 0, "kk": 0, "vv": 0}
    assert drifts["B", 0] == drifts["B", 1]
    moved = drifts["B", 0]["students"]["small"]
    assert (drifts["B", 0]["layer"], drifts["B", 0]["blocks"]) == (4, len(long_blocks(done)))
    assert moved["loss"] == pytest.approx(moved["qq"] + moved["kk"] + moved["vv"], abs=1e-5)
    assert min(moved.values()) > 0
    page = (done / "page.md").read_text()
    told = f"| {moved['loss']:.4f} | {moved['qq']:.4f} | {moved['kk']:.4f} | {moved['vv']:.4f} |"
    assert sum(line.startswith("| B | ") and line.endswith(told) for line in page.splitlines()) == 2
    assert "cannot differ much" in page
    assert f"on {len(long_blocks(done))} blocks of arm A's text" in page


def long_blocks(done: Path) -> Tokenised:
    """Of the length that students read last; there are fewer than are asked for."""
    (text,) = (done / "runs" / "store" / "text").glob("*/long")
    return Tokenised.load(text)


def test_results_of_before_get_the_drift_as_long_as_their_teacher_is_there(
    done: Path, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    path = tmp_path / "results" / "B" / "seed-0.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: part for name, part in whole.items() if name != "drift"}))
    gone = AgnosticExperiment(at(done, grid_file).grid, "small", tmp_path / "runs", tmp_path / "results")

    def refuse(run: Any, step: Any) -> None:
        assert step.fresh, f"{step.stage.name} runs again"

    monkeypatch.setattr("openbook.agnostic_experiment.perform", refuse)
    execute(gone, ["B"], tmp_path / "page.md")
    assert "drift" not in json.loads(path.read_text())
    assert any(line.startswith("| B | 0 |") and line.endswith("| – |") for line in page_of(tmp_path))
    execute(replace(gone, root=done / "runs"), ["B"], tmp_path / "page.md")
    assert json.loads(path.read_text()) == whole


def page_of(folder: Path) -> list[str]:
    return (folder / "page.md").read_text().splitlines()


def test_another_encoder_has_no_drift(done: Path, grid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = at(done, grid_file)
    run = experiment.run_of("B", 0)
    assert drift_of(experiment, run) is not None
    run.__dict__["teacher_digest"] = "another"
    assert drift_of(experiment, run) is None


def test_the_arms_that_learn_otherwise_have_the_budget_of_the_teacher_of_many_tasks() -> None:
    grid = agnostic_grid(raw_grid(SHIPPED), SHIPPED)
    for scale in grid.scales:
        many, direct, reader = (recipe_of(grid, arm, scale, 0) for arm in ("B", "C", "G"))
        assert direct.students_learn is not None
        assert direct.teacher.tasks == ()
        assert direct.students_learn.tasks == many.teacher.tasks
        assert direct.students_learn.mixture == many.teacher.mixture
        changed = many.teacher.mixture.model_copy(update={"masked_text": True})
        assert reader.teacher == many.teacher.model_copy(update={"mixture": changed})
        assert {student.dropout for student in many.students} == {0}
    weights = {one.name: one.weights for one in grid.contrasts}
    assert (weights["C - B"], weights["B - G"]) == ({"C": 1, "B": -1}, {"B": 1, "G": -1})


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
        ({"seeds": [1, 1]}, r"seeds: 1 is there twice"),
        ({"plain": "Z"}, r"'Z' is none of arms: A, B"),
        ({"arms": {"A": {"title": "a", "sett": {}}, "B": {"title": "b"}}}, r"arms\.A\.sett: unknown key; did you mean"),
        ({"contrasts": [{"name": "x", "claim": "y", "weights": {"C": 1}}]}, r"'C' is none of arms"),
        ({"contrasts": [{"name": "x", "claim": "y", "weights": {"B": 1}}]}, r"contrast 'x': .* do not add up to 0"),
        ({"contrasts": [{"name": "x", "claim": "y", "weights": {"B": 0}}]}, r"contrast 'x': .* do not add up to 0"),
    ],
)
def test_a_bad_grid_is_refused(grid_file: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        agnostic_grid(raw_grid(grid_file) | change, grid_file)


def test_arms_in_which_a_task_has_other_roles_are_refused_before_anything_runs(grid_file: Path, tmp_path: Path) -> None:
    raw = raw_grid(grid_file)
    del raw["recipe"]["fine_tune"]["known"]
    experiment = AgnosticExperiment(agnostic_grid(raw, grid_file), "small", tmp_path / "runs", tmp_path / "results")
    with pytest.raises(
        UsageError, match=r"'reviews' is out-domain .* tiny-A and in-domain in tiny-B, .*fine_tune\.known"
    ):
        execute(experiment, None, tmp_path / "page.md")
    assert list(tmp_path.iterdir()) == []


def test_one_task_is_learned_for_as_many_updates_as_many_at_every_size() -> None:
    """Rows a pass of the sixteen tasks, and of MNLI, as counted from the data."""
    grid = agnostic_grid(raw_grid(SHIPPED), SHIPPED)
    rows = {"reduced": (42_000, 3_000), "paper": (159_500, 9_420)}
    for scale, (every, mnli) in rows.items():
        many_tasks, one = (recipe_of(grid, arm, scale, 0).teacher.mixture for arm in ("B", "E"))
        assert many_tasks.tasks_per_update == one.tasks_per_update
        assert one.passes * mnli == pytest.approx(many_tasks.passes * every, rel=0.02)


def test_the_recipe_of_an_arm_is_the_shared_one_but_for_what_it_sets(grid_file: Path, many: Path) -> None:
    grid = agnostic_grid(raw_grid(grid_file), grid_file)
    plain, whole = recipe_of(grid, "A", "large", 0), recipe_of(grid, "B", "large", 0)
    assert plain.teacher.tasks == ()
    assert whole.teacher.tasks == load_recipe(many / "recipe.yaml").teacher.tasks
    assert plain.text == whole.text
