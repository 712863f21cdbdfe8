"""A task of several labels a text, end to end: read, taught, put into a book, scored, predicted, shown, exported."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from openbook.agnostic_run import task_of
from openbook.batch_prediction import Job, predict_file, prepared
from openbook.book_commands import in_words
from openbook.checkpoint import read_json
from openbook.config import TaskSettings, UsageError
from openbook.knowledge_base import editing, store
from openbook.pipeline import check, execute
from openbook.predict_commands import predictions, show_prediction
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe
from openbook.stages.export import Wish, export
from openbook.workspace import Run

LABELS = ("film", "food", "music")
WORDS = {"film": "film movie", "food": "meal", "music": "song"}
MULTI = (
    "task.kind=multi_label", "task.label=topics", "seeds=[0]", "knowledge_base.keys=teacher",
    "distill.corpus.optim.epochs=0", "distill.labels.optim.epochs=1", "teacher.optim.epochs=12",
    "teacher.optim.batch_size=8", "teacher.optim.learning_rate=1.5e-3", "distill.task.optim.epochs=8",
    "distill.task.optim.batch_size=8", "distill.task.optim.learning_rate=3.0e-3",
    "evaluate={latency_rows: 1, throughput_rows: 1, repeats: 1, examples: 6}",
)  # fmt: skip


def write_topics(path: Path, count: int, seed: int) -> None:
    """Texts whose topics are plain from their words; one in eight has none."""
    random = Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "topics"])
        for row in range(count):
            topics = [name for place, name in enumerate(LABELS) if row % 8 >> place & 1]
            things = " and ".join(f"the {random.choice(WORDS[name].split())}" for name in topics) or "we"
            ending = f"seemed {random.choice(['good', 'bad', 'great'])} {random.randint(1, 999)}"
            writer.writerow([f"{things} {ending}", "|".join(topics)])


def recipe_of(world: Path, folder: Path, *overrides: str) -> Any:
    paths = (f"task.train.path={folder}/train.csv", f"task.test.path={folder}/test.csv")
    return load_recipe(world / "recipe.yaml", [*MULTI, *paths, *overrides])


@pytest.fixture(scope="module")
def topics(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows and a finished run over them."""
    folder = tmp_path_factory.mktemp("topics")
    write_topics(folder / "train.csv", 160, seed=0)
    write_topics(folder / "test.csv", 40, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "openbook.stages.distill.run_jobs", lambda work, jobs, *_: [work(*job, lambda done: None) for job in jobs]
        )
        execute(recipe_of(world, folder), folder / "run")
    return folder


def rows_of(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    sets = [row["topics"].split("|") for row in rows]
    return [row["text"] for row in rows], np.array([[int(name in one) for name in LABELS] for one in sets])


def test_scores_are_those_of_scikit_learn(topics: Path) -> None:
    results = read_json(topics / "run" / "evaluation" / "results.json")
    gold = rows_of(topics / "test.csv")[1]
    assert (results["kind"], results["metric"], tuple(results["labels"])) == ("multi_label", "micro_f1", LABELS)
    for model in results["models"]:
        saved = np.load(topics / "run" / "evaluation" / f"{model['name']}.npy", allow_pickle=False)
        assert model["scores"] == pytest.approx(
            [f1_score(gold, one > 0.5, average="micro", zero_division=0) for one in saved]
        )
        assert ((saved >= 0) & (saved <= 1)).all()
    means = {model["name"]: model["mean"] for model in results["models"]}
    assert means["teacher"] > 0.8
    assert means["student-open-book"] > 0.7
    agreements = {model["name"]: model["agreement"] for model in results["models"]}
    teacher, opened = (
        np.load(topics / "run" / "evaluation" / f"{name}.npy")[0] for name in ("teacher", "student-open-book")
    )
    assert agreements["student-open-book"] == pytest.approx(accuracy_score(teacher > 0.5, opened > 0.5))
    keys = read_json(topics / "run" / "teacher_outputs" / "scores.json")
    assert keys["metric"] == "micro_f1"
    assert keys["holdout"]["nearest_keys"] > 0.7


def test_the_models_are_stock_ones_that_transformers_trains_likewise(topics: Path) -> None:
    for folder in (topics / "run" / "teacher", topics / "run" / "student"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.problem_type == "multi_label_classification"
        assert tuple(model.config.id2label.values()) == LABELS
    rows = rows_of(topics / "test.csv")[0][:5]
    tokens = AutoTokenizer.from_pretrained(topics / "run" / "student")(rows, return_tensors="pt", padding=True)
    chances = model(**tokens).logits.sigmoid().detach().numpy()
    alone = OpenBook(OpenBook.from_pretrained(topics / "run").backend)
    np.testing.assert_allclose(alone.predict_proba(rows), chances, atol=1e-5)


def test_predictions_are_lists_of_labels_above_a_half(topics: Path) -> None:
    book, (rows, _) = OpenBook.from_pretrained(topics / "run"), rows_of(topics / "test.csv")
    chances = book.predict_proba(rows)
    assert book.kind == "multi_label"
    for told, chance in zip(book.predict(rows), chances, strict=True):
        assert set(told) == {name for name, one in zip(LABELS, chance, strict=True) if one > 0.5}
        assert [chance[LABELS.index(name)] for name in told] == sorted((chance[chance > 0.5]).tolist(), reverse=True)
    assert {len(told) for told in book.predict(rows)} >= {0, 1, 2}
    assert book.predict(rows[0]) == book.predict(rows)[0]


def test_contributions_add_up_for_every_label(topics: Path, tmp_path: Path) -> None:
    OpenBook.from_pretrained(topics / "run").save_pretrained(tmp_path)
    editing.settle(tmp_path / "knowledge_base", {"top_k": 3, "temperature": 0.2, "beta": 0.4})
    book, rows = OpenBook.from_pretrained(tmp_path), rows_of(topics / "test.csv")[0]
    told = book.explain(rows)
    for explanation, answer in zip(told, book.predict_proba(rows), strict=True):
        found = explanation.evidence
        assert len(found.neighbours) == 3
        sums = [sum(found.contributions(place)) for place in range(len(LABELS))]
        np.testing.assert_allclose(sums, found.result, atol=1e-7)
        np.testing.assert_allclose(found.result, answer, atol=1e-7)
        assert found.decisive == (set(explanation.prediction) != set(explanation.alone))


def test_the_report_names_sets_of_labels(topics: Path) -> None:
    page = (topics / "run" / "report.md").read_text()
    assert "micro F1, points" in page
    assert "; gold “" in page
    shown = read_json(topics / "run" / "evaluation" / "examples.json")
    assert {one["right"] for one in shown} == {True, False}
    assert all(isinstance(one["gold"], list) for one in shown)
    card = (topics / "run" / "student" / "README.md").read_text()
    assert "any of the 3 labels" in card
    assert "top_k=None" in card


def test_the_command_line_and_files_show_every_label(topics: Path, capsys: Any) -> None:
    book, (rows, _) = OpenBook.from_pretrained(topics / "run"), rows_of(topics / "test.csv")
    for row, record in zip(rows, predictions(book, rows, explain=True, leave_out=False), strict=True):
        assert list(record["probability"]) == record["prediction"]
        assert all(0.5 < chance <= 1 for chance in record["probability"].values())
        json.dumps(record)
        show_prediction(row, record)
    assert "film, " in capsys.readouterr().out
    for suffix in ("jsonl", "csv"):
        job = Job(topics / "test.csv", topics / f"told.{suffix}", probabilities=True)
        assert predict_file(book, topics / "run", job, prepared(job)).rows == 40
    told = [json.loads(line) for line in (topics / "told.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in told] == book.predict(rows)
    assert all(len(row["probability"]) == len(row["prediction"]) for row in told)
    assert {f"probability_{name}" for name in LABELS} < set(told[0])
    with (topics / "told.csv").open() as file:  # which is read back as labels
        assert [in_words(book, [row["prediction"]], None)[0] for row in csv.DictReader(file)] == book.predict(rows)


def test_a_person_corrects_the_book_with_sets(topics: Path, tmp_path: Path) -> None:
    book = OpenBook.from_pretrained(topics / "run")
    book.save_pretrained(tmp_path)
    base = store.load(topics / "run" / "knowledge_base")
    assert (base.values.sum(axis=1) - 1).max() > 0.5  # values need not sum to 1
    book = OpenBook.from_pretrained(tmp_path)
    book.relabel([base.ids[0], base.ids[1]], [["film", "music"], []])
    assert store.load(tmp_path / "knowledge_base").values[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    with pytest.raises(UsageError, match="label 0 is 'sport'; the student knows film, food, music"):
        book.relabel([base.ids[0]], [["film", "sport"]])
    assert in_words(book, ["film; music", "", "food"], None) == [["film", "music"], [], ["food"]]
    with pytest.raises(UsageError, match="label 0 is 'film|film', which names 'film' twice"):
        in_words(book, ["film|film"], None)
    with pytest.raises(UsageError, match=r"label in row 2 of new\.csv is 'film\|film'"):
        in_words(book, ["film", "film|film"], Path("new.csv"))
    rows, gold = rows_of(topics / "test.csv")
    sets = [[name for name, applies in zip(LABELS, one, strict=True) if applies] for one in gold]
    tuned = book.tune(rows, sets, reported_split=True)
    assert tuned.score == pytest.approx(f1_score(gold, book.predict_proba(rows) > 0.5, average="micro"))


@pytest.mark.slow
def test_it_is_exported(topics: Path) -> None:
    pytest.importorskip("onnxruntime")
    record = export(topics / "run", Wish(int8=False))
    assert record["parity"]["onnx"]["largest_difference"] < 1e-4
    rows = rows_of(topics / "test.csv")[0]
    live, exported = (OpenBook.from_pretrained(topics / "run", name).predict_proba(rows) for name in ("torch", "onnx"))
    np.testing.assert_allclose(exported, live, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["knowledge_base.skip=safe"], "knowledge_base.skip=safe: reviews is a task of several labels"),
        (["knowledge_base.texts=both", "knowledge_base.corpus_min_confidence=0.5"], "min_confidence=0.5: reviews is a"),
        (["corpus.balance_labels=true"], "corpus.balance_labels goes by class, and reviews is a task of several"),
        (["corpus.confidence=0.5"], "corpus.confidence goes by class, and reviews is a task of several labels"),
        (
            ["distill.task.terms.official=true", "distill.task.terms.soft_labels=1"],
            "TinyBERT's code has no soft labels",
        ),
        (["teacher.fine_tuned=true"], "tells one of its labels .*task.kind is multi_label"),
        (["task.metric=accuracy"], "'accuracy' is unknown for a multi_label; choose from micro_f1, macro_f1, subset"),
        (["task.labels=[film]"], "name at least two labels, each once"),
    ],
)
def test_what_several_labels_rule_out(
    world: Path, topics: Path, tmp_path: Path, overrides: Sequence[str], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check(Run(recipe_of(world, topics, *overrides), tmp_path))


def test_several_labels_have_no_head_among_many_tasks(topics: Path) -> None:
    source = {"path": f"{topics}/train.csv"}
    settings = TaskSettings.model_validate(
        {"name": "topics", "kind": "multi_label", "text": "text", "label": "topics", "train": source, "test_share": 0.2}
    )
    with pytest.raises(UsageError, match="topics: kind=multi_label is taught by a recipe for one task alone"):
        task_of(settings)
