"""Layer maps and relation heads, against the published examples and tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.distillation.mapping import Mapping, copied_layers, layer_map, relation_heads


@pytest.mark.parametrize(
    ("student_layers", "mapping", "expected"),
    [
        (4, "uniform", (3, 6, 9, 12)),
        (6, "uniform", (2, 4, 6, 8, 10, 12)),
        (12, "uniform", tuple(range(1, 13))),
        (4, "top", (9, 10, 11, 12)),
        (5, "top", (8, 9, 10, 11, 12)),
        (4, "bottom", (1, 2, 3, 4)),
        (3, (1, 12, 4), (1, 12, 4)),
    ],
)
def test_a_twelve_layer_teacher_is_mapped_as_published(
    student_layers: int, mapping: Mapping, expected: tuple[int, ...]
) -> None:
    assert layer_map(12, student_layers, mapping) == expected


def test_a_student_is_copied_from_the_last_or_first_layer_of_each_group() -> None:
    assert copied_layers(12, 6, "last") == (2, 4, 6, 8, 10, 12)
    assert copied_layers(12, 6, "first") == (1, 3, 5, 7, 9, 11)
    assert copied_layers(12, 4, "first") == (1, 4, 7, 10)


@pytest.mark.parametrize("student_layers", [5, 13, 24])
def test_layers_that_do_not_divide_are_refused_with_those_that_do(student_layers: int) -> None:
    message = rf"student\.layers={student_layers} .* 12 layers; these do: \[1, 2, 3, 4, 6, 12\]"
    with pytest.raises(UsageError, match=message):
        layer_map(12, student_layers, "uniform")
    with pytest.raises(UsageError, match=message):
        copied_layers(12, student_layers, "first")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("top", r"student\.layers=3 exceeds the teacher's 2 layers: terms\.layer_mapping='top'"),
        ("bottom", r"student\.layers=3 exceeds the teacher's 2 layers: terms\.layer_mapping='bottom'"),
        ((1, 2), r"\[1, 2\] names 2 teacher layers for student\.layers=3"),
        ((1, 2, 3), r"names layers \[3\]; the teacher's are 1 to 2"),
        ((0, 1, 2), r"names layers \[0\]; the teacher's are 1 to 2"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(mapping: Mapping, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer_map(2, 3, mapping)


@pytest.mark.parametrize(
    ("teacher_width", "heads_by_student"),
    [(768, {768: 48, 384: 48, 312: 24, 256: 64, 128: 64}), (1024, {768: 64, 384: 64, 312: 8, 256: 64, 128: 64})],
)
def test_relation_heads_follow_the_table(teacher_width: int, heads_by_student: dict[int, int]) -> None:
    for student_width, heads in heads_by_student.items():
        assert relation_heads(teacher_width, student_width, None) == heads


def test_relation_heads_that_do_not_divide_are_refused_with_those_that_do() -> None:
    assert relation_heads(768, 312, 12) == 12
    with pytest.raises(
        UsageError, match=r"relation_heads=48 .* 768 and student\.hidden_size=312; .*\[1, 2, 3, 4, 6, 8"
    ):
        relation_heads(768, 312, 48)
    with pytest.raises(UsageError, match=r"these do: \[1, 2, 4\]"):
        relation_heads(12, 8, 3)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(teacher_width=st.integers(1, 300), student_width=st.integers(1, 300))
def test_relation_heads_always_divide_both_widths(teacher_width: int, student_width: int) -> None:
    heads = relation_heads(teacher_width, student_width, None)
    assert math.gcd(teacher_width, student_width) % heads == 0
    assert heads <= 64
