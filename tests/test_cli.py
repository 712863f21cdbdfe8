"""The command line: help, exit statuses, messages without a traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openbook import cli
from openbook.checkpoint import open_artifact, read_json
from openbook.config import RunError, UsageError
from openbook.knowledge_base import store
from openbook.recipe import load_recipe
from openbook.workspace import Run

STAGES = (
    "run", "train-teacher", "build-bank", "retrieve", "build-corpus", "record-answers", "distill", "build-kb",
    "evaluate", "report", "build-text",
    "train-students",
)  # fmt: skip
OPTIONS = {name: ("--set", "--run-dir", "--dry-run") for name in STAGES} | {
    "predict": (
        "--model",
        "--pair",
        "--explain",
        "--leave-out",
        "--json",
        "--backend",
        "--threads",
        "--input",
        "--output",
        "--text",
        "--text-pair",
        "--probabilities",
        "--prefix",
        "--quoting",
        "--batch-rows",
        "--force",
    ),
    "experiment": ("--scale", "--task", "--arm", "--run-dir", "--results", "--page"),
    "init": ("--data", "--test", "--name", "--output", "--force"),
    "remember": ("--model", "--file", "--text", "--text-pair", "--label", "--weight"),
    "forget": ("--model",),
    "book": (
        "--model",
        "--log",
        "--find",
        "--diff",
        "--merge",
        "--swap",
        "--compact",
        "--form",
        "--keys",
        "--tune",
        "--text",
        "--label",
    ),
    "export": ("--model", "--int8", "--agreement", "--opset", "--rows", "--text", "--text-pair"),
    "package": (
        "--output",
        "--model",
        "--form",
        "--torch-weights",
        "--without-texts",
        "--license",
        "--wheel",
        "--force",
    ),
    "verify": (),
    "serve": (
        "--model",
        "--backend",
        "--threads",
        "--host",
        "--port",
        "--max-body",
        "--max-texts",
        "--max-characters",
        "--max-waiting",
        "--max-waiting-bytes",
        "--max-connections",
        "--batch-tokens",
        "--timeout",
        "--read-timeout",
        "--grace",
        "--log-texts",
    ),
    "tasks": (),
    "env": (),
}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def call(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, arguments, input=stdin)


def exits(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the whole command, as a shell sees it."""
    monkeypatch.setattr(sys, "argv", ["openbook", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands_are_these() -> None:
    names = {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands}
    assert names == set(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str) -> None:
    done = call(command, "--help")
    assert done.exit_code == 0
    for option in OPTIONS[command]:
        assert option in plain(done.output)
    assert command in plain(call("--help").output)


def test_a_wrong_command_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(monkeypatch, "distil") == 2
    told = plain(capsys.readouterr().err)
    assert "No such command 'distil'" in told
    assert "Did you mean 'distill'" in told


def test_a_wrong_option_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(monkeypatch, "run", "recipe.yaml", "--dryrun") == 2
    assert "--dry-run" in plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError("student.layers: 0: too few"), 2), (RunError("the disk is full"), 1)]
)
def test_errors_are_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "start", fail)
    assert exits(monkeypatch, "run", "recipe.yaml") == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "start", fail)
    monkeypatch.setattr(sys, "argv", ["openbook", "run", "recipe.yaml"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "nowhere.yaml"), "no recipe at nowhere.yaml; `openbook init --data FILE` writes one"),
        (("predict", "a text", "--model", "nowhere"), "nowhere holds no finished student/ folder"),
        (("predict", "no tab", "--pair"), "text 0 is 'no tab': with --pair give two texts separated by a tab"),
        (("predict", "--input", "rows.csv"), "--output is None; give both or neither"),
        (("predict", "a text", "--input", "rows.csv", "--output", "out.csv"), "leave out texts"),
        (("predict", "--input", "nowhere.csv", "--output", "out.csv"), "nowhere.csv"),
        (("export", "--model", "nowhere"), "nowhere"),
        (("package", "--model", "nowhere", "--output", "out"), "nowhere"),
        (("serve", "--model", "nowhere"), "nowhere holds no finished student/ folder"),
        (("book", "--model", "nowhere", "--keys", "teacher"), "--keys teacher: a book can be changed"),
        (("init", "--data", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_what_the_user_can_mend(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exits(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err + output.out


def test_a_recipe_may_be_overridden_and_only_looked_at(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = call("run", str(world / "recipe.yaml"), "--run-dir", str(folder), "--dry-run", "--set", "seeds=[0]")
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in plain(done.output).splitlines()] == [
        "train-teacher", "build-bank", "build-index", "retrieve", "build-corpus", "record-answers", "distill",
        "build-kb", "evaluate", "report",
    ]  # fmt: skip
    assert not folder.exists()
    done = call("run", str(world / "recipe.yaml"), "--dry-run", "--set", "seedz=[0]")
    assert isinstance(done.exception, UsageError)
    assert "did you mean 'seeds'?" in str(done.exception)


def test_a_run_lives_below_runs_unless_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("build-corpus", str(world / "recipe.yaml"))
    assert done.exit_code == 0, done.output
    assert plain(done.output).rstrip().endswith("runs/small/corpus")
    assert (tmp_path / "runs" / "small" / "corpus" / "passages.parquet").is_file()


def test_tasks_lists_what_is_built_in() -> None:
    output = plain(call("tasks").output)
    assert "trec" in output
    assert "rotten-tomatoes" in output
    assert "nyu-mll/glue" in output


def test_env_prints_versions() -> None:
    lines = dict(line.split(": ", 1) for line in plain(call("env").output).splitlines())
    assert {"python", "openbook", "torch", "transformers", "platform", "device", "bf16", "cores"} <= lines.keys()
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_init_writes_a_recipe_and_does_not_overwrite(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("init", "--data", str(world / "train.csv"), "--name", "mine")
    assert done.exit_code == 0, done.output
    assert done.output == "recipes/mine.yaml\nnext: openbook run recipes/mine.yaml\n"
    written = Path("recipes/mine.yaml")
    assert "positive" in written.read_text()
    written.write_text("precious")
    refused = call("init", "--data", str(world / "train.csv"), "--name", "mine")
    assert isinstance(refused.exception, UsageError)
    assert "recipes/mine.yaml exists; choose another --output, or overwrite it with --force" in str(refused.exception)
    assert written.read_text() == "precious"
    assert call("init", "--data", str(world / "train.csv"), "--name", "mine", "--force").exit_code == 0
    assert "name: " in written.read_text()
    assert call("init", "--data", str(world / "train.csv"), "--output", "a/b.yaml").exit_code == 0
    assert Path("a/b.yaml").is_file()


class Book:
    """What `predict` asks of the object behind it."""

    labels, book = ("no", "yes"), None

    def predict(self, rows: list[Any], leave_out: bool) -> list[str]:
        return ["yes" for _ in rows]

    def predict_proba(self, rows: list[Any], leave_out: bool) -> Any:
        return np.array([[0.25, 0.75]] * len(rows))


def test_predict_reads_arguments_or_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook.predictor.OpenBook.from_pretrained", lambda *asked: Book())
    assert call("predict", "one", "two [b]").output == "yes\t0.75\tone\nyes\t0.75\ttwo [b]\n"
    assert call("predict", stdin="three\n").output == "yes\t0.75\tthree\n"
    lines = call("predict", "--json", "--pair", "größer\tb").output.splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "größer\tb", "prediction": "yes", "probability": 0.75}]


def test_from_a_file_of_ones_own_to_a_report(world: Path, pretrained: Path, tmp_path: Path) -> None:
    """What the README promises: a CSV, a recipe, a run, a report; as a real command in a real shell."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "COLUMNS": "200"}

    def shell(*arguments: str) -> str:
        command = [sys.executable, "-m", "openbook", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    assert call("init", "--data", str(world / "train.csv"), "--output", str(tmp_path / "own.yaml")).exit_code == 0
    small = [
        f"teacher.model={pretrained}", "teacher.optim={epochs: 2, learning_rate: 2e-3}",
        f"corpus.sources=[{{path: {world}/general.txt}}]", "corpus.budget_tokens=600", "task.max_length=24",
        "student={layers: 1, hidden_size: 16, heads: 2}", "seeds=[3]", "distill.workers=1",
        *(f"distill.{name}.optim={{epochs: 1, learning_rate: 5e-3}}" for name in ("corpus", "task", "labels")),
        "evaluate={latency_rows: 2, throughput_rows: 4, repeats: 1, examples: 3}",
    ]  # fmt: skip
    output = shell("run", "own.yaml", *(part for override in small for part in ("--set", override)))
    assert "report:  runs/train/report.html" in output
    assert "student-open-book" in output
    assert (tmp_path / "runs" / "train" / "report.html").stat().st_size > 10_000
    told = CliRunner().invoke(
        cli.app, ["predict", "the film was great", "--model", str(tmp_path / "runs/train"), "--json", "--explain"]
    )
    record = json.loads(told.output)
    assert record["prediction"] in ("negative", "positive")
    assert record["neighbours"][0]["id"].startswith("train/")
    book_is_edited(tmp_path / "runs" / "train", world)


def book_is_edited(run: Path, world: Path) -> None:
    """Remembered and forgotten from the shell, without the run taking the folder for a broken one."""

    def ask(*arguments: str) -> str:
        done = call(*arguments, "--model", str(run))
        assert done.exit_code == 0, f"{done.output} {done.exception}"
        return plain(done.output)

    made_from = store.load(run / "knowledge_base").manifest["made_from"]
    assert read_json(run / "student" / "config.json")["made_from"] == made_from
    before = ask("book")
    assert "entries    115 (train 115)" in before
    assert "remembered 2; 117 entries, generation" in ask(
        "remember", "a film nobody saw", "another", "--label", "negative"
    )
    assert "remembered 1; 118 entries" in ask("remember", "a third thing")
    listed = ask("book", "--find", "NOBODY saw")
    assert "negative 1.00" in listed
    id = next(word for word in listed.split() if word.startswith("remembered/"))
    assert "forgot 1; 117 entries" in ask("forget", id)
    assert [line.split()[2] for line in ask("book", "--log").splitlines()] == ["add", "add", "remove"]
    task = Run(load_recipe(run / "run.yaml"), run).task
    for name, rows in (("own", task.holdout), ("reported", task.test)):
        texts = [f"{row.text},{('negative', 'positive')[row.label]}" for row in rows]
        (run / f"{name}.csv").write_text("\n".join(["text,label", *texts]))
    assert f"held out {len(task.holdout)}: alone" in ask("book", "--tune", str(run / "own.csv"))
    assert "compacted; 117 entries" in ask("book", "--compact", "--form", "fp16")
    assert "fp16" in ask("book")
    assert "(remembered 2, train 115)" in ask("book")
    assert open_artifact(run / "knowledge_base") is not None
    refused = call("book", "--tune", str(run / "reported.csv"), "--model", str(run))
    told = f"{len(task.test)} of {len(task.test)} examples to tune on are in the reported split"
    assert told in str(refused.exception)
    refused = call("remember", "what", "--label", "neutral", "--model", str(run))
    assert "label 0 is 'neutral'; the student knows negative, positive" in str(refused.exception)
    assert "give texts, or --file" in str(call("remember", "--model", str(run)).exception)
    assert "has no column 'words'; its columns are text, label" in str(
        call("remember", "--file", str(world / "test.csv"), "--text", "words", "--model", str(run)).exception
    )
