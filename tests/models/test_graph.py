"""Encoders with heads of every kind as ONNX graphs that say what torch says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from openbook.config import RunError, UsageError
from openbook.models import graph
from openbook.models.encoder import Encoder
from openbook.models.graph import EXPORTABLE, INPUTS, graph_of, in_int8, save_graph, trace
from openbook.models.heads import HeadTask, MultiTask
from openbook.types import Batch

LONGEST = 36  # RoBERTa's positions begin at 2
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "modernbert": {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    "eurobert": {"num_key_value_heads": 2},
    "electra": {"embedding_size": 16},
    "roformer": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}
KINDS = {
    "classification": HeadTask("classification", ("no", "yes", "perhaps")),
    "regression": HeadTask("regression"),
    "multiple_choice": HeadTask("multiple_choice"),
    "span_extraction": HeadTask("span_extraction"),
    "token_classification": HeadTask("token_classification", ("O", "B", "I")),
}
Say = Callable[[Batch], dict[str, Tensor]]


def config_of(architecture: str, **more: Any) -> Any:
    sizes = {key: SIZES[key] for key in SIZES if architecture != "distilbert" or not key.startswith(("hid", "num"))}
    return AutoConfig.for_model(architecture, **{**sizes, **OWN.get(architecture, {}), **more})


def encoder_of(architecture: str, labels: int = 3, **more: Any) -> Encoder:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(architecture, num_labels=labels, **more))
    spread(model)
    return Encoder(model.eval())


def spread(model: nn.Module) -> None:
    """Weights of a trained model's size, so that every one of them counts."""
    for place, weight in enumerate(model.parameters()):
        with torch.no_grad():
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(place))


def batches(two_texts: bool = True) -> list[Batch]:
    """Every length, alone and in odd batches, with padding and without."""
    found = []
    for length in range(1, LONGEST + 1):
        for size, padded in ((1, False), (3, True), (3, False)):
            random = torch.Generator().manual_seed(length)
            lengths = torch.tensor([length, (length + 1) // 2, 1][:size] if padded else [length] * size)
            mask = (torch.arange(length) < lengths[:, None]).long()
            ids = torch.where(mask.bool(), torch.randint(4, 60, mask.shape, generator=random), 1)
            types = mask * (torch.arange(length) >= length // 2) * two_texts
            found.append(Batch((), ids, mask, types))
    return found


def session_of(made: Any, path: Path) -> Any:
    save_graph(made, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def largest_difference(session: Any, say: Say, some: list[Batch]) -> float:
    names = [one.name for one in session.get_outputs()]
    worst = 0.0
    for batch in some:
        feed = {one.name: getattr(batch, one.name).numpy() for one in session.get_inputs()}
        with torch.inference_mode():
            wanted = say(batch)
        assert list(wanted) == names
        for name, given in zip(names, session.run(names, feed), strict=True):
            assert given.shape == tuple(wanted[name].shape)
            difference = np.abs(given - wanted[name].numpy())
            if difference.ndim == 3:  # what is said of padding means nothing
                difference = difference[batch.attention_mask.bool().numpy()]
            worst = max(worst, float(difference.max()))
    return worst


def told(encoder: Encoder) -> Say:
    def say(batch: Batch) -> dict[str, Tensor]:
        said = encoder(batch)
        return {"logits": said.logits, "embedding": said.embedding}

    return say


@pytest.fixture(scope="module")
def bert() -> tuple[Encoder, Any]:
    encoder = encoder_of("bert", hidden_act="gelu")
    return encoder, graph_of(encoder)


def test_a_graph_says_what_the_encoder_says_at_every_length(bert: tuple[Encoder, Any], tmp_path: Path) -> None:
    encoder, made = bert
    session = session_of(made, tmp_path / "model.onnx")
    assert [one.name for one in session.get_inputs()] == list(INPUTS)
    assert {one.type for one in session.get_inputs()} == {"tensor(int64)"}
    assert largest_difference(session, told(encoder), batches()) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_export_leaves_the_encoder_as_it_was(bert: tuple[Encoder, Any]) -> None:
    encoder, _ = bert
    assert encoder.model.config._attn_implementation == encoder.attention != "eager"
    assert encoder._pooled is None
    assert logging.root.manager.disable == logging.NOTSET


def test_int8_is_near_smaller_and_leaves_the_graph_alone(bert: tuple[Encoder, Any], tmp_path: Path) -> None:
    encoder, made = bert
    before = [value.const_value.numpy().copy() for value in made.graph.initializers.values()]
    small = in_int8(made)
    for value, kept in zip(made.graph.initializers.values(), before, strict=True):
        np.testing.assert_array_equal(value.const_value.numpy(), kept)
    worst = largest_difference(session_of(small, tmp_path / "int8.onnx"), told(encoder), batches())
    assert 1e-4 < worst < 0.5
    stored = {name: value.const_value for name, value in small.graph.initializers.items()}
    large = [one for one in stored.values() if one.size > 200 and one.dtype == onnx_ir.DataType.FLOAT]
    assert not large  # word embeddings included
    in_seven_bits = [
        one.numpy() for one in stored.values() if one.dtype == onnx_ir.DataType.INT8 and len(one.shape) == 2
    ]
    assert in_seven_bits
    assert max(int(np.abs(one.astype(int)).max()) for one in in_seven_bits) <= 64
    assert any(list(one.shape) == [24] for name, one in stored.items() if "scale" in name)  # a scale a channel


def test_a_graph_beyond_two_gigabytes_has_its_weights_beside_it(
    bert: tuple[Encoder, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, made = bert
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT", 1000)
    session = session_of(made, tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert largest_difference(session, told(encoder), batches()[:5]) < 1e-5


def test_an_architecture_that_was_not_tried_is_refused() -> None:
    with pytest.raises(UsageError, match="model_type='funnel' is not exported; use a student of bert, "):
        graph.refuse_unexportable("funnel")


def test_what_cannot_be_traced_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Counting(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": input_ids[: int(attention_mask.sum())] if attention_mask.sum() > 3 else attention_mask}

    with pytest.raises(UsageError, match=r"^opset=default: this model cannot be exported \(.*leave") as caught:
        trace(Counting(), INPUTS[:2])
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_turned_into_int8_is_told() -> None:
    with pytest.raises(RunError, match=r"cannot be turned into int8 \(AttributeError: "):
        in_int8(None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXPORTABLE)
def test_every_architecture_equals_torch(architecture: str, tmp_path: Path) -> None:
    encoder = encoder_of(architecture)
    two_texts = getattr(encoder.model.config, "type_vocab_size", 0) > 1
    session = session_of(graph_of(encoder), tmp_path / "model.onnx")
    assert largest_difference(session, told(encoder), batches(two_texts)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 22])
def test_an_opset_may_be_chosen(opset: int, tmp_path: Path) -> None:
    encoder = encoder_of("modernbert", labels=1)
    made = graph_of(encoder, opset)
    assert made.opset_imports[""] == opset
    assert largest_difference(session_of(made, tmp_path / "model.onnx"), told(encoder), batches(False)) < 2e-5
    session_of(in_int8(made), tmp_path / "int8.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_head_equals_torch(kind: str, architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(AutoModel.from_config(config_of(architecture)).eval())
    model = MultiTask(encoder, {kind: KINDS[kind]}).eval()
    spread(model)

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model(Batch((), input_ids, attention_mask, token_type_ids, task=kind))}

    def say(batch: Batch) -> dict[str, Tensor]:
        return {"logits": model(Batch((), batch.input_ids, batch.attention_mask, batch.token_type_ids, task=kind))}

    session = session_of(trace(Headed(), INPUTS), tmp_path / "model.onnx")
    assert largest_difference(session, say, batches(architecture == "bert")) < 2e-5
