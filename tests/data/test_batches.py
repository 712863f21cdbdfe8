"""Tokenised once, mapped into memory, and batched as a pure function of seed and step."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from openbook.config import Optim, UsageError
from openbook.data.batches import BatchPlan, Tokenised, epoch_batches, ordered, tokenise
from openbook.types import Example

PAD, CLS, SEP = 7, 1, 2  # a padding id that is not 0 shows where 0 was assumed
VOCABULARY = {"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP, "a": 3, "b": 4, "c": 5, "d": 6, "[PAD]": PAD}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A real fast tokenizer with eight words and BERT's way of joining two texts."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pattern = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    words.post_processor = processors.TemplateProcessing(**pattern, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def of_lengths(folder: Path, tokenizer: Any, lengths: list[int]) -> Tokenised:
    examples = [Example(f"t/{n}", " ".join("a" * (length - 2)), label=n % 2) for n, length in enumerate(lengths)]
    return tokenise(examples, tokenizer, 512, folder)


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path, tokenizer: Any) -> None:
    examples = [Example("x/0", "a", label=1), Example("x/1", "a b c", label=0), Example("x/2", "", label=1)]
    batch = tokenise(examples, tokenizer, 8, tmp_path).batch([2, 0])
    assert batch.ids == ("x/2", "x/0")
    assert batch.input_ids.tolist() == [[CLS, SEP, PAD], [CLS, 3, SEP]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 1]
    tensors = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels)
    assert [tensor.dtype for tensor in tensors] == [torch.int64] * 4


def test_a_pair_is_cut_at_its_longer_text(tmp_path: Path, tokenizer: Any) -> None:
    examples = [Example("x/0", "a b c d a b", "d c"), Example("x/1", "a", "b"), Example("x/2", "a", "b c d a b c")]
    batch = tokenise(examples, tokenizer, 8, tmp_path).batch([0, 1, 2])
    assert batch.input_ids.tolist() == [
        [CLS, 3, 4, 5, SEP, 6, 5, SEP],
        [CLS, 3, SEP, 4, SEP, PAD, PAD, PAD],
        [CLS, 3, SEP, 4, 5, 6, 3, SEP],
    ]
    assert batch.token_type_ids.tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1],
    ]
    assert batch.labels is None


def test_targets_are_float32(tmp_path: Path, tokenizer: Any) -> None:
    batch = tokenise([Example("x/0", "a", label=0.1)], tokenizer, 8, tmp_path).batch([0])
    assert batch.labels is not None
    assert (batch.labels.dtype, batch.labels.tolist()) == (torch.float32, [float(np.float32(0.1))])


def test_a_batch_owns_its_memory(tmp_path: Path, tokenizer: Any) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [3, 4])
    batch = tokenised.batch([0, 1])
    batch.input_ids.zero_()
    assert tokenised.batch([0, 1]).input_ids[0, 0] == CLS


def test_the_file_is_mapped_and_complete(tmp_path: Path, tokenizer: Any) -> None:
    """More rows than one call of the tokenizer takes; nothing is left beside the file."""
    lengths = [3 + n % 5 for n in range(2_345)]
    of_lengths(tmp_path / "new", tokenizer, lengths)
    before = pa.total_allocated_bytes()
    loaded = Tokenised.load(tmp_path / "new")
    assert pa.total_allocated_bytes() - before < 10_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokens.arrow"]
    assert loaded.lengths.tolist() == lengths
    assert (len(loaded), loaded.pad_id) == (2_345, PAD)
    batch = loaded.batch([2_344, 1_000])
    assert batch.ids == ("t/2344", "t/1000")
    assert batch.attention_mask.sum(dim=1).tolist() == [lengths[2_344], lengths[1_000]]


def test_a_crash_leaves_the_old_file(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of_lengths(tmp_path, tokenizer, [3])

    def fail(*paths: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("openbook.data.batches.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        of_lengths(tmp_path, tokenizer, [3, 4])
    assert len(Tokenised.load(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.arrow"]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([], "no example"),
        ([Example("x", "a"), Example("x", "b")], "same id"),
        ([Example("x", "a", "b"), Example("y", "a")], "some examples are pairs"),
        ([Example("x", "a", label=1), Example("y", "a")], "some examples have a label"),
    ],
)
def test_examples_that_do_not_belong_together(
    tmp_path: Path, tokenizer: Any, examples: list[Example], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tokenise(examples, tokenizer, 8, tmp_path)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="no padding token"):
        tokenise([Example("x", "a")], bare, 8, tmp_path)


any_lengths = st.lists(st.integers(2, 60), min_size=1, max_size=300).map(np.array)


@settings(max_examples=60, deadline=None)
@given(any_lengths, st.integers(0, 5), st.integers(0, 5), st.integers(1, 9), st.none() | st.integers(60, 200))
def test_an_epoch_has_every_example_once(
    lengths: np.ndarray[Any, Any], epoch: int, seed: int, batch_size: int, batch_tokens: int | None
) -> None:
    batches = epoch_batches(lengths, epoch, seed, batch_size, batch_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    again = epoch_batches(lengths, epoch, seed, batch_size, batch_tokens)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
    if batch_tokens is None:
        assert len(batches) == math.ceil(len(lengths) / batch_size)
        assert max(map(len, batches)) <= batch_size
    else:
        assert max(lengths[batch].sum() for batch in batches) <= batch_tokens


def test_a_batch_of_tokens_is_filled(tmp_path: Path) -> None:
    """Ten examples of 10 tokens fit into 39 tokens three at a time."""
    batches = epoch_batches(np.full(10, 10), 0, 0, 1, 39)
    assert sorted(map(len, batches)) == [1, 3, 3, 3]
    with pytest.raises(UsageError, match=r"optim\.batch_tokens=9 is less than the longest example \(10 tokens\)"):
        epoch_batches(np.full(10, 10), 0, 0, 1, 9)


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(32, None), (16, None), (32, 2_048)])
def test_little_is_padding_and_the_order_is_random(batch_size: int, batch_tokens: int | None) -> None:
    """Lengths as real sentences have them: log-normal around 22 word-pieces, from 4 to 128."""
    spread = np.random.default_rng(0).lognormal(math.log(22), 0.6, 20_000)
    lengths = np.clip(spread.astype(np.int64), 4, 128)
    batches = epoch_batches(lengths, 0, 0, batch_size, batch_tokens)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.15  # a long batch says nothing about the next
    other = epoch_batches(lengths, 1, 0, batch_size, batch_tokens)
    assert not {tuple(sorted(batch)) for batch in batches} & {tuple(sorted(batch)) for batch in other}
    assert not np.array_equal(other[0], epoch_batches(lengths, 1, 1, batch_size, batch_tokens)[0])


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.1, 1), (1, 4), (1.5, 6), (2.25, 9), (2.26, 10), (3, 12)])
def test_a_plan_has_fractions_of_epochs(tmp_path: Path, tokenizer: Any, epochs: float, steps: int) -> None:
    plan = BatchPlan(
        of_lengths(tmp_path, tokenizer, [3 + n % 7 for n in range(14)]), Optim(epochs=epochs, batch_size=4), 0
    )
    assert len(plan) == steps == len(list(plan))


@pytest.mark.parametrize("batch_tokens", [None, 20])
def test_a_step_has_the_same_batch_whenever_it_is_asked_for(
    tmp_path: Path, tokenizer: Any, batch_tokens: int | None
) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [3 + (n * n) % 11 for n in range(30)])
    optim = Optim(epochs=3, batch_size=4, batch_tokens=batch_tokens)
    straight = [batch.ids for batch in BatchPlan(tokenised, optim, 5)]  # type: ignore[attr-defined]
    resumed = BatchPlan(tokenised, optim, 5)
    assert [resumed[step].ids for step in reversed(range(len(resumed)))] == straight[::-1]
    epochs = [
        batch.tolist() for epoch in range(3) for batch in epoch_batches(tokenised.lengths, epoch, 5, 4, batch_tokens)
    ]
    assert [[int(name.removeprefix("t/")) for name in names] for names in straight] == epochs
    assert straight != [batch.ids for batch in BatchPlan(tokenised, optim, 6)]  # type: ignore[attr-defined]
    for step in (-1, len(resumed)):
        with pytest.raises(IndexError):
            resumed[step]


def test_inference_goes_from_long_to_short_within_its_tokens(tmp_path: Path, tokenizer: Any) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [4, 3, 9, 4, 12, 3])
    batches = list(ordered(tokenised, 10))
    assert [batch.ids for batch in batches] == [("t/4",), ("t/2",), ("t/0", "t/3"), ("t/1", "t/5")]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 12), (1, 9), (2, 4), (2, 3)]
