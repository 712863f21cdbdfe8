"""Students start as they should, and what is saved is an ordinary Hugging Face folder with nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, ModernBertForSequenceClassification

from openbook.config import StudentSettings, UsageError
from openbook.distillation.mapping import copied_layers
from openbook.models.encoder import Encoder, Head, load_headless, load_pretrained
from openbook.models.student import (
    headless,
    load_tokenizer,
    new_student,
    principal_components,
    start_from_layers,
    start_from_word_embeddings,
)
from openbook.types import Batch

LABELS = ("low", "mid", "high")
HEAD = Head(LABELS)
ARCHITECTURES: dict[str, Any] = {
    "bert": BertForSequenceClassification,
    "modernbert": ModernBertForSequenceClassification,
}


def settings(**changes: Any) -> StudentSettings:
    given: dict[str, Any] = {
        "architecture": "bert",
        "layers": 2,
        "hidden_size": 32,
        "heads": 4,
        "intermediate_size": 64,
        "dropout": 0.0,
    }
    return StudentSettings(**{**given, **changes})


SPECIAL = SimpleNamespace(pad_token_id=0, cls_token_id=2, sep_token_id=3)


def student_of(vocabulary: int, seed: int = 0, positions: int = 40, **changes: Any) -> Encoder:
    return new_student(settings(**changes), HEAD, SPECIAL, vocabulary, positions, seed).eval()


@pytest.fixture
def teacher(pretrained: Path) -> Encoder:
    return load_pretrained(str(pretrained), HEAD, seed=5).eval()


def test_a_student_has_the_wanted_shape() -> None:
    config = student_of(50, layers=3, hidden_size=24, heads=3, intermediate_size=None, dropout=0.2).model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 3)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (96, 50, 40)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.2)


def test_a_modern_student_has_the_wanted_shape(batch: Batch) -> None:
    student = student_of(50, architecture="modernbert", intermediate_size=None, dropout=0.2)
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 4)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (80, 50, 40)
    rates = (config.embedding_dropout, config.attention_dropout, config.mlp_dropout, config.classifier_dropout)
    assert rates == (0.2, 0.2, 0.2, 0.2)
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (0, 2, 3)
    states = student.listen(hidden=True)(batch).hidden[-1] * batch.attention_mask[..., None]
    mean = states.sum(1) / batch.attention_mask.sum(1, keepdim=True)
    torch.testing.assert_close(student(batch).embedding, student.model.head(mean))  # the head reads all tokens


def test_a_random_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(8)
    first, again, other = (student_of(50, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.classifier.weight"], other["model.classifier.weight"])
    assert first["model.bert.encoder.layer.0.attention.self.query.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_layers_of_equal_shape_reproduce_the_teacher(teacher: Encoder, batch: Batch) -> None:
    student = student_of(teacher.model.config.vocab_size, layers=4)
    assert not torch.equal(student(batch).logits, teacher(batch).logits)
    start_from_layers(student, teacher, (1, 2, 3, 4))
    assert torch.equal(student(batch).logits, teacher(batch).logits)
    assert torch.equal(student(batch).embedding, teacher(batch).embedding)


def test_the_named_layers_are_the_ones_copied(teacher: Encoder, batch: Batch) -> None:
    student = student_of(teacher.model.config.vocab_size)
    start_from_layers(student, teacher, (2, 4))
    teacher.model.bert.encoder.layer = torch.nn.ModuleList([teacher.blocks()[1], teacher.blocks()[3]])
    assert torch.equal(student(batch).logits, teacher(batch).logits)


@pytest.mark.parametrize(("layers", "which"), [(4, "last"), (4, "first"), (2, "last"), (2, "first"), (1, "last")])
def test_blocks_come_from_the_last_or_the_first_layer_of_each_group(teacher: Encoder, layers: int, which: Any) -> None:
    student = student_of(teacher.model.config.vocab_size, layers=layers)
    start_from_layers(student, teacher, copied_layers(4, layers, which))
    group = 4 // layers
    for place, block in enumerate(student.blocks()):
        taken = teacher.blocks()[place * group + (group - 1 if which == "last" else 0)].state_dict()
        assert all(torch.equal(weight, taken[name]) for name, weight in block.state_dict().items())


def test_layers_that_do_not_fall_into_groups_are_refused(teacher: Encoder) -> None:
    with pytest.raises(UsageError, match=r"student\.layers=3 does not divide the teacher's 4 layers"):
        start_from_layers(student_of(50, layers=3), teacher, copied_layers(4, 3, "last"))


def test_layers_of_the_pretrained_encoder_leave_the_head_as_it_was_drawn(pretrained: Path, batch: Batch) -> None:
    bare = load_headless(str(pretrained)).listen(hidden=True)
    student = student_of(bare.model.config.vocab_size, layers=4).listen(hidden=True)
    drawn = student_of(bare.model.config.vocab_size, layers=4)
    start_from_layers(student, bare, (1, 2, 3, 4))
    for state, taught in zip(student(batch).hidden, bare(batch).hidden, strict=True):
        assert torch.equal(state, taught)
    assert torch.equal(student.model.bert.pooler.dense.weight, bare.model.pooler.dense.weight)
    assert torch.equal(student.last_linear().weight, drawn.last_linear().weight)


def test_a_pooler_that_the_pretrained_encoder_lacks_stays_as_it_was_drawn(pretrained: Path) -> None:
    bare = load_headless(str(pretrained))
    bare.model.pooler = None
    student, drawn = (student_of(bare.model.config.vocab_size) for _ in range(2))
    start_from_layers(student, bare, (2, 4))
    assert torch.equal(student.model.bert.pooler.dense.weight, drawn.model.bert.pooler.dense.weight)
    assert torch.equal(student.words().weight, bare.words().weight)


def test_a_modern_student_may_start_from_all_layers_of_its_kind_but_not_from_others(batch: Batch) -> None:
    """Its first block has no norm before attention, so no other block fits there."""
    teacher, student = (student_of(50, seed, architecture="modernbert", layers=4) for seed in (1, 2))
    start_from_layers(student, teacher, (1, 2, 3, 4))
    assert torch.equal(student(batch).logits, teacher(batch).logits)
    short = student_of(50, architecture="modernbert")
    start_from_layers(short, teacher, (1, 3))
    taken = teacher.blocks()[2].state_dict()
    assert all(torch.equal(weight, taken[name]) for name, weight in short.blocks()[1].state_dict().items())
    with pytest.raises(UsageError, match=r"layer_copy gives layer 2 of the teacher to layer 1 .*attn_norm\.weight"):
        start_from_layers(short, teacher, (2, 4))


def test_a_student_of_fewer_positions_takes_the_first(teacher: Encoder) -> None:
    student = student_of(teacher.model.config.vocab_size, positions=20)
    start_from_layers(student, teacher, (2, 4))
    positions = student.model.bert.embeddings.position_embeddings.weight
    assert torch.equal(positions, teacher.model.bert.embeddings.position_embeddings.weight[:20])


def test_copies_are_copies(teacher: Encoder) -> None:
    student = student_of(teacher.model.config.vocab_size)
    start_from_layers(student, teacher, (2, 4))
    before = teacher.blocks()[1].attention.self.query.weight.clone()
    with torch.no_grad():
        student.blocks()[0].attention.self.query.weight.zero_()
    assert torch.equal(teacher.blocks()[1].attention.self.query.weight, before)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden_size", {"hidden_size": 16}),
        ("num_attention_heads", {"heads": 2}),
        ("intermediate_size", {"intermediate_size": 32}),
    ],
)
def test_unequal_widths_are_named(teacher: Encoder, name: str, change: dict[str, int]) -> None:
    student = student_of(teacher.model.config.vocab_size, **change)
    wanted, given = getattr(teacher.model.config, name), next(iter(change.values()))
    with pytest.raises(UsageError, match=rf"student\.init=layer_copy.*{name} is {given} in the student and {wanted}"):
        start_from_layers(student, teacher, (2, 4))
    with pytest.raises(UsageError, match="vocab_size is 50"):
        start_from_layers(student_of(50), teacher, (2, 4))


def test_principal_components_keep_all_but_the_smallest_axes() -> None:
    """The error of the Gram matrix is the discarded part of the spectrum (Eckart and Young, 1936)."""
    words = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 3
    centred = (words - words.mean(0)).double()
    spectrum = torch.linalg.svdvals(centred)
    for width in (1, 3, 8):
        kept = principal_components(words, width).double()
        assert kept.shape == (40, width)
        error = torch.linalg.matrix_norm(centred @ centred.T - kept @ kept.T, ord="fro")
        discarded = (spectrum[width:] ** 4).sum().sqrt()
        torch.testing.assert_close(error, discarded, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(kept.norm(dim=0), spectrum[:width], rtol=1e-4, atol=0)  # the largest axis first


def test_principal_components_have_a_fixed_sign() -> None:
    words = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    kept = principal_components(words, 4)
    assert torch.equal(kept, principal_components(words, 4))
    axes = torch.linalg.lstsq((words - words.mean(0)), kept).solution  # (8, 4)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(kept.abs(), principal_components(words @ turned, 4).abs(), rtol=1e-3, atol=1e-4)


def test_principal_components_cannot_widen() -> None:
    with pytest.raises(UsageError, match=r"student\.hidden_size=9 is above the teacher's 8; use embeddings: random"):
        principal_components(torch.ones(40, 8), 9)


def test_projected_words_reach_the_student_and_nothing_else(teacher: Encoder) -> None:
    student = student_of(teacher.model.config.vocab_size, hidden_size=16)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_from_word_embeddings(student, teacher)
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(student.words().weight, principal_components(teacher.words().weight, 16))


STOCK = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert not any(name.split(".")[0] == "openbook" for name in sys.modules)
for folder in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(["the film was great", "dull"], padding=True, return_tensors="pt")
    if model.config.model_type == "modernbert":
        del inputs["token_type_ids"]
    said = {"labels": model.config.id2label, "logits": model(**inputs).logits.tolist(), "class": type(model).__name__}
    print(json.dumps(said))
"""


def test_transformers_alone_reads_a_student(tmp_path: Path, tokenizer: Any) -> None:
    students = {name: student_of(len(tokenizer), architecture=name) for name in ARCHITECTURES}
    for name, student in students.items():
        student.listen(hidden=True, layers=(1,)).save(tmp_path / name, tokenizer)
    command = [sys.executable, "-I", "-c", STOCK, *(str(tmp_path / name) for name in ARCHITECTURES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    inputs = tokenizer(["the film was great", "dull"], padding=True, return_tensors="pt")
    for line, (name, student) in zip(done.stdout.splitlines()[-2:], students.items(), strict=True):
        told = json.loads(line)
        assert told["class"] == ARCHITECTURES[name].__name__
        assert told["labels"] == {"0": "low", "1": "mid", "2": "high"}
        expected = student(Batch(("a", "b"), inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]))
        torch.testing.assert_close(torch.tensor(told["logits"]), expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_saved_student_holds_the_stock_weights_and_no_more(tmp_path: Path, tokenizer: Any, architecture: str) -> None:
    student = student_of(len(tokenizer), architecture=architecture).listen(layers=(1, 2))
    student.save(tmp_path, tokenizer)
    saved = load_file(tmp_path / "model.safetensors")
    stock = ARCHITECTURES[architecture](student.model.config)
    assert saved.keys() == stock.state_dict().keys()
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in stock.parameters())
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pkl")]


def test_a_slow_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("openbook.models.student.AutoTokenizer.from_pretrained", lambda *given, **options: Slow())
    with pytest.raises(UsageError, match="has no fast tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("layers", "width", "inner", "parameters"),
    [
        (12, 768, None, 109_482_240),
        (6, 768, None, 66_955_008),
        (12, 384, None, 33_360_000),
        (6, 384, None, 22_713_216),
        (4, 384, None, 19_164_288),
        (4, 312, 1200, 14_350_248),
        (6, 256, None, 12_750_080),
        (3, 128, None, 4_584_192),
        (6, 384, 3072, 29_800_320),
    ],
)
def test_students_are_of_the_published_sizes(
    tokenizer: Any, layers: int, width: int, inner: int | None, parameters: int
) -> None:
    """MITKD specification, F19: BERT with its pooler, 30,522 words, 512 positions."""
    shape = StudentSettings(
        architecture="bert", layers=layers, hidden_size=width, heads=2, intermediate_size=inner or 4 * width
    )
    with torch.device("meta"):
        student = headless(new_student(shape, Head(None), tokenizer, 30_522, 512, 0))
    assert sum(weight.numel() for weight in student.parameters()) == parameters
