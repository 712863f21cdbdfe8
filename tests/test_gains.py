"""Means never cross roles or skip a task, pairs are pairs, and intervals widen by what is shared between tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.gains import TEACHER, Contrast, Evidence, Row, Score, contrasts, crossed_difference, gain, report
from openbook.metrics import hierarchical_difference

FACTS = {
    "mnli": ("in-domain", "nli"),
    "sst2": ("in-domain", "sentiment"),
    "qnli": ("leaky", "nli"),
    "scitail": ("out-domain near", "nli"),
    "cola": ("out-domain far", "acceptability"),
    "trec": ("out-domain far", "question"),
}
SMALL = "3L128H"


def score(arm: str, task: str, value: float, **more: Any) -> Score:
    role, family = FACTS[task]
    given = {"role": role, "family": family, "shots": None, "draw": None, "seed": 0, "metric": "accuracy"}
    seeds = {"teacher_seed": 0 if arm == "B" else None, "distillation_seed": 0}
    return Score(**{"arm": arm, "student": SMALL, "task": task, "value": value, **given, **seeds, **more})


def teacher(arm: str, task: str, value: float, **more: Any) -> Score:
    return score(arm, task, value, student=TEACHER, distillation_seed=None, **more)


def test_f22_gain_report() -> None:
    found = gain(0.84, 0.86, 0.80, 0.83)
    assert found.student == pytest.approx(0.03)
    assert (found.gap_plain, found.gap_multi_task) == pytest.approx((0.04, 0.03))
    assert found.ratio == pytest.approx(1.5)
    assert found.teacher == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("multi_task", "ratio"), [(0.842, 5.0), (0.8419, None), (0.84, None), (0.8381, None), (0.838, -5.0), (0.83, -1.0)]
)
def test_f22_the_ratio_is_not_defined_for_a_teacher_gain_below_a_fifth_of_a_point(
    multi_task: float, ratio: float | None
) -> None:
    assert gain(0.84, multi_task, 0.80, 0.81).ratio == (ratio if ratio is None else pytest.approx(ratio))


def row_of(rows: Sequence[Row], role: str, family: str | None = None, **more: Any) -> Row:
    wanted = {"student": SMALL, "task": None, "shots": None, **more}
    (found,) = [
        row
        for row in rows
        if (row.group.role, row.group.family, row.group.task, row.group.shots, row.student)
        == (role, family, wanted["task"], wanted["shots"], wanted["student"])
    ]
    return found


def test_tasks_weigh_the_same_however_many_runs_they_have() -> None:
    scores = [score("A", "cola", value, seed=seed) for seed, value in enumerate([0.1, 0.2, 0.3])]
    rows = report([*scores, score("A", "trec", 0.8)], "A", "B")
    assert row_of(rows, "out-domain far").means["A"] == pytest.approx(0.5)
    assert row_of(rows, "out-domain far", "acceptability").means["A"] == pytest.approx(0.2)
    assert row_of(rows, "out-domain far", "question", task="trec").means["A"] == pytest.approx(0.8)


def test_no_mean_crosses_roles_or_numbers_of_shots() -> None:
    scores = [score("A", task, 0.5) for task in FACTS]
    few = [replace(one, role="low-resource", shots=shots) for one in scores[3:] for shots in (16, 64)]
    roles = [row.group for row in report(scores + few, "A", "B") if row.group.family is None]
    assert [(group.role, group.shots, group.tasks) for group in roles] == [
        ("in-domain", None, ("mnli", "sst2")),
        ("leaky", None, ("qnli",)),
        ("out-domain near", None, ("scitail",)),
        ("out-domain far", None, ("cola", "trec")),
        ("low-resource", 16, ("scitail", "cola", "trec")),
        ("low-resource", 64, ("scitail", "cola", "trec")),
    ]


def test_a_mean_waits_for_all_its_tasks() -> None:
    scores = [score("A", "cola", 0.2), score("A", "trec", 0.8), score("B", "cola", 0.3)]
    rows = report(scores, "A", "B")
    assert row_of(rows, "out-domain far").means == {"A": pytest.approx(0.5), "B": None}
    assert row_of(rows, "out-domain far", "acceptability").means["B"] == pytest.approx(0.3)


def test_a_gain_stands_beside_the_means_of_the_same_tasks() -> None:
    scores = [
        teacher("A", "cola", 0.80),
        teacher("A", "trec", 0.88),
        teacher("B", "cola", 0.84),
        teacher("B", "trec", 0.88),
        *(score("A", task, 0.8) for task in ("cola", "trec")),
        *(score("B", task, 0.83) for task in ("cola", "trec")),
    ]
    rows = report(scores, "A", "B")
    found = row_of(rows, "out-domain far")
    assert found.gain is not None
    assert (found.gain.teacher, found.gain.student, found.gain.ratio) == pytest.approx((0.02, 0.03, 1.5))
    assert (found.gain.gap_plain, found.gain.gap_multi_task) == pytest.approx((0.04, 0.03))
    trec = row_of(rows, "out-domain far", "question").gain
    assert trec is not None
    assert trec.ratio is None
    above = row_of(rows, "out-domain far", student=TEACHER)
    assert (above.means["B"], above.gain) == (pytest.approx(0.86), None)
    assert row_of(report(scores[1:], "A", "B"), "out-domain far").gain is None


def test_a_run_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="a run is there twice"):
        report([score("A", "cola", 0.2), score("A", "cola", 0.3)], "A", "B")


@pytest.mark.parametrize(("fact", "value"), [("role", "leaky"), ("family", "nli"), ("metric", "f1")])
def test_a_task_that_is_judged_in_two_ways_is_refused(fact: str, value: str) -> None:
    scores = [score("A", "cola", 0.2), score("B", "cola", 0.3, **{fact: value})]
    with pytest.raises(UsageError, match=f"task 'cola', arms 'A' and 'B': {fact} is .* and '{value}'"):
        contrasts(scores, [])


@pytest.mark.parametrize("value", [84.0, float("nan"), -1.1])
def test_points_and_nan_are_no_scores(value: float) -> None:
    with pytest.raises(UsageError, match="accuracy of arm 'A' on 'cola' with seed 0 is .* fractions"):
        score("A", "cola", value)


def test_there_is_no_report_without_a_score() -> None:
    with pytest.raises(UsageError, match="there is no score"):
        report([], "A", "B")


FAR = Contrast("B - A", {"B": 1, "A": -1}, SMALL, "out-domain far")


def grid(
    arms: dict[str, float], tasks: Sequence[str] = ("cola", "trec"), distillations: int = 3, seeds: int = 2
) -> list[Score]:
    return [
        score(arm, task, value + 0.01 * distillation + 0.001 * seed, distillation_seed=distillation, seed=seed)
        for (arm, value), task, distillation, seed in product(arms.items(), tasks, range(distillations), range(seeds))
    ]


def judged(scores: Sequence[Score], contrast: Contrast = FAR) -> Evidence:
    (found,) = contrasts(scores, [contrast])
    return found


def test_pairing_removes_what_both_arms_owe_to_their_seeds() -> None:
    found = judged(grid({"A": 0.5, "B": 0.52}))
    assert (found.difference, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    assert (found.tasks, found.missing, found.distillations, found.pairs, found.planned) == (
        ("cola", "trec"),
        (),
        3,
        12,
        12,
    )
    assert found.p == pytest.approx(2**-5)  # six cells of equal sign


def test_a_contrast_reads_its_own_role_student_and_shots_only() -> None:
    scores = grid({"A": 0.5, "B": 0.52})
    other = [
        *grid({"A": 0.5, "B": 0.9}, tasks=["scitail"]),
        *(replace(one, student="6L384H", value=0.1) for one in scores),
        *(replace(one, role="low-resource", shots=16, value=0.1) for one in scores),
        *(replace(one, arm="C", value=0.1) for one in scores[:5]),
    ]
    assert judged(scores + other) == judged(scores)
    few = judged(scores + other, replace(FAR, role="low-resource", shots=16))
    assert (few.difference, few.pairs) == (0, 12)


def test_an_interaction_weighs_four_arms() -> None:
    weights = {"B+": 1, "A+": -1, "B": -1, "A": 1}
    found = judged(grid({"A": 0.5, "B": 0.52, "A+": 0.5, "B+": 0.55}), replace(FAR, weights=weights))
    assert found.difference == pytest.approx(0.03)


def test_teacher_seeds_are_averaged_before_arms_are_paired() -> None:
    scores = grid({"A": 0.5, "B": 0.52})
    second = [replace(one, teacher_seed=1, value=one.value + 0.02) for one in scores if one.arm == "B"]
    found = judged(scores + second)
    assert (found.difference, found.pairs) == (pytest.approx(0.03), 12)
    found = judged(scores + second[1:])
    assert (found.difference, found.pairs, found.planned) == (pytest.approx(0.03), 11, 12)


def test_a_distillation_seed_counts_when_all_tasks_have_it() -> None:
    scores = grid({"A": 0.5, "B": 0.52})
    late = [one for one in scores if (one.arm, one.task, one.distillation_seed) != ("B", "trec", 2)]
    found = judged(late)
    assert (found.distillations, found.pairs, found.planned) == (2, 8, 12)


def test_a_task_without_a_pair_is_named() -> None:
    scores = [one for one in grid({"A": 0.5, "B": 0.52}) if (one.arm, one.task) != ("B", "trec")]
    found = judged(scores)
    assert (found.tasks, found.missing, found.distillations, found.pairs) == (("cola",), ("trec",), 3, 6)


def test_what_is_not_there_has_no_evidence() -> None:
    found = judged(grid({"A": 0.5}))
    assert (found.difference, found.low, found.p, found.p_holm) == (None, None, None, 1)
    assert (found.tasks, found.missing, found.pairs, found.planned) == ((), ("cola", "trec"), 0, 12)
    single = judged(grid({"A": 0.5, "B": 0.52}, tasks=["cola"], distillations=1, seeds=1))
    assert (single.difference, single.low, single.p_holm) == (pytest.approx(0.02), None, 1)


def test_holms_correction_counts_every_declared_contrast() -> None:
    scores = grid({"A": 0.5, "B": 0.52, "E": 0.52})
    found = contrasts(scores, [FAR, replace(FAR, weights={"B": 1, "E": -1}), replace(FAR, role="leaky")])
    assert [one.p for one in found] == [pytest.approx(2**-5), 1, None]
    assert [one.p_holm for one in found] == pytest.approx([3 * 2**-5, 1, 1])


@pytest.mark.parametrize("weights", [{"B": 1}, {"B": 1, "A": 1}, {"B": 0, "A": 0}, {}])
def test_weights_that_compare_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="contrast 'B - A': the weights .* do not add up to 0"):
        replace(FAR, weights=weights)


def test_what_a_distillation_does_to_all_tasks_alike_does_not_average_out() -> None:
    """Ten tasks that agree within each of four seeds say no more about seeds than one task does."""
    effects = np.array([-0.02, 0.0, 0.01, 0.05])
    found, _ = crossed_difference([[[effect] for effect in effects]] * 10)
    drawn = np.repeat(list(product(effects, repeat=4)), 99, axis=0).mean(axis=1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=1e-9)
    assert found.mean == pytest.approx(0.01)


def test_tasks_that_differ_widen_the_interval_however_many_seeds_agree() -> None:
    effects = np.array([0.0, 0.01, 0.04])
    found, _ = crossed_difference([[[effect] * 5] * 6 for effect in effects])
    drawn = np.repeat(list(product(effects, repeat=3)), 99, axis=0).mean(axis=1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=1e-9)


def test_with_one_distillation_it_is_the_bootstrap_over_tasks_and_seeds() -> None:
    groups = [[0.01, 0.03, 0.02, -0.01], [0.0, 0.02], [0.05, 0.01, 0.02]]
    found, p = crossed_difference([[group] for group in groups], null=0.01)
    expected, expected_p = hierarchical_difference(groups, null=0.01)
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=5e-4)
    assert p == pytest.approx(expected_p, abs=0.02)


@pytest.mark.parametrize(
    ("shape", "p"), [((1, 1, 6), 2**-5), ((1, 6, 9), 2**-5), ((2, 3, 1), 2**-5), ((3, 1, 2), 2**-5), ((1, 3, 9), 2**-2)]
)
def test_p_is_no_smaller_than_the_signs_of_what_is_independent_allow(shape: tuple[int, int, int], p: float) -> None:
    """Fine-tunings of one student are no new distillations."""
    assert crossed_difference(np.full(shape, 0.1).tolist())[1] == pytest.approx(p)


@pytest.mark.parametrize("cells", [[], [[]], [[[0.1]]], [[[0.1], []]], [[[0.1, 0.2]], [[]]]])
def test_cells_without_differences_are_refused(cells: list[list[list[float]]]) -> None:
    with pytest.raises(UsageError, match="have no interval"):
        crossed_difference(cells)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda width: st.lists(
            st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=4), min_size=width, max_size=width), min_size=1
        )
    )
)
def test_the_interval_holds_the_mean_of_cells_and_turns_with_the_sign(cells: list[list[list[float]]]) -> None:
    found, p = crossed_difference(cells, draws=200)
    other, same_p = crossed_difference([[[-one for one in cell] for cell in row] for row in cells], draws=200)
    assert found.mean == pytest.approx(np.mean([np.mean(cell) for row in cells for cell in row]), abs=1e-12)
    assert found.low <= found.high
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert 0 < p <= 1
    assert same_p == pytest.approx(p, abs=0.02)
