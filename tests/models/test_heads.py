"""Heads of every kind on one encoder: what they read, how they start, who learns, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertConfig, DistilBertConfig, ModernBertConfig

from openbook.config import Kind, Optim, UsageError
from openbook.distillation.supervised import loss_of_kind
from openbook.models.encoder import Encoder
from openbook.models.heads import HeadTask, MultiTask, TaskHead, head_name, read_tasks
from openbook.training import train
from openbook.types import Batch

NLI = HeadTask("classification", ("entailment", "neutral", "contradiction"))
SCORE = HeadTask("regression", mean=2.5, deviation=1.25)
CHOICE, SPAN, TAGS = (
    HeadTask("multiple_choice"),
    HeadTask("span_extraction"),
    HeadTask("token_classification", ("O", "B")),
)
TASKS = {"nli": NLI, "score": SCORE, "copa": CHOICE, "swag": CHOICE, "squad": SPAN, "tags": TAGS}
LABELS: dict[str, Any] = {
    "nli": [0, 1, 2],
    "score": [1.0, 2.5, 4.0],
    "copa": [[0, 1], [0, 0], [0, 0]],
    "swag": [[0, 0], [0, 0], [0, 1]],
    "squad": [[3, 5, 3, 5], [2, 2, 1, 2], [4, 4, 3, 4]],
    "tags": [[-100, 0, 1, 0, 1, 0, -100], [-100, 1, 1, -100, -100, -100, -100], [-100] * 7],
}
SIZES = {"vocab_size": 60, "max_position_embeddings": 24, "pad_token_id": 0}
BERT = {**SIZES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**BERT),
    "distilbert": DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "modernbert": ModernBertConfig(**BERT, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
}


def encoder_of(family: str = "bert") -> Encoder:
    torch.manual_seed(0)
    return Encoder(AutoModel.from_config(CONFIGS[family]).eval())


def model_of(tasks: dict[str, HeadTask] | None = None, seed: int = 0, dropout: float = 0.0) -> MultiTask:
    return MultiTask(encoder_of(), tasks or TASKS, seed, dropout).eval()


def of_task(batch: Batch, name: str) -> Batch:
    return replace(batch, task=name, labels=torch.tensor(LABELS[name]))


def loss_of(model: MultiTask, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return loss_of_kind(model.tasks[batch.task].kind)(model(batch), batch.labels)


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("nli", (3, 3)), ("score", (3, 1)), ("copa", (3, 1)), ("squad", (3, 7, 2)), ("tags", (3, 7, 2))],
)
def test_every_kind_has_logits_that_its_loss_reads(batch: Batch, name: str, shape: tuple[int, ...]) -> None:
    model = model_of()
    logits = model(of_task(batch, name))
    assert logits.shape == shape
    states = model.encoder.last_states(batch)
    head = model.heads[head_name(name, TASKS[name])]
    read = states if len(shape) == 3 else states[:, 0]
    torch.testing.assert_close(logits, read @ head.linear.weight.T + head.linear.bias)
    assert loss_of(model, of_task(batch, name)).item() > 0


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_read_what_the_encoder_says_last(batch: Batch, family: str) -> None:
    encoder = encoder_of(family)
    states = encoder.last_states(batch)
    assert states.shape == (3, 7, 16)
    torch.testing.assert_close(states, encoder.listen(hidden=True)(batch).hidden[-1])


def test_dropout_before_the_head_is_for_training_only() -> None:
    head = TaskHead(NLI, 16, seed=0, dropout=0.5)
    states = torch.ones(1, 2, 16)
    assert not torch.equal(head(states), head(states))
    head.eval()
    assert torch.equal(head(states), head(states))


def test_a_task_without_a_head_is_refused(batch: Batch) -> None:
    with pytest.raises(ValueError, match="task 'qqp', and the heads serve"):
        model_of()(replace(batch, task="qqp"))


def test_a_batch_that_names_no_task_has_a_head_too(batch: Batch) -> None:
    assert model_of({"": NLI})(batch).shape == (3, 3)


# --- who has which head, and how it starts ----------------------------------------------------------------------------


def test_spans_and_choices_share_a_head() -> None:
    tasks = {**TASKS, "span_extraction": NLI, "keys": NLI, "a.b": NLI, "a%2Eb": TAGS, "type": NLI}
    model = model_of(tasks)
    assert sorted(model.heads) == sorted(
        ["multiple_choice", "span_extraction", "task nli", "task score", "task tags", "task span_extraction"]
        + ["task keys", "task a%2Eb", "task a%252Eb", "task type"]
    )


def test_a_head_starts_by_its_seed_and_name_alone() -> None:
    model, fewer, other = model_of(), model_of({"tags": TAGS, "nli": NLI}), model_of(seed=1)
    for key in fewer.heads:
        for own, same, different in zip(*(m.heads[key].parameters() for m in (fewer, model, other)), strict=True):
            assert torch.equal(own, same)
            assert own.ndim == 1 or not torch.equal(own, different)
    assert not torch.equal(model.heads["task tags"].linear.weight, model.heads["span_extraction"].linear.weight)


def test_a_head_starts_small_and_unbiased() -> None:
    state = torch.get_rng_state()
    head = TaskHead(HeadTask("classification", tuple(map(str, range(50)))), 2_000, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert head.linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.linear.weight.mean().item() == pytest.approx(0, abs=0.001)
    assert not head.linear.bias.any()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("classification", ()),
        ("classification", ("yes",)),
        ("token_classification", ("O", "O")),
        ("regression", ("low", "high")),
        ("span_extraction", ("start", "end")),
    ],
)
def test_labels_that_do_not_fit_the_kind_are_refused(kind: Kind, labels: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"task\.labels"):
        HeadTask(kind, labels)


def test_targets_without_a_spread_are_refused() -> None:
    with pytest.raises(UsageError, match=r"task\.train"):
        HeadTask("regression", deviation=0.0)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_an_update_is_the_mean_of_the_gradients_of_its_tasks(batch: Batch) -> None:
    model = model_of().double()
    drawn = ["nli", "copa", "squad", "nli"]
    alone = []
    for name in drawn:
        model.zero_grad()
        loss_of(model, of_task(batch, name)).backward()
        alone.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for name in drawn:
        (loss_of(model, of_task(batch, name)) / len(drawn)).backward()
    for key, parameter in model.named_parameters():
        parts = [gradients[key] for gradients in alone if key in gradients]
        if parts:
            torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0) / len(drawn))
        else:
            assert parameter.grad is None
    untouched = {key.split(".")[1] for key, p in model.named_parameters() if p.grad is None}
    assert untouched == {"task score", "task tags", "model"}  # of the model, its pooler


class Drawn:
    """A plan of two updates, each of these tasks."""

    def __init__(self, batch: Batch, names: list[str]) -> None:
        self.batches = [of_task(batch, name) for name in names] * 2

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        return self.batches[step]


def test_what_was_not_drawn_stays_as_it_was(batch: Batch) -> None:
    """Under AdamW with weight decay, in the loop that trains: only a gradient of None leaves weights alone."""
    model, before = model_of(), model_of().state_dict()
    plan = Drawn(batch, ["nli", "squad", "copa"])
    optim = Optim(learning_rate=0.01, accumulation=3, weight_decay=0.1, warmup=0, precision="fp32")
    history = train(lambda b: (loss_of(model, b), {}), model, plan, optim, 0, Accelerator(cpu=True))
    assert history[-1]["step"] == 2
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    heads = {key.split(".")[1] for key in changed if key.startswith("heads.")}
    assert heads == {"task nli", "span_extraction", "multiple_choice"}
    assert any(key.startswith("encoder.") for key in changed)
    assert not any("pooler" in key for key in changed)


# --- kept -------------------------------------------------------------------------------------------------------------


def test_heads_come_back_as_they_were(tmp_path: Path, batch: Batch) -> None:
    model, other = model_of(), model_of(seed=5)
    model.save_heads(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]
    assert list(read_tasks(tmp_path).items()) == list(TASKS.items())
    other.load_heads(tmp_path)
    for name in TASKS:
        assert torch.equal(model(of_task(batch, name)), other(of_task(batch, name)))


def test_some_of_the_heads_may_be_taken(tmp_path: Path) -> None:
    model, one = model_of(), model_of({"swag": CHOICE}, seed=5)
    model.save_heads(tmp_path)
    one.load_heads(tmp_path)
    assert torch.equal(one.heads["multiple_choice"].linear.weight, model.heads["multiple_choice"].linear.weight)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (replace(NLI, labels=("neutral", "entailment", "contradiction")), ["('neutral', 'ent", "('entailment', 'neu"]),
        (replace(TAGS, labels=NLI.labels), ["'classification'", "'token_classification'"]),
        (replace(SCORE, mean=2.0), ["mean=2.0", "labels=('entailment'"]),
    ],
)
def test_a_head_of_other_labels_is_refused(tmp_path: Path, task: HeadTask, told: list[str]) -> None:
    model_of().save_heads(tmp_path)
    with pytest.raises(UsageError, match=r"heads\.json: the head of task 'nli'") as caught:
        model_of({"nli": task}).load_heads(tmp_path)
    assert all(part in str(caught.value) for part in told)


def test_a_regression_in_other_units_is_refused(tmp_path: Path) -> None:
    model_of().save_heads(tmp_path)
    with pytest.raises(UsageError, match=r"mean=2\.5.*mean=2\.0"):
        model_of({"score": replace(SCORE, mean=2.0)}).load_heads(tmp_path)


def test_a_head_that_is_absent_is_refused(tmp_path: Path) -> None:
    model_of({"nli": NLI}).save_heads(tmp_path)
    with pytest.raises(UsageError, match=r"serves \['nli'\], and no task 'squad'"):
        model_of({"squad": SPAN}).load_heads(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("heads.json", None),
        ("heads.json", b"{"),
        ("heads.json", b'{"nli": {"kind": "riddle"}}'),
        ("heads.json", b'{"nli": {"kind": "classification", "labels": ["yes"]}}'),
        ("heads.safetensors", None),
        ("heads.safetensors", b"\x80\x04 no tensors"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    model = model_of()
    model.save_heads(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        model.load_heads(tmp_path)


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    model = model_of()
    model.save_heads(tmp_path)
    weights = load_file(tmp_path / "heads.safetensors")
    save_file({key: value[..., :5].contiguous() for key, value in weights.items()}, tmp_path / "heads.safetensors")
    with pytest.raises(UsageError, match="does not fit"):
        model.load_heads(tmp_path)
    weights.popitem()
    save_file(weights, tmp_path / "heads.safetensors")
    with pytest.raises(UsageError, match="Missing key"):
        model.load_heads(tmp_path)
