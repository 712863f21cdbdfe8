"""Which layers and relation heads of a teacher and a student of other shapes answer each other."""

from __future__ import annotations

from typing import Literal

from openbook.config import UsageError

Mapping = Literal["uniform", "top", "bottom"] | tuple[int, ...]

MOST_RELATION_HEADS = 64


def layer_map(teacher_layers: int, student_layers: int, mapping: Mapping) -> tuple[int, ...]:
    """The teacher layer that each student layer imitates, both numbered from 1 (TinyBERT, section 3.1, g(m)).

    `uniform` takes the last layer of each of M equal groups, `top` the last M layers, `bottom` the first M.
    Raises UsageError if the counts do not fit the mapping.
    """
    if isinstance(mapping, tuple):
        return _explicit(teacher_layers, student_layers, mapping)
    if mapping == "uniform":
        return copied_layers(teacher_layers, student_layers, "last")
    if student_layers > teacher_layers:
        raise UsageError(
            f"student.layers={student_layers} exceeds the teacher's {teacher_layers} layers: "
            f"terms.layer_mapping={mapping!r} needs at most as many"
        )
    first = 1 if mapping == "bottom" else teacher_layers - student_layers + 1
    return tuple(range(first, first + student_layers))


def copied_layers(teacher_layers: int, student_layers: int, which: Literal["last", "first"]) -> tuple[int, ...]:
    """The teacher layers a student may start from: the last or first of each of M equal groups, numbered from 1.

    Raises UsageError if the teacher's layers do not fall into M equal groups.
    """
    if teacher_layers % student_layers:
        fits = [layers for layers in range(1, teacher_layers + 1) if teacher_layers % layers == 0]
        raise UsageError(
            f"student.layers={student_layers} does not divide the teacher's {teacher_layers} layers; these do: {fits}"
        )
    group = teacher_layers // student_layers
    first = group if which == "last" else 1
    return tuple(range(first, teacher_layers + 1, group))


def relation_heads(
    teacher_width: int, student_width: int, wanted: int | None, key: str = "terms.relation_heads"
) -> int:
    """The number of heads both widths are split into for relations; it need not be either model's own.

    Without a wish: 48 if it divides both widths, else 64, else the largest common divisor up to 64.
    Raises UsageError, naming the `key` of the recipe, if the wanted number does not divide both.
    """
    fits = [n for n in range(1, min(teacher_width, student_width) + 1) if teacher_width % n == student_width % n == 0]
    if wanted is None:
        return next((heads for heads in (48, 64) if heads in fits), max(n for n in fits if n <= MOST_RELATION_HEADS))
    if wanted not in fits:
        raise UsageError(
            f"{key}={wanted} must divide the teacher's width {teacher_width} and "
            f"student.hidden_size={student_width}; these do: {fits}"
        )
    return wanted


def _explicit(teacher_layers: int, student_layers: int, mapping: tuple[int, ...]) -> tuple[int, ...]:
    if len(mapping) != student_layers:
        raise UsageError(
            f"terms.layer_mapping={list(mapping)} names {len(mapping)} teacher layers for "
            f"student.layers={student_layers}; name one for each"
        )
    outside = [layer for layer in mapping if not 1 <= layer <= teacher_layers]
    if outside:
        raise UsageError(
            f"terms.layer_mapping={list(mapping)} names layers {outside}; the teacher's are 1 to {teacher_layers}"
        )
    return mapping
