"""What is set aside: its size, its classes, and no text on both sides."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.data.splits import cut_off, holdout_size, normalised
from openbook.types import Example


def examples_of(rows: list[tuple[str, int | float]]) -> list[Example]:
    return [Example(f"t/train/{number}", text, label=label) for number, (text, label) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "share", "size"),
    [(999, 0.1, 100), (1_000, 0.1, 200), (1_999, 0.1, 200), (5_000, 0.1, 500), (60_000, 0.1, 5_000), (3, 0.1, 1)],
)
def test_holdout_size(rows: int, share: float, size: int) -> None:
    assert holdout_size(rows, share) == size


def test_classes_keep_their_shares() -> None:
    rows = [(f"text {number}", 0 if number < 700 else 1 if number < 970 else 2) for number in range(1_000)]
    rest, part = cut_off(examples_of(rows), 200, "task.holdout")
    assert Counter(example.label for example in part) == {0: 140, 1: 54, 2: 6}
    assert Counter(example.label for example in rest) == {0: 560, 1: 216, 2: 24}


def test_rounding_gives_the_whole_size() -> None:
    """Three equal classes and four rows: 1.33 each would round to three rows."""
    _, part = cut_off(examples_of([(str(number), number % 3) for number in range(30)]), 4, "task.holdout")
    assert sorted(Counter(example.label for example in part).values()) == [1, 1, 2]


def test_a_class_with_one_row_is_trained_on() -> None:
    rest, part = cut_off(examples_of([("only", 1), *((str(number), 0) for number in range(20))]), 10, "task.holdout")
    assert len(part) == 10
    assert {example.label for example in part} == {0}
    assert rest[0].text == "only"


def test_a_share_of_nearly_all_leaves_a_row_of_every_class() -> None:
    rest, part = cut_off(examples_of([(str(number), number % 2) for number in range(10)]), 10, "task.holdout")
    assert ({example.label for example in rest}, len(rest), len(part)) == ({0, 1}, 2, 8)


def test_the_cut_is_shuffled_and_always_the_same() -> None:
    rows = examples_of([(str(number), 0.5) for number in range(100)])
    rest, part = cut_off(rows, 10, "task.holdout")
    assert (rest, part) == cut_off(rows, 10, "task.holdout")
    positions = [int(example.text) for example in part]
    assert positions == sorted(positions)
    assert positions not in ([*range(10)], [*range(90, 100)])


def test_texts_are_equal_up_to_case_white_space_and_order() -> None:
    assert normalised(Example("a", "The  Cat\n")) == normalised(Example("b", "the cat"))
    assert normalised(Example("a", "one", "two")) == normalised(Example("b", "Two", "one"))
    assert normalised(Example("a", "one", "two")) != normalised(Example("b", "one", "three"))
    assert normalised(Example("a", "one", options=("x", "y"))) != normalised(Example("b", "one", options=("x", "z")))
    assert normalised(Example("a", "one", options=("X", "y"))) == normalised(Example("b", "one", options=("y", "x ")))
    assert normalised(Example("a", "STRASSE")) == normalised(Example("b", "straße"))


def test_too_few_different_rows_are_refused() -> None:
    with pytest.raises(UsageError, match=r"task\.holdout: 4 rows with 1 different texts are too few"):
        cut_off(examples_of([("same", 0)] * 4), 1, "task.holdout")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A", " a", "b", "c ", "C", "d", "e", "f", "g"]), st.integers(0, 2)), min_size=8
    ),
    st.integers(1, 6),
)
def test_nothing_is_lost_and_no_text_is_on_both_sides(rows: list[tuple[str, int]], size: int) -> None:
    examples = examples_of(rows)
    try:
        rest, part = cut_off(examples, size, "task.holdout")
    except UsageError:
        return
    assert sorted(rest + part, key=examples.index) == examples
    assert 0 < len(part) <= size
    assert not {normalised(example) for example in rest} & {normalised(example) for example in part}
    assert rest
