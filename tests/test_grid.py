"""An experiment file: every cell is a checked recipe; names that do not fit together are named."""

from pathlib import Path

import pytest
import yaml

from openbook.config import UsageError
from openbook.grid import cell, coordinates_of, load_grid, middle

SHIPPED = Path(__file__).parent.parent / "experiments"


def small() -> dict:
    return {
        "name": "tiny",
        "title": "A tiny grid",
        "recipe": {
            "teacher": {"model": "somewhere"},
            "corpus": {"sources": [{"path": "texts.txt"}], "budget_tokens": 7},
            "distill": {
                "corpus": {"terms": {"hidden": 1}, "optim": {"batch_tokens": 64}},
                "task": {"terms": {"gold": 1}, "optim": {}},
            },
        },
        "scales": {"small": {"corpus.budget_tokens": 10}, "large": {"corpus.budget_tokens": 1000}},
        "tasks": {"trec": {"title": "TREC", "set": {"task": {"name": "trec"}}, "seeds": [3, 4]}},
        "arms": {
            "A0": {"title": "nothing", "set": {"distill.corpus.optim.epochs": 0}},
            "A2": {"title": "random", "set": {"corpus.select": "random"}},
            "A5": {"title": "retrieved"},
        },
        "baseline": "A2",
        "tune": [
            {
                "name": "stage1",
                "keys": ["distill.corpus.optim.learning_rate", "distill.general.optim.learning_rate"],
                "values": [1e-4, 1e-3, 1e-2],
            },
            {"name": "stage2", "keys": ["distill.task.optim.learning_rate"], "values": [1e-5, 1e-4]},
        ],
    }


def written(tmp_path: Path, grid: dict) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def test_a_cell_lays_scale_task_arm_and_rates_over_the_shared_recipe(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path, small()))
    one = cell(grid, "trec", "A2", "large", seed=4, rates=(1e-2, 1e-5))
    assert one.recipe.corpus.budget_tokens == 1000
    assert one.recipe.corpus.select == "random"
    assert one.recipe.task.name == "trec"
    assert one.recipe.seeds == (4,)
    assert one.recipe.distill.corpus.optim.learning_rate == 1e-2
    assert one.recipe.distill.corpus.optim.batch_tokens == 64
    assert one.recipe.distill.task.optim.learning_rate == 1e-5
    assert one.recipe.distill.general is None, "a rate alone does not make a lesson"


def test_cells_do_not_share_what_they_change(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path, small()))
    cell(grid, "trec", "A2", "small", 3, middle(grid))
    assert cell(grid, "trec", "A5", "small", 3, middle(grid)).recipe.corpus.select == "retrieved"


def test_tuning_starts_in_the_middle_and_leaves_out_a_lesson_that_is_not_held(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path, small()))
    assert middle(grid) == (1e-3, 1e-4)
    assert coordinates_of(grid, "trec", "A0", "small") == [1]
    assert coordinates_of(grid, "trec", "A5", "small") == [0, 1]


def test_arms_may_be_limited_to_some_tasks(tmp_path: Path) -> None:
    raw = small()
    raw["tasks"]["other"] = {"title": "Other", "set": {"task": {"name": "sst2"}}, "seeds": [0]}
    raw["arms"]["A5"]["tasks"] = ["other"]
    grid = load_grid(written(tmp_path, raw))
    assert grid.arms_of("trec") == ["A0", "A2"]
    assert grid.tasks_of("A5") == ["other"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g.update(baseline="A9"), "baseline names 'A9'"),
        (lambda g: g["arms"]["A5"].update(tasks=["nowhere"]), "arms.A5.tasks names 'nowhere'"),
        (lambda g: g["arms"]["A5"].update(rates_from="A6"), "arms.A5.rates_from names 'A6'"),
        (lambda g: g.update(hypotheses=[{"name": "H1", "claim": "", "pairs": [["A5", "A7"]]}]), "hypotheses.H1 names"),
        (lambda g: g.update(curves=[{"title": "", "task": "trec", "series": {"x": {"0.1": "A8"}}}]), "curves names"),
        (lambda g: g["tasks"]["trec"].update(seeds=[]), "tasks.trec.seeds"),
        (lambda g: g.update(colour="red"), "colour: unknown key"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named(tmp_path: Path, change: object, said: str) -> None:
    raw = small()
    change(raw)  # type: ignore[operator]
    with pytest.raises(UsageError) as refused:
        load_grid(written(tmp_path, raw))
    assert said in str(refused.value)


def test_a_bad_override_names_its_arm(tmp_path: Path) -> None:
    raw = small()
    raw["arms"]["A5"]["set"] = {"student.layerz": 3}
    grid = load_grid(written(tmp_path, raw))
    with pytest.raises(UsageError, match=r"arm A5 on trec:\n.*student.layerz: unknown key; did you mean 'layers'"):
        cell(grid, "trec", "A5", "small", 0, middle(grid))


def test_a_missing_file_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name an experiment file"):
        load_grid(tmp_path / "absent.yaml")


@pytest.mark.parametrize("file", ["corpus.yaml", "reaugkd.yaml"])
def test_every_cell_of_the_shipped_experiments_is_a_valid_recipe(file: str) -> None:
    grid = load_grid(SHIPPED / file)
    assert sorted(path.name for path in SHIPPED.glob("*.yaml")) == ["corpus.yaml", "mitkd.yaml", "reaugkd.yaml"]
    places = [(task, arm, scale) for scale in grid.scales for task in grid.tasks for arm in grid.arms_of(task)]
    recipes = [cell(grid, *place, 0, middle(grid)).recipe for place in places]
    assert len(recipes) >= 2 * len(grid.arms)


def test_retrieval_has_to_beat_every_control() -> None:
    grid = load_grid(SHIPPED / "reaugkd.yaml")
    (retrieval,) = (one for one in grid.hypotheses if one.name == "retrieval")
    assert retrieval.pairs == tuple(("A5", control) for control in ("A2", "A9", "A9p", "A10"))


def test_an_arm_that_opens_a_book_has_the_recipe_of_its_students(tmp_path: Path) -> None:
    raw = small()
    raw["arms"]["B"] = {"title": "book", "students_of": "A2", "set": {"knowledge_base.values": "gold"}}
    grid = load_grid(written(tmp_path, raw))
    trained, read = (cell(grid, "trec", arm, "small", 3, middle(grid)) for arm in ("A2", "B"))
    assert grid.readers_of(trained) == ["B"]
    assert read.recipe.corpus == trained.recipe.corpus
    assert read.recipe.knowledge_base.values == "gold"
    raw["tasks"]["mr"] = raw["tasks"]["trec"] | {"title": "MR"}
    raw["arms"]["B"]["tasks"] = ["mr"]
    assert load_grid(written(tmp_path, raw)).readers_of(trained) == [], "of this task nobody reads"
    raw["arms"]["A2"]["rates_from"] = "A5"
    grid = load_grid(written(tmp_path, raw))
    assert [grid.tuned_as(arm) for arm in ("A0", "A2", "B")] == ["A0", "A5", "A5"]
    raw["arms"]["C"] = {"title": "book of a book", "students_of": "B"}
    with pytest.raises(UsageError, match=r"arms\.C\.students_of='B' trains nothing either"):
        load_grid(written(tmp_path, raw))
