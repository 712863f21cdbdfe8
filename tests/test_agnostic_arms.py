"""Controls of the method: a teacher that only read the tasks' texts, and students that learn the tasks themselves."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interruptions import killing_after
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from openbook import agnostic_experiment, training
from openbook.agnostic_run import AgnosticRun
from openbook.config import UsageError
from openbook.data.masking import MaskedBatches, Masking
from openbook.drift import blocks_of, drift
from openbook.multitask import learned, mixture_of, texts_of
from openbook.pipeline import execute, plan
from openbook.recipe import load_recipe
from openbook.stages import train_multitask
from openbook.stages.evaluate_agnostic import place_of

pytestmark = pytest.mark.usefixtures("trials_here")

MASKED = "teacher.mixture.masked_text=true"
NO_TASKS = "teacher.tasks=[]"
FEW = "teacher.mixture.passes=2"


@pytest.fixture(scope="session")
def control(many: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of many tasks on an encoder that has a mask token, whose students can learn the tasks too."""
    folder = tmp_path_factory.mktemp("control")
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model = AutoModel.from_pretrained(pretrained)
    torch.manual_seed(2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    raw = yaml.safe_load((many / "recipe.yaml").read_text())
    raw["teacher"]["model"] = str(folder / "encoder")
    raw["fine_tune"] |= {"learning_rates": [2.0e-3], "epochs": [1], "seeds": [0], "teacher": False, "few": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    raw["students_learn"] = {name: part for name, part in raw["teacher"].items() if name != "model"}
    raw["students_learn"]["mixture"] = raw["teacher"]["mixture"] | {"passes": 4}
    raw["students_learn"]["optim"] = raw["teacher"]["optim"] | {"learning_rate": 1.0e-2}
    raw["teacher"]["tasks"] = []
    (folder / "direct.yaml").write_text(yaml.safe_dump(raw))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# A teacher that reads the tasks' texts and no label


@pytest.fixture(scope="session")
def reader(control: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reader"
    execute(load_recipe(control / "recipe.yaml", [MASKED, FEW]), folder, "train-teacher")
    return folder


def test_a_teacher_of_masked_text_learns_to_guess_words_and_has_no_heads(reader: Path, control: Path) -> None:
    told = json.loads((reader / "teacher" / "scores.json").read_text())
    assert told["tasks"] == {}
    assert list(told["masked_text"]) == ["reviews", "scores", "pairs"]
    history = json.loads((reader / "teacher" / "history.json").read_text())
    looks = [row["holdout"] for row in history if "holdout" in row]
    assert looks[-1] > looks[0]
    losses = [task["loss"] for task in told["masked_text"].values()]
    assert -sum(losses) / 3 == pytest.approx(max(looks), abs=1e-5), "the weights that stay guess best"
    assert max(losses) < math.log(100), "as many words as there are; a guess without knowledge"
    assert history[0]["loss"] == pytest.approx(1, abs=0.15), "over the logarithm of the vocabulary"
    assert not list((reader / "teacher").glob("heads*"))
    model, plain = AutoModel.from_pretrained(reader / "teacher"), AutoModel.from_pretrained(control / "encoder")
    assert model.state_dict().keys() == plain.state_dict().keys()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[name])]
    assert not [name for name in moved if name.startswith("pooler")]
    assert len(moved) > 60


def test_it_reads_the_rows_in_the_draws_and_updates_of_the_teacher_of_many_tasks(control: Path, reader: Path) -> None:
    many = AgnosticRun(load_recipe(control / "recipe.yaml", [FEW]), reader)
    texts = texts_of(many, many.recipe.teacher, learned(many, many.recipe.teacher))
    mixture = mixture_of(many.recipe.teacher, texts)
    told = json.loads((reader / "teacher" / "scores.json").read_text())["masked_text"]
    assert {name: {"draws": one["draws"], "passes": one["passes"]} for name, one in told.items()} == mixture.draws_of()
    assert json.loads((reader / "teacher" / "history.json").read_text())[-1]["step"] * 4 == len(mixture)
    masked = MaskedBatches(mixture, Masking.of(many.tokenizer), seed=0)
    drawn = [(masked[step], mixture[step]) for step in range(24)]
    assert {own.task for own, _ in drawn} == {"reviews", "scores", "pairs"}
    for own, theirs in drawn:
        assert own.ids == theirs.ids
        assert own.labels is not None
        kept = torch.where(own.labels >= 0, own.labels, own.input_ids)
        assert torch.equal(kept, theirs.input_ids)
        assert torch.equal(own.token_type_ids, theirs.token_type_ids)
        assert bool(own.token_type_ids.any()) == (own.task == "pairs"), "a pair is read as a pair"


def test_killed_while_it_reads_it_goes_on_to_the_same_weights(
    control: Path, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = load_recipe(control / "recipe.yaml", [MASKED, FEW]), tmp_path / "reader"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killing_after(12))
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, folder, "train-teacher")
    execute(recipe, folder, "train-teacher")
    assert same(folder / "teacher", reader / "teacher")


def test_its_students_are_distilled_and_judged_as_all_others(control: Path, reader: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(reader / "teacher", folder / "teacher")
    execute(load_recipe(control / "recipe.yaml", [MASKED, FEW, "distill.optim.tokens=600"]), folder)
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["heads"] == {}
    record = agnostic_experiment.told(AgnosticRun(load_recipe(control / "recipe.yaml", [MASKED, FEW]), folder))
    assert record["teacher"] == {}
    assert list(record["masked_text"]) == ["reviews", "scores", "pairs"]
    assert {row["model"] for row in results["rows"]} == {"small", "wide"}


# Students that learn the tasks themselves


@pytest.fixture(scope="session")
def direct(control: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "direct"
    execute(load_recipe(control / "direct.yaml"), folder)
    return folder


@pytest.mark.parametrize("name", ["small", "wide"])
def test_students_learn_the_tasks_after_distillation_and_lose_their_heads(direct: Path, name: str) -> None:
    before, after = direct / "students" / name, direct / "trained_students" / name
    model = AutoModel.from_pretrained(after)
    assert set(weights(after)) == set(weights(before)) == set(model.state_dict())
    assert not list(after.glob("heads*"))
    assert not same(before, after)
    told = json.loads((after / "scores.json").read_text())["tasks"]
    assert list(told) == ["reviews", "scores", "pairs"]
    assert told["reviews"]["score"] > told["reviews"]["guess"] + 0.2
    assert sum(task["passes"] for task in told.values()) == pytest.approx(12, rel=0.2)
    places = "embeddings.position_embeddings.weight"  # beyond the longest text they only decay
    torch.testing.assert_close(weights(after)[places][-1], weights(before)[places][-1], rtol=0.05, atol=0)


def test_evaluation_reads_the_students_that_learned(direct: Path, control: Path) -> None:
    made = json.loads((direct / "trained_students" / "artifact.json").read_text())["fingerprint"]
    run = AgnosticRun(load_recipe(control / "direct.yaml"), direct)
    assert place_of(run, "small").encoder == direct / "trained_students" / "small"
    rows = json.loads((direct / "evaluation" / "results.json").read_text())["rows"]
    assert {(row["model"], row["task"], row["role"]) for row in rows} == {
        (name, task, role)
        for name in ("small", "wide")
        for task, role in (("reviews", "in-domain"), ("other", "leaky"))
    }  # the tasks that students learned count as seen
    assert [step.stage.name for step in plan(run)][-2:] == ["train-students", "evaluate"]
    assert made in json.dumps(plan(run)[-1].inputs["upstream"])


def test_the_results_of_a_grid_tell_what_the_students_learned(direct: Path, control: Path) -> None:
    record = agnostic_experiment.told(AgnosticRun(load_recipe(control / "direct.yaml"), direct))
    assert record["teacher"] == {}
    for name in ("small", "wide"):
        own = record["students"][name]
        assert list(own["learned"]["tasks"]) == ["reviews", "scores", "pairs"]
        assert own["loss"] == json.loads((direct / "students" / name / "history.json").read_text())[-1]["loss"]


def test_students_killed_while_they_learn_go_on_to_the_same_weights(
    direct: Path, control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the first student's training, once in the second's; the first is then not trained again."""
    recipe, folder = load_recipe(control / "direct.yaml"), tmp_path / "direct"
    for stage in ("teacher", "text", "students"):
        shutil.copytree(direct / stage, folder / stage)
    kill = killing_after(12)
    for kills in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(training, "save_checkpoint", kill if kills == 1 else killing_the_second(12))
            with pytest.raises(KeyboardInterrupt):
                execute(recipe, folder, "train-students")
    partial = folder / ".trained_students.partial"
    first = (partial / "small" / "scores.json").stat().st_mtime_ns
    assert not (partial / "wide" / "scores.json").exists()
    execute(recipe, folder, "train-students")
    assert (folder / "trained_students" / "small" / "scores.json").stat().st_mtime_ns == first
    for name in ("small", "wide"):
        assert same(folder / "trained_students" / name, direct / "trained_students" / name)
    assert not (folder / "trained_students" / "scratch").exists()


def killing_the_second(updates: int) -> Any:
    save = training.save_checkpoint

    def stop(learners: Any, scratch: Path, done: int, accelerator: Any) -> None:
        save(learners, scratch, done, accelerator)
        if scratch.name == "wide" and done >= updates:
            raise KeyboardInterrupt

    return stop


def test_rows_near_a_reported_one_are_not_learned_by_students_either(
    control: Path, world: Path, tmp_path: Path
) -> None:
    known = (world / "test.csv").read_text().splitlines()[1]
    (tmp_path / "train.csv").write_text((world / "train.csv").read_text() + known + "\n")
    raw = yaml.safe_load((control / "direct.yaml").read_text())
    raw["students_learn"]["tasks"][0]["train"]["path"] = str(tmp_path / "train.csv")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    run = AgnosticRun(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    assert run.duplicates(run.learned).counts == {"reviews": 1, "scores": 0, "pairs": 0}
    rows = learned(run, run.recipe.students_learn)["reviews"].train
    assert known.partition(",")[0] not in {row.text for row in rows}


def test_recipes_without_the_new_keys_keep_their_stages_and_fingerprints(control: Path, many: Path) -> None:
    run = AgnosticRun(load_recipe(many / "recipe.yaml"), control / "none")
    steps = {step.stage.name: step.inputs for step in plan(run)}
    assert list(steps) == ["train-teacher", "build-text", "distill", "evaluate"]
    assert list(steps["evaluate"]["upstream"]) == ["distill"]
    assert list(steps["train-teacher"]) == [
        "stage", "upstream", "pretrained", "settings", "duplicates", "names", "tasks",
    ]  # fmt: skip
    assert set(steps["train-teacher"]["settings"]) == {
        "revision", "mixture", "scale_losses", "dropout", "optim", "judge_every", "seed",
    }  # fmt: skip
    assert set(steps["train-teacher"]["settings"]["mixture"]) == {
        "passes", "alpha", "cap", "tasks_per_update", "micro_batch", "systematic", "rows", "shuffle_labels",
    }  # fmt: skip
    masked = AgnosticRun(load_recipe(control / "recipe.yaml", [MASKED]), control / "none")
    assert train_multitask.inputs(masked)["settings"]["mixture"]["masked_text"] is True
    direct = AgnosticRun(load_recipe(control / "direct.yaml"), control / "none")
    assert [step.stage.name for step in plan(direct, "distill")] == ["train-teacher", "build-text", "distill"]


LEARN = "students_learn"
BAD_RECIPES = [
    ("recipe", [MASKED, NO_TASKS], r"teacher\.mixture\.masked_text=true .* teacher\.tasks is empty; name tasks"),
    ("recipe", [MASKED, "teacher.mixture.shuffle_labels=true"], r"shuffle_labels=true moves them; keep one"),
    ("recipe", [f"{LEARN}={{seed: 1}}"], r"students_learn\.tasks is empty; name what .* or remove students_learn"),
    ("direct", [f"{LEARN}.tasks=[{{name: a}}, {{name: a}}]"], r"students_learn\.tasks names 'a' twice"),
    (
        "direct",
        [f"{LEARN}.mixture.masked_text=true", f"{LEARN}.mixture.shuffle_labels=true"],
        r"reads no labels, and students_learn\.mixture\.shuffle_labels=true",
    ),
    (
        "direct",
        [f"{LEARN}.processes=9"],
        r"students_learn\.processes=9 is more than the students_learn\.mixture\.tasks",
    ),
    (
        "direct",
        ["text.long_length=20"],
        r"students_learn\.tasks, reviews: max_length=24 .* reads, 20 .* raise text\.long",
    ),
    ("direct", [f"{LEARN}.model=bert"], r"students_learn\.model: unknown key"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), BAD_RECIPES)
def test_bad_controls_are_refused_by_key(
    control: Path, tmp_path: Path, name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        execute(load_recipe(control / f"{name}.yaml", overrides), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_masked_text_needs_a_mask_token(many: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"teacher\.mixture\.masked_text=true: the tokenizer .* has no mask token"):
        execute(load_recipe(many / "recipe.yaml", [MASKED]), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_the_stage_of_students_is_refused_without_its_key(control: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe has no students_learn"):
        execute(load_recipe(control / "recipe.yaml"), tmp_path / "bad", "train-students")


# How far a teacher moved


@pytest.fixture
def moved(reader: Path, direct: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """A run's folder with this teacher and the text."""

    def begin(teacher: Path) -> Path:
        shutil.copytree(teacher, tmp_path / "teacher", dirs_exist_ok=True)
        shutil.copytree(direct / "text", tmp_path / "text", dirs_exist_ok=True)
        return tmp_path

    return begin


def test_a_teacher_that_learned_nothing_has_no_drift(
    control: Path, direct: Path, moved: Callable[[Path], Path]
) -> None:
    run = AgnosticRun(load_recipe(control / "direct.yaml"), moved(direct / "teacher"))
    found = drift(run, run.folder / "text" / "long")
    nothing = {"loss": 0.0, "qq": 0.0, "kk": 0.0, "vv": 0.0}
    assert (found["layer"], found["students"]) == (4, {"small": nothing, "wide": nothing})
    assert found["layers"] == {str(layer): nothing for layer in range(1, 5)}


def test_the_drift_is_the_relation_kl_of_the_layer_that_is_taught(
    control: Path, reader: Path, moved: Callable[[Path], Path]
) -> None:
    """Against softmaxes written out over the states of stock models; other layers and heads give other numbers."""
    overrides = [MASKED, FEW, "distill.teacher_layer=2", "distill.relations=[kk, qv]", "distill.relation_heads=4"]
    run = AgnosticRun(load_recipe(control / "recipe.yaml", overrides), moved(reader / "teacher"))
    further = {name: 5 * value if "self" in name else value for name, value in weights(run.folder / "teacher").items()}
    save_file(further, run.folder / "teacher" / "model.safetensors", {"format": "pt"})
    found = drift(run, run.folder / "text" / "short")
    batch = blocks_of(run.folder / "text" / "short")
    taps: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for folder in (run.folder / "teacher", control / "encoder"):
        model = AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            states = model(
                batch.input_ids, batch.attention_mask, batch.token_type_ids, output_hidden_states=True
            ).hidden_states[1]
            own = model.encoder.layer[1].attention.self
            for name, projection in (("q", own.query), ("k", own.key), ("v", own.value)):
                taps[name].append(projection(states).unflatten(2, (4, 8)).transpose(1, 2))  # (B, A, L, d/A)
    expected = {}
    for pair in ("kk", "qv"):
        sides = [taps[pair[0]][side] @ taps[pair[1]][side].transpose(2, 3) / math.sqrt(8) for side in (0, 1)]
        hidden = (1 - batch.attention_mask)[:, None, None, :] * -1e9
        after, before = ((side + hidden).log_softmax(-1) for side in sides)
        rows = (after.exp() * (after - before)).sum(-1).mean(1)  # (B, L), mean over heads
        real = batch.attention_mask
        expected[pair] = float(((rows * real).sum(1) / real.sum(1)).mean())
    small = found["students"]["small"]
    assert {pair: small[pair] for pair in expected} == pytest.approx(expected, rel=1e-3)
    assert small["loss"] == pytest.approx(sum(expected.values()), rel=1e-3)
    assert small["loss"] > 0.01
    assert found["students"]["wide"] == small == found["layers"]["2"]
    assert len({one["loss"] for one in found["layers"].values()}) == 4
    assert found["blocks"] == min(64, len(batch.ids))


def test_the_blocks_are_the_same_every_time_and_from_all_of_the_text(direct: Path) -> None:
    ids = json.loads((direct / "text" / "statistics.json").read_text())["short"]["blocks"]
    assert ids > 130
    one, again = blocks_of(direct / "text" / "short"), blocks_of(direct / "text" / "short")
    assert one.ids == again.ids
    assert len(set(one.ids)) == 64
    documents = {name.rpartition("/")[0] for name in one.ids}
    assert len(documents) > 40
