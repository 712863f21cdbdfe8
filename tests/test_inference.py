"""Logits turned into classes, options, answers and tags; an answer is the passage's own text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import Kind
from openbook.data.batches import Tokenised, tokenise
from openbook.inference import answer_text, best_span, best_window, predictions_of
from openbook.metrics import score
from openbook.types import Batch, Example, Span

START, END = np.array([0.5, 3, 1, 2, 0, -1]), np.array([0.0, 4, 1, 0, 1, 2])


def test_the_best_span_of_f13() -> None:
    """[CLS], a question, [SEP] and three tokens of the passage: 3 to 5 with 4.0; [CLS] has 0.5."""
    assert best_span(START, END, 3, 5) == (3, 5, 4.0)
    assert best_span(START, END, 3, 5, null_allowed=True) == (3, 5, 4.0)
    assert best_span(START - [0, 0, 0, 9, 9, 9], END, 3, 5, null_allowed=True) == (0, 0, 0.5)


def test_a_span_is_no_longer_than_its_cap() -> None:
    assert best_span(START, END, 3, 5, longest=2) == (3, 4, 3.0)
    assert best_span(START, END, 3, 5, longest=1) == (3, 3, 2.0)


def test_of_equal_spans_the_first_and_shortest_wins() -> None:
    assert best_span(np.zeros(6), np.zeros(6), 2, 5) == (2, 2, 0.0)
    assert best_span(np.zeros(6), np.zeros(6), 2, 5, null_allowed=True) == (2, 2, 0.0)


def test_an_empty_passage_has_no_answer() -> None:
    assert best_span(START, END, 1, 0) == (0, 0, -np.inf)
    assert best_span(START, END, 1, 0, null_allowed=True) == (0, 0, 0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(3, 14), st.integers(1, 9), st.booleans(), st.data())
def test_the_best_span_is_the_best_of_all(seed: int, size: int, longest: int, null_allowed: bool, data: Any) -> None:
    random = np.random.default_rng(seed)
    start, end = random.normal(size=(2, size)).round(1)
    first = data.draw(st.integers(1, size - 1))
    last = data.draw(st.integers(first, size - 1))
    spans = [(i, j) for i in range(first, last + 1) for j in range(i, min(last, i + longest - 1) + 1)]
    best = max(spans, key=lambda span: start[span[0]] + end[span[1]])  # the first of equals
    expected = (*best, start[best[0]] + end[best[1]])
    if null_allowed and start[0] + end[0] > expected[2]:
        expected = (0, 0, start[0] + end[0])
    assert best_span(start, end, first, last, longest, null_allowed) == pytest.approx(expected)


def test_the_best_window_wins_against_the_lowest_null_score() -> None:
    """A window without the answer points to [CLS] with certainty; that is no word about the question."""
    scores, nulls = np.array([1.0, 6.0, 2.0]), np.array([9.0, 5.0, 9.0])
    assert best_window(scores, nulls) == 1
    assert best_window(scores, nulls, null_allowed=True) == 1
    assert best_window(scores, nulls + 2, null_allowed=True) is None
    assert best_window(scores, nulls + 2) == 1


def test_an_answer_is_cut_from_the_passage_as_it_stands() -> None:
    starts, ends = np.array([0, 0, 4, 9]), np.array([0, 3, 8, 10])
    assert answer_text("The  FILM?!", starts, ends, 1, 2) == "The  FIL"
    assert answer_text("The  FILM?!", starts, ends, 0, 0) == ""


def answering(texts: Tokenised, peaks: dict[str, tuple[int, int, float]]) -> Any:
    """A model that gives these rows a start and an end, and [CLS] of all others."""

    def logits_of(batch: Batch) -> torch.Tensor:
        logits = torch.zeros(*batch.input_ids.shape, 2)
        for row, name in enumerate(batch.ids):
            start, end, height = peaks.get(name, (0, 0, 9.0))
            logits[row, start, 0] = logits[row, end, 1] = height
        return logits

    return logits_of


PASSAGE = "My meal was good, and the Plot was bad we us"


def test_answers_of_questions_come_from_their_best_window(tmp_path: Path, tokenizer: Any) -> None:
    examples = [
        Example("x/0", "the film", PASSAGE, Span(22, 30), answers=("the Plot",)),
        Example("x/1", "the film", PASSAGE, Span(3, 7), answers=("meal", "my meal")),
        Example("x/2", "the film", PASSAGE),
    ]
    texts = tokenise(examples, tokenizer, 9, tmp_path, "span_extraction", stride=2, training=False)
    model = answering(texts, {"x/0#2": (6, 7, 5.0), "x/0#3": (4, 4, 4.0), "x/1#0": (5, 5, 1.0)})
    told = predictions_of(model, texts, examples, null_allowed=True)
    assert told.outputs.tolist() == ["the Plot", "meal", ""]
    assert told.gold.tolist() == [("the Plot",), ("meal", "my meal"), ()]
    assert score("exact_match", told.outputs, told.gold, "span_extraction") == 1
    always = predictions_of(model, texts, examples).outputs
    assert always[0] == "the Plot"
    assert always[2] != ""  # where every question has an answer, [CLS] is none


def test_options_that_a_question_lacks_have_no_probability(tmp_path: Path, tokenizer: Any) -> None:
    counts, labels = (2, 4, 3, 2), (1, 0, 2, 0)
    texts = ("good", "bad", "a b", "us")
    examples = [
        Example(f"x/{n}", "the film" * n or "my", None, label, texts[:count])
        for n, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]
    tokens = tokenise(examples, tokenizer, 20, tmp_path, "multiple_choice", training=False)

    def logits_of(batch: Batch) -> torch.Tensor:
        right = [labels[int(name[2])] == int(name[4]) for name in batch.ids]
        return torch.tensor(right, dtype=torch.bfloat16)[:, None]

    told = predictions_of(logits_of, tokens, examples)
    assert told.outputs.shape == (4, 4)
    assert told.outputs.sum(axis=1) == pytest.approx(1)
    assert ((told.outputs == 0) == (np.arange(4) >= np.array(counts)[:, None])).all()
    assert told.gold.tolist() == list(labels)
    assert score("accuracy", told.outputs, told.gold, "multiple_choice") == 1


def test_words_have_the_tag_of_their_first_piece_and_o_beyond_the_cut(tmp_path: Path, tokenizer: Any) -> None:
    labels = ("O", "B-x", "I-x")
    examples = [
        Example("x/0", "xyz film", label=(1, 2), words=("xyz", "film")),
        Example("x/1", "my plot was xyz us", label=(0, 1, 0, 1, 2), words=("my", "plot", "was", "xyz", "us")),
    ]
    texts = tokenise(examples, tokenizer, 7, tmp_path, "token_classification", training=False)

    def logits_of(batch: Batch) -> torch.Tensor:
        assert batch.labels is not None
        guess = torch.where(batch.labels >= 0, batch.labels, torch.ones_like(batch.labels))  # noise on other pieces
        return torch.nn.functional.one_hot(guess, 3).float()

    told = predictions_of(logits_of, texts, examples, labels)
    assert told.outputs.tolist() == [("B-x", "I-x"), ("O", "B-x", "O", "B-x", "O")]
    assert told.gold.tolist() == [("B-x", "I-x"), ("O", "B-x", "O", "B-x", "I-x")]
    assert score("accuracy", told.outputs, told.gold, "token_classification") == pytest.approx(6 / 7)


@pytest.mark.parametrize(("kind", "width"), [("classification", 3), ("regression", 1)])
def test_classes_and_scores_keep_their_order(tmp_path: Path, tokenizer: Any, kind: Kind, width: int) -> None:
    """Batches go from long to short, with half a precision at most."""
    targets: list[Any] = [n % 3 if kind == "classification" else n / 2 for n in range(7)]
    examples = [Example(f"x/{n}", "a " * (n * 5 % 7), label=target) for n, target in enumerate(targets)]
    texts = tokenise(examples, tokenizer, 20, tmp_path, kind, training=False)

    def logits_of(batch: Batch) -> torch.Tensor:
        said = torch.tensor([targets[int(name[2:])] for name in batch.ids])
        return torch.nn.functional.one_hot(said, 3).float() if width == 3 else said[:, None]

    told = predictions_of(logits_of, texts, examples)
    assert told.outputs.shape == (7, width)
    assert told.gold.tolist() == targets
    assert score("accuracy" if width == 3 else "pearson", told.outputs, told.gold, kind) == pytest.approx(1)


def test_texts_of_other_examples_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    examples = [Example(f"x/{n}", "a", label=0) for n in range(3)]
    texts = tokenise(examples, tokenizer, 20, tmp_path)
    with pytest.raises(ValueError, match="3 tokenised examples are not these 2"):
        predictions_of(lambda batch: torch.zeros(3, 2), texts, examples[:2])
