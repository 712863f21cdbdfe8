"""Answers in a passage, options and tags are read as the rows say, and refused by row and value."""

import json
from pathlib import Path
from typing import Any

import pytest

from openbook.config import FileSource, TaskSettings, UsageError
from openbook.data.tasks import TaskData, describe_task, load_task, unreported_texts
from openbook.types import Example, Span

Rows = list[dict[str, Any]]


def saved(path: Path, rows: Rows) -> FileSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(path=str(path))


def read(folder: Path, train: Rows, test: Rows | None = None, **changes: Any) -> TaskData:
    places = {"train": saved(folder / "train.jsonl", train), "test": saved(folder / "test.jsonl", test or train)}
    return load_task(TaskSettings(**{"name": "mine", **places, **changes}))


def refused(folder: Path, said: list[str], train: Rows, test: Rows | None = None, **changes: Any) -> None:
    with pytest.raises(UsageError) as error:
        read(folder, train, test, **changes)
    assert [part for part in said if part not in str(error.value)] == [], str(error.value)


SPANS = {"kind": "span_extraction", "text": "question", "text_pair": "context", "label": "answers"}
CHOICES = {"kind": "multiple_choice", "text": "story", "options": "endings", "label": "right"}
TAGS = {"kind": "token_classification", "text": "words", "label": "tags"}


def asked(answers: Any, number: int = 0) -> dict[str, Any]:
    return {"question": f"who {number}", "context": "Mary met Bob. Bob left.", "answers": answers}


def squad(*answers: tuple[str, int]) -> dict[str, Any]:
    return {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}


def several(row: dict[str, Any], column: str, times: int = 6) -> Rows:
    return [{**row, column: f"{row[column]} {n}"} for n in range(times)]


@pytest.mark.parametrize("form", ["squad", "list"])
def test_the_first_answer_is_the_label_and_all_are_accepted(tmp_path: Path, form: str) -> None:
    written: Any = squad(("Bob", 9), ("Mary", 0), ("Bob", 14))
    if form == "list":
        pairs = zip(written["text"], written["answer_start"], strict=True)
        written = [{"text": text, "answer_start": start, "id": 1} for text, start in pairs]
    task = read(tmp_path, several(asked(written), "question"), **SPANS)
    assert (task.kind, task.labels, task.metrics) == ("span_extraction", None, ("f1", "exact_match"))
    example = task.test[0]
    assert (example.label, example.answers) == (Span(9, 12), ("Bob", "Mary"))
    assert (example.text, task.pair, task.null_allowed) == ("who 0 0", True, False)


def test_white_space_around_an_answer_is_no_part_of_it(tmp_path: Path) -> None:
    task = read(tmp_path, several(asked(squad((" met ", 4))), "question"), **SPANS)
    assert (task.test[0].label, task.test[0].answers) == (Span(5, 8), ("met",))


@pytest.mark.parametrize("empty", [[], {"text": [], "answer_start": []}])
def test_a_question_may_have_no_answer(tmp_path: Path, empty: Any) -> None:
    rows = [*several(asked(squad(("Bob", 9))), "question", 9), asked(empty, 77)]
    task = read(tmp_path, rows, **SPANS)
    assert (task.test[-1].label, task.test[-1].answers, task.null_allowed) == (None, (), True)
    task = read(tmp_path, rows[:9], rows, **SPANS)
    assert not task.null_allowed
    assert task.warnings[0].startswith("task.test: 1 questions have no answer")
    refused(tmp_path, ["no question has an answer"], several(asked(empty), "question"), **SPANS)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (squad(("Bob", 8)), ["answer 'Bob'", "at character 8 of column 'context'", "stands ' Bo'"]),
        (squad(("Bob", -14)), ["answer 'Bob'", "at character -14", "mend answer_start"]),
        (squad(("left.", 99)), ["at character 99", "stands ''"]),
        (squad(("bob", 9)), ["answer 'bob'", "stands 'Bob'"]),
        (squad((" ", 4)), ["answer ' ' at 4", "a text and its first character"]),
        ({"text": ["Bob"], "answer_start": ["9"]}, ["answer 'Bob' at '9'"]),
        ({"text": ["Bob"], "answer_start": [True]}, ["at True"]),
        ({"text": ["Bob"], "answer_start": [9, 14]}, ["is no answer", "lists of equal length"]),
        ({"text": "Bob", "answer_start": 9}, ["is no answer"]),
        ([["Bob", 9]], ["is no answer"]),
        ("Bob", ["label 'Bob' (column 'answers') is no answer"]),
        (None, ["label None", "is no answer"]),
    ],
)
def test_an_answer_that_is_not_where_it_should_be_is_refused(tmp_path: Path, answers: Any, said: list[str]) -> None:
    rows = [*several(asked(squad(("Bob", 9))), "question"), asked(answers)]
    refused(tmp_path, ["task.train: ", "train.jsonl, row 7", *said], rows, **SPANS)


def told(label: Any, *endings: str, number: int = 0) -> dict[str, Any]:
    return {"story": f"once {number}", "endings": [*endings], "right": label}


def stories(label: Any, *endings: str) -> Rows:
    return [told(label, *(endings or ("end", "go on", "stop")), number=number) for number in range(6)]


@pytest.mark.parametrize(
    ("label", "endings", "place"),
    [
        (2, (), 2),
        (0.0, (), 0),
        ("1", (), 1),
        ("C", (), 2),
        ("go on", (), 1),
        (" stop ", (), 2),
        (1, ("0", "1", "2"), 1),
        (0, ("2", "1", "0"), 0),  # a number is a place, whatever the texts
        ("1", ("2", "1", "0"), 1),
        ("A", ("A", "B"), 0),
        (1, ("same", "same"), 1),
    ],
)
def test_the_right_option_goes_by_number_letter_or_text(tmp_path: Path, label: Any, endings: Any, place: int) -> None:
    task = read(tmp_path, stories(label, *endings), **CHOICES)
    assert [example.label for example in task.test] == [place] * 6
    assert task.test[0].options == (endings or ("end", "go on", "stop"))
    assert (task.metrics, task.labels, task.pair) == (("accuracy",), None, False)


@pytest.mark.parametrize(
    ("label", "endings", "said"),
    [
        (3, (), ["label 3 (column 'right')", "none of its 3 options ['end', 'go on', 'stop']", "numbers from 0"]),
        (-1, (), ["label -1"]),
        ("D", (), ["label 'D'"]),
        ("on", (), ["label 'on'", "letters from A or texts"]),
        (0.5, (), ["label 0.5"]),
        (True, (), ["label True"]),
        (None, (), ["label None", "is missing"]),
        ([1], (), ["label [1]", "no single label"]),
        ("1", ("1", "2"), ["could be any of the options [0, 1] (from 0)", "write a letter"]),
        ("A", ("B", "A"), ["could be any of the options [0, 1]"]),
        ("same", ("same", "same"), ["could be any of the options [0, 1]"]),
    ],
)
def test_an_option_that_cannot_be_told_is_refused(tmp_path: Path, label: Any, endings: Any, said: list[str]) -> None:
    refused(tmp_path, ["task.train: ", "row 1", *said], stories(label, *endings), **CHOICES)


def test_options_may_have_names(tmp_path: Path) -> None:
    task = read(tmp_path, stories("2"), labels=("1", "2", "3"), **CHOICES)
    assert {example.label for example in task.test} == {1}
    refused(tmp_path, ["label 0", "told by the names ['1', '2', '3']"], stories(0), labels=("1", "2", "3"), **CHOICES)


def test_options_may_be_columns_of_which_the_last_are_empty(tmp_path: Path) -> None:
    columns = {**CHOICES, "options": ("a", "b", "c"), "text_pair": "asked"}
    rows = [
        {"story": f"s{n}", "asked": "why", "right": 0, "a": "yes", "b": "no", "c": ("or", None, "")[n % 3]}
        for n in range(6)
    ]
    task = read(tmp_path, rows, **columns)
    assert [len(example.options) for example in task.test] == [3, 2, 2] * 2
    assert task.test[0] == Example("mine/test/0", "s0", "why", 0, ("yes", "no", "or"))
    rows[4]["b"], rows[4]["c"] = "", "or"
    refused(tmp_path, ["row 5", "['yes', '', 'or']", "an empty option before others"], rows, **columns)
    refused(tmp_path, ["task.options='d'", "no such column"], rows, **{**columns, "options": ("a", "d")})


def test_rows_without_a_choice_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*stories(1), told(0, "only", number=9), told(0, number=10)]
    task = read(tmp_path, rows, **CHOICES)
    assert task.warnings[0].endswith("train.jsonl: 2 rows with fewer than two options were dropped")
    assert len(task.test) == 6
    refused(tmp_path, ["task.options='endings' gives no row two options"], [told(0, "only")], **CHOICES)
    refused(
        tmp_path, ["row 1", "'endings' holds 'end'", "a list of strings"], [told(0) | {"endings": "end"}], **CHOICES
    )


def sentence(text: str, tags: Any, number: int = 0) -> dict[str, Any]:
    return {"words": [*text.split(), str(number)], "tags": tags if not isinstance(tags, str) else [*tags.split(), "O"]}


def sentences(text: str, tags: str) -> Rows:
    return [sentence(text, tags, number) for number in range(6)]


def test_tags_are_read_from_train_with_o_first(tmp_path: Path) -> None:
    task = read(tmp_path, sentences("a Bob Lee NY", "O B-PER I-PER B-LOC"), **TAGS)
    assert task.labels == ("O", "B-LOC", "B-PER", "I-PER")
    assert task.metrics == ("entity_f1", "accuracy")
    example = task.test[0]
    assert (example.text, example.words, example.label) == (
        "a Bob Lee NY 0",
        ("a", "Bob", "Lee", "NY", "0"),
        (0, 2, 3, 1, 0),
    )
    assert (example.text_pair, task.warnings[-1]) == (
        None,
        "task.test: 5 of 6 rows have a text that is also trained on",
    )


def test_numbers_of_tags_need_their_names(tmp_path: Path) -> None:
    rows = [sentence("a Bob", [0, 1, 0], number) for number in range(6)]
    refused(tmp_path, ["row 1", "holds numbers", "task.labels"], rows, **TAGS)
    task = read(tmp_path, rows, labels=("O", "B-PER", "I-PER"), **TAGS)
    assert task.test[0].label == (0, 1, 0)
    assert task.warnings[0] == "task.train: no row has the label 'I-PER'"


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (["O", "B-PER"], ["has 2 tags for the 3 words of column 'words'"]),
        (["O", "B-PRE", "O"], ["gives word 2 the tag 'B-PRE', not one of ['O', 'B-PER']", "did you mean 'B-PER'?"]),
        (["O", 5, "O"], ["gives word 2 the tag '5'"]),
        (["O", None, "O"], ["is no list of tags"]),
        (["O", True, "O"], ["is no list of tags"]),
        ("O", ["has 2 tags"]),
        (None, ["label None", "is no list of tags"]),
    ],
)
def test_a_tag_that_train_does_not_know_is_refused_by_name(tmp_path: Path, tags: Any, said: list[str]) -> None:
    train = sentences("a Bob", "O B-PER")
    refused(tmp_path, ["task.test: ", "test.jsonl, row 2", *said], train, [train[0], sentence("a Bob", tags)], **TAGS)


def test_one_tag_leaves_nothing_to_learn(tmp_path: Path) -> None:
    refused(tmp_path, ["is ['O'] in every row", "nothing to learn"], sentences("a Bob", "O O"), **TAGS)
    refused(tmp_path, ["nothing to tell apart"], sentences("a b", "O O"), labels=("O", "B-x"), **TAGS)


def test_words_must_be_a_list(tmp_path: Path) -> None:
    rows = [{"words": "a Bob", "tags": ["O", "B-PER"]}]
    refused(tmp_path, ["row 1", "'words' holds 'a Bob', a str", "a list of strings"], rows, **TAGS)


def test_iob1_is_told_of_and_read(tmp_path: Path) -> None:
    """I- after O, or after another type, begins an entity; I- after I- of its type does not."""
    train = sentences("a Bob Lee NY x", "O I-PER I-PER I-LOC B-LOC")
    task = read(tmp_path, train, sentences("a Bob NY", "O I-LOC B-LOC"), **TAGS)
    assert task.warnings[0].startswith("task.train: 12 tags I-x follow no B-x or I-x: each counts as the beginning")
    assert task.warnings[1].startswith("task.test: 6 tags I-x")


def test_tags_that_name_no_entities_have_an_accuracy_only(tmp_path: Path) -> None:
    train = sentences("a dog", "DET NOUN")
    refused(tmp_path, ["task.metric='entity_f1'", "'DET' is none", "task.metric: accuracy"], train, **TAGS)
    assert read(tmp_path, train, metric="accuracy", **TAGS).metrics == ("accuracy",)
    entities = sentences("a Bob", "O B-PER")
    assert read(tmp_path, entities, metric="accuracy", **TAGS).metrics == ("accuracy", "entity_f1")


OWN = {"name": "mine", "train": FileSource(path="a.jsonl"), "text": "t", "label": "l"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "span_extraction"}, ["task.text_pair is absent", "passages"]),
        ({"kind": "span_extraction", "text_pair": "p", "labels": ("a", "b")}, ["a span_extraction has no label names"]),
        ({"kind": "span_extraction", "text_pair": "p", "metric": "accuracy"}, ["'accuracy'", "f1, exact_match"]),
        ({"kind": "multiple_choice"}, ["task.options=None", "task.kind='multiple_choice'", "name the column"]),
        ({"kind": "multiple_choice", "options": ("a",)}, ["task.options=['a']", "write task.options: NAME"]),
        ({"options": "o"}, ["task.options='o'", "task.kind='classification'", "remove it"]),
        ({"kind": "token_classification", "text_pair": "p"}, ["task.text_pair='p'", "remove it"]),
        ({"kind": "token_classification", "metric": "f1"}, ["task.metric='f1'", "entity_f1, accuracy"]),
    ],
)
def test_columns_must_fit_the_kind(settings: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        describe_task(TaskSettings(**{**OWN, **settings}))
    assert [part for part in said if part not in str(error.value)] == [], str(error.value)


def test_a_data_folder_may_hold_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    folder = tmp_path / "tasks" / "squad"
    rows = [{**row, "id": "5", "answer_count": 2} for row in several(asked(squad(("Bob", 9))), "question")]
    for split in ("train", "dev", "test"):
        saved(folder / f"{split}.jsonl", rows if split != "test" else several(asked(None), "context"))
    about = {"name": "squad", "kind": "span", "metric": "f1+exact_match", "labels": {}, "splits": {}}
    (folder / "task.json").write_text(json.dumps(about))
    task = load_task(TaskSettings(name="squad"))
    assert (task.kind, task.labels, task.metrics) == ("span_extraction", None, ("f1", "exact_match"))
    assert task.test[3] == Example("squad/test/3", "who 0 3", rows[0]["context"], Span(9, 12), answers=("Bob",))
    unreported = [*unreported_texts(TaskSettings(name="squad"))]
    assert unreported[:2] == ["who 0", "Mary met Bob. Bob left. 0"]


def test_further_evaluation_text_may_be_lists(tmp_path: Path) -> None:
    """Words are a text; options are guarded too."""
    tags = {**OWN, **TAGS, "also_evaluated": (saved(tmp_path / "a.jsonl", [sentence("a Bob", "O O", 5)]),)}
    assert [*unreported_texts(TaskSettings(**tags))] == ["a Bob 5"]
    choices = {**OWN, **CHOICES, "also_evaluated": (saved(tmp_path / "b.jsonl", [told(0, "end", "go on")]),)}
    assert [*unreported_texts(TaskSettings(**choices))] == ["once 0", "end go on"]
