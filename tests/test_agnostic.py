"""From many tasks to students of no task: one run on a tiny world, killed and resumed, with every kind of tail."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from interruptions import killing_after
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config, ElectraConfig
from typer.testing import CliRunner

from openbook import fine_tuning, training
from openbook.agnostic_run import AgnosticRun, task_of
from openbook.checkpoint import write_json
from openbook.cli import app
from openbook.config import UsageError
from openbook.data.batches import Tokenised
from openbook.distillation import losses
from openbook.distillation.teachers import LiveTeacher
from openbook.fine_tuning import Limits, Place, Trial, rows_of
from openbook.manifest import resolved
from openbook.models.encoder import load_headless
from openbook.multitask import learned
from openbook.pipeline import execute, plan
from openbook.recipe import load_recipe
from openbook.stages import evaluate_agnostic
from openbook.stages.build_text import documents_of_tasks
from openbook.stages.distill_agnostic import check_start, fresh, learner_of, live_teacher, plan_of, teacher_layer
from openbook.stages.evaluate_agnostic import check as check_evaluation
from openbook.stages.evaluate_agnostic import overview
from openbook.training import hear_update, train_together

pytestmark = pytest.mark.usefixtures("trials_here")


@pytest.fixture(scope="session")
def finished(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "many"
    execute(load_recipe(many / "recipe.yaml"), folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def assert_equal(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_teacher_learns_every_task_and_is_an_ordinary_encoder(finished: Path, pretrained: Path) -> None:
    told = json.loads((finished / "teacher" / "scores.json").read_text())["tasks"]
    assert list(told) == ["reviews", "scores", "pairs"]
    assert told["reviews"]["score"] > 0.9 > told["reviews"]["guess"]
    assert told["scores"]["score"] > 0.5
    assert told["scores"]["guess"] == 0
    assert {(task["without_loss"], tuple(task["warnings"])) for task in told.values()} == {(0, ())}
    assert sum(task["passes"] for task in told.values()) == pytest.approx(18, rel=0.1)
    model = AutoModel.from_pretrained(finished / "teacher")
    plain = AutoModel.from_pretrained(pretrained)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any("head" in name or "task" in name for name in weights(finished / "teacher"))
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[name])]
    assert not [name for name in moved if name.startswith("pooler")]  # the heads bypass it
    assert len(moved) > 60
    looks = [row for row in json.loads((finished / "teacher" / "history.json").read_text()) if "holdout" in row]
    assert {"score of reviews", "score of scores", "score of pairs"} <= looks[0].keys()
    best = max(looks, key=lambda row: row["holdout"])
    assert told["pairs"]["score"] == pytest.approx(best["score of pairs"])


def test_the_students_are_ordinary_encoders_that_came_closer_to_the_teacher(finished: Path) -> None:
    for name, layers, width in (("small", 1, 16), ("wide", 2, 32)):
        folder = finished / "students" / name
        model = AutoModel.from_pretrained(folder)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, width)
        assert set(weights(folder)) == set(model.state_dict())
        assert AutoTokenizer.from_pretrained(folder)("the film").input_ids[0] == 2
        history = json.loads((folder / "history.json").read_text())
        short = [row["loss"] for row in history[:22]]  # the last ones are of long blocks, which compare more tokens
        assert sum(short[-5:]) < 0.85 * sum(short[1:6])
        assert history[0]["loss"] == pytest.approx(sum(history[0][pair] for pair in ("qq", "kk", "vv")), abs=1e-4)


def results_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "evaluation" / "results.json").read_text())["rows"])


def test_every_model_is_fine_tuned_on_every_task_with_every_seed(finished: Path) -> None:
    rows = results_of(finished)
    whole = [row for row in rows if row["shots"] is None]
    assert sorted({(row["model"], row["task"], row["seed"]) for row in whole}) == sorted(
        (model, task, seed)
        for model in ("teacher", "small", "wide")
        for task in ("reviews", "other")
        for seed in (0, 1)
    )
    assert len(whole) == 12
    few = [row for row in rows if row["shots"] == 4]
    assert len(few) == 3 * 2 * 2  # models, draws, seeds
    assert {row["rows"] for row in few} == {16}  # of a regression, four bins
    assert all(row["status"] == "ok" and row["is_final"] for row in rows)
    roles = {(row["task"], row["shots"]): row["role"] for row in rows}
    assert roles == {("reviews", None): "in-domain", ("other", None): "leaky", ("scores", 4): "low-resource, seen"}


def test_the_overview_tells_means_over_seeds_and_draws(finished: Path, tmp_path: Path) -> None:
    rows = [
        row for row in results_of(finished)
        if row["model"] != "wide" and not (row["model"] == "small" and row["task"] == "other" and row["seed"] == 1)
    ]  # fmt: skip
    for row in rows:
        if row["task"] == "reviews" and row["model"] == "small":
            row["status"], row["scores"] = "failed", {}
        if row["task"] == "reviews" and row["model"] == "teacher":
            row["scores"] = {"accuracy": 0.9 + row["seed"] / 20}
        if row["task"] == "other":
            row["scores"] = {"accuracy": 0.75}
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    found = overview(tmp_path)
    few = [100 * row["scores"]["spearmanr"] for row in rows if row["model"] == "small" and row["shots"] == 4]
    assert len(few) == 4
    assert found == {
        "task": ["reviews", "other", "scores, 4 shots"],
        "role": ["in-domain", "leaky", "low-resource, seen"],
        "metric": ["accuracy", "accuracy", "spearmanr"],
        "teacher": ["92.5 ± 3.5", "75.0 ± 0.0", found["teacher"][2]],
        "small": ["failed", "75.0", f"{np.mean(few):.1f} ± {np.std(few, ddof=1):.1f}"],
    }


def test_a_run_ends_with_scores_and_where_the_students_are(finished: Path, many: Path) -> None:
    said = CliRunner().invoke(
        app, ["run", str(many / "recipe.yaml"), "--run-dir", str(finished)], env={"COLUMNS": "200"}
    )
    assert said.exit_code == 0, said.output
    told = overview(finished / "evaluation")
    assert told["wide"][0] in said.output
    assert f"small: {finished / 'students' / 'small'}" in said.output.replace("\n", "")


def test_rates_are_chosen_on_rows_set_aside_and_the_reported_ones_are_read_at_the_end(finished: Path) -> None:
    rows = [row for row in results_of(finished) if row["model"] == "teacher" and row["shots"] is None]
    assert {row["learning_rate"] for row in rows} == {2e-3}, "the other one hardly moves a weight"
    assert min(row["scores"]["accuracy"] for row in rows) > 0.9
    trials = [json.loads(path.read_text()) for path in (finished / "trials").glob("*/teacher/reviews/*.json")]
    assert sorted((trial["is_final"], trial["learning_rate"]) for trial in trials) == [
        (False, 1e-6), (False, 2e-3), (True, 2e-3), (True, 2e-3),
    ]  # fmt: skip
    learned = {trial["is_final"]: trial["rows"] for trial in trials}
    assert learned == {False: 144, True: 160}  # the rows set aside join at the end


def test_what_follows_the_last_projections_learns_nothing(finished: Path) -> None:
    """Specification, 2.5."""
    names = json.loads((finished / "students" / "wide" / "untaught.json").read_text())
    tail = [f"encoder.layer.1.{part}" for part in ("attention.output", "intermediate", "output")]
    assert {name.rpartition(".")[0] for name in names} == {
        *(f"{tail[0]}.{part}" for part in ("dense", "LayerNorm")),
        f"{tail[1]}.dense",
        *(f"{tail[2]}.{part}" for part in ("dense", "LayerNorm")),
        "pooler.dense",
    }


@pytest.mark.parametrize("name", ["small", "wide"])
def test_a_student_is_the_same_whoever_learns_beside_it(finished: Path, many: Path, tmp_path: Path, name: str) -> None:
    raw = (many / "recipe.yaml").read_text()
    lines = raw.splitlines(keepends=True)
    start = next(place for place, line in enumerate(lines) if line.startswith("students:"))
    own = {"small": lines[start + 1 : start + 2], "wide": lines[start + 2 : start + 4]}[name]
    (tmp_path / "alone.yaml").write_text("".join([*lines[: start + 1], *own, *lines[start + 4 :]]))
    folder = tmp_path / "many"
    folder.mkdir()
    for stage in ("teacher", "text"):
        shutil.copytree(finished / stage, folder / stage)
    execute(load_recipe(tmp_path / "alone.yaml"), folder, "distill")
    assert_equal(folder / "students" / name, finished / "students" / name)


def test_a_killed_run_resumes_to_the_same_weights(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once in the teacher's training and once in the students'."""
    recipe, folder = load_recipe(many / "recipe.yaml"), tmp_path / "many"
    for updates in (12, 17):
        with monkeypatch.context() as patch:
            patch.setattr(training, "save_checkpoint", killing_after(updates))
            with pytest.raises(KeyboardInterrupt):
                execute(recipe, folder, "distill")
    execute(recipe, folder, "distill")
    assert_equal(folder / "teacher", finished / "teacher")
    for name in ("small", "wide"):
        assert_equal(folder / "students" / name, finished / "students" / name)


def test_two_processes_train_the_teacher_that_one_does(finished: Path, many: Path, tmp_path: Path) -> None:
    execute(load_recipe(many / "recipe.yaml", ["teacher.processes=2"]), tmp_path, "train-teacher")
    left, right = weights(tmp_path / "teacher"), weights(finished / "teacher")
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=0, atol=2e-4)
    for file in ("scores.json", "history.json"):
        told, expected = (json.loads((folder / "teacher" / file).read_text()) for folder in (tmp_path, finished))
        assert flat(told) == pytest.approx(flat(expected), abs=1e-5)


def flat(told: Any, name: str = "") -> dict[str, float]:
    """Numbers by where they are."""
    if isinstance(told, dict | list):
        parts = told.items() if isinstance(told, dict) else enumerate(told)
        return {key: value for place, part in parts for key, value in flat(part, f"{name}/{place}").items()}
    return {name: told} if isinstance(told, int | float) else {}


def test_nothing_runs_twice(finished: Path, many: Path) -> None:
    run = AgnosticRun(load_recipe(many / "recipe.yaml"), finished)
    assert [step.fresh for step in plan(run)] == [True] * 4
    changed = AgnosticRun(load_recipe(many / "recipe.yaml", ["teacher.mixture.passes=7"]), finished)
    assert [step.fresh for step in plan(changed)] == [False, True, False, False]
    other = AgnosticRun(load_recipe(many / "recipe.yaml", ["text.pair_share=0"]), finished)
    assert [step.fresh for step in plan(other)] == [True, False, False, False]


def test_a_run_killed_while_it_saves_its_students_goes_on(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for stage in ("teacher", "text"):
        shutil.copytree(finished / stage, folder / stage)
    with monkeypatch.context() as patch:
        patch.setattr("openbook.stages.distill_agnostic.write_json", stopping)
        with pytest.raises(KeyboardInterrupt):
            execute(load_recipe(many / "recipe.yaml"), folder, "distill")
    execute(load_recipe(many / "recipe.yaml"), folder, "distill")
    assert_equal(folder / "students" / "wide", finished / "students" / "wide")


def stopping(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_training_on_other_tasks_is_neither_resumed_nor_lost(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, few = tmp_path / "many", "teacher.tasks=[{name: reviews, text: text, label: label, train: {path: %s}}]"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killing_after(12))
        with pytest.raises(KeyboardInterrupt):
            execute(load_recipe(many / "recipe.yaml"), folder, "train-teacher")
    other = load_recipe(many / "recipe.yaml", [few % (many / "scores.jsonl")])
    with pytest.raises(UsageError, match=r"teacher\.tasks=\['reviews'\], but .* on \['reviews', 'scores', 'pairs'\]"):
        execute(other, folder, "train-teacher")
    assert list(folder.glob(".teacher.partial/scratch/checkpoint-*"))
    faster = AgnosticRun(load_recipe(many / "recipe.yaml", ["teacher.optim.learning_rate=0.1"]), folder)
    assert plan(faster, "train-teacher")[0].why == "it was interrupted, but settings.optim.learning_rate changed"
    same = AgnosticRun(load_recipe(many / "recipe.yaml"), folder)
    assert plan(same, "train-teacher")[0].why == "it was interrupted and resumes"


def test_an_interrupted_training_on_other_rows_of_the_same_tasks_is_not_lost(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would begin anew, and what it learned so far be deleted."""
    (tmp_path / "pairs.jsonl").write_text((many / "pairs.jsonl").read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((many / "recipe.yaml").read_text().replace(f"{many}/pairs.jsonl", f"{tmp_path}/pairs.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killing_after(12))
        with pytest.raises(KeyboardInterrupt):
            execute(load_recipe(recipe), tmp_path / "many", "train-teacher")
    longer = recipe.read_text().replace("max_length: 24}\n  mixture", "max_length: 20}\n  mixture")
    recipe.write_text(longer)
    with pytest.raises(UsageError, match=r"training on other rows, labels or lengths of \['pairs'\] waits to go on"):
        execute(load_recipe(recipe), tmp_path / "many", "train-teacher")
    assert list((tmp_path / "many").glob(".teacher.partial/scratch/checkpoint-*"))


def written(many: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    raw = json.loads(json.dumps(yaml.safe_load((many / "recipe.yaml").read_text())))  # without anchors
    change(raw)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def test_two_tasks_of_one_name_are_refused(many: Path, world: Path, tmp_path: Path) -> None:
    def other_rows(raw: dict[str, Any]) -> None:
        raw["fine_tune"]["few"]["tasks"][0]["train"]["path"] = f"{world}/train.csv"
        raw["fine_tune"]["few"]["tasks"][0] |= {"label": "label", "kind": "classification"}

    recipe = load_recipe(written(many, tmp_path, other_rows))
    with pytest.raises(UsageError, match="tasks, scores: two entries of this name differ in kind, label, train, and"):
        execute(recipe, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_task_that_cannot_be_read_is_named_before_anything_is_trained(many: Path, tmp_path: Path) -> None:
    def misspell(raw: dict[str, Any]) -> None:
        raw["teacher"]["tasks"][1]["label"] = "lable"

    recipe = load_recipe(written(many, tmp_path, misspell))
    name = recipe.teacher.tasks[1].name
    with pytest.raises(UsageError, match=rf"tasks, {name}: task\.label='lable': .* has no such column"):
        execute(recipe, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_span_task_whose_windows_cannot_move_on_is_refused_before_anything_is_trained(
    many: Path, tmp_path: Path
) -> None:
    passage = {"context": "the film was good", "answers": {"text": ["good"], "answer_start": [13]}}
    rows = [{"question": f"how was {'it ' * (place % 9)}?", **passage} for place in range(20)]
    (tmp_path / "spans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spans = {
        "name": "spans", "kind": "span_extraction", "text": "question", "text_pair": "context", "label": "answers",
        "train": {"path": str(tmp_path / "spans.jsonl")}, "test_share": 0.2, "max_length": 24, "stride": 10,
    }  # fmt: skip

    def add(raw: dict[str, Any]) -> None:
        raw["fine_tune"]["tasks"].append(spans)

    recipe = load_recipe(written(many, tmp_path, add))
    with pytest.raises(UsageError, match=r"fine_tune\.tasks, spans: task\.max_length=24 leaves no room .* takes"):
        execute(recipe, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_what_the_teacher_alone_is_fine_tuned_on_may_be_as_long_as_it_reads(many: Path, tmp_path: Path) -> None:
    own = "fine_tune.teacher_tasks=[{name: long, text: text, label: label, max_length: %d, train: {path: %s}}]"
    rows = many.parent / "long.csv"
    rows.write_text("text,label\n" + "".join(f"the film number {place},{'ab'[place % 2]}\n" for place in range(40)))
    own = own.replace("train: {path: %s}", "train: {path: %s}, test_share: 0.2")
    check_evaluation(AgnosticRun(load_recipe(many / "recipe.yaml", [own % (48, rows)]), tmp_path))
    with pytest.raises(UsageError, match=r"teacher_tasks, long: max_length=49 is more than the teacher reads, 48"):
        check_evaluation(AgnosticRun(load_recipe(many / "recipe.yaml", [own % (49, rows)]), tmp_path))


def test_rows_near_what_the_teacher_alone_is_judged_on_are_not_learned(many: Path, tmp_path: Path) -> None:
    same = "fine_tune.teacher_tasks=[{name: %s, text: one, text_pair: two, label: label, train: {path: %s}, %s}]"
    pairs = many / "pairs.jsonl"
    beside = same % ("more", pairs, f"test: {{path: {pairs}}}, max_length: 24")
    run = AgnosticRun(load_recipe(many / "recipe.yaml", [beside]), tmp_path)
    alone = AgnosticRun(load_recipe(many / "recipe.yaml"), tmp_path)
    assert alone.duplicates(alone.recipe.teacher.tasks).counts["pairs"] == 0
    assert run.duplicates(run.recipe.teacher.tasks).counts["pairs"] > 80
    with pytest.raises(UsageError, match="tasks, pairs: each of its .* training rows nearly equals a reported row"):
        learned(run, run.recipe.teacher)


def test_words_of_a_teacher_that_are_narrower_than_its_layers_are_not_widened(many: Path, tmp_path: Path) -> None:
    run = AgnosticRun(load_recipe(many / "recipe.yaml"), tmp_path)
    run.__dict__["teacher_config"] = ElectraConfig(hidden_size=32, embedding_size=16)
    with pytest.raises(UsageError, match="hidden_size=32 is above the teacher's 16"):
        check_start(run, run.student("wide"))


def test_a_released_student_takes_any_head(finished: Path) -> None:
    """What its configuration said of a head would decide the loss of whoever fine-tunes it elsewhere."""
    told = json.loads((finished / "students" / "small" / "config.json").read_text())
    assert not {"problem_type", "id2label", "label2id", "num_labels"} & told.keys()
    model = AutoModelForSequenceClassification.from_pretrained(finished / "students" / "small", num_labels=3)
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]])
    labels = torch.tensor([0, 2])
    said = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(said.loss, torch.nn.functional.cross_entropy(said.logits, labels))


def test_a_student_of_the_teachers_layers_may_learn_through_one_more(
    many: Path, finished: Path, tmp_path: Path
) -> None:
    shape = "{name: a, layers: 2, hidden_size: 32, heads: 4, intermediate_size: 64, init: layer_copy}"
    settings = [f"students=[{shape}]", "distill.tail=aux", "distill.optim={tokens: 300, batch_tokens: 256}"]
    shutil.copytree(finished, tmp_path / "many")
    run = AgnosticRun(load_recipe(many / "recipe.yaml", settings), tmp_path / "many")
    learner = learner_of(run, run.recipe.students[0], live_teacher(run))
    student, teacher = learner.lesson.student, load_headless(str(finished / "teacher"))
    assert len(student.blocks()) == 3
    for place, layer in ((0, 2), (1, 4)):
        taken, given = student.blocks()[place].state_dict(), teacher.blocks()[layer - 1].state_dict()
        assert all(torch.equal(taken[name], given[name]) for name in given)
    execute(run.recipe, run.folder, "distill")
    assert AutoModel.from_pretrained(run.folder / "students" / "a").config.num_hidden_layers == 2


def test_roles_are_told_anew_when_provenance_changes(finished: Path, many: Path, tmp_path: Path) -> None:
    raw = json.loads(json.dumps(yaml.safe_load((many / "recipe.yaml").read_text())))  # without anchors
    raw["teacher"]["tasks"][2]["group"] = "reviews-elsewhere"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    steps = plan(AgnosticRun(load_recipe(tmp_path / "recipe.yaml"), finished))
    assert [step.fresh for step in steps] == [True] * 4, "no role depends on it"
    raw["fine_tune"]["tasks"][1]["group"] = "elsewhere"  # it shares nothing with a task that was learned any more
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    steps = plan(AgnosticRun(load_recipe(tmp_path / "recipe.yaml"), finished))
    assert [step.fresh for step in steps] == [True, True, True, False]
    raw["fine_tune"]["tasks"][1]["group"] = "reviews"
    raw["teacher"]["tasks"][0]["group"] = "elsewhere"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    steps = plan(AgnosticRun(load_recipe(tmp_path / "recipe.yaml"), finished))
    assert ([step.fresh for step in steps], steps[3].why) == ([True, True, True, False], "roles changed")


def test_the_tasks_have_their_share_of_the_text_and_short_rows_are_read(many: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((many / "recipe.yaml").read_text())
    raw["text"] |= {"task_share": 0.2, "task_text": raw["teacher"]["tasks"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    execute(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "many", "build-text")
    tasks: set[str] = set()
    for name, budget in (("short", 2700), ("long", 300)):
        texts = Tokenised.load(tmp_path / "many" / "text" / name)
        of_tasks = np.array([not block.startswith("text.sources") for block in texts.ids.to_pylist()])
        assert texts.tokens[of_tasks].sum() == pytest.approx(0.2 * budget, abs=12)
        assert texts.tokens[~of_tasks].sum() == pytest.approx(0.8 * budget, abs=24)
        tasks |= {block.split("/")[0] for block in np.array(texts.ids.to_pylist())[of_tasks]}
    assert tasks == {"reviews", "scores", "pairs"}


@pytest.mark.parametrize("tail", ["aux", "init"])
def test_the_other_tails(finished: Path, many: Path, tmp_path: Path, tail: str) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for stage in ("teacher", "text"):
        shutil.copytree(finished / stage, folder / stage)
    wide = ["students=[{name: wide, layers: 2, hidden_size: 32, heads: 4, intermediate_size: 64}]"]
    execute(load_recipe(many / "recipe.yaml", [f"distill.tail={tail}", *wide]), folder, "distill")
    student = folder / "students" / "wide"
    model, untaught = AutoModel.from_pretrained(student), json.loads((student / "untaught.json").read_text())
    assert len(model.encoder.layer) == 2
    assert set(weights(student)) == set(model.state_dict())
    if tail == "aux":
        assert untaught == ["pooler.dense.weight", "pooler.dense.bias"]
        assert not any(name.startswith("encoder.layer.2.") for name in weights(student))
    else:  # all but weight decay left it as the teacher's
        theirs = weights(folder / "teacher")
        for part in ("attention.output.LayerNorm.weight", "intermediate.dense.bias"):
            assert torch.equal(weights(student)[f"encoder.layer.1.{part}"], theirs[f"encoder.layer.3.{part}"])
        assert torch.equal(weights(student)["pooler.dense.bias"], theirs["pooler.dense.bias"])


def test_rows_near_a_reported_one_are_not_learned_from(many: Path, tmp_path: Path, world: Path) -> None:
    known = (world / "test.csv").read_text().splitlines()
    rows = (world / "train.csv").read_text().splitlines()
    again = [known[1].upper().replace("POSITIVE", "positive").replace("NEGATIVE", "negative"), known[2]]
    (tmp_path / "train.csv").write_text("\n".join([*rows, *again]))
    raw = (many / "recipe.yaml").read_text().replace(f"{world}/train.csv", f"{tmp_path}/train.csv", 1)
    (tmp_path / "recipe.yaml").write_text(raw)
    run = AgnosticRun(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    text = run.recipe.text.model_copy(update={"task_text": run.recipe.teacher.tasks})
    reading = AgnosticRun(run.recipe.model_copy(update={"text": text}), tmp_path)
    assert not {line.partition(",")[0] for line in again} & {one for _, one in documents_of_tasks(reading)}
    assert run.duplicates(run.learned).counts == {"reviews": 2, "scores": 0, "pairs": 0}
    kept = {row.text for row in learned(run, run.recipe.teacher)["reviews"].train}
    assert not {text.partition(",")[0] for text in again} & kept
    assert len(kept) >= 143


def test_a_task_of_ones_own_needs_its_name_only_once_it_is_in_the_manifest(many: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((many / "recipe.yaml").read_text())
    tasks = raw["teacher"]["tasks"]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    raw["teacher"]["tasks"] = [{"name": task["name"]} for task in tasks]
    raw["fine_tune"]["few"]["tasks"] = [{"name": "scores"}]
    raw["manifest"] = str(tmp_path / "tasks.yaml")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    named, written = resolved(load_recipe(tmp_path / "recipe.yaml")), load_recipe(many / "recipe.yaml")
    assert named.teacher == written.teacher
    assert named.fine_tune == written.fine_tune


def test_a_teacher_without_tasks_is_the_plain_encoder(many: Path, pretrained: Path, tmp_path: Path) -> None:
    execute(load_recipe(many / "recipe.yaml", ["teacher.tasks=[]"]), tmp_path / "many", "train-teacher")
    model, plain = AutoModel.from_pretrained(tmp_path / "many" / "teacher"), AutoModel.from_pretrained(pretrained)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_labels_that_changed_their_rows_teach_nothing(many: Path, finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(many / "recipe.yaml", ["teacher.mixture.shuffle_labels=true"])
    execute(recipe, tmp_path / "many", "train-teacher")
    told, learned = (
        json.loads((folder / "teacher" / "scores.json").read_text())["tasks"]["reviews"]["score"]
        for folder in (tmp_path / "many", finished)
    )
    assert told < 0.8 < learned


def test_a_block_learned_through_is_dropped_from_a_modernbert_too(finished: Path, many: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for stage in ("teacher", "text"):
        shutil.copytree(finished / stage, folder / stage)
    student = ["students=[{name: modern, architecture: modernbert, layers: 2, hidden_size: 16, heads: 2}]"]
    execute(load_recipe(many / "recipe.yaml", ["distill.tail=aux", *student]), folder, "distill")
    model = AutoModel.from_pretrained(folder / "students" / "modern")
    assert (len(model.layers), model.config.num_hidden_layers, len(model.config.layer_types)) == (2, 2, 2)


def test_what_a_student_sets_for_itself_leaves_the_rest_as_it_is_shared(many: Path, tmp_path: Path) -> None:
    shared = ["distill.optim.weight_decay=0.5", "distill.optim.accumulation=3"]
    run = AgnosticRun(load_recipe(many / "recipe.yaml", shared), tmp_path)
    small, wide = (student.optim.over(run.recipe.distill.optim) for student in run.recipe.students)
    assert small == run.recipe.distill.optim
    assert (wide.learning_rate, wide.weight_decay, wide.accumulation) == (5e-3, 0.5, 3)


def test_text_that_fills_no_batch_is_refused_before_a_model_is_loaded(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """General text may be shorter than its budget."""
    folder = tmp_path / "many"
    folder.mkdir()
    shutil.copytree(finished / "teacher", folder / "teacher")
    (tmp_path / "general.txt").write_text("the film was good and the book was bad. " * 10)
    short = [f"text.sources=[{{path: {tmp_path}/general.txt}}]"]
    monkeypatch.setattr("openbook.stages.distill_agnostic.load_headless", stopping)
    with pytest.raises(UsageError, match=r"the short blocks .* too few for one batch, \d+ of .*batch_tokens=256"):
        execute(load_recipe(many / "recipe.yaml", short), folder, "distill")


def test_a_tail_that_fits_no_student_is_refused_before_a_model_is_loaded(many: Path, tmp_path: Path) -> None:
    student = "students=[{name: a, layers: 2, hidden_size: 32, heads: 4}]"
    with pytest.raises(UsageError, match=r"students, a: distill\.tail=init .* intermediate_size is 128 .* tail: leave"):
        execute(load_recipe(many / "recipe.yaml", ["distill.tail=init", student]), tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_students_learn_with_the_epsilon_of_minilm(finished: Path, many: Path) -> None:
    """Specification, 2.7."""
    run = AgnosticRun(load_recipe(many / "recipe.yaml"), finished)
    learner = learner_of(run, run.recipe.students[0], live_teacher(run))
    assert {group["eps"] for group in learner.optimizer.param_groups} == {1e-6}


def begun(finished: Path, folder: Path, *stages: str) -> Path:
    """A run with what these stages of the finished one left."""
    for stage in ("teacher", "text", *stages):
        shutil.copytree(finished / stage, folder / stage)
    return folder


def test_one_answer_of_the_teacher_serves_all_students(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MITKD specification, 2.6. Before the first step each student is asked once which weights get no gradient."""
    calls: list[int] = []

    class Counting(LiveTeacher):
        def __call__(self, batch: Any) -> Any:
            calls.append(len(batch.ids))
            return super().__call__(batch)

    monkeypatch.setattr("openbook.stages.distill_agnostic.LiveTeacher", Counting)
    folder = begun(finished, tmp_path / "many")
    run = execute(load_recipe(many / "recipe.yaml", ["distill.optim.tokens=1500"]), folder, "distill")
    steps = len(plan_of(run))
    assert steps > 4
    assert len(list(folder.glob("students/*/model.safetensors"))) == 2
    assert len(calls) == steps + 2


@pytest.mark.parametrize("tail", ["leave", "aux"])
def test_a_student_on_disk_is_the_one_in_memory_without_what_it_learned_through(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    """MITKD specification, property 8: read by transformers alone, it has the states of its own layers."""
    seen: list[tuple[torch.Tensor, ...]] = []
    overrides = [f"distill.tail={tail}", "distill.optim.tokens=600"]
    run = AgnosticRun(load_recipe(many / "recipe.yaml", overrides), begun(finished, tmp_path / "many"))
    batch = plan_of(run)[0]

    def kept(learners: Any, *rest: Any) -> Any:
        histories = train_together(learners, *rest)
        with torch.no_grad():
            seen.extend(learner.lesson.student.listen(hidden=True)(batch).hidden for learner in learners)
        return histories

    monkeypatch.setattr("openbook.stages.distill_agnostic.train_together", kept)
    execute(run.recipe, run.folder, "distill")
    for name, layers, states in zip(("small", "wide"), (1, 2), seen, strict=True):
        model = AutoModel.from_pretrained(run.folder / "students" / name).eval()
        with torch.no_grad():
            own = model(
                batch.input_ids, batch.attention_mask, batch.token_type_ids, output_hidden_states=True
            ).hidden_states
        assert (len(own), len(states)) == (layers + 1, layers + 1 + (tail == "aux"))
        for one, other in zip(own, states, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tail", ["leave", "aux"])
def test_what_is_told_to_learn_nothing_is_all_that_gets_no_gradient(
    finished: Path, many: Path, tmp_path: Path, tail: str
) -> None:
    """MITKD specification, property 6: in a step as it is made, and in the weights where nothing decays."""
    overrides = [f"distill.tail={tail}", "distill.optim.tokens=1500", "distill.optim.weight_decay=0"]
    run = execute(load_recipe(many / "recipe.yaml", overrides), begun(finished, tmp_path / "many"), "distill")
    for student in run.recipe.students:
        folder, layers = run.folder / "students" / student.name, student.layers + (tail == "aux")
        told = json.loads((folder / "untaught.json").read_text())
        learner = learner_of(run, student, live_teacher(run))
        hear_update([learner], plan_of(run), 0, Accelerator(cpu=True))
        idle = {name for name, weight in learner.lesson.named_parameters() if weight.grad is None}
        places = {name.split(".")[4] for name in idle if ".layer." in name}
        assert places == {str(layers - 1)}
        own, start = weights(folder), fresh(run, student, layers).model.state_dict()
        still = {name for name, value in own.items() if torch.equal(value, start[name])}
        assert set(told) == still == {name.removeprefix("student.model.") for name in idle} & own.keys()
        assert ("pooler.dense.weight" in still, len(still) == 2) == (True, tail == "aux")


def test_norm_and_samples_of_the_recipe_reach_the_loss(finished: Path, many: Path) -> None:
    told: dict[str, dict[str, float]] = {}
    settings = {
        "token": "distill.norm=token",
        "flat": "distill.norm=flat",
        "paddle": "distill.norm=paddle",
        "samples": "distill.sample_relations=0.25",
    }
    for name, override in settings.items():
        run = AgnosticRun(load_recipe(many / "recipe.yaml", [override]), finished)
        batch, student, teacher = plan_of(run)[0], run.recipe.students[0], live_teacher(run)
        assert batch.attention_mask.min() == 0
        learner = learner_of(run, student, teacher)
        learner.lesson.eval()
        loss, parts = learner.loss_of(batch)
        told[name] = {"loss": loss.item(), **{part: value.item() for part, value in parts.items()}}
        if name != "samples":
            own, aim = learner.lesson.student(batch).relations[1], teacher(batch).relations[4]  # type: ignore[operator]
            plain = losses.relations(own, aim, batch.attention_mask, 16, norm=name)  # type: ignore[arg-type]
            assert loss.item() == pytest.approx(plain.item())
    assert len({round(told[name]["loss"], 6) for name in ("token", "flat", "paddle")}) == 3
    samples = told["samples"]
    assert samples["samples"] != pytest.approx(told["token"]["loss"])
    assert samples["loss"] == pytest.approx(0.75 * told["token"]["loss"] + 0.25 * samples["samples"])


def test_a_teacher_without_known_projections_is_refused_before_anything_is_trained(
    many: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Its weights are not even there."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    DebertaV2Config(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        UsageError, match=r"layer 1 of DebertaV2\w+ has no query, .* use a teacher\.model .*q_proj/k_proj"
    ):
        execute(load_recipe(many / "recipe.yaml", [f"teacher.model={tmp_path}/model"]), tmp_path / "many")
    assert not (tmp_path / "many").exists()


# rate: what seed 0 scores on rows set aside, then what both seeds do on the reported ones
PRETENDED: dict[float, tuple[float, tuple[float | None, ...]]] = {
    1e-3: (0.5, (0.95, 0.10)),
    2e-3: (0.4, (0.70, 0.72)),
    3e-3: (0.8, (0.99, None)),
}


def pretend(trial: Trial, place: Place, limits: Limits, optim: Any) -> None:
    """What takes the place of a fine-tuning: its scores depend on its rate; None: it failed."""
    aside, reported = PRETENDED[trial.learning_rate]
    accuracy = reported[trial.seed] if trial.is_final else aside
    scores = {} if accuracy is None else {"accuracy": accuracy, "f1": 1 - accuracy}
    told = {"status": "ok" if scores else "failed", "scores": scores, "metric": "accuracy", "rows": 1}
    path = place.record_of(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**asdict(trial), "task": trial.task.name, **told})


@pytest.mark.parametrize(("select", "rate", "tuned"), [("honest", 3e-3, 3), ("dev-max", 2e-3, 0)])
def test_rates_are_chosen_by_reported_scores_only_under_dev_max(
    finished: Path,
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    select: str,
    rate: float,
    tuned: int,
) -> None:
    """By the mean over seeds, of which a failed one is worse than any score; and honestly, by rows set aside."""
    monkeypatch.setattr(evaluate_agnostic, "fine_tune", pretend)
    few = ["fine_tune.few={}", "fine_tune.teacher=false", "fine_tune.learning_rates=[1.0e-3, 2.0e-3, 3.0e-3]"]
    folder = begun(finished, tmp_path / "many", "students")
    execute(load_recipe(many / "recipe.yaml", [*few, f"fine_tune.select={select}"]), folder)
    rows = results_of(folder)
    assert len(rows) == 2 * 2 * 2  # students, tasks, seeds
    assert {row["learning_rate"] for row in rows} == {rate}
    assert [row["scores"].get("accuracy") for row in rows] == [*PRETENDED[rate][1]] * 4
    assert json.loads((folder / "evaluation" / "results.json").read_text())["select"] == select
    trials = [json.loads(path.read_text()) for path in (folder / "trials").glob("*/small/reviews/*.json")]
    assert [trial["is_final"] for trial in trials].count(False) == tuned
    assert [trial["is_final"] for trial in trials].count(True) == (2 if select == "honest" else 6)


def test_everybody_is_fine_tuned_on_the_same_few_rows(
    finished: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[tuple[str, str], set[tuple[tuple[str, ...], tuple[str, ...]]]] = {}

    def kept(trial: Trial, limits: Limits) -> Any:
        rows = rows_of(trial, limits)
        names = (tuple(row.id for row in rows.train), tuple(row.id for row in rows.judged))
        read.setdefault((trial.task.name, "all" if trial.shots is None else "few"), set()).add(names)
        return rows

    monkeypatch.setattr(fine_tuning, "rows_of", kept)
    few = ["fine_tune.epochs=[1]", "fine_tune.few.epochs=[1]", "fine_tune.few.draws=1", "fine_tune.teacher=false"]
    limits = ["fine_tune.rows=20", "fine_tune.test_rows=10", "fine_tune.learning_rates=[1.0e-3]"]
    one_rate = "fine_tune.few.learning_rates=[1.0e-3]"
    folder = begun(finished, tmp_path / "many", "students")
    execute(load_recipe(many / "recipe.yaml", [*few, *limits, one_rate]), folder)
    assert {(row["task"], row["shots"], row["rows"]) for row in results_of(folder)} == {
        ("reviews", None, 20),
        ("other", None, 20),
        ("scores", 4, 16),
    }
    assert read.keys() == {("reviews", "all"), ("other", "all"), ("scores", "few")}
    assert {len(rows) for rows in read.values()} == {1}, "whatever the student and the seed"
    [(train, judged)] = read["reviews", "all"]
    assert (len(train), len(judged)) == (20, 10)
    assert [len(names) for rows in read["scores", "few"] for names in rows] == [16, 10]


@pytest.mark.parametrize("is_final", [True, False])
def test_few_rows_are_drawn_from_all_and_kept_in_their_order(many: Path, is_final: bool) -> None:
    recipe = load_recipe(many / "recipe.yaml")
    trial = Trial("small", recipe.fine_tune.tasks[0], None, None, 1e-3, 1, 0, is_final)
    task = task_of(trial.task)
    whole, few = rows_of(trial, Limits(None, None)), rows_of(trial, Limits(20, 10))
    sides: list[Callable[[Any], Any]] = [lambda rows: rows.train, lambda rows: rows.judged]
    every = ([*task.train, *task.holdout], task.test) if is_final else (task.train, task.holdout)
    for side, rows, wanted in zip(sides, every, (20, 10), strict=True):
        assert list(side(whole)) == list(rows)
        drawn = list(side(few))
        assert drawn == [row for row in rows if row in drawn]
        assert len(drawn) == wanted
        assert drawn != list(rows)[:wanted]


@pytest.mark.parametrize(("model_type", "layers", "taught"), [("bert", 24, 21), ("roberta", 24, 19), ("bert", 12, 12)])
def test_large_teachers_teach_the_layer_that_minilm_found_best(
    many: Path, tmp_path: Path, model_type: str, layers: int, taught: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(model_type=model_type, num_hidden_layers=layers)
    monkeypatch.setattr(AgnosticRun, "teacher_config", config)
    assert teacher_layer(AgnosticRun(load_recipe(many / "recipe.yaml"), tmp_path)) == taught
    chosen = load_recipe(many / "recipe.yaml", ["distill.teacher_layer=7"])
    assert teacher_layer(AgnosticRun(chosen, tmp_path)) == 7


BAD_RECIPES = {
    "text.budget_tokens=2000": r"gives 200 word-pieces of blocks of one length, fewer than .*batch_tokens=256; raise",
    "distill.optim.keep=best": r"distill\.optim\.keep=best needs rows to judge by",
    "students=[{name: teacher}]": "students: 'teacher' is the name of something else in a run",
    "students=[{name: scratch}]": "students: 'scratch' is the name of something else in a run",
    "students=[{name: a, tokenizer: b}]": r"students\.0\.tokenizer: unknown key",
    "students=[{name: a, max_positions: 9}]": r"students\.0\.max_positions: unknown key",
    "students=[{name: a, hidden_size: 64, embeddings: projected}]": r"students, a: .*hidden_size=64 is above the .* 32",
    "students=[{name: a, layers: 2, hidden_size: 32, heads: 4, init: layer_copy}]": (
        r"students, a: student\.init=layer_copy .* intermediate_size is 128 in the student and 64"
    ),
    "teacher.optim.epochs=3": r"teacher\.optim\.epochs: unknown key",
    "students=[{name: a, optim: {batch_size: 3}}]": r"students\.0\.optim\.batch_size: unknown key",
    "distill.relation_heads=5": r"students, small: .*relation_heads=5 must divide .*these do: \[1, 2, 4, 8, 16\]",
    "distill.teacher_layer=9": r"distill\.teacher_layer=9: the teacher has layers 1 to 4",
    "text.length=64": r"text\.long_length=24 is no more than text\.length=64",
    "text.least=7": r"text\.least=7 is more than half of text\.length=12",
    "text.long_length=64": r"text\.long_length=64 is more than the teacher reads, 48",
    "teacher.processes=9": r"teacher\.processes=9 is more than the teacher\.mixture\.tasks_per_update=4",
    "distill.tail=init": r"students, small: distill\.tail=init takes weights of the teacher, whose width is 32",
    "text.task_share=0.1": r"text\.task_share and text\.task_text belong together",
    "students=[{name: a}, {name: a}]": r"students: 'a' is the name of two",
    "distill.relations=[qx]": r"distill\.relations\.0: 'qx'",
    "teacher.mixture.pases=3": r"teacher\.mixture\.pases: unknown key; did you mean 'passes'\?",
    "distill.optim={epochs: 0, batch_tokens: 256}": r"distill\.optim\.epochs=0 distils no student",
    "fine_tune.optim.keep=best": r"fine_tune\.optim\.keep=best would choose an epoch on rows",
    "fine_tune.optim.learning_rate=0.1": r"learning_rate=0\.1 has no effect; set fine_tune\.learning_rates",
    "fine_tune.optim.epochs=1": r"fine_tune\.optim\.epochs=1\.0 has no effect; set fine_tune\.epochs",
    "fine_tune.epochs=[0]": r"fine_tune\.epochs\.0: .*greater than 0",
    "fine_tune.learning_rates=[-1.0]": r"fine_tune\.learning_rates\.0: .*greater than 0",
    "fine_tune.seeds=[1, 1]": r"fine_tune\.seeds names 1 twice",
    "fine_tune.few.shots=[4, 4]": r"fine_tune\.few\.shots names 4 twice",
    "fine_tune.teacher_tasks=[{name: a}, {name: a}]": r"fine_tune\.teacher_tasks names 'a' twice",
    "fine_tune.known=[{name: mnlii}]": r"fine_tune\.known, mnlii: no task of this name is known here",
}


@pytest.mark.parametrize("override", BAD_RECIPES)
def test_bad_recipes_are_refused_by_key_before_a_model_is_loaded(many: Path, tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError, match=BAD_RECIPES[override]):
        execute(load_recipe(many / "recipe.yaml", [override]), tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_stage_of_the_other_kind_of_recipe_is_refused(many: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"task-agnostic .* no stage build-kb; its stages: train-teacher, build-text, d"
    ):
        execute(load_recipe(many / "recipe.yaml"), tmp_path, "build-kb")
    with pytest.raises(UsageError, match="for one task .* no stage build-text"):
        execute(load_recipe(world / "recipe.yaml"), tmp_path, "build-text")
