"""A grid at work: every arm is tuned alike, what is done is skipped, what fails is told."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from openbook import cells
from openbook.cells import Experiment, key_of, prepare
from openbook.checkpoint import read_json
from openbook.experiment import describe, execute, is_whole
from openbook.grid import load_grid
from openbook.results import load

RATES = (1e-3, 5e-3)


@pytest.fixture(scope="module")
def grid_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    task = recipe.pop("task")
    recipe.pop("seeds")
    recipe["distill"]["corpus"]["optim"] |= {"epochs": 2}
    recipe["distill"]["task"]["optim"] |= {"epochs": 4}
    grid = {
        "name": "tiny",
        "title": "A tiny grid",
        "recipe": recipe,
        "scales": {"small": {}, "large": {"corpus.budget_tokens": 1600}},
        "tasks": {"reviews": {"title": "Reviews", "set": {"task": task}, "seeds": [0, 1]}},
        "arms": {
            "A0": {"title": "no first lesson", "set": {"distill.corpus.optim.epochs": 0}},
            "A2": {"title": "random text", "set": {"corpus.select": "random"}},
            "A5": {"title": "contextualized corpus"},
            "C5": {"title": "half of it", "rates_from": "A5", "set": {"corpus.fraction": 0.5}},
            "B": {"title": "the first with its book", "students_of": "A0"},
            "B0": {"title": "its book alone", "students_of": "A0", "book": {"beta": 0.0}},
            "BG": {"title": "gold", "students_of": "A0", "set": {"knowledge_base.values": "gold"}, "book": {"beta": 0}},
            "BP": {"title": "prior", "students_of": "A0", "book": {"beta": 0.0, "values": "prior"}},
            "BS": {
                "title": "found by the students' own embeddings, few and small",
                "students_of": "A0",
                "book": {"beta": 0.0, "keys": "student", "prototypes": 12, "form": "pca-8"},
            },
            "BR": {"title": "mapped", "students_of": "A0", "book": {"beta": 0.0, "queries": "ridge"}},
            "N": {"title": "a bias in its place", "students_of": "A0", "book": {"closed": True}},
        },
        "baseline": "A2",
        "tune": [
            {"name": "stage1", "keys": ["distill.corpus.optim.learning_rate"], "values": RATES},
            {"name": "stage2", "keys": ["distill.task.optim.learning_rate"], "values": RATES},
        ],
        "hypotheses": [{"name": "H1", "claim": "relevance", "pairs": [["A5", "A2"]]}],
        "curves": [{"title": "Scale", "task": "reviews", "series": {"retrieved": {0.5: "C5", 1.0: "A5"}}}],
    }
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(grid))))
    return path


@pytest.fixture(autouse=True)
def taught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[float, ...]]]:
    """The trainings that take place, in this process: starting others costs seconds."""
    jobs_done: list[tuple[str, int, tuple[float, ...]]] = []

    def run_jobs(work: Any, jobs: Sequence[Any], workers: int, what: str, updates: int) -> None:
        for job in jobs:
            work(*job, lambda done: None)
            jobs_done.append((job[1].arm, job[1].seed, job[1].rates))

    monkeypatch.setattr("openbook.experiment.run_jobs", run_jobs)
    return jobs_done


def at(folder: Path, grid_file: Path) -> Experiment:
    return Experiment(load_grid(grid_file), "small", folder / "runs", folder / "results")


@pytest.fixture(scope="module")
def finished(grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openbook.experiment.run_jobs", lambda work, jobs, *_: [work(*job, str) for job in jobs])
        execute(at(folder, grid_file), ["reviews"], None, folder / "page.md")
    return folder


def test_every_arm_has_a_result_for_every_seed(finished: Path) -> None:
    for arm in ("A0", "A2", "A5", "C5"):
        for seed in (0, 1):
            record = read_json(finished / "results" / "reviews" / arm / f"seed-{seed}.json")
            assert (record["task"], record["arm"], record["seed"], record["status"]) == ("reviews", arm, seed, "ok")
            assert 0 <= record["scores"]["accuracy"] <= 1
            assert record["steps"]["task"] > 0
            assert ("corpus" in record["steps"]) == (arm != "A0")
    assert read_json(finished / "results" / "reviews" / "teacher.json")["scores"]["accuracy"] > 0.5


def test_every_arm_is_tuned_over_the_same_rates_on_held_out_rows(finished: Path) -> None:
    for arm in ("A0", "A2", "A5"):
        tuning = read_json(finished / "results" / "reviews" / arm / "tuning.json")
        tried = {(run["rates"]["stage1"], run["rates"]["stage2"]) for run in tuning["runs"]}
        chosen = tuning["chosen"]["stage1"], tuning["chosen"]["stage2"]
        assert len(tried) == (2 if arm == "A0" else 3)
        assert all("scores" not in run for run in tuning["runs"]), "the reported split chooses nothing"
        best = max(run["holdout"] for run in tuning["runs"])
        assert next(run["holdout"] for run in tuning["runs"] if tuple(run["rates"].values()) == chosen) == best
        final = read_json(finished / "results" / "reviews" / arm / "seed-1.json")
        assert tuple(final["rates"].values()) == chosen


def test_an_arm_may_take_the_rates_of_another(finished: Path) -> None:
    own, others = (read_json(finished / "results" / "reviews" / arm / "seed-0.json")["rates"] for arm in ("C5", "A5"))
    assert own == others
    assert not (finished / "results" / "reviews" / "C5" / "tuning.json").exists()


def test_half_a_corpus_is_read_for_half_as_long_but_is_the_better_half(finished: Path) -> None:
    half, whole = (read_json(finished / "results" / "reviews" / arm / "corpus.json") for arm in ("C5", "A5"))
    assert half["tokens"] <= whole["tokens"] / 2
    assert half["k_star"] == whole["k_star"]


def test_what_is_done_is_skipped_and_survives_the_large_files(
    finished: Path, grid_file: Path, tmp_path: Path, taught: list[Any]
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    execute(at(tmp_path, grid_file), ["reviews"], None, tmp_path / "page.md")
    assert taught == []
    assert (tmp_path / "page.md").read_text() == (finished / "page.md").read_text()


def test_a_missing_result_is_made_again_and_is_the_same(
    finished: Path, grid_file: Path, tmp_path: Path, taught: list[Any]
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    lost = next((tmp_path / "results" / "reviews" / "A2" / "runs").glob("seed-1-*.json"))
    before = read_json(lost)
    lost.unlink()
    execute(at(tmp_path, grid_file), ["reviews"], None, tmp_path / "page.md")
    assert [(arm, seed) for arm, seed, _ in taught] == [("A2", 1)]
    again = read_json(lost)
    assert {**again, "seconds": 0} == {**before, "seconds": 0}


def test_what_the_teacher_scored_is_told_in_other_results_too(finished: Path, grid_file: Path, tmp_path: Path) -> None:
    """Its folder may be older than the results."""
    shutil.copytree(finished / "runs" / "store", tmp_path / "runs" / "store")
    work = at(tmp_path, grid_file)
    describe(work)
    prepare(work, work.cell("reviews", "A0", 0, (RATES[0], RATES[0])))
    told, before = (folder / "results" / "reviews" / "teacher.json" for folder in (tmp_path, finished))
    assert read_json(told) == read_json(before)


def test_another_size_of_the_grid_is_another_result(
    finished: Path, grid_file: Path, tmp_path: Path, taught: list[Any]
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    large = Experiment(load_grid(grid_file), "large", tmp_path / "runs", tmp_path / "results")
    execute(large, ["reviews"], ["A2"], tmp_path / "page.md")
    assert {arm for arm, _, _ in taught} == {"A2"}
    assert read_json(tmp_path / "results" / "grid.json")["scale"] == "large"


def test_a_training_that_diverges_is_a_result(
    finished: Path, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*job: Any) -> None:
        raise FloatingPointError("the loss is nan at step 3")

    shutil.copytree(finished / "results", tmp_path / "results")
    for path in (tmp_path / "results" / "reviews" / "A2" / "runs").glob("seed-1-*.json"):
        path.unlink()
    monkeypatch.setattr(cells, "teach", diverge)
    execute(at(tmp_path, grid_file), ["reviews"], None, tmp_path / "page.md")
    record = read_json(tmp_path / "results" / "reviews" / "A2" / "seed-1.json")
    assert (record["status"], record["error"]) == ("failed", "the loss is nan at step 3")
    assert "the loss is nan at step 3" in (tmp_path / "page.md").read_text()


def book_record(finished: Path, arm: str, seed: int = 0) -> dict[str, Any]:
    record = read_json(finished / "results" / "reviews" / arm / f"seed-{seed}.json")
    assert (record["arm"], record["seed"], record["status"]) == (arm, seed, "ok")
    return record


def test_arms_that_open_a_book_answer_for_the_students_of_another(finished: Path) -> None:
    alone, opened = book_record(finished, "A0"), book_record(finished, "B")
    assert opened["rates"] == alone["rates"]
    assert opened["steps"] == alone["steps"]
    assert opened["book"]["entries"] == 144
    if not opened["book"]["kept"]:
        assert opened["scores"] == alone["scores"]
        assert opened["holdout"] == pytest.approx(alone["holdout"])
    effect = opened["book"]["if_opened"]
    assert sum(bucket["rows"] for bucket in effect["buckets"]) == effect["rows"]
    assert [bucket["similarity"] for bucket in effect["buckets"]] == sorted(b["similarity"] for b in effect["buckets"])
    changed = effect["better"] - effect["worse"]
    assert changed == sum(bucket["better"] - bucket["worse"] for bucket in effect["buckets"])


def test_the_book_alone_is_as_good_as_what_it_holds(finished: Path) -> None:
    """Students that learned labels in this small world lie near texts of the same label."""
    assert book_record(finished, "B0")["book"]["retrieval"]["beta"] == 0
    for arm in ("BS", "BR"):
        assert book_record(finished, arm)["scores"]["accuracy"] > 0.8
    prior = book_record(finished, "BP")["scores"]["accuracy"]
    assert prior < 0.7, "a book that says the same of everything"
    assert book_record(finished, "BG")["scores"] != book_record(finished, "BP")["scores"]


def test_a_bias_takes_the_place_of_a_book(finished: Path) -> None:
    record = book_record(finished, "N")
    assert "book" not in record
    assert record["holdout"] >= book_record(finished, "A0")["holdout"], "tuned where it is measured"


def test_a_new_way_to_open_the_book_trains_nothing(
    finished: Path, grid_file: Path, tmp_path: Path, taught: list[Any]
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    shutil.copytree(finished / "runs" / "answers", tmp_path / "runs" / "answers")
    grid = yaml.safe_load(grid_file.read_text())
    grid["arms"]["B0"]["book"]["beta"] = 0.5
    changed = tmp_path / "tiny.yaml"
    changed.write_text(yaml.safe_dump(grid))
    execute(at(tmp_path, changed), ["reviews"], None, tmp_path / "page.md")
    assert taught == []
    assert book_record(tmp_path, "B0")["book"]["retrieval"]["beta"] == 0.5


def test_a_student_is_taught_again_only_where_a_book_is_to_be_read_and_nobody_kept_what_it_said(
    finished: Path, grid_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    rates = tuple(book_record(finished, "A0")["rates"].values())
    grid = yaml.safe_load(grid_file.read_text())
    for beta, whole in ((0.0, True), (0.5, False)):
        grid["arms"]["B0"]["book"]["beta"] = beta
        changed = tmp_path / "tiny.yaml"
        changed.write_text(yaml.safe_dump(grid))
        work = at(tmp_path, changed)
        one = work.cell("reviews", "A0", 0, rates)
        assert is_whole(work, one, key_of(work, one)) == whole


def test_a_new_account_of_books_is_given_of_every_arm_but_trains_none(
    grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = at(tmp_path, grid_file)
    trained, reading = (work.cell("reviews", arm, 0, RATES) for arm in ("A0", "B"))
    before = [key_of(work, one) for one in (trained, reading)]
    monkeypatch.setattr(cells, "READING", cells.READING + 1)
    assert [key_of(work, one) == key for one, key in zip((trained, reading), before, strict=True)] == [True, False]


def test_what_is_claimed_changes_no_result(grid_file: Path, tmp_path: Path) -> None:
    work = at(tmp_path, grid_file)
    other = Experiment(work.grid.model_copy(update={"hypotheses": ()}), work.scale, work.root, work.results)
    before, after = (key_of(one, one.cell("reviews", "A0", 0, RATES)) for one in (work, other))
    assert before == after


def test_what_is_said_of_each_row_is_kept_of_trainings_and_of_readings(finished: Path) -> None:
    results = load(finished / "results")
    assert set(results.rows) == set(results.found)
    for key, rows in results.rows.items():
        assert rows.gives("accuracy", results.found[key]["scores"]["accuracy"])
    assert "Rows of the reported split are drawn too, the same for all trainings of a task. " in (
        finished / "page.md"
    ).read_text(encoding="utf-8")


def test_rows_of_trainings_from_before_they_were_kept_come_from_the_answers_that_were(
    finished: Path, grid_file: Path, tmp_path: Path, taught: list[Any]
) -> None:
    """There are such answers where another arm opens a book for these students."""
    shutil.copytree(finished / "results", tmp_path / "results")
    shutil.copytree(finished / "runs" / "answers", tmp_path / "runs" / "answers")
    for arm in ("A0", "A5"):
        for path in (tmp_path / "results" / "reviews" / arm / "runs").glob("*.npz"):
            path.unlink()
    execute(at(tmp_path, grid_file), ["reviews"], None, tmp_path / "page.md")
    assert taught == []
    known = load(tmp_path / "results").rows
    assert ("reviews", "A0", 0) in known
    assert np.array_equal(known["reviews", "A0", 1].said, load(finished / "results").rows["reviews", "A0", 1].said)
    assert ("reviews", "A5", 0) not in known
    assert "Rows are not drawn, since what was said of each was not kept" in (tmp_path / "page.md").read_text()


def test_what_arms_share_is_built_once(finished: Path) -> None:
    store = finished / "runs" / "store"
    assert len(list((store / "bank").iterdir())) == 1
    assert len(list((store / "teacher").iterdir())) == 1
    assert len(list((store / "corpus").iterdir())) == 3, "random, retrieved, half of it"
    assert not (store / "teacher_outputs").exists(), "the largest files go when a task is done"
