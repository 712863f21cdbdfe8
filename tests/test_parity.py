"""The proof that an export equals torch: what it tries, what it finds, and what it lets through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from openbook.answers import Answers, Encoded
from openbook.config import RunError
from openbook.parity import Case, cases, closeness, cosines, cut, in_cases, lengths_up_to, prove_close, prove_equal

ROWS = [Encoded([2, *range(10 * row, 10 * row + 3 + row), 3], [0] * (5 + row)) for row in range(1, 9)]
Change = Callable[[Encoded, Any, Any], None]


def answers_of(rows: Sequence[Encoded], change: Change | None = None) -> Answers:
    """A made-up model of three classes: a row's answer depends on its word-pieces, and on nothing else."""
    logits, embedding = np.empty((len(rows), 3), np.float32), np.empty((len(rows), 4), np.float32)
    for place, row in enumerate(rows):
        random = np.random.default_rng(row.ids)
        logits[place], embedding[place] = 4 * random.normal(size=3), random.normal(size=4)
        if change is not None:
            change(row, logits[place], embedding[place])
    return Answers(logits, embedding, np.empty(0))


def changed(change: Change) -> Callable[[Sequence[Encoded]], Answers]:
    return lambda rows: answers_of(rows, change)


def test_every_length_is_tried_or_for_a_long_model_short_ones_and_the_longest() -> None:
    assert lengths_up_to(1) == [1]
    assert lengths_up_to(128) == list(range(1, 129))
    long = lengths_up_to(512)
    assert long[:32] == list(range(1, 33))
    assert long[-1] == 512
    assert all(one < two <= 1.16 * one for one, two in zip(long[32:], long[33:], strict=False))
    assert len(long) < 64


def test_cases_have_every_length_alone_and_in_odd_batches_padded_and_not() -> None:
    found = list(cases(ROWS, 20))
    assert [len(case.rows[0]) for case in found if len(case.rows) == 1] == list(range(1, 21))
    odd = [tuple(map(len, case.rows)) for case in found if len(case.rows) > 1]
    assert {len(lengths) for lengths in odd} == {3}
    assert {(length, (length + 1) // 2, 1) for length in range(1, 21)} <= set(odd)
    assert {(length,) * 3 for length in (1, 2, 11, 20)} <= set(odd)
    assert all(str(len(case.rows[0])) in case.name for case in found)
    assert len({tuple(case.rows[0].ids[1:2]) for case in found}) > 5  # not one row again and again


def test_a_cut_is_real_rows_behind_one_another() -> None:
    rows = [Encoded([2, 7, 3], [0, 0, 0]), Encoded([2, 8, 3], [0, 1, 1])]
    assert cut(rows, 1) == Encoded([2], [0])
    assert cut(rows, 5) == Encoded([2, 7, 3, 2, 8], [0, 0, 0, 0, 1])
    assert cut(rows, 8) == Encoded([2, 7, 3, 2, 8, 3, 2, 7], [0, 0, 0, 0, 1, 1, 0, 0])


def test_whole_rows_come_once_each() -> None:
    found = list(in_cases(ROWS, 3))
    assert [len(case.rows) for case in found] == [3, 3, 2]
    assert [row for case in found for row in case.rows] == ROWS
    assert found[-1].name == "rows 7 to 8"


def test_equal_answers_pass_and_the_largest_difference_is_told() -> None:
    def nudge(row: Encoded, logits: Any, embedding: Any) -> None:
        embedding[2] += 5e-5

    found = prove_equal("onnx", answers_of, changed(nudge), list(in_cases(ROWS, 3)))
    assert found["largest_difference"] == pytest.approx(5e-5, rel=0.5)
    assert prove_equal("onnx", answers_of, answers_of, list(cases(ROWS, 9)))["largest_difference"] == 0


@pytest.mark.parametrize("what", ["logits", "embedding"])
def test_a_difference_at_one_length_only_is_found_and_named(what: str) -> None:
    def wrong(row: Encoded, logits: Any, embedding: Any) -> None:
        if len(row) == 13:
            (logits if what == "logits" else embedding)[1] += 0.01

    with pytest.raises(RunError, match=rf"^onnx does not say .*: length 13, batch 1, row 1: {what} differ by 0.0"):
        prove_equal("onnx", answers_of, changed(wrong), list(cases(ROWS, 20)))


def test_a_difference_behind_padding_only_is_found() -> None:
    def wrong(rows: Sequence[Encoded]) -> Answers:
        found = answers_of(rows)
        found.embedding[[len(row) < max(map(len, rows)) for row in rows]] += 0.01
        return found

    with pytest.raises(RunError, match="length 2, batch 3 padded, row 2: embedding differ"):
        prove_equal("onnx", answers_of, wrong, list(cases(ROWS, 20)))


def test_the_tolerance_grows_with_the_numbers() -> None:
    def big(scale: float) -> Callable[[Sequence[Encoded]], Answers]:
        return lambda rows: Answers(np.zeros((len(rows), 2)), np.full((len(rows), 2), 1000.0) + scale, np.empty(0))

    assert prove_equal("onnx", big(0), big(0.05), [Case("", ROWS)])["largest_difference"] == pytest.approx(5e-5)
    with pytest.raises(RunError, match="differ by 0.0002"):
        prove_equal("onnx", big(0), big(0.2), [Case("", ROWS)])


def of_logits(*rows: list[float]) -> Callable[[Sequence[Encoded]], Answers]:
    return lambda _: Answers(np.array(rows, np.float32), np.ones((len(rows), 2), np.float32), np.empty(0))


def test_a_class_may_differ_in_a_tie_only() -> None:
    case = [Case("here", ROWS[:2])]
    prove_equal("onnx", of_logits([0, 9], [1.00005, 1.0]), of_logits([0, 9], [1.0, 1.00004]), case)
    with pytest.raises(RunError, match="here, row 2: logits differ by 0.0011"):
        prove_equal("onnx", of_logits([0, 9], [1.01, 1.0]), of_logits([0, 9], [1.0, 1.01]), case)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    def wrong(row: Encoded, logits: Any, embedding: Any) -> None:
        embedding[0] = value

    with pytest.raises(RunError, match="finite: False"):
        prove_equal("onnx", answers_of, changed(wrong), list(in_cases(ROWS, 3)))
    with pytest.raises(RunError, match="finite: False"):
        prove_close_here(wrong)


def test_swapped_outputs_are_refused() -> None:
    def swapped(rows: Sequence[Encoded]) -> Answers:
        said = answers_of(rows)
        return Answers(said.embedding, said.logits, said.labels)

    with pytest.raises(RunError, match=r"logits \(3, 4\), finite: True, where torch gives \(3, 3\)"):
        prove_equal("onnx", answers_of, swapped, list(in_cases(ROWS, 3)))


def test_an_engine_that_fails_at_one_length_is_refused() -> None:
    def failing(rows: Sequence[Encoded]) -> Answers:
        if len(rows[0]) == 7:
            raise ValueError("no such shape\nand more")
        return answers_of(rows)

    with pytest.raises(RunError, match="^onnx cannot answer length 7, batch 1: no such shape$"):
        prove_equal("onnx", answers_of, failing, list(cases(ROWS, 20)))


# --- int8 -------------------------------------------------------------------------------------------------------------

MANY = [Encoded([2, *range(100 * row, 100 * row + 3 + row % 9), 3], [0] * (5 + row % 9)) for row in range(1, 201)]


def prove_close_here(change: Change, agreement: float = 0.98) -> dict[str, float]:
    return prove_close(
        "int8",
        answers_of,
        changed(change),
        list(in_cases(MANY, 32)),
        list(cases(ROWS, 20)),
        "classification",
        agreement,
    )


def test_answers_that_are_near_enough_pass_and_are_measured() -> None:
    def nudge(row: Encoded, logits: Any, embedding: Any) -> None:
        logits[0] += 0.02
        embedding[1] += 0.02

    found = prove_close_here(nudge)
    assert found["agreement"] >= 0.98
    assert 0 < found["mean_shift"] < found["worst_shift"] < 0.01
    assert 0.99 < found["worst_cosine"] < found["mean_cosine"] < 1


def number(row: Encoded) -> int:
    """Of a whole row, from 1; 0 for one that was cut."""
    return row.ids[1] // 100 if len(row) > 4 else 0


def test_too_many_other_classes_are_refused_by_the_share_asked_for() -> None:
    def other(row: Encoded, logits: Any, embedding: Any) -> None:
        if number(row) in range(1, 11):  # of 200
            logits[:] = np.roll(logits, 1)

    with pytest.raises(RunError, match=r"on 200 rows: agreement is 0.9500, and at least 0.98 is allowed"):
        prove_close_here(other)
    with pytest.raises(RunError, match="shift is"):
        prove_close_here(other, agreement=0.95)


def test_probabilities_that_all_move_are_refused() -> None:
    def sharper(row: Encoded, logits: Any, embedding: Any) -> None:
        logits *= 1.3

    with pytest.raises(RunError, match=r"mean shift is 0\.0[2-9]\d+, and at most 0.02 is allowed"):
        prove_close_here(sharper)


def test_one_probability_that_moves_far_is_refused() -> None:
    def less_sure(row: Encoded, logits: Any, embedding: Any) -> None:
        if number(row) == 150:
            logits[:] = 0
            logits[int(answers_of([row]).logits.argmax())] = 0.01

    with pytest.raises(RunError, match=r"worst shift is 0\.[3-9]\d+, and at most 0.35 is allowed"):
        prove_close_here(less_sure)


def test_embeddings_that_turn_are_refused_on_the_whole_and_one_by_one() -> None:
    def turned(size: float, length: int | None) -> Change:
        def change(row: Encoded, logits: Any, embedding: Any) -> None:
            if length is None or len(row) == length:
                embedding[:] += size * np.linalg.norm(embedding) * np.array([1, -1, 1, -1])

        return change

    with pytest.raises(RunError, match="mean cosine is 0.9[0-8]"):
        prove_close_here(turned(0.15, None))
    with pytest.raises(RunError, match=r"length 17, batch 1, row 1: its embedding has a cosine of (0|-0)\.\d+ with"):
        prove_close_here(turned(3.0, 17))


def test_scores_must_correlate_and_stay_near() -> None:
    wanted = np.array([[0.0], [1.0], [2.0], [3.0]])
    found = closeness(wanted, wanted + 0.1, "regression")
    assert found["agreement"] == pytest.approx(1)
    assert found["mean_shift"] == found["worst_shift"] == pytest.approx(0.1 / wanted.std())
    assert closeness(wanted, -wanted, "regression")["agreement"] == pytest.approx(-1)
    same = np.ones((4, 1))
    assert closeness(same, same, "regression") == {"agreement": 1.0, "mean_shift": 0.0, "worst_shift": 0.0}
    assert closeness(wanted, same, "regression")["agreement"] == 0


@pytest.mark.parametrize(("shift", "told"), [(0.05, None), (0.15, "mean shift is 0.1500, and at most 0.1 is")])
def test_scores_are_measured_in_standard_deviations(shift: float, told: str | None) -> None:
    deviation = np.concatenate([answers_of([row]).logits[:, :1] for row in MANY]).std()

    def scores(move: float) -> Callable[[Sequence[Encoded]], Answers]:
        def run(rows: Sequence[Encoded]) -> Answers:
            said = answers_of(rows)
            return Answers(said.logits[:, :1] + move * deviation, said.embedding, said.labels)

        return run

    arguments = ("int8", scores(0), scores(shift), list(in_cases(MANY, 32)), [], "regression", 0.98)
    if told is None:
        assert prove_close(*arguments)["mean_shift"] == pytest.approx(0.05, rel=1e-3)
        return
    with pytest.raises(RunError, match=told):
        prove_close(*arguments)


def test_cosines_are_of_rows_and_zero_equals_zero_only() -> None:
    one, two = np.array([[1.0, 0], [1, 1], [0, 0], [0, 0]]), np.array([[2.0, 0], [1, -1], [0, 0], [1, 0]])
    assert cosines(one, two).tolist() == [1, 0, 1, 0]


def test_of_several_labels_every_decision_counts() -> None:
    wanted, given = np.array([[1.0, -1], [1, 1]]), np.array([[1.0, 0.1], [1, 1]])
    found = closeness(wanted, given, "multi_label")
    assert found["agreement"] == 0.75
    shift = 1 / (1 + np.exp(-0.1)) - 1 / (1 + np.exp(1))
    assert found["worst_shift"] == pytest.approx(shift)
    assert found["mean_shift"] == pytest.approx(shift / 4)
