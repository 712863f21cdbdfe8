"""Encoders of four families speak the same language, whatever their insides are called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from openbook.config import UsageError
from openbook.models.encoder import (
    COUNTS_AFTER_PADDING,
    TAPPABLE,
    Encoder,
    Head,
    find_projections,
    label_names,
    load_finished,
    load_headless,
    load_pretrained,
    positions_of,
    refuse_untappable,
)
from openbook.types import Batch

LABELS = ("low", "mid", "high")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, bos_token_id=2, eos_token_id=3),
    "distilbert": DistilBertConfig(
        vocab_size=60, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=24, pad_token_id=0
    ),
    "modernbert": ModernBertConfig(**SIZES, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
}
SEPARATE = ["bert", "roberta", "distilbert"]  # q, k and v in linear layers of their own; ModernBERT fuses them


def encoder_of(family: str, dropout: bool = False) -> Encoder:
    torch.manual_seed(3)
    config = CONFIGS[family].from_dict({**CONFIGS[family].to_dict(), "id2label": dict(enumerate(LABELS))})
    encoder = Encoder(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    for place, (name, weight) in enumerate(encoder.named_parameters()):
        if "norm" not in name.lower():  # fresh biases are zero, which would hide mistakes
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(place))
    return encoder.train(dropout)


def padded(batch: Batch, more: int) -> Batch:
    def longer(tensor: Tensor, value: int = 0) -> Tensor:
        return nn.functional.pad(tensor, (0, more), value=value)

    return replace(
        batch,
        input_ids=longer(batch.input_ids),
        attention_mask=longer(batch.attention_mask),
        token_type_ids=longer(batch.token_type_ids),
    )


def row_of(batch: Batch, row: int) -> Batch:
    real = int(batch.attention_mask[row].sum())
    tensors = {
        name: getattr(batch, name)[row : row + 1, :real] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    return replace(batch, ids=batch.ids[row : row + 1], labels=None, **tensors)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_nothing(family: str, batch: Batch) -> None:
    encoder = encoder_of(family).listen(hidden=True)
    with torch.no_grad():
        said, longer = encoder(batch), encoder(padded(batch, 5))
        torch.testing.assert_close(longer.logits, said.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(longer.embedding, said.embedding, rtol=0, atol=1e-5)
        for row in range(3):
            alone = encoder(row_of(batch, row))
            torch.testing.assert_close(alone.logits[0], said.logits[row], rtol=0, atol=1e-5)
            for state, whole in zip(alone.hidden, said.hidden, strict=True):
                torch.testing.assert_close(state[0], whole[row, : state.shape[1]], rtol=0, atol=1e-5)
    assert (said.logits[0] - said.logits[1]).abs().max() > 0.01  # the rows do differ


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_and_states(family: str, batch: Batch) -> None:
    encoder = encoder_of(family).listen(hidden=True)
    said = encoder(batch)
    assert said.logits.shape == (3, 3)
    assert said.embedding.shape == (3, encoder.embedding_width) == (3, 16)
    assert [state.shape for state in said.hidden] == [(3, 7, 16)] * 4  # embeddings, then every block
    assert (encoder.layers, encoder.width, encoder.heads) == (3, 16, 4)
    assert encoder.words().weight.shape == (60, 16)
    assert len(encoder.blocks()) == 3
    assert encoder.listen()(batch).hidden == ()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_embedding_is_what_the_last_linear_layer_reads(family: str, batch: Batch) -> None:
    encoder, read = encoder_of(family), []
    linears = [
        module for module in encoder.model.modules() if isinstance(module, nn.Linear) and module.out_features == 3
    ]
    assert len(linears) == 1
    linears[0].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    said = encoder(batch)
    assert torch.equal(said.embedding, read[0])
    assert torch.equal(linears[0](said.embedding), said.logits)


def test_the_embedding_of_bert_is_its_pooled_vector(batch: Batch) -> None:
    encoder = encoder_of("bert")
    pooled = encoder.model.bert(batch.input_ids, batch.attention_mask, batch.token_type_ids).pooler_output
    assert torch.equal(encoder(batch).embedding, pooled)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_embedding_is_taken_before_dropout(family: str, batch: Batch) -> None:
    encoder, read = encoder_of(family), []
    dropout = [module for module in encoder.head_modules() if isinstance(module, nn.Dropout)][-1].train()
    dropout.p = 0.5
    encoder.last_linear().register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    said = encoder(batch)
    torch.testing.assert_close(read[0], torch.where(read[0] == 0, 0, 2 * said.embedding))
    assert ((read[0] == 0) & (said.embedding != 0)).any()


def test_the_embedding_carries_gradients(batch: Batch) -> None:
    encoder = encoder_of("bert", dropout=True)
    encoder(batch).embedding.sum().backward()
    assert encoder.words().weight.grad is not None


def test_inputs_a_model_does_not_know_are_kept_from_it(batch: Batch) -> None:
    distilbert, bert = encoder_of("distilbert"), encoder_of("bert")
    assert "token_type_ids" not in distilbert.accepted
    other = replace(batch, token_type_ids=1 - batch.token_type_ids)
    assert torch.equal(distilbert(batch).logits, distilbert(other).logits)
    assert not torch.equal(bert(batch).logits, bert(other).logits)


def projections(family: str, encoder: Encoder, layer: int) -> list[nn.Module]:
    if family == "distilbert":
        attention = encoder.model.distilbert.transformer.layer[layer - 1].attention
        return [attention.q_lin, attention.k_lin, attention.v_lin]
    attention = getattr(encoder.model, family).encoder.layer[layer - 1].attention.self
    return [attention.query, attention.key, attention.value]


@pytest.mark.parametrize("family", SEPARATE)
def test_taps_give_what_the_projections_put_out(family: str, batch: Batch) -> None:
    encoder = encoder_of(family).listen(hidden=True, layers=(1, 3))
    said = encoder(batch)
    assert list(said.relations) == [1, 3]
    for layer, tapped in said.relations.items():
        for projection, found in zip(projections(family, encoder, layer), tapped, strict=True):
            assert found.shape == (3, 7, 16)
            torch.testing.assert_close(found, projection(said.hidden[layer - 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", SEPARATE)
def test_taps_vanish_when_nobody_listens(family: str, batch: Batch) -> None:
    encoder = encoder_of(family)
    expected = encoder(batch).logits
    encoder.listen(layers=(2,))
    assert torch.equal(encoder(batch).logits, expected)
    assert dict(encoder.listen()(batch).relations) == {}
    for block in encoder.blocks():
        found = find_projections(block)
        assert found is not None
        assert [len(module._forward_hooks) for module in found] == [0, 0, 0]
    assert encoder._taps == {}
    assert encoder._pooled is None


def test_a_fused_projection_is_taken_apart(batch: Batch) -> None:
    encoder, put_out = encoder_of("modernbert").listen(layers=(2,)), []
    encoder.blocks()[1].attn.Wqkv.register_forward_hook(lambda module, inputs, output: put_out.append(output))
    tapped = encoder(batch).relations[2]
    for place, found in enumerate(tapped):
        assert torch.equal(found, put_out[0][..., 16 * place : 16 * (place + 1)])
        assert found.shape == (3, 7, 16)
    assert dict(encoder.listen()(batch).relations) == {}
    assert len(encoder.blocks()[1].attn.Wqkv._forward_hooks) == 1


def test_a_second_listen_replaces_the_first(batch: Batch) -> None:
    encoder = encoder_of("bert").listen(layers=(1,)).listen(layers=(2,))
    assert list(encoder(batch).relations) == [2]


def test_a_model_with_projections_of_unknown_names_says_so() -> None:
    encoder = encoder_of("bert")
    attention = encoder.blocks()[1].attention.self
    attention.frage = attention.query
    del attention.query
    with pytest.raises(UsageError, match=r"layer 2 of BertFor\w+ has no query, key and value.*`relations` to 0"):
        encoder.listen(layers=(2,))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_configuration_tells_whether_a_model_can_be_tapped(family: str) -> None:
    refuse_untappable(CONFIGS[family])
    assert not any(weight.is_meta for weight in encoder_of(family).parameters())  # the device is the old one again


def test_models_without_projections_of_known_names_are_refused_before_they_are_loaded() -> None:
    shared = AlbertConfig(**SIZES, embedding_size=8)  # one block for all layers
    with pytest.raises(UsageError, match=r"AlbertFor\w+ has no list of 3 blocks; use .* bert, .*`relations` to 0"):
        refuse_untappable(shared)
    with pytest.raises(UsageError, match=r"DebertaV2For\w+ has no query, key and value.* query/key/value, or .*Wqkv"):
        refuse_untappable(DebertaV2Config(**SIZES))


@pytest.mark.parametrize("architecture", TAPPABLE)
def test_the_architectures_that_messages_name_can_be_tapped(architecture: str) -> None:
    refuse_untappable(AutoConfig.for_model(architecture))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", *sorted(COUNTS_AFTER_PADDING)])
def test_a_model_reads_as_many_word_pieces_as_is_said_and_no_more(architecture: str) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "pad_token_id"}
    config = AutoConfig.for_model(architecture, **sizes | {"max_position_embeddings": 20, "attention_window": 4})
    model, most = AutoModel.from_config(config).eval(), positions_of(config)
    assert most is not None
    with torch.no_grad():
        assert model(torch.full((1, most), 9)).last_hidden_state.shape[1] == most
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 9))


def test_rotary_models_may_be_tapped_for_relations_but_not_for_scores() -> None:
    refuse_untappable(CONFIGS["bert"], scores=True)
    with pytest.raises(
        UsageError, match=r"ModernBertFor\w+ turns queries and keys.*use `relations`, or another teacher"
    ):
        refuse_untappable(CONFIGS["modernbert"], scores=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_is_plain_in_training_and_says_the_same(family: str, batch: Batch, tmp_path: Path) -> None:
    encoder = encoder_of(family)
    assert encoder.model.config._attn_implementation == "sdpa"
    fused = encoder(batch).logits
    assert encoder.train().model.config._attn_implementation == ("sdpa" if torch.cuda.is_available() else "eager")
    for module in encoder.modules():
        module.training = False  # the same attention, without dropout
    torch.testing.assert_close(encoder(batch).logits, fused, rtol=1e-5, atol=1e-5)
    encoder.model.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
    assert encoder.eval().model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", CONFIGS)
def test_an_encoder_without_a_head_tells_the_same_states(family: str, batch: Batch, tmp_path: Path) -> None:
    whole = encoder_of(family).listen(hidden=True, layers=(2,))
    whole.model.save_pretrained(tmp_path)
    bare = load_headless(str(tmp_path)).listen(hidden=True, layers=(2,))
    said, expected = bare(batch), whole(batch)
    assert not any(module.training for module in bare.model.modules())
    for state, other in zip(said.hidden, expected.hidden, strict=True):
        assert torch.equal(state, other)
    assert all(torch.equal(*pair) for pair in zip(said.relations[2], expected.relations[2], strict=True))
    assert (said.logits.shape, bare.embedding_width) == ((3, 0), 16)
    for row, real in enumerate(batch.attention_mask.sum(1)):
        torch.testing.assert_close(said.embedding[row], said.hidden[-1][row, :real].mean(0))


def test_a_pooler_that_a_checkpoint_lacks_is_not_made_up(tmp_path: Path) -> None:
    body = encoder_of("bert").model.bert
    body.save_pretrained(tmp_path / "with")
    assert torch.equal(load_headless(str(tmp_path / "with")).model.pooler.dense.weight, body.pooler.dense.weight)
    body.pooler = None
    body.save_pretrained(tmp_path / "without")
    assert load_headless(str(tmp_path / "without")).model.pooler is None


def test_an_encoder_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    encoder_of("bert").model.bert.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"has no weights for \['encoder\.layer\.1\.output\.dense\.weight'\]; name"):
        load_headless(str(tmp_path))


def test_heads_carry_names_in_order(pretrained: Path) -> None:
    encoder = load_pretrained(str(pretrained), Head(LABELS))
    config = encoder.model.config
    assert config.id2label == {0: "low", 1: "mid", 2: "high"}
    assert config.label2id == {"low": 0, "mid": 1, "high": 2}
    assert encoder.last_linear().out_features == 3
    score = load_pretrained(str(pretrained), Head(None)).model.config
    assert (score.num_labels, score.problem_type) == (1, "regression")


def test_a_fresh_head_depends_on_the_seed_alone(pretrained: Path) -> None:
    def head(seed: int) -> Tensor:
        return load_pretrained(str(pretrained), Head(LABELS), seed=seed).last_linear().weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_pretrained_body_comes_as_it_is(pretrained: Path) -> None:
    body = load_pretrained(str(pretrained), Head(LABELS)).body().state_dict()
    original = AutoModelForSequenceClassification.from_pretrained(pretrained).base_model.state_dict()
    assert body.keys() == original.keys()
    assert all(torch.equal(body[name], original[name]) for name in body)


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    encoder_of("bert").model.bert.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"has no weights for .*classifier\.bias.*classifier\.weight"):
        load_finished(str(tmp_path))


def test_a_finished_encoder_comes_back_in_evaluation_mode(tmp_path: Path, batch: Batch, tokenizer: Any) -> None:
    encoder = encoder_of("bert")
    encoder.save(tmp_path, tokenizer)
    again = load_finished(str(tmp_path))
    assert not any(module.training for module in again.model.modules())
    assert torch.equal(again(batch).logits, encoder(batch).logits)
    assert label_names(str(tmp_path)) == LABELS


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("last", [1, 3])
def test_nothing_runs_after_the_last_projections_asked_for(family: str, last: int, batch: Batch) -> None:
    """Property 5 of MITKD: the taps are those of a whole pass, bit for bit, and no module ran after them."""
    encoder = encoder_of(family)
    whole = encoder.listen(layers=[1, last])(batch)
    ran: list[str] = []
    for name, module in encoder.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    short = encoder.listen(layers=[1, last], stop=True)(batch)
    assert (short.logits.numel(), short.embedding.numel(), short.hidden) == (0, 0, ())
    assert short.relations.keys() == whole.relations.keys() == {1, last}
    for layer, taps in whole.relations.items():
        for tap, same in zip(taps, short.relations[layer], strict=True):
            assert torch.equal(tap, same)
    blocks = [str(place) for place in range(last, 3)]
    assert not [name for name in ran if any(f".{place}." in f".{name}." for place in blocks)]
    assert not [name for name in ran if name.endswith(("dense", "out_lin", "Wo", "classifier", "pooler"))] or last > 1
    assert "" not in ran  # the model itself did not come to an end
    encoder.listen()(batch)
    assert "" in ran


def test_a_short_pass_gives_the_gradient_of_a_whole_one(batch: Batch) -> None:
    short, whole = encoder_of("bert"), encoder_of("bert")
    for encoder, stop in ((short, True), (whole, False)):
        taps = encoder.listen(layers=[3], stop=stop)(batch).relations[3]
        torch.stack([tap.square().mean() for tap in taps]).sum().backward()
    for (name, one), other in zip(short.named_parameters(), whole.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_a_short_pass_needs_a_layer_to_stop_at() -> None:
    with pytest.raises(ValueError, match="needs layers to stop at"):
        encoder_of("bert").listen(stop=True)
