"""Differences are paired by seed, nothing missing is averaged over in silence, and no verdict outruns its evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openbook.comparison import summarise
from openbook.config import UsageError
from openbook.results import rows_file
from openbook.row_answers import RowAnswers

Scores = Mapping[str, Mapping[str, Sequence[float | str | None]]]  # task -> arm -> by seed: a score, "failed", or None
STEADY = [0.0, 0.001, -0.001, 0.002, -0.002]  # what a seed adds


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def run_of(task: str, arm: str, seed: int, score: float | str, **more: Any) -> dict[str, Any]:
    one = {"task": task, "arm": arm, "seed": seed, "rates": {"stage1": 1e-3}, "seconds": 2.0}
    if score == "failed":
        return {**one, "status": "failed", "error": "the loss is nan", **more}
    return {**one, "status": "ok", "error": None, "holdout": score, "scores": {"accuracy": score}, **more}


def grid_of(scores: Scores, **more: Any) -> dict[str, Any]:
    arms = dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm)
    tasks = {
        task: {
            "title": task.upper(),
            "metric": "accuracy",
            "metrics": ["accuracy"],
            "seeds": list(range(max(map(len, by_arm.values())))),
        }
        for task, by_arm in scores.items()
    }
    planned = {arm: {"title": f"the arm {arm}", "tasks": [t for t in scores if arm in scores[t]]} for arm in arms}
    first = next(iter(arms))
    return {"name": "g", "title": "G", "scale": "s", "arms": planned, "tasks": tasks, "baseline": first} | more


def folder_of(folder: Path, scores: Scores, **more: Any) -> Path:
    write(folder / "grid.json", grid_of(scores, **more))
    for task, by_arm in scores.items():
        for arm, by_seed in by_arm.items():
            for seed, score in enumerate(by_seed):
                if score is not None:
                    write(folder / task / arm / f"seed-{seed}.json", run_of(task, arm, seed, score))
    return folder


def claim(*pairs: tuple[str, str], name: str = "H", test: str = "greater", margin: float = 0.0) -> dict[str, Any]:
    return {"name": name, "claim": "x", "pairs": [list(pair) for pair in pairs], "test": test, "margin": margin}


def around(mean: float, noise: Sequence[float] = STEADY) -> list[float]:
    return [mean + one for one in noise]


def verdict_of(folder: Path, scores: Scores, *claims: dict[str, Any]) -> str:
    found = summarise(folder_of(folder, scores, hypotheses=list(claims)))
    return str(found["hypotheses"][0]["verdict"])


def two_tasks(gain: float, noise: Sequence[float] = STEADY) -> Scores:
    """Arm B against A on two tasks; `noise` is what the gain varies by over seeds."""
    return {task: {"A": around(base), "B": around(base + gain, [2 * n for n in noise])} for task, base in BASES.items()}


BASES = {"cola": 0.3, "sst": 0.8}


@pytest.mark.parametrize(("gain", "verdict"), [(0.02, "holds"), (-0.02, "does not hold"), (0.0003, "not shown")])
def test_a_claim_holds_is_contradicted_or_is_not_shown(tmp_path: Path, gain: float, verdict: str) -> None:
    assert verdict_of(tmp_path, two_tasks(gain), claim(("B", "A"))) == verdict


def test_equal_scores_show_nothing(tmp_path: Path) -> None:
    scores = {"cola": {"A": around(0.3), "B": around(0.3)}, "sst": {"A": around(0.8), "B": around(0.8)}}
    found = summarise(folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))]))
    (pair,) = found["hypotheses"][0]["pairs"]
    assert (pair["difference"], pair["low"], pair["high"], pair["p"]) == (0, 0, 0, 1)
    assert found["hypotheses"][0]["verdict"] == "not shown"
    assert found["best"] == {"cola": None, "sst": None}
    assert found["best_average"] is None


def test_a_claim_needs_all_its_pairs(tmp_path: Path) -> None:
    scores = {task: {**arms, "C": arms["B"]} for task, arms in two_tasks(0.02).items()}
    assert verdict_of(tmp_path / "1", scores, claim(("B", "A"), ("C", "A"))) == "holds"
    assert verdict_of(tmp_path / "2", scores, claim(("B", "A"), ("B", "C"))) == "not shown"
    assert verdict_of(tmp_path / "3", scores, claim(("B", "A"), ("A", "C"))) == "does not hold"


def test_a_claim_is_as_uncertain_as_its_most_uncertain_pair(tmp_path: Path) -> None:
    """B against A: 12 pairs over two tasks; C against A: 6 pairs of equal sign; A against B: on the wrong side."""
    scores = {"cola": {"A": [0.3] * 6, "B": [0.5] * 6, "C": [0.5] * 6}, "sst": {"A": [0.3] * 6, "B": [0.5] * 6}}
    claims = [claim(("B", "A")), claim(("B", "A"), ("C", "A")), claim(("A", "B"))]
    found = summarise(folder_of(tmp_path, scores, hypotheses=claims))["hypotheses"]
    assert [one["p"] for one in found] == pytest.approx([2**-11, 2**-5, 1])
    assert found[2]["verdict"] == "does not hold"


def test_a_small_p_is_not_enough_when_the_interval_includes_zero(tmp_path: Path) -> None:
    """One seed of ten went badly: shifted upwards that never happens, drawn thrice it eats up the gain."""
    scores = {"cola": {"A": [0.3] * 10, "B": [0.31] * 9 + [0.27]}}
    found = summarise(folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))]))
    (pair,) = found["hypotheses"][0]["pairs"]
    assert pair["p"] < 0.01
    assert pair["low"] < 0 < pair["difference"]
    assert found["hypotheses"][0]["verdict"] == "not shown"
    assert found["best"]["cola"] is None


@pytest.mark.parametrize(
    ("gain", "margin", "verdict"),
    [(-0.005, 1.0, "holds"), (-0.005, 0.55, "not shown"), (-0.02, 1.0, "does not hold"), (0.0, 1.0, "holds")],
)
def test_not_worse_allows_a_margin_in_points(tmp_path: Path, gain: float, margin: float, verdict: str) -> None:
    asked = claim(("B", "A"), test="not_worse", margin=margin)
    assert verdict_of(tmp_path, two_tasks(gain), asked) == verdict


@pytest.mark.parametrize(("seeds", "verdict"), [(2, "not shown"), (5, "not shown"), (6, "holds")])
def test_fewer_than_six_pairs_show_nothing_however_clear(tmp_path: Path, seeds: int, verdict: str) -> None:
    scores = {"cola": {"A": [0.3] * seeds, "B": [0.5] * seeds}}
    assert verdict_of(tmp_path / "up", scores, claim(("B", "A"))) == verdict
    against = "does not hold" if seeds >= 6 else "not shown"
    assert verdict_of(tmp_path / "down", scores, claim(("A", "B"))) == against


def test_a_single_pair_has_a_difference_and_no_interval(tmp_path: Path) -> None:
    found = summarise(folder_of(tmp_path, {"cola": {"A": [0.3], "B": [0.5]}}, hypotheses=[claim(("B", "A"))]))
    (pair,) = found["hypotheses"][0]["pairs"]
    assert pair["difference"] == pytest.approx(0.2)
    assert (pair["pairs"], pair["low"], pair["high"], pair["p"]) == (1, None, None, None)
    assert found["hypotheses"][0]["verdict"] == "not shown"


def test_holms_correction_decides(tmp_path: Path) -> None:
    """Six equal signs have a p of 0.031: enough alone, not beside another claim as weak."""
    scores = {"cola": {"A": [0.3] * 6, "B": [0.5] * 6}}
    assert verdict_of(tmp_path / "1", scores, claim(("B", "A"))) == "holds"
    assert verdict_of(tmp_path / "2", scores, claim(("B", "A")), claim(("B", "A"), name="I")) == "not shown"


def test_an_unfinished_claim_stays_in_the_family_of_the_correction(tmp_path: Path) -> None:
    scores = {"cola": {"A": [0.3] * 6, "B": [0.5] * 6, "C": [0.5] * 5 + [None]}}
    claims = [claim(("B", "A")), claim(("C", "A"), name="I")]
    found = summarise(folder_of(tmp_path, scores, hypotheses=claims))["hypotheses"]
    assert [one["verdict"] for one in found] == ["not shown", "unfinished"]
    assert [one["p_holm"] for one in found] == pytest.approx([0.0625, 1])


def test_there_is_no_verdict_while_a_training_is_to_come(tmp_path: Path) -> None:
    scores = two_tasks(0.02)
    scores["sst"]["A"][4] = None  # type: ignore[index]
    assert verdict_of(tmp_path, scores, claim(("B", "A"))) == "unfinished"


def test_differences_are_paired_by_seed_and_only_where_both_are_done(tmp_path: Path) -> None:
    scores = {"cola": {"A": ["failed", 0.2, 0.3, 0.9], "B": [0.9, 0.25, "failed", 0.95]}}
    found = summarise(folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))]))
    (pair,) = found["hypotheses"][0]["pairs"]
    assert (pair["pairs"], pair["planned"], pair["pending"]) == (2, 4, 0)
    assert pair["difference"] == pytest.approx(0.05)
    task = pair["tasks"]["cola"]
    assert (task["pairs"], task["planned"]) == (2, 4)
    assert (task["smallest"], task["largest"]) == pytest.approx((0.05, 0.05))


def test_pairing_removes_what_both_arms_owe_to_the_seed(tmp_path: Path) -> None:
    wild = [0.1, 0.5, 0.2, 0.8, 0.4, 0.6]
    scores = {"cola": {"A": wild, "B": [score + 0.01 for score in wild]}}
    (pair,) = summarise(folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))]))["hypotheses"][0]["pairs"]
    assert (pair["low"], pair["high"]) == pytest.approx((0.01, 0.01))


def test_arms_are_compared_on_the_tasks_that_both_are_planned_for(tmp_path: Path) -> None:
    scores = {"cola": {"A": around(0.3), "B": around(0.4)}, "sst": {"A": around(0.8)}}
    found = summarise(folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))]))
    (pair,) = found["hypotheses"][0]["pairs"]
    assert list(pair["tasks"]) == ["cola"]
    assert pair["planned"] == 5
    assert list(found["averages"]) == ["A"]
    assert found["runs"]["planned"] == 15


def test_a_cell_has_mean_and_standard_deviation_over_what_is_done(tmp_path: Path) -> None:
    found = summarise(folder_of(tmp_path, {"cola": {"A": [0.1, 0.3, "failed", None], "B": [0.5]}}))
    cell, single = found["cells"]["cola"]["A"], found["cells"]["cola"]["B"]
    assert (cell["mean"], cell["sd"]) == pytest.approx((0.2, 0.02**0.5))
    assert (cell["scores"], cell["planned"]) == ({"0": 0.1, "1": 0.3}, 4)
    assert (single["mean"], single["sd"]) == (0.5, None)


def test_an_average_weighs_tasks_equally_and_waits_for_all(tmp_path: Path) -> None:
    scores = {"cola": {"A": [0.2, 0.2, 0.2], "B": [0.1, 0.1, 0.1]}, "sst": {"A": [0.8, None], "B": [None, None]}}
    found = summarise(folder_of(tmp_path, scores))["averages"]
    assert found["A"] == {"mean": pytest.approx(0.5), "runs": 4, "planned": 5}
    assert found["B"] == {"mean": None, "runs": 3, "planned": 5}


def test_the_best_arm_is_named_only_if_it_is_clear_and_all_is_done(tmp_path: Path) -> None:
    eight = [0.001 * one for one in (0, 3, 1, 2, -1, -3, -2, 0)]
    clear = {"cola": {"A": around(0.3, eight), "B": around(0.4, eight), "C": around(0.2, eight)}}
    close = {"cola": {"A": around(0.4005, eight), "B": around(0.4, eight[::-1]), "C": around(0.2, eight)}}
    pending = {"cola": {**clear["cola"], "C": [*around(0.2, eight)[:7], None]}}
    found = [summarise(folder_of(tmp_path / str(n), s)) for n, s in enumerate((clear, close, pending))]
    assert [one["best"]["cola"] for one in found] == ["B", None, None]
    assert found[0]["best_average"] == "B"


def costs(folder: Path, steps: Mapping[str, Mapping[str, int]], **more: Mapping[str, int]) -> dict[str, Any]:
    folder_of(folder, {"cola": {arm: [0.5] for arm in steps}}, baseline="A2")
    for arm, taken in steps.items():
        run = run_of("cola", arm, 0, 0.5, steps=taken) | ({"tokens": more[arm]} if arm in more else {})
        write(folder / "cola" / arm / "seed-0.json", run)
    found: dict[str, Any] = summarise(folder)["cost"]["cola"]
    return found


def test_cost_is_compared_lesson_by_lesson_with_the_baseline(tmp_path: Path) -> None:
    """General distillation counts to the first lesson, whatever it is called; a small excess in it is not diluted."""
    steps = {
        "A0": {"task": 10_000},
        "A1": {"task text": 201, "task": 10_000},
        "A2": {"corpus": 200, "task": 10_000},
        "A8": {"general": 100, "corpus": 100, "task": 10_000},
        "A9": {"general": 200, "corpus": 200, "task": 10_000},
    }
    found = costs(tmp_path, steps)
    assert found["tokens"] == {}
    assert found["steps"] == pytest.approx({"A1": 0.005, "A8": 0, "A9": 1})
    assert (found["unlike"], found["above"]) == (["A0"], ["A9"])


def test_tokens_count_too_and_the_last_lesson_as_well(tmp_path: Path) -> None:
    steps = dict.fromkeys(("A2", "A5"), {"corpus": 200, "task": 100})
    found = costs(tmp_path, steps, A2={"corpus": 1000, "task": 1000}, A5={"corpus": 1000, "task": 980})
    assert found["tokens"] == pytest.approx({"A5": 0.02})
    assert found["above"] == ["A5"]


def curve_of(folder: Path, held_out: Mapping[str, float | None], reported: Mapping[str, list[float]]) -> dict[str, Any]:
    line = {"1.0": "A", **{arm[1:]: arm for arm in reported if arm != "A"}}
    curve = {"title": "t", "task": "cola", "series": {"own": line}}
    folder_of(folder, {"cola": {arm: [None] * 3 for arm in reported}}, curves=[curve])
    for arm, scores in reported.items():
        for seed, score in enumerate(scores):
            asked = held_out[arm] if seed == 0 else 0.99  # other seeds must not choose
            if asked is not None:
                write(folder / "cola" / arm / f"seed-{seed}.json", run_of("cola", arm, seed, score, holdout=asked))
    (found,) = summarise(folder)["curves"]
    return dict(found)


def test_the_best_share_is_chosen_on_held_out_rows_and_judged_on_the_reported_ones(tmp_path: Path) -> None:
    reported = {"A": [0.5, 0.5, 0.5], "S0.1": [0.9, 0.9, 0.9], "S0.4": [0.6, 0.5, 0.55]}
    found = curve_of(tmp_path, {"A": 0.3, "S0.1": 0.2, "S0.4": 0.4}, reported)
    assert [point["share"] for point in found["series"]["own"]] == [0.1, 0.4, 1.0]
    peak = found["peaks"]["own"]
    assert (peak["share"], peak["gain"]["a"], peak["gain"]["b"]) == (0.4, "S0.4", "A")
    assert peak["gain"]["difference"] == pytest.approx(0.05)


def test_equal_shares_give_the_smallest_and_an_unknown_one_gives_none(tmp_path: Path) -> None:
    reported = {"A": [0.5], "S0.1": [0.5], "S0.4": [0.5]}
    tie = curve_of(tmp_path / "tie", {"A": 0.3, "S0.1": 0.3, "S0.4": 0.3}, reported)
    assert tie["peaks"]["own"]["share"] == 0.1
    unknown = curve_of(tmp_path / "unknown", {"A": 0.3, "S0.1": None, "S0.4": 0.4}, reported)
    assert unknown["peaks"]["own"] is None


def test_terms_are_those_at_the_end_of_the_lesson_before_the_last(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cola": {"A": [0.5, 0.5], "B": [0.5, 0.5]}})
    for seed, hidden in enumerate((0.2, 0.4)):
        terms = {"general": {"hidden": 9.0}, "corpus": {"loss": 1.0, "hidden": hidden}, "task": {"soft_labels": 3.0}}
        run = run_of("cola", "A", seed, 0.5, final_terms=terms, agreement=0.8 + 0.1 * seed)
        write(tmp_path / "cola" / "A" / f"seed-{seed}.json", run)
        told = run_of("cola", "B", seed, 0.5, final_terms={"task": {"soft_labels": 3.0}}, agreement=None)
        write(tmp_path / "cola" / "B" / f"seed-{seed}.json", told)
    cells = summarise(tmp_path)["cells"]["cola"]
    assert cells["A"]["terms"] == pytest.approx({"hidden": 0.3})
    assert cells["A"]["agreement"] == pytest.approx(0.85)
    assert (cells["B"]["terms"], cells["B"]["agreement"]) == ({}, None)


def test_every_training_is_accounted_for(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cola": {"A": [0.5, "failed", None], "B": [0.5, 0.4, 0.3]}})
    write(tmp_path / "cola" / "A" / "seed-7.json", {"status": "ok"})
    write(tmp_path / "old" / "A" / "seed-0.json", {"status": "ok"})
    assert summarise(tmp_path)["runs"] == {
        "planned": 6,
        "ok": 4,
        "failed": [{"task": "cola", "arm": "A", "seed": 1, "error": "the loss is nan"}],
        "missing": [["cola", "A", 2]],
        "outside": ["cola/A/seed-7.json", "old/A/seed-0.json"],
    }


def test_rates_that_differ_between_seeds_are_seen(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cola": {"A": [0.5, 0.5], "B": [0.5, 0.5]}})
    write(tmp_path / "cola" / "B" / "seed-1.json", run_of("cola", "B", 1, 0.5, rates={"stage1": 3e-3}))
    cells = summarise(tmp_path)["cells"]["cola"]
    assert cells["A"]["rates"] == [{"stage1": 1e-3}]
    assert cells["B"]["rates"] == [{"stage1": 1e-3}, {"stage1": 3e-3}]


def test_the_metric_that_counts_decides_and_the_others_are_kept(tmp_path: Path) -> None:
    grid = grid_of({"mrpc": {"A": [0.5]}})
    grid["tasks"]["mrpc"] |= {"metric": "f1", "metrics": ["accuracy", "f1"]}
    write(tmp_path / "grid.json", grid)
    write(tmp_path / "mrpc" / "A" / "seed-0.json", run_of("mrpc", "A", 0, 0.5, scores={"accuracy": 0.7, "f1": 0.8}))
    cell = summarise(tmp_path)["cells"]["mrpc"]["A"]
    assert cell["mean"] == 0.8
    assert {name: one["mean"] for name, one in cell["metrics"].items()} == {"f1": 0.8, "accuracy": 0.7}


def test_a_summary_survives_json_and_is_repeatable(tmp_path: Path) -> None:
    found = summarise(folder_of(tmp_path, two_tasks(0.01), hypotheses=[claim(("B", "A"))]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found == summarise(tmp_path)


GOOD = grid_of({"cola": {"A": [0.5], "B": [0.5]}})
CURVE = {"title": "t", "task": "cola", "series": {"own": {"half": "A"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": None}, "lacks arms"),
        ({"baseline": "Z"}, "baseline names 'Z', which is none of A, B"),
        ({"hypotheses": [claim(("A", "Z"), name="H9")]}, "hypothesis H9 names 'Z'"),
        ({"curves": [{**CURVE, "task": "rte"}]}, "a curve names 'rte', which is none of cola"),
        ({"curves": [{**CURVE, "series": {"own": {"1.0": "Z"}}}]}, "a curve names 'Z'"),
        ({"curves": [CURVE]}, "share 'half'"),
        ({"tasks": {"cola": GOOD["tasks"]["cola"], "sst": GOOD["tasks"]["cola"]}}, "same title"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "grid.json", {key: value for key, value in (GOOD | change).items() if value is not None})
    with pytest.raises(UsageError, match=message):
        summarise(tmp_path)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (run_of("cola", "A", 1, 0.5), "another training"),
        (run_of("cola", "B", 0, 0.5), "another training"),
        (run_of("cola", "A", 0, float("nan")), "scores.accuracy is nan"),
        (run_of("cola", "A", 0, 0.5, scores={"f1": 0.5}), "scores.accuracy is None"),
        (run_of("cola", "A", 0, 0.5, status="running"), "status is 'running'"),
        ([1], "holds a list"),
    ],
)
def test_a_result_that_is_not_what_it_says_is_refused_by_name(tmp_path: Path, run: Any, message: str) -> None:
    write(tmp_path / "grid.json", GOOD)
    write(tmp_path / "cola" / "A" / "seed-0.json", run)
    with pytest.raises(UsageError, match=rf"seed-0\.json.*{message}"):
        summarise(tmp_path)


def test_a_folder_without_results_or_with_half_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there; name a folder that `openbook experiment` wrote"):
        summarise(tmp_path)
    (tmp_path / "grid.json").write_text('{"name": ')
    with pytest.raises(UsageError, match=r"grid\.json is not whole JSON"):
        summarise(tmp_path)


def with_rows(folder: Path, arm: str, task: str, wrong: int, rows: int = 200, shift: int = 0) -> None:
    """Every training of an arm is wrong on so many rows, each seed on others."""
    gold = np.arange(rows) % 2
    for seed in range(5):
        said = gold.copy()
        said[(np.arange(wrong) + 7 * seed + shift) % rows] ^= 1
        answers = RowAnswers.of(np.eye(2)[said], gold)
        answers.save(rows_file(folder, (task, arm, seed)))
        write(folder / task / arm / f"seed-{seed}.json", run_of(task, arm, seed, float((said == gold).mean())))


def test_rows_are_drawn_where_both_arms_have_them(tmp_path: Path) -> None:
    scores = {"cola": {"A": [0.9] * 5, "B": [0.95] * 5}, "sst": {"A": [0.9] * 5, "B": [0.95] * 5}}
    folder = folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))])
    (before,) = summarise(folder)["hypotheses"][0]["pairs"]
    assert before["high"] - before["low"] == pytest.approx(0), "seeds and tasks agree"
    with_rows(folder, "A", "cola", 20)
    with_rows(folder, "B", "cola", 10, shift=10)
    (pair,) = summarise(folder)["hypotheses"][0]["pairs"]
    assert pair["difference"] == pytest.approx(before["difference"])
    assert (pair["tasks"]["cola"]["rows"], pair["tasks"]["sst"]["rows"]) == (True, False)
    width = pair["tasks"]["cola"]["high"] - pair["tasks"]["cola"]["low"]
    assert 0.02 < width < 4 * (0.05 * 0.95 / 200) ** 0.5, "less than of one seed, since each is wrong on other rows"
    assert 0 < pair["high"] - pair["low"] < width
    assert pair["tasks"]["cola"]["mcnemar"] == pytest.approx([2**-9] * 5)
    assert pair["tasks"]["sst"]["mcnemar"] is None


def test_rows_of_another_training_or_split_are_not_believed(tmp_path: Path) -> None:
    scores = {"cola": {"A": [0.9] * 5, "B": [0.95] * 5}}
    folder = folder_of(tmp_path, scores, hypotheses=[claim(("B", "A"))])

    def drawn() -> bool:
        return bool(summarise(folder)["hypotheses"][0]["pairs"][0]["tasks"]["cola"]["rows"])

    with_rows(folder, "A", "cola", 20)
    with_rows(folder, "B", "cola", 10)
    assert drawn()
    with_rows(folder, "B", "cola", 5, rows=100)
    assert not drawn(), "other rows"
    with_rows(folder, "B", "cola", 10)
    write(folder / "cola" / "B" / "seed-3.json", run_of("cola", "B", 3, 0.94))
    assert not drawn(), "of one training they give another score"
