"""Long texts are learned from with fused attention, which says and teaches what plain attention does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, ModernBertConfig

from openbook.models.attention import FUSED_FP32, FUSED_FROM, PLAIN
from openbook.models.encoder import Encoder
from openbook.types import Batch

SIZES: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "num_labels": 3}
BERT: dict[str, Any] = SIZES | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 160,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**BERT, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    "distilbert": DistilBertConfig(
        **SIZES, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=160, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    ),
    "modernbert": ModernBertConfig(**BERT, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
}  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU attention is always fused")


def encoder_of(config: Any) -> Encoder:
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), "initializer_range": 0.3})  # so that attention matters
    return Encoder(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).train()


def batch_of(length: int) -> Batch:
    """Three texts, the second shorter than the others."""
    random = torch.Generator().manual_seed(1)
    real = torch.tensor([length, length - 30, length])
    mask = (torch.arange(length) < real[:, None]).long()
    ids = torch.randint(4, 60, (3, length), generator=random) * mask
    return Batch(("a", "b", "c"), ids, mask, torch.zeros_like(ids))


def taught(encoder: Encoder, batch: Batch) -> dict[str, Tensor]:
    """Logits and gradients."""
    encoder.zero_grad()
    logits = encoder(batch).logits
    (logits * torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 1.0], [-1.0, 0.0, 2.0]])).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_attention_says_and_teaches_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = encoder_of(CONFIGS[family]), batch_of(FUSED_FROM)
    with monkeypatch.context() as patch:
        patch.setattr("openbook.models.attention.FUSED_FROM", FUSED_FROM + 1)
        plain = taught(encoder, batch)
    assert encoder.model.config._attn_implementation == PLAIN
    fused = taught(encoder, batch)
    assert encoder.model.config._attn_implementation == FUSED_FP32
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_under_autocast_products_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, bool]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *others: Any, **how: Any) -> Tensor:
        asked.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return plain(query, *others, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        encoder_of(CONFIGS["bert"])(batch_of(FUSED_FROM))
    assert asked == [(torch.float32, False)] * 2


def test_short_texts_and_attention_that_drops_out_are_learned_plainly() -> None:
    encoder = encoder_of(CONFIGS["bert"])
    for length, kind in ((FUSED_FROM - 1, PLAIN), (FUSED_FROM, FUSED_FP32), (FUSED_FROM - 1, PLAIN)):
        encoder(batch_of(length))
        assert encoder.model.config._attn_implementation == kind
    encoder.last_states(batch_of(FUSED_FROM))  # heads for other kinds of tasks read these
    assert encoder.model.config._attn_implementation == FUSED_FP32
    dropping = encoder_of(BertConfig(**BERT, attention_probs_dropout_prob=0.1))
    dropping(batch_of(FUSED_FROM))
    assert dropping.model.config._attn_implementation == PLAIN


def test_what_was_trained_is_saved_and_asked_as_before(tmp_path: Path) -> None:
    encoder, batch = encoder_of(CONFIGS["bert"]), batch_of(FUSED_FROM)
    before = encoder.attention
    encoder(batch)
    encoder.model.save_pretrained(tmp_path)
    assert FUSED_FP32 not in (tmp_path / "config.json").read_text()
    assert encoder.eval().model.config._attn_implementation == before == "sdpa"
    encoder(batch)
    assert encoder.model.config._attn_implementation == before
