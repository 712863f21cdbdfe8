"""What all engines share: rows become word-pieces as transformers makes them, and batches answer in order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from openbook.answers import Encoded
from openbook.backends import base
from openbook.backends.base import Pieces, about, in_batches, longest_input
from openbook.config import UsageError

LONG = "the film was great and the plot was poor " * 4


@pytest.fixture
def pieces(tokenizer: PreTrainedTokenizerFast) -> Pieces:
    return Pieces(tokenizer.backend_tokenizer, 12, 0)


@pytest.mark.parametrize(
    "rows",
    [["a film", "", LONG, "dull\tplot"], [("a film", "great"), (LONG, "dull"), ("dull", LONG), (LONG, LONG), ("", "")]],
    ids=["texts", "pairs"],
)
def test_rows_become_the_word_pieces_of_transformers(
    pieces: Pieces, tokenizer: PreTrainedTokenizerFast, rows: list[Any]
) -> None:
    first = [row if isinstance(row, str) else row[0] for row in rows]
    second = None if isinstance(rows[0], str) else [row[1] for row in rows]
    theirs = tokenizer(
        first, second, truncation="longest_first", max_length=12, padding=True, return_token_type_ids=True,
        return_tensors="np",
    )  # fmt: skip
    ours = pieces.padded(pieces.encode(rows))
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
        assert array.dtype == np.int64


def test_what_was_left_out_is_told(pieces: Pieces) -> None:
    assert [row.cut for row in pieces.encode(["a film", LONG, "a b c d e f g h i j", "a b c d e f g h i j k"])] == [
        False, True, False, True,
    ]  # fmt: skip
    assert [len(row) for row in pieces.encode([LONG, ""])] == [12, 2]
    assert pieces.encode([("a", LONG)])[0].cut


def test_a_tokenizer_that_was_handed_over_stays_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    Pieces(tokenizer.backend_tokenizer, 4, 0)
    assert len(tokenizer(LONG).input_ids) > 30


def test_lone_surrogates_are_read_as_question_marks(pieces: Pieces) -> None:
    [odd], [plain] = pieces.encode(["a \ud800 film"]), pieces.encode(["a ? film"])
    assert odd == plain
    assert pieces.encode([("a \udfff", "b")]) == pieces.encode([("a ?", "b")])


def test_padding_has_the_index_it_was_given(tokenizer: PreTrainedTokenizerFast) -> None:
    padded = Pieces(tokenizer.backend_tokenizer, 12, 7).padded([Encoded([2, 3], [0, 0]), Encoded([2, 5, 3], [0, 1, 1])])
    assert padded["input_ids"].tolist() == [[2, 3, 7], [2, 5, 3]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("stated", "config", "length"),
    [
        (64, {"max_position_embeddings": 512}, 64),
        (1e30, {"max_position_embeddings": 512}, 512),
        (None, {"max_position_embeddings": 128}, 128),
        (1e30, {"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 512),
        (1e30, {"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}, 512),
    ],
)
def test_the_longest_input_is_the_tokenizers_or_that_of_the_positions(
    stated: float | None, config: dict[str, Any], length: int
) -> None:
    assert longest_input(stated, config) == length


def test_a_student_that_tells_no_length_is_refused() -> None:
    with pytest.raises(UsageError, match="model_max_length.*max_position_embeddings"):
        longest_input(1e30, {})


def test_a_configuration_tells_kind_labels_and_book() -> None:
    told = about({"id2label": {"1": "good", "0": "bad", "10": "eleventh", "2": "c"}, "key_space": "k"})
    assert (told.kind, told.labels, told.key_space) == ("classification", ("bad", "good", "c", "eleventh"), "k")
    assert about({"problem_type": "regression", "id2label": {"0": "score"}}) == base.About("regression", None, None)
    several = about({"problem_type": "multi_label_classification", "id2label": {"0": "joy", "1": "fear"}})
    assert several == base.About("multi_label", ("joy", "fear"), None)


def test_batches_of_similar_length_answer_in_the_order_of_rows() -> None:
    rows = [Encoded(list(range(length)), [0] * length) for length in (4, 9, 1, 7, 2, 8, 3, 5)]
    asked: list[list[int]] = []

    def answer(some: Sequence[Encoded]) -> tuple[Any, Any]:
        asked.append([len(row) for row in some])
        sums = np.array([[len(row)] for row in some], np.float32)
        return sums, np.repeat(-sums, 2, axis=1)

    told = in_batches(rows, answer, 3)
    assert asked == [[9, 8, 7], [5, 4, 3], [2, 1]]
    assert told.logits[:, 0].tolist() == [4, 9, 1, 7, 2, 8, 3, 5]
    assert (told.embedding == -told.logits).all()
    assert told.embedding.shape == (8, 2)
