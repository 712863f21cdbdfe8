"""The head for hidden words against transformers' own, and what it draws, learns and leaves alone."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from openbook.models.encoder import Encoder
from openbook.models.language import MaskedLanguageModel
from openbook.types import Batch


def tiny() -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)


@pytest.fixture
def asked(batch: Batch) -> Batch:
    """The second row asks for nothing."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[0, 1], labels[0, 5], labels[2, 2] = 11, 0, 39
    return Batch(batch.ids, batch.input_ids, batch.attention_mask, batch.token_type_ids, labels)


def test_the_logits_are_those_of_a_bert_with_the_same_weights(asked: Batch) -> None:
    torch.manual_seed(3)
    theirs = BertForMaskedLM(tiny()).eval()
    model = MaskedLanguageModel(Encoder(theirs.bert)).eval()
    head = theirs.cls.predictions
    torch.nn.init.normal_(head.bias)
    model.transform.load_state_dict(head.transform.dense.state_dict())
    model.norm.load_state_dict(head.transform.LayerNorm.state_dict())
    model.bias.data.copy_(head.bias)
    with torch.no_grad():
        whole = theirs(asked.input_ids, asked.attention_mask, asked.token_type_ids).logits  # (B, L, V)
        own = model(asked)
    torch.testing.assert_close(own, torch.stack([whole[0, 1], whole[0, 5], whole[2, 2]]), atol=1e-5, rtol=1e-5)


def test_words_learn_from_both_sides_and_are_kept_once(asked: Batch) -> None:
    encoder = Encoder(BertModel(tiny()))
    model = MaskedLanguageModel(encoder)
    assert sum(tuple(value.shape) == (40, 32) for value in model.state_dict().values()) == 1
    logits = model(asked)
    assert asked.labels is not None
    torch.nn.functional.cross_entropy(logits, asked.labels[asked.labels >= 0]).backward()
    words = encoder.words().weight.grad
    assert words is not None
    unread = sorted({*range(40)} - {*asked.input_ids.flatten().tolist()})
    assert words[unread].abs().sum(1).min() > 0
    assert encoder.model.pooler.dense.weight.grad is None


def test_the_head_is_drawn_by_its_seed_alone() -> None:
    encoder = Encoder(BertModel(tiny()))
    torch.manual_seed(1)
    one = MaskedLanguageModel(encoder, 5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    same, other = MaskedLanguageModel(encoder, 5), MaskedLanguageModel(encoder, 6)
    assert torch.equal(torch.rand(1), drawn), "building a head draws nothing from the generator of everybody"
    assert torch.equal(one.transform.weight, same.transform.weight)
    assert not torch.equal(one.transform.weight, other.transform.weight)
    assert one.transform.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not one.transform.bias.any()
