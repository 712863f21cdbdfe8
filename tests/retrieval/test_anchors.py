"""The task's texts as queries (fixture F4 of the specification), and their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from openbook.config import CorpusSettings, FileSource
from openbook.retrieval.anchors import Anchor, anchors_of, load_anchors, save_anchors
from openbook.retrieval.passages import key
from openbook.types import Example

ROWS = [Example("t/0", "The cat sat.", "A dog ran!", 1), Example("t/1", "the cat sat", "Birds fly.", 0)]


def settings(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("each", {"the cat sat": 2, "a dog ran": 1, "birds fly": 1}),
        ("concat", {"the cat sat a dog ran": 1, "the cat sat birds fly": 1}),
        ("first", {"the cat sat": 2}),
        ("second", {"a dog ran": 1, "birds fly": 1}),
    ],
)
def test_anchors_are_unique_by_key_and_count_their_rows(mode: str, expected: dict[str, int]) -> None:
    found = anchors_of(ROWS, settings(anchor_mode=mode), set())
    assert [(anchor.key, anchor.weight) for anchor in found] == list(expected.items())
    assert all(key(anchor.text) == anchor.key for anchor in found)
    assert len({anchor.id for anchor in found}) == len(found)


def test_an_anchor_knows_its_rows_fields_and_their_labels() -> None:
    cat, dog, birds = anchors_of(ROWS, settings(), set())
    assert cat == Anchor("t/0#0", "The cat sat.", "the cat sat", ("t/0", "t/1"), ("text", "text"), (0, 1))
    assert (dog.rows, dog.fields, dog.labels) == (("t/0",), ("text_pair",), (1,))
    assert birds.id == "t/1#1"
    (both, _) = anchors_of(ROWS, settings(anchor_mode="concat"), set())
    assert (both.text, both.rows, both.fields) == ("The cat sat. A dog ran!", ("t/0",), ("both",))
    scores = [Example("t/0", "the cat sat", label=2.5), Example("t/1", "a dog ran")]
    assert [anchor.labels for anchor in anchors_of(scores, settings(), set())] == [(), ()]


def test_the_first_occurrence_is_kept_and_a_row_counts_once() -> None:
    (anchor,) = anchors_of([Example("t/7", "A dog ran!", "a dog ran")], settings(), set())
    assert anchor == Anchor("t/7#0", "A dog ran!", "a dog ran", ("t/7", "t/7"), ("text", "text_pair"))
    assert anchor.weight == 1


@pytest.mark.parametrize("mode", ["each", "concat"])
def test_texts_that_equal_evaluation_text_are_no_anchors(mode: str) -> None:
    found = anchors_of([*ROWS, Example("t/2", "...")], settings(anchor_mode=mode), {"the cat sat"})
    assert [(anchor.key, anchor.fields) for anchor in found] == [
        ("a dog ran", ("text_pair",)),
        ("birds fly", ("text_pair",)),
    ]
    joined = anchors_of(ROWS, settings(anchor_mode="concat"), {"the cat sat a dog ran"})
    assert [anchor.key for anchor in joined] == ["the cat sat birds fly"]


def test_short_texts_are_no_anchors_if_the_recipe_says_so() -> None:
    assert [anchor.key for anchor in anchors_of(ROWS, settings(anchor_min_words=3), set())] == [
        "the cat sat",
        "a dog ran",
    ]


def test_a_long_text_is_queried_by_sentence() -> None:
    sentence = "w " * 63 + "end. "
    whole = [Example("t/0", sentence * 2)]  # 128 words
    split = [Example("t/0", "Leaked here. " + sentence + "Another one. " + sentence)]
    assert [anchor.text for anchor in anchors_of(whole, settings(), set())] == [sentence * 2]
    first, second = anchors_of(split, settings(), {"leaked here"})
    assert (first.id, first.text, first.rows, first.fields) == ("t/0#1", sentence.strip(), ("t/0",), ("text",))
    assert (second.id, second.text) == ("t/0#2", "Another one.")


def test_labels_and_repeated_rows_change_no_query() -> None:
    once = anchors_of(ROWS, settings(), set())
    other = anchors_of([replace(row, label=1 - row.label) for row in ROWS], settings(), set())
    assert [replace(anchor, labels=()) for anchor in other] == [replace(anchor, labels=()) for anchor in once]
    again = anchors_of([*ROWS, replace(ROWS[0], id="t/2")], settings(), set())
    assert [anchor.weight for anchor in again] == [3, 2, 1]
    assert [(anchor.id, anchor.text) for anchor in again] == [(anchor.id, anchor.text) for anchor in once]


def test_anchors_come_back_from_their_file(tmp_path: Path) -> None:
    anchors = anchors_of(ROWS, settings(), set())
    save_anchors(anchors, tmp_path)
    assert load_anchors(tmp_path) == anchors
    assert pq.read_table(tmp_path / "anchors.parquet")["weight"].to_pylist() == [2, 1, 1]
    save_anchors([], tmp_path)
    assert load_anchors(tmp_path) == []
