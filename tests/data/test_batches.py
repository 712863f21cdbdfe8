"""Tokenised once, mapped into memory, and batched as a pure function of seed and step."""

import math
from dataclasses import dataclass
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


def test_pairs_and_single_texts_are_read_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    """Sentences that are read two by two leave an odd one; whichever kind comes first."""
    single, pair, empty = Example("x", "a b"), Example("y", "a", "b c"), Example("z", "a", "")
    for place, examples in enumerate(([single, pair, empty], [pair, empty, single])):
        tokenised = tokenise(examples, tokenizer, 8, tmp_path / str(place))
        rows = dict(zip(tokenised.ids.to_pylist(), range(3), strict=True))
        batch = tokenised.batch([rows[name] for name in "xyz"])
        assert batch.input_ids.tolist() == [
            [CLS, 3, 4, SEP, PAD, PAD],
            [CLS, 3, SEP, 4, 5, SEP],
            [CLS, 3, SEP, SEP, PAD, PAD],
        ]
        assert batch.token_type_ids.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
        assert [tokenised.tokens[rows[name]] for name in "xyz"] == [2, 3, 1]


def test_tokens_are_counted_after_cutting_without_special_ones(tmp_path: Path, tokenizer: Any) -> None:
    examples = [Example("x", "a b c d " * 9), Example("y", "a b c d " * 9, "a b c"), Example("z", "")]
    tokenised = tokenise(examples, tokenizer, 8, tmp_path)
    assert tokenised.lengths.tolist() == [8, 8, 2]
    assert tokenised.tokens.tolist() == [6, 5, 0]


any_tokens = st.lists(st.integers(2, 60), min_size=1, max_size=300).map(np.array)
any_optim = st.builds(Optim, batch_size=st.integers(1, 9), batch_tokens=st.none() | st.integers(60, 200))


def lists(batches: list[Any]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@settings(max_examples=60, deadline=None)
@given(any_tokens, st.integers(0, 5), st.integers(0, 5), any_optim)
def test_an_epoch_has_every_example_once(tokens: np.ndarray[Any, Any], epoch: int, seed: int, optim: Optim) -> None:
    batches, left = epoch_batches(tokens, epoch, seed, optim)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(tokens)))
    assert len(left) == 0
    assert lists(batches) == lists(epoch_batches(tokens, epoch, seed, optim)[0])
    if optim.batch_tokens is None:
        assert len(batches) == math.ceil(len(tokens) / optim.batch_size)
        assert max(map(len, batches)) <= optim.batch_size
    else:
        assert max(tokens[batch].sum() for batch in batches) <= optim.batch_tokens


@settings(max_examples=60, deadline=None)
@given(any_tokens, st.integers(0, 5), any_optim)
def test_what_an_epoch_leaves_over_is_read_in_the_next(tokens: np.ndarray[Any, Any], seed: int, optim: Optim) -> None:
    left = np.empty(0, np.int64)
    read = np.zeros(len(tokens), np.int64)
    for epoch in range(4):
        batches, left = epoch_batches(tokens, epoch, seed, optim, left)
        for batch in batches:
            np.add.at(read, batch, 1)
            if optim.batch_tokens is None:
                assert len(batch) == optim.batch_size
            else:
                assert optim.batch_tokens - tokens.max() < tokens[batch].sum() <= optim.batch_tokens
        waiting = np.bincount(left, minlength=len(tokens))
        assert (read + waiting == epoch + 1).all()


def test_a_batch_of_tokens_is_filled() -> None:
    """Ten examples of 10 tokens fit into 39 tokens three at a time."""
    batches, _ = epoch_batches(np.full(10, 10), 0, 0, Optim(batch_tokens=39))
    assert sorted(map(len, batches)) == [1, 3, 3, 3]
    with pytest.raises(UsageError, match=r"optim\.batch_tokens=9 is less than the longest example \(10 tokens\)"):
        epoch_batches(np.full(10, 10), 0, 0, Optim(batch_tokens=9))


def sentence_lengths(median: float, tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Lengths as real sentences have them, log-normal, cut at 62 word-pieces; so many tokens in all."""
    spread = np.random.default_rng(seed).lognormal(math.log(median), 0.6, 4 * round(tokens / median))
    lengths = np.clip(spread.astype(np.int64), 1, 62)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(32, None), (16, None), (32, 2_048)])
def test_little_is_padding_and_the_order_is_random(batch_size: int, batch_tokens: int | None) -> None:
    """Lengths as real sentences have them: log-normal around 22 word-pieces, from 4 to 128."""
    spread = np.random.default_rng(0).lognormal(math.log(22), 0.6, 20_000)
    lengths = np.clip(spread.astype(np.int64), 4, 128)
    optim = Optim(batch_size=batch_size, batch_tokens=batch_tokens)
    batches, _ = epoch_batches(lengths, 0, 0, optim)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.15  # a long batch says nothing about the next
    other, _ = epoch_batches(lengths, 1, 0, optim)
    assert not {tuple(sorted(batch)) for batch in batches} & {tuple(sorted(batch)) for batch in other}
    assert not np.array_equal(other[0], epoch_batches(lengths, 1, 1, optim)[0][0])


def test_batches_may_disregard_length() -> None:
    lengths = np.arange(1, 201)
    sorted_ones, _ = epoch_batches(lengths, 0, 0, Optim(batch_size=10))
    mixed, _ = epoch_batches(lengths, 0, 0, Optim(batch_size=10), by_length=False)
    assert max(np.ptp(batch) for batch in sorted_ones) == 9
    assert min(np.ptp(batch) for batch in mixed) > 50


@pytest.mark.parametrize(
    ("epochs", "ends"),
    [
        (0, []),
        (0.1, [1]),
        (1, [4]),
        (1.5, [4, 6]),
        (2.25, [4, 8, 9]),
        (2.26, [4, 8, 10]),
        (3, [4, 8, 12]),
    ],
)
def test_a_plan_has_fractions_of_epochs(tmp_path: Path, tokenizer: Any, epochs: float, ends: list[int]) -> None:
    plan = BatchPlan(
        of_lengths(tmp_path, tokenizer, [3 + n % 7 for n in range(14)]), Optim(epochs=epochs, batch_size=4), 0
    )
    assert plan.epoch_ends == ends
    assert len(plan) == max(ends, default=0) == len(list(plan))


@dataclass(frozen=True)
class Counted:
    """As much of tokenised text as the length of a plan depends on."""

    tokens: np.ndarray[Any, Any]


def planned(tokens: np.ndarray[Any, Any], wanted: int, most: int) -> list[Any]:
    """The batches that a plan ends up with."""
    plan = BatchPlan(Counted(tokens), Optim(tokens=wanted, batch_tokens=most), 0)  # type: ignore[arg-type]
    counts = np.diff(plan._starts).tolist()
    batches = [batch for epoch, count in enumerate(counts) for batch in plan._batches(epoch)[0][:count]]
    assert len(batches) == len(plan)
    return batches


def test_equal_tokens_are_equal_steps_whatever_the_text() -> None:
    """Property 13: corpora of other sizes and lengths, one smaller than a batch, for as many tokens each."""
    wanted, most = 1_200_000, 4_096
    found = {}
    for median, size in ((8, 500_000), (20, 400_000), (35, 400_000), (20, 2_000_000), (12, 45_000), (20, 3_000)):
        tokens = sentence_lengths(median, size)
        batches = planned(tokens, wanted, most)
        found[median, size] = len(batches), int(sum(tokens[batch].sum() for batch in batches))
    steps, read = ([pair[place] for pair in found.values()] for place in (0, 1))
    assert max(steps) <= 1.01 * min(steps)
    assert all(wanted <= tokens < wanted + most for tokens in read), read


def test_no_text_waits_while_others_repeat() -> None:
    tokens = sentence_lengths(8, 30_000, seed=1)
    read = np.bincount(np.concatenate(planned(tokens, 900_000, 4_096)), minlength=len(tokens))
    assert np.ptp(read) <= 2
    assert read.mean() == pytest.approx(900_000 / tokens.sum(), abs=1)


@pytest.mark.parametrize("batch_tokens", [None, 40])
def test_a_plan_ends_with_the_batch_that_reaches_its_tokens(
    tmp_path: Path, tokenizer: Any, batch_tokens: int | None
) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [3 + (n * n) % 11 for n in range(30)])
    long = Optim(tokens=2_000, batch_size=4, batch_tokens=batch_tokens, epochs=0.5)
    read = np.cumsum([batch.attention_mask.sum() - 2 * len(batch.ids) for batch in BatchPlan(tokenised, long, 3)])  # type: ignore[attr-defined]
    assert read[-2] < 2_000 <= read[-1]
    for steps in (1, 2, len(read) // 2):
        for tokens, expected in ((read[steps - 1], steps), (read[steps - 1] + 1, steps + 1)):
            plan = BatchPlan(tokenised, long.model_copy(update={"tokens": int(tokens)}), 3)
            assert len(plan) == expected
            assert plan.epoch_ends[-1] == expected


def test_an_empty_text_does_not_make_a_training_endless(tmp_path: Path, tokenizer: Any) -> None:
    tokenised = tokenise([Example("x", ""), Example("y", "")], tokenizer, 8, tmp_path)
    assert len(BatchPlan(tokenised, Optim(tokens=8, batch_tokens=4), 0)) == 2


@pytest.mark.parametrize("batch_tokens", [None, 20])
@pytest.mark.parametrize("tokens", [None, 500])
def test_a_step_has_the_same_batch_whenever_it_is_asked_for(
    tmp_path: Path, tokenizer: Any, batch_tokens: int | None, tokens: int | None
) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [3 + (n * n) % 11 for n in range(30)])
    optim = Optim(epochs=3, batch_size=4, batch_tokens=batch_tokens, tokens=tokens)
    straight = [batch.ids for batch in BatchPlan(tokenised, optim, 5)]  # type: ignore[attr-defined]
    resumed = BatchPlan(tokenised, optim, 5)
    assert [resumed[step].ids for step in reversed(range(len(resumed)))] == straight[::-1]
    assert straight != [batch.ids for batch in BatchPlan(tokenised, optim, 6)]  # type: ignore[attr-defined]
    for step in (-1, len(resumed)):
        with pytest.raises(IndexError):
            resumed[step]
    if tokens is None:
        epochs = [lists(epoch_batches(tokenised.tokens, epoch, 5, optim)[0]) for epoch in range(3)]
        assert [[int(name.removeprefix("t/")) for name in names] for names in straight] == sum(epochs, [])


def test_inference_goes_from_long_to_short_within_its_tokens(tmp_path: Path, tokenizer: Any) -> None:
    tokenised = of_lengths(tmp_path, tokenizer, [4, 3, 9, 4, 12, 3])
    batches = list(ordered(tokenised, 10))
    assert [batch.ids for batch in batches] == [("t/4",), ("t/2",), ("t/0", "t/3"), ("t/1", "t/5")]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 12), (1, 9), (2, 4), (2, 3)]
