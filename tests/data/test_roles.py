"""Roles are computed from provenance; training rows that an evaluation row repeats are found."""

from __future__ import annotations

import pytest

from openbook.config import TaskSettings
from openbook.data.roles import PROVENANCE, Provenance, near_duplicates, provenance, role_of
from openbook.data.tasks import TASKS
from openbook.types import Example

# of the data set collection that OPENBOOK_DATA may name
FOLDERS = [
    "ag_news",
    "clinc150",
    "cola",
    "emotion",
    "mnli",
    "mr",
    "mrpc",
    "qnli",
    "qqp",
    "reviews_books",
    "reviews_dvd",
    "reviews_electronics",
    "reviews_kitchen",
    "rte",
    "snli",
    "squad_v1",
    "sst2",
    "stsb",
    "subj",
    "zh_afqmc",
    "zh_fewclue_bustm",
    "zh_fewclue_eprstmt",
    "zh_tnews",
]


def task(name: str, family: str | None = None, group: str | None = None) -> TaskSettings:
    return TaskSettings(name=name, family=family, group=group)


F21 = [task("mnli"), task("squad1", "span", "squad")]


@pytest.mark.parametrize(
    ("name", "shots", "role"),
    [
        ("mnli", None, "in-domain"),
        ("qnli", None, "leaky"),
        ("scitail", None, "out-domain near"),
        ("sst2", None, "out-domain far"),
        ("sst2", 16, "low-resource"),
        ("mnli", 16, "low-resource, seen"),
    ],
)
def test_f21_roles(name: str, shots: int | None, role: str) -> None:
    assert role_of(task(name), F21, shots) == role


def test_few_shots_of_a_leaky_set_are_seen() -> None:
    assert role_of(task("qnli"), F21, 16) == "low-resource, seen"


def test_a_family_in_common_is_no_source_in_common() -> None:
    assert role_of(task("mrpc"), [task("qqp")]) == "out-domain near"
    assert role_of(task("cola"), [task("qqp")]) == "out-domain far"


def test_a_plain_teacher_has_seen_nothing() -> None:
    assert role_of(task("sst2"), []) == "out-domain far"
    assert role_of(task("sst2"), [], 16) == "low-resource"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("squad_v1", "qnli"),
        ("mrpc", "stsb"),
        ("sst2", "sst5"),
        ("sst2", "mr"),
        ("mr", "subj"),
        ("mnli", "cmnli"),
        ("snli", "cmnli"),
        ("snli", "stsb"),
        ("reviews_books", "reviews_kitchen"),
    ],
)
def test_sets_that_share_a_source_leak_into_each_other(first: str, second: str) -> None:
    assert role_of(task(second), [task(first)]) == "leaky"
    assert role_of(task(first), [task(second)]) == "leaky"


def test_a_source_in_common_is_not_passed_on() -> None:
    """STS-B shares sentences with MRPC and with SNLI; MRPC and SNLI share none."""
    assert role_of(task("mrpc"), [task("snli")]) == "out-domain far"
    assert role_of(task("snli"), [task("mnli")]) == "out-domain near"


def test_every_known_task_has_a_provenance() -> None:
    assert {*TASKS, *FOLDERS} <= set(PROVENANCE)
    differing = {name for name in TASKS if TASKS[name].family != PROVENANCE[name].family}
    assert differing <= {"emotion"}


def test_the_words_of_the_recipe_win() -> None:
    assert provenance(task("mnli", group="mine")) == Provenance("nli", frozenset({"mine"}))
    assert provenance(task("mnli", family="mine")) == Provenance("mine", frozenset({"mnli"}))
    assert provenance(task("reviews")) == Provenance("own", frozenset({"reviews"}))
    assert role_of(task("mine", group="squad"), [task("qnli")]) == "leaky"
    assert role_of(task("mine"), [task("yours")]) == "out-domain near"


NINE = "one two three four five six seven eight nine"


def rows(*texts: str | tuple[str, str]) -> list[Example]:
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    return [Example(f"t/train/{place}", first, second) for place, (first, second) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("train", "evaluation", "is_same"),
    [
        ("Yes, please!", "yes please", True),
        ("I ca n't wait .", "I can't wait.", True),
        (("a b", "c d"), ("C d.", "A b?"), True),
        (("a b", "c d"), ("a b", "c e"), False),
        ("a b", ("a b", "c d"), False),
        ((NINE, "x"), (NINE.upper(), "y"), True),
        (("x", NINE), (NINE, "y"), True),
        (NINE, (NINE, "y"), True),
        ((NINE, "x"), (NINE + " ten", NINE), False),
        ((NINE[:28], "x"), (NINE[:28], "y"), False),
        (NINE, NINE.replace("nine", "ten"), False),
        ("!!!", "???", False),
        ("!!!", "!!! ", True),
        ("花呗怎么还款？", "花呗 怎么还款", True),
    ],
)
def test_rows_that_nearly_equal_an_evaluation_row(
    train: str | tuple[str, str], evaluation: str | tuple[str, str], is_same: bool
) -> None:
    assert bool(near_duplicates({"t": rows(train)}, rows(evaluation)).ids) is is_same


def test_seven_words_are_no_long_text_and_eight_are() -> None:
    for count, found in ((7, 0), (8, 1)):
        text = " ".join(NINE.split()[:count])
        assert near_duplicates({"t": rows((text, "x"))}, rows((text, "y"))).counts == {"t": found}


def test_options_are_part_of_a_question() -> None:
    ask = [Example("q/train/0", "Which one?", label=0, options=("A tree.", "a car"))]
    assert near_duplicates({"q": ask}, [Example("q/test/0", "which one", options=("a car", "a tree"))]).counts == {
        "q": 1
    }
    assert near_duplicates({"q": ask}, [Example("q/test/0", "which one", options=("a car", "a bus"))]).counts == {
        "q": 0
    }


def test_rows_to_drop_are_counted_by_training_task() -> None:
    training = {
        "a": [Example("a/train/0", "same"), Example("a/train/1", "other"), Example("a/train/2", "Same")],
        "b": [Example("b/train/0", "same")],
        "c": [Example("c/train/0", "third")],
    }
    found = near_duplicates(training, [Example("e/test/0", "same")])
    assert found.ids == {"a/train/0", "a/train/2", "b/train/0"}
    assert found.counts == {"a": 2, "b": 1, "c": 0}
    assert near_duplicates({}, []).ids == frozenset()
