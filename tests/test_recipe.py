"""The recipe: mistakes are named by key, value and fix; defaults, overrides and files read back as they were."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from openbook.config import DistillSettings, Optim, Recipe, Settings, StudentSettings, Terms, UsageError
from openbook.recipe import dump_recipe, load_recipe, validate_as

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

SMALL = """\
name: small
task: {name: trec}
teacher: {model: some/model}
corpus:
  sources:
    - {path: text.txt}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_recipes_that_ship_are_found() -> None:
    assert len(SHIPPED) == 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert validate_as(type(recipe), yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, "student.layers=5", "distill.task.terms={relations: 1, layer_mapping: [1, 3]}")
    dumped = dump_recipe(recipe)
    assert load(tmp_path, dumped) == recipe
    assert "checkpoint_every: 200" in dumped  # defaults are written out
    assert recipe.distill.task.terms.layer_mapping == (1, 3)


BAD: list[tuple[str, tuple[str, ...]]] = [
    # unknown keys name the nearest valid one
    ("student.layer=4", ("student.layer: unknown key", "did you mean 'layers'?")),
    ("distill.task.optim.lerning_rate=1", ("distill.task.optim.lerning_rate:", "did you mean 'learning_rate'?")),
    ("knowledgebase.top_k=4", ("knowledgebase: unknown key", "did you mean 'knowledge_base'?")),
    ("distill.corpus.terms={sofd_labels: 1}", ("distill.corpus.terms.sofd_labels:", "did you mean 'soft_labels'?")),
    ("corpus.sources=[{path: a, formt: csv}]", ("corpus.sources.0.formt:", "did you mean 'format'?")),
    ("corpus.sources=[{package: p, path: a, quotes: no}]", ("corpus.sources.0.quotes:", "'quoting'")),
    ("corpus.sources=[{dataset: d, splitt: a}]", ("corpus.sources.0.splitt:", "did you mean 'split'?")),
    ("teacher.model={package: p, pth: a}", ("teacher.model.pth: unknown key", "did you mean 'path'?")),
    ("evaluate.zzz=4", ("evaluate.zzz: unknown key", "valid keys here: latency_rows, throughput_rows")),
    # values: the key, the value, what would be right
    ("student.layers=0", ("student.layers: 0:", "greater than 0")),
    ("student.layers=2.5", ("student.layers: 2.5:", "valid integer")),
    ("student.layers=true", ("student.layers: True:", "valid integer", "YAML reads an unquoted")),
    ("student.layers=many", ("student.layers: 'many':", "valid integer")),
    ("student.layers=", ("student.layers: None:", "valid integer")),
    ("student.heads=3", ("student.heads=3 does not divide student.hidden_size=128", "[1, 2, 4, 8, 16, 32, 64]")),
    ("student.dropout=1", ("student.dropout: 1:", "less than 1")),
    ("student.init=copy", ("student.init: 'copy':", "'random' or 'layer_copy'")),
    ("student.max_positions=64", ("student.max_positions=64 is below task.max_length=128", "raise the first")),
    ("student=null", ("student: None:",)),
    ("student=3", ("student: 3:",)),
    ("task.holdout=1", ("task.holdout: 1:", "less than 1")),
    (
        "task.kind=ranking",
        ("task.kind: 'ranking':", "'classification', 'regression', 'multi_label',"),
    ),
    ("task.labels=[no, yes]", ("task.labels.0: False:", "YAML reads an unquoted yes, no", "quote it")),
    ("task.name=on", ("task.name: True:", "quote it if it is a word")),
    ("task.name=2024-01-01", ("task.name: datetime.date(2024, 1, 1):", "valid string")),
    ("teacher.optim.precision=fp16", ("teacher.optim.precision: 'fp16':", "'auto', 'fp32' or 'bf16'")),
    ("teacher.optim.learning_rate=-1e-4", ("teacher.optim.learning_rate: '-1e-4':", "greater than 0")),
    ("teacher.optim.warmup=1.5", ("teacher.optim.warmup: 1.5:", "less than 1")),
    ("teacher.model=3", ("teacher.model: 3:",)),
    ("corpus.sources=[]", ("corpus.sources: []:", "at least 1 item")),
    ("corpus.sources=[{kind: ftp, path: a}]", ("corpus.sources.0: ", "'ftp'", "'file', 'package', 'hub'")),
    ("corpus.sources=[{package: p}]", ("corpus.sources.0.path: missing",)),
    ("corpus.budget_tokens=1e6", ("corpus.budget_tokens: '1e6':", "valid integer")),
    ("distill.task.terms.soft_labels=-1", ("distill.task.terms.soft_labels: -1:", "greater than or equal to 0")),
    ("distill.task.terms.layer_mapping=middle", ("distill.task.terms.layer_mapping", "'uniform', 'top' or 'bottom'")),
    ("distill.task.terms.layer_mapping=[0, 1]", ("distill.task.terms.layer_mapping.0: 0:", "greater than 0")),
    ("seeds=[]", ("seeds: []:", "at least 1 item")),
    ("seeds=[1, 1]", ("seeds=[1, 1] names a seed twice",)),
    ("name=../up", ("name: '../up':", "match pattern")),
    # the form of --set itself
    ("student.layers", ("--set 'student.layers'", "key=value", "such as student.layers=4")),
    ("=4", ("--set '=4'", "key=value")),
    ("name.first=4", ("--set name.first", "'name' is 'small'", "nothing can be set below it")),
    ("student={layers: 1", ("--set student", "not valid YAML")),
]


@pytest.mark.parametrize(("override", "told"), BAD, ids=[override for override, _ in BAD])
def test_a_mistake_is_named_with_its_fix(tmp_path: Path, override: str, told: tuple[str, ...]) -> None:
    message = refused(tmp_path, SMALL, override)
    for part in told:
        assert part in message
    assert not re.search(r"constrained|literal\[|\.str:|PackagedModel:", message)  # pydantic's names, not the user's


def test_the_table_of_mistakes_is_whole() -> None:
    assert len(BAD) == 43


@pytest.mark.parametrize("key", ["name", "task", "teacher", "corpus"])
def test_a_missing_part_is_named(tmp_path: Path, key: str) -> None:
    raw = yaml.safe_load(SMALL)
    del raw[key]
    assert f"{key}: missing; add it to the recipe" in refused(tmp_path, yaml.safe_dump(raw))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, SMALL, "student.layer=4", "task.holdout=2", "seeds=[]")
    assert message.count("\n") == 3
    assert str(tmp_path / "recipe.yaml") in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", ("'name' is set twice in one block (line 2)",)),
        ("student:\n  layers: 1\n  heads: 2\n  layers: 3\n", ("'layers' is set twice in one block (line 4)",)),
        ("name: [unclosed\n", ("not valid YAML", "line 2")),
        ("name: a\n\tstudent: 1\n", ("not valid YAML", "line 2")),
        ("date: 2024-13-45\n", ("not valid YAML", "month must be in 1..12")),
        ("? [a, b]\n: 1\n", ("not valid YAML", "a key must be one word", "line 1")),
        ("run: !!python/object/apply:os.system [true]\n", ("not valid YAML", "python/object/apply")),
        ("just words\n", ("holds str, not a recipe of `key: value` lines",)),
        ("- a\n- b\n", ("holds list, not a recipe",)),
        ("", ("holds NoneType, not a recipe",)),
        ("3: a\n", ("3: 3: Keys should be strings",)),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path: Path, text: str, told: tuple[str, ...]) -> None:
    message = refused(tmp_path, text)
    for part in told:
        assert part in message
    assert "recipe.yaml" in message


def test_anchors_and_merges_of_yaml_serve(tmp_path: Path) -> None:
    text = SMALL + (
        "distill:\n  task: &same {optim: &o {epochs: 2, batch_size: 8}}\n"
        "  labels:\n    optim:\n      <<: *o\n      epochs: 5\n"
    )
    distill = load(tmp_path, text).distill
    assert (distill.labels.optim.epochs, distill.labels.optim.batch_size) == (5, 8)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=r"no recipe at nowhere\.yaml; `openbook init .*recipes/quickstart\.yaml"):
        load_recipe(Path("nowhere.yaml"))
    with pytest.raises(UsageError, match=r"recipes cannot be read \(Is a directory\)"):
        load_recipe(Path("recipes"))
    (tmp_path / "latin.yaml").write_bytes("name: größer".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml is not UTF-8 text \(byte 8\)"):
        load_recipe(tmp_path / "latin.yaml")


DISTILL = DistillSettings()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("distill.corpus.optim.epochs=1", {"epochs": 1.0}),
        ("distill.corpus={optim: {learning_rate: 1e-5}}", {"learning_rate": 1e-5}),
        ("distill.corpus.terms={gold: 1}", {}),
        ("distill.workers=1", {}),
    ],
)
def test_a_key_that_is_set_leaves_its_neighbours_alone(tmp_path: Path, override: str, changed: dict[str, Any]) -> None:
    assert DISTILL.corpus.optim not in (Optim(), Optim(**changed))  # the place has defaults of its own
    recipe = load(tmp_path, SMALL, override)
    assert recipe.distill.corpus.optim == DISTILL.corpus.optim.model_copy(update=changed)
    assert recipe.distill.task == DISTILL.task
    assert recipe.distill.labels == DISTILL.labels


def test_every_block_with_defaults_of_its_place_keeps_them(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL, "teacher.optim.batch_size=8", "knowledge_base.projection.optim.epochs=9")
    assert recipe.teacher.optim == Optim(learning_rate=1e-4, epochs=3, batch_size=8)
    fitted = recipe.knowledge_base.projection.optim
    assert fitted == Optim(learning_rate=1e-3, epochs=9, batch_size=256, precision="fp32")


def test_terms_that_are_named_are_all_there_are(tmp_path: Path) -> None:
    """One term asked for is that term alone: a loss nobody named is not minimised beside it."""
    recipe = load(tmp_path, SMALL, "distill.task.terms={gold: 1}", "distill.corpus.terms.relations=1")
    assert recipe.distill.task.terms == Terms(gold=1)
    assert recipe.distill.corpus.terms == Terms(relations=1)
    assert recipe.distill.labels.terms == Terms(gold=1)


def test_overrides_are_laid_on_in_their_order(tmp_path: Path) -> None:
    text = SMALL + "student: {layers: 2, heads: 8}\n"
    recipe = load(tmp_path, text, "student.layers=3", "student.hidden_size=64", "student.layers=5", "seeds=[4]")
    assert recipe.student == StudentSettings(layers=5, heads=8, hidden_size=64)
    assert recipe.seeds == (4,)
    assert load(tmp_path, SMALL + "student:\n", "student.layers=1").student.layers == 1


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_learning_rate_may_be_written_as_people_do(tmp_path: Path, written: str) -> None:
    assert load(tmp_path, SMALL, f"teacher.optim.learning_rate={written}").teacher.optim.learning_rate == 1e-4


def test_the_kind_of_a_source_is_plain_from_its_keys(tmp_path: Path) -> None:
    sources = "[{path: a.txt}, {package: p, path: b}, {dataset: d}, {kind: file, path: c}]"
    recipe = load(tmp_path, SMALL, f"corpus.sources={sources}")
    assert [source.kind for source in recipe.corpus.sources] == ["file", "package", "hub", "file"]


def settings_classes(base: type[Settings] = Settings) -> list[type[Settings]]:
    return [found for below in base.__subclasses__() for found in (below, *settings_classes(below))]


def test_every_part_of_the_recipe_is_frozen_and_refuses_unknown_keys() -> None:
    classes = [found for found in settings_classes() if found.__module__ == "openbook.config"]
    assert len(classes) == 21
    for model in classes:
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"]


def test_a_loaded_recipe_does_not_change(tmp_path: Path) -> None:
    recipe: Any = load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
