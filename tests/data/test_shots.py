"""A draw is exact in size, the same for everybody, nested in larger ones, and apart from what is selected by."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.data.shots import draw
from openbook.data.splits import normalised
from openbook.types import Example, Span

LABELS = ("no", "maybe", "yes")


def rows_of(*counts: int) -> list[Example]:
    """So many rows of each class, the classes taking turns."""
    rows = [(place, label) for label, count in enumerate(counts) for place in range(count)]
    return [Example(f"t/train/{label}-{place}", f"text {label} {place}", label=label) for place, label in sorted(rows)]


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


def test_both_sides_have_as_many_of_each_class_as_asked_for() -> None:
    for side in draw(rows_of(40, 33, 90), 16, 0, LABELS):
        assert Counter(row.label for row in side) == {0: 16, 1: 16, 2: 16}


def test_the_sides_share_no_row_even_if_every_row_is_drawn() -> None:
    train, select = draw(rows_of(32, 32), 16, 0, LABELS[:2])
    assert not set(ids(train)) & set(ids(select))
    assert len(train) + len(select) == 64


def test_five_draws_differ_and_stay_the_same() -> None:
    rows = rows_of(100, 100)
    found = [ids(draw(rows, 16, number, LABELS[:2])[0]) for number in range(5)]
    assert len({tuple(one) for one in found}) == 5
    assert found == [ids(draw(list(rows), 16, number, LABELS[:2])[0]) for number in range(5)]
    assert ids(draw(rows_of(4), 1, 0, ["a"])[0]) == ["t/train/0-3"]  # fixed for ever: scores are published with it


def test_a_draw_does_not_depend_on_the_order_of_rows() -> None:
    rows = rows_of(50, 50)
    for side, other in zip(draw(rows, 16, 1, LABELS[:2]), draw(rows[::-1], 16, 1, LABELS[:2]), strict=True):
        assert ids(side) == ids(other)[::-1]


def test_a_small_draw_lies_in_a_larger_one() -> None:
    rows = rows_of(200, 150, 130)
    small, large = draw(rows, 16, 2, LABELS), draw(rows, 64, 2, LABELS)
    for less, more in zip(small, large, strict=True):
        assert set(ids(less)) < set(ids(more))


def test_rows_keep_the_order_of_the_task() -> None:
    rows = rows_of(50, 50)
    train, select = draw(rows, 16, 0, LABELS[:2])
    for side in (train, select):
        assert side == [row for row in rows if row in side]


def test_a_regression_is_spread_over_its_targets() -> None:
    rows = [Example(f"t/train/{place}", f"text {place}", label=place / 10) for place in range(200)]
    for side in draw(rows, 16, 0, None):
        assert Counter(int(row.label // 5) for row in side) == {0: 16, 1: 16, 2: 16, 3: 16}


def test_targets_that_are_all_equal_still_fill_their_bins() -> None:
    train, select = draw([Example(str(place), f"text {place}", label=5.0) for place in range(8)], 1, 0, None)
    assert (len(train), len(select)) == (4, 4)


def test_too_small_a_class_is_refused_by_name_and_number() -> None:
    with pytest.raises(UsageError, match=r"class 'maybe' has 31 rows of different text: 32 are needed for shots=16"):
        draw(rows_of(40, 31, 40), 16, 0, LABELS)
    with pytest.raises(UsageError, match="class 'yes' has 0 rows"):
        draw(rows_of(40, 40), 16, 0, LABELS)
    with pytest.raises(UsageError, match="bin 1 of 4 of the targets has 1 rows"):
        draw([Example(str(place), f"text {place}", label=0.5) for place in range(4)], 1, 0, None)


def test_equal_texts_count_once() -> None:
    rows = [*rows_of(2), Example("t/train/again", "TEXT 0  1", label=0)]
    with pytest.raises(UsageError, match="has 2 rows of different text"):
        draw(rows, 2, 0, ["no"])


@pytest.mark.parametrize(("shots", "number"), [(0, 0), (16, 5), (16, -1)])
def test_only_five_draws_of_one_shot_or_more(shots: int, number: int) -> None:
    with pytest.raises(UsageError, match=f"shots={shots}, draw={number}"):
        draw(rows_of(100), shots, number, ["no"])


@pytest.mark.parametrize("label", [1, Span(0, 2), (0, 1), None])
def test_a_task_without_classes_or_targets_is_refused(label: object) -> None:
    with pytest.raises(UsageError, match="row q/train/0: .* classes, or numbers"):
        draw([Example("q/train/0", "text", label=label)], 1, 0, None)  # type: ignore[arg-type]
    if label != 1:
        with pytest.raises(UsageError, match="row q/train/0: .* is no index"):
            draw([Example("q/train/0", "text", label=label)], 1, 0, LABELS)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A", " a", "b", "c", "C ", "d", "e", "f", "g"]), st.integers(0, 1)), min_size=12
    ),
    st.integers(1, 2),
    st.integers(0, 4),
)
def test_no_text_is_on_both_sides_or_twice(rows: list[tuple[str, int]], shots: int, number: int) -> None:
    examples = [Example(str(place), text, label=label) for place, (text, label) in enumerate(rows)]
    try:
        train, select = draw(examples, shots, number, LABELS[:2])
    except UsageError:
        return
    texts = [normalised(row) for row in train + select]
    assert len(set(texts)) == len(texts) == 4 * shots
