"""A file of the user's own is understood as a person would, or refused."""

from typing import Any

import pytest

from openbook.config import UsageError
from openbook.data.inspect import Guess, guess_columns

Columns = dict[str, list[Any]]
TEXTS = [f"a sentence with the number {number}" for number in range(60)]
OTHERS = [f"another, shorter {number}" for number in range(60)]
YES_NO = ["no", "yes", "no"] * 20
CLASSES = Guess("text", None, "label", "classification", ("no", "yes"))


def guess(columns: Columns) -> Guess:
    return guess_columns([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": TEXTS, "label": YES_NO}, CLASSES),
        (
            {"region": ["eu", "us", "us"] * 20, "text": TEXTS, "verdict": YES_NO},
            Guess("text", None, "verdict", "classification", ("no", "yes")),
        ),
        ({"label": YES_NO, "id": [*range(60)], "text": TEXTS}, CLASSES),
        ({"Text": TEXTS, "LABEL": YES_NO}, Guess("Text", None, "LABEL", "classification", ("no", "yes"))),
        (
            {"tweet": OTHERS, "long": TEXTS, "target": [0, 1] * 30},
            Guess("tweet", None, "target", "classification", ("0", "1")),
        ),
        ({"a": OTHERS, "b": TEXTS, "c": YES_NO}, Guess("b", None, "c", "classification", ("no", "yes"))),
        (
            {"text": TEXTS, "stars": [*map(str, [1, 2, 10] * 20)]},
            Guess("text", None, "stars", "classification", ("1", "2", "10")),
        ),
        (
            {"text": TEXTS, "score": [f"{number / 7:.2f}" for number in range(60)]},
            Guess("text", None, "score", "regression", None),
        ),
        (
            {"text": TEXTS, "label": [["joy", "fear"], [], ["joy"]] * 20},
            Guess("text", None, "label", "multi_label", ("fear", "joy")),
        ),
        (
            {"text": TEXTS, "label": ["joy|fear", "", "joy", "fear"] * 15},
            Guess("text", None, "label", "multi_label", ("fear", "joy")),
        ),
        (
            {"text": TEXTS, "label": ["a|b", "c"] * 30},  # names may hold the sign
            Guess("text", None, "label", "classification", ("a|b", "c")),
        ),
        ({"text": TEXTS, "score": [*range(60)]}, Guess("text", None, "score", "regression", None)),
        (
            {"premise": TEXTS, "hypothesis": OTHERS, "label": YES_NO},
            Guess("premise", "hypothesis", "label", "classification", ("no", "yes")),
        ),
        (
            {"label": YES_NO, "question": TEXTS, "sentence": OTHERS},
            Guess("question", "sentence", "label", "classification", ("no", "yes")),
        ),
        ({"question": TEXTS, "answer": YES_NO}, Guess("question", None, "answer", "classification", ("no", "yes"))),
        (
            {"title": ["news", "sport", "news"] * 20, "body": TEXTS, "y": YES_NO},
            Guess("body", None, "y", "classification", ("no", "yes")),
        ),
        (
            {"text": TEXTS, "label": [True, False] * 30},
            Guess("text", None, "label", "classification", ("false", "true")),
        ),
        ({"text": TEXTS, "label": [None, "no", "yes"] * 20}, CLASSES),
        ({"title": OTHERS, "category": YES_NO}, Guess("title", None, "category", "classification", ("no", "yes"))),
    ],
)
def test_columns_are_guessed(columns: Columns, expected: Guess) -> None:
    assert guess(columns) == expected


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": TEXTS, "id": [*range(60)]}, "no column looks like a label.*'text', 'id'"),
        ({"id": [*range(60)], "label": YES_NO}, "no column looks like text.*'id', 'label'"),
        ({"n": ["1", "2"] * 30, "label": YES_NO}, "no column looks like text"),
    ],
)
def test_what_cannot_be_guessed_is_said(columns: Columns, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        guess(columns)
