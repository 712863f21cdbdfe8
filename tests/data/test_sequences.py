"""Options, windows and tags as sequences: worked out by hand first, then for any passage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openbook.config import Kind, Optim, UsageError
from openbook.data.batches import BatchPlan, Tokenised, epoch_batches, ordered, tokenise, write_tokens
from openbook.inference import answer_text
from openbook.types import Example, Span

PASSAGE = "My meal was good, and the Plot was bad we us"  # 12 word-pieces: a comma is one
WINDOW = 9  # [CLS] the film [SEP], four word-pieces of the passage, [SEP]


def question(name: str, answer: str | None, passage: str = PASSAGE, text: str = "the film") -> Example:
    if answer is None:
        return Example(name, text, passage)
    start = passage.index(answer)
    return Example(name, text, passage, Span(start, start + len(answer)), answers=(answer,))


def spans(examples: list[Example], tokenizer: Any, folder: Path, **how: Any) -> Tokenised:
    return tokenise(
        examples, tokenizer, how.pop("max_length", WINDOW), folder, "span_extraction", **{"stride": 2} | how
    )


def labels_of(tokens: Tokenised) -> list[list[int]]:
    batch = tokens.batch(range(len(tokens)))
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64
    return batch.labels.tolist()


def test_a_passage_is_cut_into_windows_that_share_the_stride(tmp_path: Path, tokenizer: Any) -> None:
    tokens = spans([question("x/0", "the Plot")], tokenizer, tmp_path, training=False)
    batch = tokens.batch(range(len(tokens)))
    words = [tokenizer.convert_ids_to_tokens(row) for row in batch.input_ids.tolist()]
    parts = ["my meal was good", "was good [UNK] and", "[UNK] and the plot", "the plot was bad", "was bad we us"]
    assert words == [f"[CLS] the film [SEP] {part} [SEP]".split() for part in parts]
    assert batch.token_type_ids.tolist() == [[0] * 4 + [1] * 5] * 5
    assert batch.ids == tuple(f"x/0#{number}" for number in range(5))
    assert labels_of(tokens) == [[-100, -100, 4, 7]] * 5
    assert tokens.example is not None
    assert tokens.example.tolist() == [0] * 5
    assert tokens.tokens.tolist() == [6] * 5


def test_training_keeps_windows_with_the_whole_answer(tmp_path: Path, tokenizer: Any) -> None:
    tokens = spans([question("x/0", "the Plot"), question("x/1", "My")], tokenizer, tmp_path)
    assert labels_of(tokens) == [[6, 7, 4, 7], [4, 5, 4, 7], [4, 4, 4, 7]]
    assert tokens.example is not None
    assert tokens.example.tolist() == [0, 0, 1]
    assert tokens.dropped == 0


def test_windows_without_the_answer_point_to_cls_where_a_question_has_none(tmp_path: Path, tokenizer: Any) -> None:
    nothing, short = question("x/1", None), question("x/2", None, passage="my meal")
    tokens = spans([question("x/0", "the Plot"), nothing, short], tokenizer, tmp_path)
    away = [0, 0, 4, 7]
    assert labels_of(tokens) == [away, away, [6, 7, 4, 7], [4, 5, 4, 7], away, *[away] * 5, [0, 0, 4, 5]]


def test_what_carries_no_loss_is_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    """An answer longer than every window, and a passage with one position to point to."""
    long = question("x/0", "good, and the Plot was")
    examples = [long, question("x/1", "film", passage="film"), question("x/2", "bad")]
    tokens = spans(examples, tokenizer, tmp_path / "training")
    assert (set(tokens.ids.to_pylist()), tokens.dropped) == ({"x/2#0", "x/2#1"}, 2)
    told = spans(examples, tokenizer, tmp_path / "predictions", training=False)
    assert (len(told), told.dropped) == (11, 0)
    with pytest.raises(UsageError, match="none of 1 examples carries a loss: no window of task.max_length=9"):
        spans([long], tokenizer, tmp_path / "nothing")


def test_an_answer_inside_a_word_is_labelled_by_the_pieces_it_touches(tmp_path: Path, tokenizer: Any) -> None:
    example = Example("x/0", "the film", "the plot was xyzq", Span(14, 16))  # z and q come as ##y ##z
    assert labels_of(spans([example], tokenizer, tmp_path, max_length=20)) == [[8, 9, 4, 10]]


def test_characters_are_those_of_the_passage_as_it_was_written(tmp_path: Path, tokenizer: Any) -> None:
    tokens = spans([question("x/0", "the Plot")], tokenizer, tmp_path, training=False)
    assert tokens.start is not None
    assert tokens.end is not None
    third = slice(tokens.offsets[2], tokens.offsets[3])
    assert tokens.start[third].tolist() == [0, 0, 0, 0, 16, 18, 22, 26, 0]
    assert tokens.end[third].tolist() == [0, 0, 0, 0, 17, 21, 25, 30, 0]
    assert answer_text(PASSAGE, tokens.start[third], tokens.end[third], 6, 7) == "the Plot"
    assert answer_text(PASSAGE, tokens.start[third], tokens.end[third], 0, 0) == ""


@pytest.mark.parametrize("max_length", [7, 8])
def test_a_question_is_never_cut(tmp_path: Path, tokenizer: Any, max_length: int) -> None:
    examples = [question("x/0", "good", text="my"), question("x/1", "good", text="the film of me")]
    with pytest.raises(UsageError) as error:
        spans(examples, tokenizer, tmp_path, max_length=max_length)
    said = ["task.max_length=", "task.stride=2", "'x/1' takes 4", "special tokens 3", "to 10 or more"]
    assert [part for part in said if part not in str(error.value)] == []
    assert len(spans(examples, tokenizer, tmp_path, max_length=10)) > 0


def test_a_slow_tokenizer_is_refused_where_places_are_needed(tmp_path: Path) -> None:
    class Slow:
        is_fast, name_or_path, pad_token_id = False, "old", 0

    for kind, example in (
        ("span_extraction", question("x/0", "good")),
        ("token_classification", Example("x", "a", label=(0,), words=("a",))),
    ):
        with pytest.raises(UsageError, match="'old' does not tell where its tokens stand"):
            tokenise([example], Slow(), 9, tmp_path, kind)  # type: ignore[arg-type]


any_passage = st.lists(st.sampled_from(["the", "Film", "xyz", "plot,", "é", "a-b", "Q1"]), min_size=1, max_size=30)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_passage, st.integers(0, 6), st.integers(4, 12), st.data())
def test_every_answer_that_the_stride_holds_is_found_verbatim(
    tmp_path: Path, tokenizer: Any, words: list[str], stride: int, more: int, data: Any
) -> None:
    """A window moves on by less than an answer of `stride + 1` word-pieces needs to be cut in two everywhere."""
    passage = "  ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    start = sum(len(word) + 2 for word in words[:first])
    answer = "  ".join(words[first : last + 1])
    example = Example("x", "the film", passage, Span(start, start + len(answer)))
    pieces = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    how = {"max_length": 5 + stride + more, "stride": stride}
    told = spans([example], tokenizer, tmp_path, training=False, **how)
    inside = len(tokenizer(passage, add_special_tokens=False)["input_ids"])
    assert told.labels is not None
    assert int(np.diff(told.labels[:, 2:]).sum()) + len(told) == inside + (len(told) - 1) * stride
    try:
        tokens = spans([example], tokenizer, tmp_path, **how)
    except UsageError:
        assert pieces > stride + 1 or inside == 1
        return
    assert tokens.labels is not None
    assert tokens.start is not None
    assert tokens.end is not None
    for row, (i, j, _, _) in enumerate(tokens.labels.tolist()):
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        assert answer_text(passage, tokens.start[part], tokens.end[part], i, j) == answer


def choices(*counts: int, label: int | None = 0, text_pair: str | None = None) -> list[Example]:
    options = ("good", "a b", "bad bad bad", "we us")
    return [Example(f"x/{n}", "the film", text_pair, label, options[:count]) for n, count in enumerate(counts)]


def test_every_option_is_a_row_and_a_question_is_a_unit(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tokenise(choices(3, 2, label=1), tokenizer, 12, tmp_path, "multiple_choice")
    assert (len(tokens), len(tokens.ids), [tokens.rows(unit) for unit in range(2)]) == (2, 5, [range(3), range(3, 5)])
    assert tokens.tokens.tolist() == [(2 + 1) + (2 + 2) + (2 + 3), (2 + 1) + (2 + 2)]
    batch = tokens.batch([1, 0])
    assert batch.ids == ("x/1#0", "x/1#1", "x/0#0", "x/0#1", "x/0#2")
    words = [tokenizer.convert_ids_to_tokens(row) for row in batch.input_ids.tolist()]
    assert [" ".join(row) for row in words][:2] == [
        "[CLS] the film [SEP] good [SEP] [PAD] [PAD]",
        "[CLS] the film [SEP] a b [SEP] [PAD]",
    ]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 0]]


def test_logits_of_f14_meet_their_labels(tmp_path: Path, tokenizer: Any) -> None:
    """F14: the third option of row 2 is absent; the losses are scaled by ln 3 and ln 2."""
    examples = choices(3, 2)
    examples[1] = Example("x/1", "the film", None, 1, ("good", "bad"))
    batch = tokenise(examples, tokenizer, 12, tmp_path, "multiple_choice").batch([0, 1])
    assert batch.labels is not None
    scores, losses = torch.tensor([1.0, 0, -1, 2, 1]), []
    for number in batch.labels[:, 0].unique():
        mine = batch.labels[:, 0] == number
        right = batch.labels[mine, 1].argmax()
        losses.append(-scores[mine].log_softmax(0)[right] / torch.tensor(float(mine.sum())).log())
    assert torch.stack(losses).tolist() == pytest.approx([0.371019, 1.894636], abs=1e-6)


def test_a_question_stands_before_each_option(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tokenise(choices(2, text_pair="my plot"), tokenizer, 12, tmp_path, "multiple_choice")
    words = tokenizer.convert_ids_to_tokens(tokens.batch([0]).input_ids[1].tolist())
    assert " ".join(words) == "[CLS] the film [SEP] my plot a b [SEP]"


def test_a_lone_option_carries_no_loss_but_can_be_predicted(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tokenise(choices(1, 2), tokenizer, 12, tmp_path / "training", "multiple_choice")
    assert (len(tokens), tokens.dropped, tokens.ids.to_pylist()) == (1, 1, ["x/1#0", "x/1#1"])
    told = tokenise(choices(1, 2), tokenizer, 12, tmp_path / "predictions", "multiple_choice", training=False)
    assert (len(told), told.dropped) == (2, 0)
    with pytest.raises(UsageError, match="no question has two options"):
        tokenise(choices(1, 1), tokenizer, 12, tmp_path / "nothing", "multiple_choice")
    unlabelled = tokenise(choices(2, label=None), tokenizer, 12, tmp_path / "unlabelled", "multiple_choice")
    assert unlabelled.batch([0]).labels is None


def test_batches_never_part_the_options_of_a_question(tmp_path: Path, tokenizer: Any) -> None:
    counts = [2 + n % 3 for n in range(40)]
    tokens = tokenise(choices(*counts), tokenizer, 12, tmp_path, "multiple_choice")
    read = []
    for batch in BatchPlan(tokens, Optim(epochs=1, batch_size=7), 0):  # type: ignore[attr-defined]
        names = [name.partition("#")[0] for name in batch.ids]
        read += list(dict.fromkeys(names))
        assert len(batch.ids) == sum(counts[int(name.partition("/")[2])] for name in set(names))
        assert batch.labels[:, 1].sum() == len(set(names)) <= 7
    assert sorted(read) == sorted(f"x/{n}" for n in range(40))
    limit = Optim(batch_tokens=40)
    batches, _ = epoch_batches(tokens.tokens, 0, 0, limit)
    assert max(tokens.tokens[units].sum() for units in batches) <= 40


def test_inference_counts_all_rows_of_a_unit(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tokenise(choices(*[2 + n % 3 for n in range(30)]), tokenizer, 12, tmp_path, "multiple_choice")
    batches = list(ordered(tokens, 50))
    assert sorted(name for batch in batches for name in batch.ids) == sorted(tokens.ids.to_pylist())
    assert all(batch.input_ids.numel() <= 50 for batch in batches)
    assert len(list(ordered(tokens, 1))) == 30  # a single unit, however large


def tagged(name: str, text: str, *tags: int) -> Example:
    return Example(name, text, label=tags, words=tuple(text.split()))


def test_the_first_piece_of_a_word_has_its_tag(tmp_path: Path, tokenizer: Any) -> None:
    """As F15: pieces of one sequence without a label, and a sequence with one labelled piece."""
    examples = [tagged("x/0", "xyz Film", 1, 2), tagged("x/1", "the", 3)]
    tokens = tokenise(examples, tokenizer, 12, tmp_path, "token_classification")
    batch = tokens.batch([0, 1])
    assert tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist()) == ["[CLS]", "x", "##y", "##z", "film", "[SEP]"]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[-100, 1, -100, -100, 2, -100], [-100, 3, -100, -100, -100, -100]]
    assert batch.labels.dtype == torch.int64
    assert tokens.word is not None
    assert tokens.word.tolist() == [-1, 0, -1, -1, 1, -1, -1, 0, -1]
    assert tokens.ids.to_pylist() == ["x/0", "x/1"]


def test_words_beyond_the_cut_have_no_label(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tokenise([tagged("x/0", "the film was xyz", 1, 2, 1, 2)], tokenizer, 4, tmp_path, "token_classification")
    assert labels_of(tokens) == [[-100, 1, 2, -100]]


def test_a_sentence_without_a_tagged_piece_is_left_out_in_training(tmp_path: Path, tokenizer: Any) -> None:
    examples = [Example("x/0", " ", label=(0,), words=("\u200b",)), tagged("x/1", "the", 1)]
    tokens = tokenise(examples, tokenizer, 8, tmp_path / "training", "token_classification")
    assert (tokens.ids.to_pylist(), tokens.dropped) == (["x/0", "x/1"], 0)  # this tokenizer has [UNK] for it
    tokens = tokenise(examples[1:], tokenizer, 3, tmp_path / "short", "token_classification")
    assert labels_of(tokens) == [[-100, 1, -100]]
    empty = Example("x/2", " ", label=(0,), words=(" ",))
    tokens = tokenise([empty, examples[1]], tokenizer, 8, tmp_path / "empty", "token_classification")
    assert (tokens.ids.to_pylist(), tokens.dropped) == (["x/1"], 1)
    told = tokenise([empty, examples[1]], tokenizer, 8, tmp_path / "p", "token_classification", training=False)
    assert len(told) == 2


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["the", "Film", "xyz", "U.S.", "é", "a-b", "we"]), min_size=1, max_size=9))
def test_words_begin_where_the_tokenizer_says_so(tmp_path: Path, tokenizer: Any, words: list[str]) -> None:
    """The tokenizer's own account of words that are given one by one."""
    example = Example("x", " ".join(words), label=tuple(range(len(words))), words=tuple(words))
    tokens = tokenise([example], tokenizer, 64, tmp_path, "token_classification")
    owners = tokenizer(words, is_split_into_words=True).word_ids()
    expected = [
        -100 if owner is None or owner == before else owner
        for before, owner in zip([None, *owners], owners, strict=False)
    ]
    assert labels_of(tokens) == [expected]


def test_a_byte_level_token_belongs_to_the_word_it_ends_in(tmp_path: Path) -> None:
    """Its offsets may begin with the space before the word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<pad>", "a", "b", "\u0120", "\u0120b", "ab"]
    rules = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("\u0120", "b"), ("a", "b")]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    bytes_of = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>")
    tokens = tokenise([tagged("x", "ab b a b", 1, 2, 3, 4)], bytes_of, 16, tmp_path, "token_classification")
    assert bytes_of.convert_ids_to_tokens(tokens.input_ids.tolist())[1:4] == ["ab", "\u0120b", "\u0120"]
    assert labels_of(tokens) == [[-100, 1, 2, -100, 3, 4, -100]]


KINDS: list[tuple[Kind, list[Example]]] = [
    ("classification", [Example(f"x/{n}", "the film", label=n % 2) for n in range(5)]),
    ("multiple_choice", choices(2, 3, 4, 3, 2)),
    ("span_extraction", [question(f"x/{n}", "good") for n in range(5)]),
    ("token_classification", [tagged(f"x/{n}", "the film xyz", 1, 0, 1) for n in range(5)]),
]


@pytest.mark.parametrize(("kind", "examples"), KINDS, ids=[kind for kind, _ in KINDS])
def test_what_is_loaded_is_what_was_written_however_many_are_read_at_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: Kind, examples: list[Example]
) -> None:
    tokenise(examples, tokenizer, WINDOW, tmp_path / "one", kind, stride=2)
    monkeypatch.setattr("openbook.data.sequences.AT_ONCE", 2)
    tokenise(examples, tokenizer, WINDOW, tmp_path / "many", kind, stride=2)
    one, many = (Tokenised.load(tmp_path / name) for name in ("one", "many"))
    assert one.kind == kind
    for name in ("ids", "input_ids", "token_type_ids", "offsets", "special", "labels", "example"):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name
    for first, second in zip(ordered(one, 40), ordered(many, 40), strict=True):
        assert torch.equal(first.labels, second.labels)  # type: ignore[arg-type]


def test_blocks_need_no_tokenizer(tmp_path: Path) -> None:
    ids, types = np.array([1, 5, 2, 1, 2], np.int32), np.array([0, 1, 1, 0, 0], np.int8)
    write_tokens(tmp_path, ["a", "b"], np.array([3, 2]), ids, types, [2, 2], 9)
    tokens = Tokenised.load(tmp_path)
    assert (tokens.pad_id, tokens.tokens.tolist(), len(tokens)) == (9, [1, 0], 2)
    batch = tokens.batch([0, 1])
    assert batch.input_ids.tolist() == [[1, 5, 2], [1, 2, 9]]
    assert (batch.ids, batch.labels) == (("a", "b"), None)
