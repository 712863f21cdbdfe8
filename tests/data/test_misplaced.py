"""Labels that stand at other rows: all are kept, each fits its row, and hardly any is right."""

from __future__ import annotations

import random

from openbook.data.misplaced import same_place, with_label_of, with_labels_moved
from openbook.types import Example, Span


def moved(rows: list[Example]) -> list[Example]:
    return with_labels_moved(rows, random.Random(0))


def test_classes_and_targets_move_between_all_rows() -> None:
    rows = [Example(str(n), f"text {n}", label=n) for n in range(50)]
    found = moved(rows)
    assert [row.text for row in found] == [row.text for row in rows]
    assert sorted(int(row.label) for row in found if isinstance(row.label, int)) == list(range(50))
    assert sum(one.label == two.label for one, two in zip(rows, found, strict=True)) < 8
    assert moved(rows) == found


def test_tags_move_between_rows_of_as_many_words() -> None:
    rows = [
        Example(f"{length}-{n}", "", words=("w",) * length, label=tuple((n + i) % 5 for i in range(length)))
        for n in range(12)
        for length in (2, 3)
    ]
    found = moved(rows)
    assert all(isinstance(row.label, tuple) and len(row.label) == len(row.words) for row in found)
    assert sum(one.label == two.label for one, two in zip(rows, found, strict=True)) < 10
    assert sorted(map(str, (row.label for row in found))) == sorted(map(str, (row.label for row in rows)))


def test_right_options_move_between_questions_of_as_many_options() -> None:
    rows = [Example(str(n), "q", options=("o",) * (2 + n % 3), label=n % (2 + n % 3)) for n in range(30)]
    found = moved(rows)
    assert all(isinstance(row.label, int) and row.label < len(row.options) for row in found)
    assert sum(one.label == two.label for one, two in zip(rows, found, strict=True)) < 25


def test_an_answer_is_words_of_the_rows_own_passage() -> None:
    passages = [f"The {animal} sat on a {place} today." for animal, place in (("cat", "mat"), ("dog", "log"))]
    rows = [
        Example("0", "who?", passages[0], Span(0, 7), answers=("The cat",)),
        Example("1", "where?", passages[1], Span(17, 20), answers=("log",)),
    ]
    found = [with_label_of(rows[0], rows[1]), with_label_of(rows[1], rows[0])]
    assert [row.answers for row in found] == [("mat",), ("The dog",)]
    for row in found:
        assert isinstance(row.label, Span)
        assert row.text_pair is not None
        assert row.text_pair[row.label.start : row.label.end] == row.answers[0]


def test_an_answer_longer_than_the_passage_is_all_of_it_and_none_stays_none() -> None:
    assert same_place(Span(0, 11), "a b c d e f", "one two") == Span(0, 7)
    assert same_place(Span(10, 11), "a b c d e f", "one two") == Span(4, 7)
    row = Example("0", "who?", "one two", Span(0, 3), answers=("one",))
    assert with_label_of(row, Example("1", "why?", "three", None)) == Example("0", "who?", "one two", None)
