"""A small recipe end to end: what runs, what is skipped, and what a killed run leaves behind."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openbook import book_commands, pipeline
from openbook.checkpoint import open_artifact, read_json
from openbook.config import RunError, UsageError
from openbook.pipeline import STAGES, execute, plan
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe
from openbook.workspace import Run

AFTER_CORPUS = ["record-answers", "distill", "build-kb", "evaluate", "report"]
MODELS = ["teacher", "student-labels", "student-kd", "student-corpus", "student-open-book"]


@pytest.fixture(scope="session")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe run to its end without interruption, its students in a process of their own."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    execute(load_recipe(world / "recipe.yaml"), folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process costs seconds; the test of kills has real ones."""

    def run_jobs(work: Any, jobs: Sequence[Any], workers: int, what: str, updates: int) -> None:
        for job in jobs:
            work(*job, lambda done: None)

    monkeypatch.setattr("openbook.stages.distill.run_jobs", run_jobs)


def again(world: Path, folder: Path, *overrides: str, **options: Any) -> None:
    execute(load_recipe(world / "recipe.yaml", overrides), folder, **options)


def ran(output: str) -> list[str]:
    """The stages that ran, from what was printed."""
    lines = [line.split() for line in output.splitlines()]
    return [words[0] for words in lines if words and words[0] in STAGES and words[1] in ("runs:", "run")]


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_all_stages_leave_a_whole_folder(finished: Path) -> None:
    assert len(STAGES) == 10
    for stage in STAGES.values():
        assert open_artifact(finished / stage.folder) is not None, stage.name
    assert not [path for path in finished.rglob("*") if path.name.endswith((".partial", ".retired"))]
    assert (finished / "run.yaml").is_file()
    for name in ("report.html", "report.md", "student/README.md"):
        assert len((finished / name).read_text()) > 500
    assert "student-open-book" in (finished / "report.md").read_text()


def test_the_results_hold_five_models(finished: Path) -> None:
    results = read_json(finished / "evaluation" / "results.json")
    assert [model["name"] for model in results["models"]] == MODELS
    for model in results["models"]:
        assert len(model["scores"]) == (1 if model["name"] == "teacher" else 2)
        assert model["mean"] == pytest.approx(np.mean(model["scores"]))
        assert model["sd"] == pytest.approx(np.std(model["scores"], ddof=1) if len(model["scores"]) > 1 else 0)
        assert 0 <= model["agreement"] <= 1
        assert 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p95"]
    parameters = {model["name"]: model["parameters"] for model in results["models"]}
    weights = load_file(finished / "student" / "model.safetensors")
    assert parameters["student-corpus"] == sum(weight.numel() for weight in weights.values())
    assert parameters["student-corpus"] < parameters["teacher"] / 2
    sizes = {model["name"]: model["bytes"] for model in results["models"]}
    assert sizes["teacher"] == (finished / "teacher" / "model.safetensors").stat().st_size
    assert results["rows"] == 48


def test_it_learns(finished: Path) -> None:
    means = {model["name"]: model["mean"] for model in read_json(finished / "evaluation" / "results.json")["models"]}
    assert means["teacher"] > 0.9
    assert means["student-open-book"] > 0.8


def test_scores_are_those_of_the_saved_answers(finished: Path, world: Path) -> None:
    gold = np.array([row % 2 for row in range(48)])  # as the rows were written; labels in alphabetical order
    for model in read_json(finished / "evaluation" / "results.json")["models"]:
        answers = np.load(finished / "evaluation" / f"{model['name']}.npy", allow_pickle=False)
        assert model["scores"] == pytest.approx([float((one.argmax(1) == gold).mean()) for one in answers])


def test_the_finished_run_answers(finished: Path) -> None:
    book = OpenBook.from_pretrained(finished)
    assert book.predict("the film was superb and the plot was great a 3") == "positive"
    assert book.predict(["the film was horrid and the plot was awful b 4"]) == ["negative"]
    shipped = read_json(finished / "student" / "selection.json")["seed"]
    place = list((0, 1)).index(shipped)
    rows = [line.rsplit(",", 1)[0] for line in (finished.parent / "test.csv").read_text().splitlines()[1:]]
    saved = np.load(finished / "evaluation" / "student-open-book.npy", allow_pickle=False)[place]
    np.testing.assert_allclose(book.predict_proba(rows), saved, atol=1e-5)


@pytest.fixture(autouse=True, scope="session")
def test_rows_beside_the_run(finished: Path, world: Path) -> None:
    shutil.copy(world / "test.csv", finished.parent / "test.csv")


def test_the_book_holds_no_row_that_is_reported_or_tuned_on(finished: Path, world: Path) -> None:
    run = Run(load_recipe(world / "recipe.yaml"), finished)
    book = OpenBook.from_pretrained(finished)
    assert book.base is not None
    assert set(book.base.ids) == {example.id for example in run.task.train}
    assert not set(book.base.texts) & {example.text for example in (*run.task.holdout, *run.task.test)}


def test_a_long_text_is_cut_as_it_was_in_training(finished: Path) -> None:
    book = OpenBook.from_pretrained(finished)
    assert book.predict("the film was superb " * 200) in ("positive", "negative")
    assert list(map(len, book.encode(["the film " * 200]))) == [24]


def test_the_student_and_its_book_know_each_other(finished: Path, copy: Path) -> None:
    book = OpenBook.from_pretrained(finished)
    assert book.base is not None
    for text in book.base.texts[:3]:
        assert book.explain(text).evidence.neighbours[0].similarity == pytest.approx(1)
    other = next(path for path in (copy / "students" / "student-labels").rglob("model.safetensors"))
    shutil.copy(other, copy / "student" / "model.safetensors")
    with pytest.raises(UsageError, match="the student's weights are others.*--keys student"):
        OpenBook.from_pretrained(copy)
    book_commands.rewrite(copy, copy / "knowledge_base", False, None, "student")
    assert OpenBook.from_pretrained(copy).base is not None


def test_a_second_run_skips_everything(world: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: seen for name, seen in inodes(copy).items() if "/" in name and not name.endswith("README.md")}
    again(world, copy)
    output = capsys.readouterr().out
    assert ran(output) == []
    assert output.count("skipped: its inputs did not change") == 10
    assert {name: inodes(copy)[name] for name in before} == before


@pytest.mark.usefixtures("in_this_process")
def test_another_student_shape_reruns_what_follows_from_it(
    world: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inodes(copy)
    again(world, copy, "student.layers=2", *(f"distill.{name}.optim.epochs=1" for name in ("corpus", "task", "labels")))
    assert ran(capsys.readouterr().out) == AFTER_CORPUS
    after = inodes(copy)
    assert after["teacher/model.safetensors"] == before["teacher/model.safetensors"]
    assert after["corpus/passages.parquet"] == before["corpus/passages.parquet"]
    assert after["student/model.safetensors"] != before["student/model.safetensors"]
    assert read_json(copy / "student" / "config.json")["num_hidden_layers"] == 2


@pytest.mark.usefixtures("in_this_process")
def test_another_budget_leaves_teacher_and_gold_label_students(
    world: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inodes(copy)
    again(world, copy, "corpus.budget_tokens=1000")
    assert ran(capsys.readouterr().out) == ["build-corpus", *AFTER_CORPUS]
    after = inodes(copy)
    assert after["teacher/model.safetensors"] == before["teacher/model.safetensors"]
    for seed in (0, 1):
        weights = f"seed-{seed}/model.safetensors"
        assert after[f"students/student-labels/{weights}"] == before[f"students/student-labels/{weights}"]
        assert after[f"students/student-corpus/{weights}"] != before[f"students/student-corpus/{weights}"]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("teacher.optim.epochs=1", ["train-teacher", *AFTER_CORPUS]),
        ("student.layers=2", AFTER_CORPUS),
        ("task.max_length=20", ["train-teacher", "build-corpus", *AFTER_CORPUS]),
        ("task.metric=f1", ["distill", "build-kb", "evaluate", "report"]),
        ("corpus.min_words=4", [name for name in STAGES if name != "train-teacher"]),
        ("knowledge_base.projection.temperature=0.1", AFTER_CORPUS),
        ("distill.labels.optim.epochs=1", ["distill", "build-kb", "evaluate", "report"]),
        ("seeds=[0]", ["distill", "build-kb", "evaluate", "report"]),
        ("knowledge_base.value_temperature=2", ["build-kb", "evaluate", "report"]),
        ("evaluate.repeats=3", ["evaluate", "report"]),
        ("distill.workers=2", ["report"]),
    ],
)
def test_what_a_change_makes_stale(world: Path, finished: Path, override: str, stages: list[str]) -> None:
    steps = plan(Run(load_recipe(world / "recipe.yaml", [override]), finished))
    assert [step.stage.name for step in steps if not step.fresh] == stages
    stale = steps[list(STAGES).index(stages[0])]
    assert stale.why.endswith(" changed")


def test_a_changed_row_makes_all_stale(world: Path, finished: Path, tmp_path: Path) -> None:
    rows = (world / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(rows.replace("film", "movie", 1))
    steps = plan(Run(load_recipe(world / "recipe.yaml", [f"task.train.path={tmp_path}/train.csv"]), finished))
    kept = ("build-bank", "build-index")  # general text and evaluation rows are what they were
    assert not any(step.fresh for step in steps if step.stage.name not in kept)
    (tmp_path / "train.csv").write_text(rows)
    steps = plan(Run(load_recipe(world / "recipe.yaml", [f"task.train.path={tmp_path}/train.csv"]), finished))
    assert [step.stage.name for step in steps if not step.fresh] == ["report"]  # which shows the recipe


def test_a_dry_run_tells_and_changes_nothing(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inodes(finished)
    again(world, finished, "student.layers=2", dry_run=True)
    output = capsys.readouterr().out
    assert ran(output) == AFTER_CORPUS
    assert "train-teacher   skip  its inputs did not change" in output
    assert "recipe.student.layers" in output
    assert inodes(finished) == before
    again(world, tmp_path / "new", dry_run=True)
    assert ran(capsys.readouterr().out) == list(STAGES)
    assert not (tmp_path / "new").exists()


def test_only_what_a_stage_needs_is_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again(world, tmp_path / "run", until="build-corpus")
    assert ran(capsys.readouterr().out) == ["build-bank", "build-index", "retrieve", "build-corpus"]
    again(world, tmp_path / "run", until="distill", dry_run=True)
    assert ran(capsys.readouterr().out) == ["train-teacher", "record-answers", "distill"]


def test_another_recipe_may_not_use_the_folder(world: Path, finished: Path) -> None:
    before = inodes(finished)
    with pytest.raises(
        UsageError, match=r"made by another recipe: its name is 'small', this one's is 'other'.*--run-dir"
    ):
        again(world, finished, "name=other")
    with pytest.raises(UsageError, match=r"its task\.name is 'reviews', this one's is 'news'"):
        again(world, finished, "task.name=news")
    assert inodes(finished) == before


def test_two_runs_at_once_are_refused(world: Path, copy: Path) -> None:
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"another run is at work in .*; wait for it, or give this one --run-dir"):
            again(world, copy)
    again(world, copy)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    stage = STAGES[name]

    def build(run: Run, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise error

    changed = type(stage)(stage.name, stage.folder, stage.upstream, stage.inputs, build)
    monkeypatch.setitem(pipeline.STAGES, name, changed)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(
            OSError(28, "No space left on device"), "the disk is full in .*finished stages are kept", id="system"
        ),
        pytest.param(
            OSError("200000 requested and 38384 written"), "the disk is full", id="numpy", marks=pytest.mark.slow
        ),
        pytest.param(
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
            id="safetensors",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FloatingPointError("the loss is nan at step 3"),
            "build-corpus: the loss is nan at step 3",
            id="loss",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            pipeline.BrokenProcessPool("terminated"), "a worker process was killed.*distill.workers", id="worker"
        ),
    ],
)
def test_a_failure_keeps_the_old_artefact(
    world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    before = inodes(copy / "corpus")
    failing(monkeypatch, "build-corpus", error)
    with pytest.raises(RunError, match=told):
        again(world, copy, "corpus.min_words=4")
    assert open_artifact(copy / "corpus") is not None
    assert inodes(copy / "corpus") == before
    monkeypatch.undo()
    again(world, copy)
    assert not (copy / "corpus" / "half").exists()


def test_an_error_of_our_own_is_not_hidden(world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "build-corpus", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        again(world, copy, "corpus.min_words=4")


NURSERY = """
import json, os, signal, sys, time
import openbook.pipeline as pipeline
from openbook import checkpoint
from openbook.distillation import teachers
from openbook.recipe import load_recipe
from pathlib import Path
import torch
torch.set_num_threads(1)

def die_when(function, condition):
    def dying(*arguments):
        function(*arguments)
        if condition(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
    return dying

if __name__ == "__main__":
    for line in sys.stdin:
        recipe, folder, die_in = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            print(os.waitpid(child, 0)[1], flush=True)
            continue
        checkpoint.sync = die_when(checkpoint.sync, lambda where: where.name == f".{die_in}.partial")
        if die_in == "teacher_outputs":
            teachers.flush = die_when(teachers.flush, lambda arrays: True)
        sys.stdout = open(os.devnull, "w")
        pipeline.execute(load_recipe(Path(recipe)), Path(folder))
        os._exit(0)
"""


class Nursery:
    """A process that has imported everything once; each run is a fork of it, and may be killed."""

    def __init__(self, folder: Path) -> None:
        (folder / "nursery.py").write_text(NURSERY)
        self.workers: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "nursery.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *command: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def status(self) -> int:
        return os.waitstatus_to_exitcode(int(self.line()))


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path)
    yield nursery
    for worker in nursery.workers:
        if not is_gone(worker):
            os.kill(worker, signal.SIGKILL)
    nursery.process.kill()
    nursery.process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.002)


def state(pid: int) -> tuple[int, str] | None:
    """Parent and state of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), fields[0]


def children(pid: int) -> list[int]:
    known = {int(path.name): state(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    return [child for child, found in known.items() if found is not None and found[0] == pid]


def is_gone(pid: int) -> bool:
    found = state(pid)
    return found is None or found[1] == "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_was_not(
    world: Path, finished: Path, tmp_path: Path, nursery: Nursery
) -> None:
    recipe, folder = str(world / "recipe.yaml"), tmp_path / "run"

    def killed_in(stage: str) -> None:
        nursery.start(recipe, str(folder), stage)
        assert nursery.status() == -signal.SIGKILL
        assert open_artifact(folder / stage) is None

    def killed_when(pattern: str) -> None:
        run = nursery.start(recipe, str(folder), "")
        wait_for(lambda: any(folder.glob(pattern)) or is_gone(run))
        nursery.workers += (workers := children(run))
        os.kill(run, signal.SIGKILL)
        assert nursery.status() == -signal.SIGKILL
        assert bool(workers) == pattern.startswith(("students", "lessons"))
        wait_for(lambda: all(map(is_gone, workers)), seconds=10)

    killed_when(".teacher.partial/scratch/checkpoint-*")
    assert not (folder / "teacher").exists()
    killed_in("corpus")
    teacher = inodes(folder / "teacher")
    killed_in("teacher_outputs")
    killed_when("lessons/.*.partial/scratch/training/checkpoint-*")
    killed_when("students/student-corpus/.seed-0.partial/scratch/task/checkpoint-*")
    early = {name: inodes(folder / name) for name in ("corpus", "teacher_outputs", "students/student-labels/seed-0")}
    for stage in ("knowledge_base", "evaluation", "report"):
        killed_in(stage)
    nursery.start(recipe, str(folder), "")
    assert nursery.status() == 0
    assert inodes(folder / "teacher") == teacher
    assert {name: inodes(folder / name) for name in early} == early
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".retired"))]
    assert_same_run(folder, finished)


def assert_same_run(folder: Path, other: Path) -> None:
    weights = sorted(str(path.relative_to(other)) for path in other.rglob("*.safetensors"))
    assert len(weights) == 17  # teacher, its projection, the student that ships, three kinds and two lessons a seed
    for name in weights:
        left, right = load_file(folder / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    for name in ("knowledge_base/tuning.json", "teacher/history.json", "students/student-corpus/seed-0/history.json"):
        assert read_json(folder / name) == read_json(other / name)
    for name in MODELS:
        path = Path("evaluation", f"{name}.npy")
        assert np.array_equal(np.load(folder / path), np.load(other / path))
    scores = [
        [model["scores"] for model in read_json(run / "evaluation" / "results.json")["models"]]
        for run in (folder, other)
    ]
    assert scores[0] == scores[1]
