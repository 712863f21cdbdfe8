"""The pages are true: commands parse, files exist, Python runs, recipes are valid, generated parts are current."""

import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import typer
import yaml
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from openbook.answers import outputs_of
from openbook.cli import app
from openbook.config import Optim, Recipe, Settings, StudentSettings, TaskSettings
from openbook.data.batches import tokenise
from openbook.data.tasks import TaskData, describe_task
from openbook.grid import load_grid
from openbook.inference import answers_of
from openbook.knowledge_base import store
from openbook.metrics import kl_to_teacher
from openbook.models.encoder import load_finished
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe, validate_recipe
from openbook.types import Example, KnowledgeBase

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("src/", "docs/", "tests/", "recipes/", "examples/", "benchmarks/", "requirements/")
generated = runpy.run_path(str(ROOT / "docs" / "regenerate.py"))["PAGES"]


def blocks(page: Path, language: str) -> list[str]:
    return [code for named, code in FENCE.findall(TEXT[page]) if named == language]


def spans(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", TEXT[page]))


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command in the blocks of every page, as page and words."""
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).splitlines():
            for part in line.split(" | "):
                yield page.name, words_of(part)


def words_of(command: str) -> list[str]:
    program, *arguments = shlex.split(command)
    return [program.removeprefix(".venv/bin/"), *arguments]


SHELL = list(shell_lines())
MENTIONED = [words_of(span) for page in PAGES for span in spans(page) if re.match(r"(openbook|make|python) ", span)]
OPENBOOK = [(page, words[1:]) for page, words in SHELL if words[0] == "openbook"]
MAKE = sorted({words[1] for words in [*MENTIONED, *(words for _, words in SHELL)] if words[0] == "make"})
WRITTEN = {f"recipes/{Path(words[2]).stem}.yaml" for _, words in OPENBOOK if words[:2] == ["init", "--data"]}


def test_all_pages_are_looked_at() -> None:
    names = ["cli", "decisions", "experiments", "export", "how-it-works", "open-book", "quickstart", "recipe"]
    names += ["report", "serving", "shipping", "task-agnostic-recipe", "task-agnostic", "textbook", "your-own-data"]
    assert [page.stem for page in PAGES[3:]] == names
    assert len(OPENBOOK) >= 14
    assert len(MENTIONED) >= 20
    assert len(MAKE) >= 5


@pytest.mark.parametrize("name", ["cli.md", "recipe.md", "task-agnostic-recipe.md"])
def test_generated_pages_are_current(name: str) -> None:
    assert TEXT[ROOT / "docs" / name] == generated[name](), "run docs/regenerate.py"
    assert len(generated) == 3


def test_every_command_and_every_key_is_documented() -> None:
    headings = re.findall(r"^## (.+)$", TEXT[ROOT / "docs" / "cli.md"], re.MULTILINE)
    below = {f"bench {name}" for name in COMMANDS["bench"].commands}
    assert set(headings) == set(COMMANDS) - {"bench"} | below
    rows = re.findall(r"^\| `(\w+)` \|", TEXT[ROOT / "docs" / "recipe.md"], re.MULTILINE)
    assert sorted(rows) == sorted(key for model in PARTS for key in model.model_fields)


def parts_of(annotation: Any) -> Iterator[type[Settings]]:
    """Every settings model a recipe can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        for field in annotation.model_fields.values():
            yield from parts_of(field.annotation)
    for part in get_args(annotation):
        yield from parts_of(part)


PARTS = set(parts_of(Recipe))


@pytest.mark.parametrize(
    ("page", "words"), OPENBOOK, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_commands_parse(page: str, words: list[str]) -> None:
    name, *arguments = words
    assert name in COMMANDS, f"{page}: openbook has no command {name}"
    context = COMMANDS[name].make_context(name, arguments)
    recipe = context.params.get("recipe")
    if name == "experiment":
        load_grid(ROOT / context.params["file"])
    if recipe is not None and str(recipe) not in WRITTEN:
        load_recipe(ROOT / recipe, context.params["set_"] or ())


@pytest.mark.parametrize("words", [words[1:] for words in MENTIONED if words[0] == "openbook"], ids=" ".join)
def test_mentioned_commands_and_options_exist(words: list[str]) -> None:
    COMMANDS[words[0]].make_context(words[0], words[1:], resilient_parsing=True)


@pytest.mark.parametrize("target", MAKE)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT[page]) if not link.startswith("http")]
    for link in links:
        assert (page.parent / link).exists(), link
    arguments = [word for block in blocks(page, "bash") for word in shlex.split(block)]
    for span in [*spans(page), *arguments]:
        if span.startswith(FOLDERS) and not set(span) & set("<*") and span not in WRITTEN:
            assert (ROOT / span).exists(), span


def test_recipes_in_the_pages_are_valid() -> None:
    shipped = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    found = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
    assert len(found) == 6
    for page, block in found:
        if page.stem == "task-agnostic":
            for task in yaml.safe_load(block):
                describe_task(TaskSettings.model_validate(task))
        elif page.stem != "experiments":
            validate_recipe({**shipped, **yaml.safe_load(block)}, page.name)


def test_contributing_is_short_and_the_changelog_knows_the_version() -> None:
    assert len(TEXT[ROOT / "CONTRIBUTING.md"].splitlines()) <= 60
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in TEXT[ROOT / "CHANGELOG.md"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with `runs/quickstart`, as the demo leaves it, around a tiny random student."""
    run = tmp_path_factory.mktemp("workplace") / "runs" / "quickstart"
    random_model(("who", "where"), tokenizer, run / "student")
    base = KnowledgeBase(
        keys=np.eye(2, 16, dtype=np.float32),
        values=np.eye(2, dtype=np.float32),
        ids=("a", "b"),
        texts=("who is he", "where is it"),
        manifest={
            "kind": "classification",
            "labels": ("who", "where"),
            "key_space": "of this test",
            "retrieval": {"top_k": 2, "temperature": 0.1, "beta": 0.5},
        },
    )
    store.save(base, run / "knowledge_base")
    OpenBook.from_pretrained(run).rekey()
    return run.parents[1]


def random_model(labels: tuple[str, ...], tokenizer: Any, folder: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        problem_type="single_label_classification", initializer_range=0.5,  # so that answers differ from text to text
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PYTHON = [(page.name, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_runs(page: str, code: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert len(PYTHON) == 4
    monkeypatch.chdir(workplace)
    exec(compile(code, page, "exec"), {})
    assert re.search("who|where", capsys.readouterr().out)


@pytest.mark.parametrize("words", [words for _, words in OPENBOOK if words[0] == "predict" and "--model" not in words])
def test_predictions_run(words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    told = CliRunner().invoke(app, words, input="where is it\n", catch_exceptions=False)
    assert told.exit_code == 0
    assert re.search("who|where", told.output)


def test_distillation_in_one_file(tmp_path: Path, tokenizer: Any) -> None:
    """The teacher knows nothing of the labels, so only listening to it brings the student nearer to it."""
    labels = ("no", "yes")
    random_model(labels, tokenizer, tmp_path / "teacher")
    words = ["film", "movie", "book", "play", "song", "meal", "plot", "actor"]
    texts = [f"the {a} was {b}" for a in words for b in words]
    train = [Example(f"own/train/{row}", text, label=row % 2) for row, text in enumerate(texts)]
    task = TaskData("own", "classification", labels, ("accuracy",), False, train, [], [], [])
    shape, teacher = StudentSettings(layers=1, hidden_size=16, heads=2), str(tmp_path / "teacher")
    read = tokenise(train, tokenizer, 16, tmp_path / "read")
    aim = outputs_of(answers_of(load_finished(teacher), read), task.kind)
    distances = []
    for epochs in (0, 30):
        folder = tmp_path / f"epochs-{epochs}"
        folder.mkdir()
        distill = runpy.run_path(str(ROOT / "examples" / "distill_in_one_file.py"))["distill"]
        student = distill(teacher, task, shape, Optim(learning_rate=5e-3, epochs=epochs, precision="fp32"), folder)
        distances.append(kl_to_teacher(outputs_of(answers_of(student, read), task.kind), aim))
        saved = AutoModelForSequenceClassification.from_pretrained(folder / "student")
        assert saved.config.id2label == dict(enumerate(labels))
    assert distances[1] < distances[0] / 2, distances
