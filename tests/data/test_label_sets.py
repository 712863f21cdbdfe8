"""Several labels a row, as people write them; what is unclear is refused by row and value."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openbook.config import FileSource, TaskSettings, UsageError
from openbook.data.label_sets import names_in
from openbook.data.tasks import TaskData, load_task

SETS = [["joy", "anger"], ["joy"], [], ["fear", "anger"], ["fear"]] * 4
LABELS = ("anger", "fear", "joy")
HOT = {"joy,anger": (1, 0, 1), "joy": (0, 0, 1), "": (0, 0, 0), "fear,anger": (1, 1, 0), "fear": (0, 1, 0)}


def read(path: Path, test: Path | None = None, **changes: Any) -> TaskData:
    places = {"train": FileSource(path=str(path)), "test": FileSource(path=str(test or path))}
    return load_task(
        TaskSettings(**{"name": "mine", "kind": "multi_label", "text": "text", "label": "tags", **places, **changes})
    )


def saved(path: Path, cells: list[Any]) -> Path:
    """The cells with a text each, in the format of the suffix."""
    rows = [{"text": f"row {number}", "tags": cell} for number, cell in enumerate(cells)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "tags"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("a.jsonl", list),
        ("a.parquet", list),
        ("a.parquet", "|".join),
        ("a.csv", "|".join),
        ("a.csv", ", ".join),
        ("a.csv", ";".join),
        ("a.csv", json.dumps),
        ("a.jsonl", lambda names: "|".join(names) or None),
    ],
    ids=["lists", "lists of Parquet", "bars of Parquet", "bars", "commas", "semicolons", "JSON", "nothing"],
)
def test_every_way_of_writing_gives_the_same_sets(tmp_path: Path, file: str, write: Any) -> None:
    task = read(saved(tmp_path / file, [write(names) for names in SETS]))
    assert (task.kind, task.labels, task.metrics) == (
        "multi_label",
        LABELS,
        ("micro_f1", "macro_f1", "subset_accuracy"),
    )
    assert [example.label for example in task.test] == [HOT[",".join(names)] for names in SETS]
    assert len(task.train) + len(task.holdout) == len(SETS)
    assert task.warnings == ["task.test: 18 of 20 rows have a text that is also trained on"]


def test_given_labels_have_their_order_and_may_be_named_by_place(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", [[0, 2], [1], [2], []] * 3)
    task = read(path, labels=["joy", "anger", "fear"])
    assert [example.label for example in task.test[:4]] == [(1, 0, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)]


def test_a_given_label_may_hold_a_delimiter() -> None:
    assert names_in("joy, anger", ("joy, anger", "fear")) == ["joy, anger"]
    assert names_in("joy, anger|fear", ("joy, anger", "fear")) == ["joy, anger", "fear"]
    assert names_in(" joy | | fear |") == ["joy", "fear"]
    assert names_in("") == names_in(None) == names_in(float("nan")) == names_in([]) == names_in("[]") == []
    assert names_in(3) == names_in(3.0) == names_in([3]) == ["3"]


@pytest.mark.parametrize(
    ("cells", "changes", "told"),
    [
        (["joy", "joy|anger", "fear"], {}, None),
        (["joy", "joy|envy"], {"labels": LABELS}, "task.train: {path}, row 2: label 'joy|envy' (column 'tags') names"
         " 'envy', not one of ['anger', 'fear', 'joy']; Mend the row, or list every label in task.labels"),
        (["joy", "joy|angr"], {"labels": LABELS}, "not one of ['anger', 'fear', 'joy']; did you mean 'anger'?"),
        (["joy", "joy", ""], {}, "column 'tags' names 'joy' alone, which leaves nothing to tell apart; add rows with"),
        (["", None], {}, "column 'tags' names no label in any row, which leaves nothing to tell apart"),
        (["joy|fear", "a, b|c"], {}, "row 2: label 'a, b|c' (column 'tags') may be separated at more than one"),
        (["joy|fear", "joy|joy"], {}, "row 2: label 'joy|joy' (column 'tags') names 'joy' twice; give the names"),
        ([[0, 1, 1], [1, 0, 0]], {"labels": LABELS}, "row 1: label [0, 1, 1] (column 'tags') names '1' twice"),
        ([[0, 1], [1]], {}, "row 1: label [0, 1] (column 'tags') holds numbers; list the names they stand for in"),
        (["['joy', 'fear']", "joy"], {}, "begins like a list and is none in JSON; write names separated by '|'"),
        ([{"joy": 1}, {"joy": 0}], {}, "is no set of labels; give a list of names, or names separated by '|'"),
        ([["joy", None], ["fear"]], {}, "is no set of labels"),
        ([True, False], {"labels": LABELS}, "is no set of labels"),
        ([f"text {number}" for number in range(60)], {}, "has 60 different names in 60 rows; name another task.label"),
        (["joy|fear"] * 4, {}, "every row has the same of the labels ['fear', 'joy']; there is nothing to tell apart"),
        (["joy", "fear"] * 4, {"metric": "f1"}, "task.metric='f1' is unknown for a multi_label; choose from micro_f1"),
        (["joy", "fear"] * 4, {"labels": ["joy"]}, "task.labels=['joy']: name at least two labels, each once"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_by_row(
    tmp_path: Path, cells: list[Any], changes: dict[str, Any], told: str | None
) -> None:
    path = saved(tmp_path / "a.jsonl", cells)
    if told is None:
        assert read(path, **changes).labels == ("anger", "fear", "joy")
        return
    with pytest.raises(UsageError, match=re.escape(told.format(path=path))):
        read(path, **changes)


def test_a_label_that_only_test_rows_have_is_refused(tmp_path: Path) -> None:
    train, test = saved(tmp_path / "a.csv", ["joy", "fear"] * 5), saved(tmp_path / "b.csv", ["joy", "joy|envy"])
    with pytest.raises(UsageError, match=r"task\.test: .*b\.csv, row 2: label 'joy\|envy' .* names 'envy', not one of"):
        read(train, test)


def test_labels_without_rows_and_with_all_rows_are_told_of(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.csv", ["joy|fear", "joy"] * 5)
    told = read(path, saved(tmp_path / "b.csv", ["", "fear"]), labels=["joy", "fear", "anger"]).warnings
    assert told[:2] == ["task.train: no row has the label 'anger'", "task.train: every row has the label 'joy'"]


def test_a_list_of_labels_is_pointed_to_the_kind(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", [["joy"], ["fear", "joy"]])
    with pytest.raises(
        UsageError, match="is no single label; give one string or number a row, or set task.kind: multi"
    ):
        read(path, kind="classification")
