"""The object users hold: strings, lists and pairs in, answers with their arithmetic out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openbook.backends import pytorch
from openbook.backends.pytorch import TorchBackend
from openbook.config import StudentSettings, UsageError
from openbook.knowledge_base.index import Index
from openbook.knowledge_base.search import normalise
from openbook.models.encoder import Encoder, Head
from openbook.models.student import new_student
from openbook.predictor import OpenBook
from openbook.types import KnowledgeBase

LABELS = ("bad", "fair", "good")
TEXTS = ["the film was great", "dull", "my song seemed nice and the plot was poor", "a book of the week"]
PAIRS = [("the film was great", "it was good"), ("dull", "a meal"), ("song", "the song was weak and horrid")]


@pytest.fixture
def student(tokenizer: Any) -> Encoder:
    settings = StudentSettings(architecture="bert", layers=2, hidden_size=16, heads=2)
    student = new_student(settings, Head(LABELS), tokenizer, len(tokenizer), positions=24, seed=4)
    for place, weight in enumerate(student.parameters()):
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(place))
    student.model.config.key_space = "space"
    return student


def base_of(width: int = 16, **manifest: Any) -> KnowledgeBase:
    random = np.random.default_rng(0)
    keys = normalise(random.normal(size=(30, width))).astype(np.float32)
    values = random.dirichlet(np.ones(3), 30).astype(np.float32)
    names = tuple(f"t/train/{row}" for row in range(30))
    known: dict[str, Any] = {
        "kind": "classification",
        "labels": LABELS,
        "key_space": "space",
        "retrieval": {"top_k": 5, "temperature": 0.2, "beta": 0.4},
    }
    return KnowledgeBase(keys, values, names, tuple(f"text of {name}" for name in names), {**known, **manifest})


@pytest.fixture
def book(student: Encoder, tokenizer: Any) -> OpenBook:
    return OpenBook(TorchBackend(student, tokenizer), base_of())


def test_one_text_gives_one_answer_and_a_list_a_list(book: OpenBook) -> None:
    answers = book.predict(TEXTS)
    assert answers == [book.predict(text) for text in TEXTS]
    assert set(answers) <= set(LABELS)
    assert book.predict_proba(TEXTS).shape == (4, 3)
    assert book.predict_proba(TEXTS[0]).shape == (3,)
    assert answers == [LABELS[row.argmax()] for row in book.predict_proba(TEXTS)]
    assert book.predict(TEXTS[:1]) == answers[:1]
    np.testing.assert_allclose(book.predict_proba(TEXTS).sum(1), 1, rtol=1e-6)


def test_pairs_come_as_tuples_or_lists_of_two(book: OpenBook) -> None:
    answers = book.predict_proba(PAIRS)
    assert answers.shape == (3, 3)
    np.testing.assert_array_equal(book.predict_proba([list(pair) for pair in PAIRS]), answers)
    assert book.predict_proba(PAIRS[0]).shape == (3,)
    np.testing.assert_allclose(book.predict_proba(PAIRS[0]), answers[0], atol=1e-5)
    assert isinstance(book.predict(PAIRS[0]), str)
    assert book.predict_proba(list(PAIRS[0])).shape == (2, 3)  # a list of two strings is two texts
    same_first = book.predict_proba([(PAIRS[0][0], second) for _, second in PAIRS])
    assert np.abs(same_first[1:] - same_first[0]).max(axis=1).min() > 1e-4  # the second text is read
    swapped = book.predict_proba([pair[::-1] for pair in PAIRS])
    assert np.abs(swapped - answers).max() > 1e-3


def test_any_iterable_of_texts_will_do(book: OpenBook) -> None:
    assert book.predict(text for text in TEXTS) == book.predict(np.array(TEXTS)) == book.predict(tuple(TEXTS))


@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_a_batch_equals_its_rows_one_by_one(book: OpenBook, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "BATCH_SIZE", 2)
    together = book.predict_proba(rows)
    np.testing.assert_allclose(together, [book.predict_proba(row) for row in rows], rtol=0, atol=1e-5)
    np.testing.assert_allclose(book.predict_proba(rows[::-1])[::-1], together, rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "nothing to predict: the list of texts is empty"),
        ((), "nothing to predict"),
        (None, "None is no text; give a string"),
        (3, "3 is no text"),
        ([None], "text 0 is None; give a string, or a pair"),
        (["a", 3.5], "text 1 is 3.5"),
        ([("a", None)], r"text 0 is \('a', None\)"),
        ([("a", "b", "c")], r"text 0 is \('a', 'b', 'c'\)"),
        (b"a", "text 0 is 97"),
        (["a", ("b", "c")], "text 1 is a pair, text 0 is not; do not mix them"),
        ([("b", "c"), "a"], "text 1 is a string, text 0 is not"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused(book: OpenBook, given: Any, told: str) -> None:
    for ask in (book.predict, book.predict_proba, book.explain):
        with pytest.raises(UsageError, match=told):
            ask(given)


@pytest.mark.parametrize("text", ["", "   ", "🙂 ß 西", "a" * 3000, "the film " * 500])
def test_odd_texts_are_answered(student: Encoder, tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 24)
    book = OpenBook(TorchBackend(student, tokenizer), base_of())
    assert book.predict(text) in LABELS
    assert book.predict([text, (text)]) == [book.predict(text)] * 2
    assert book.predict((text, text)) in LABELS


def refuse(*arguments: Any) -> Any:
    raise AssertionError("the book was opened")


def test_a_student_without_a_book(student: Encoder, tokenizer: Any) -> None:
    alone = OpenBook(TorchBackend(student, tokenizer))
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = student.model(**inputs).logits.softmax(-1)
    np.testing.assert_allclose(alone.predict_proba(TEXTS), expected, atol=1e-5)
    with pytest.raises(UsageError, match="no knowledge base; build one"):
        alone.explain(TEXTS)


def test_beta_of_one_leaves_the_book_shut_and_the_answer_as_it_was(
    student: Encoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = OpenBook(TorchBackend(student, tokenizer), base_of(retrieval={"top_k": 5, "temperature": 0.2, "beta": 1.0}))
    told = shut.explain(TEXTS)  # asked for, it is searched
    assert len(told[0].evidence.neighbours) == 5
    monkeypatch.setattr(Index, "search", refuse)
    np.testing.assert_array_equal(
        shut.predict_proba(TEXTS), OpenBook(TorchBackend(student, tokenizer)).predict_proba(TEXTS)
    )
    assert [one.prediction for one in told] == [one.alone for one in told] == shut.predict(TEXTS)


def test_the_book_is_mixed_in_by_the_formula(book: OpenBook, student: Encoder, tokenizer: Any) -> None:
    """y' = beta p + (1 - beta) sum_j softmax(s / T)_j V_j over the five nearest keys, by hand."""
    alone = OpenBook(TorchBackend(student, tokenizer))
    base = base_of()
    vectors = alone.read(TEXTS).embedding.astype(np.float64)
    cosines = vectors @ base.keys.T.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)  # (4, 30)
    for row, result in enumerate(book.predict_proba(TEXTS)):
        nearest = np.argsort(-cosines[row])[:5]
        weights = np.exp(cosines[row, nearest] / 0.2)
        average = (weights / weights.sum()) @ base.values[nearest]
        np.testing.assert_allclose(result, 0.4 * alone.predict_proba(TEXTS)[row] + 0.6 * average, atol=1e-5)


def test_an_explanation_adds_up(book: OpenBook, student: Encoder, tokenizer: Any) -> None:
    told, chances = book.explain(TEXTS), book.predict_proba(TEXTS)
    for text, one, chance in zip(TEXTS, told, chances, strict=True):
        parts = [neighbour.contribution for neighbour in one.evidence.neighbours]
        assert len(parts) == 5
        assert one.evidence.student_contribution + sum(parts) == pytest.approx(chance.max(), abs=1e-6)
        assert sum(neighbour.weight for neighbour in one.evidence.neighbours) == pytest.approx(1)
        assert one.text == text
        assert one.prediction == book.predict(text)
        assert one.alone == OpenBook(TorchBackend(student, tokenizer)).predict(text)
        assert one.evidence.neighbours[0].text.startswith("text of t/train/")
    assert book.explain(TEXTS[0]).prediction == told[0].prediction


@pytest.mark.parametrize("with_book", [True, False])
def test_what_is_saved_comes_back(tmp_path: Path, student: Encoder, tokenizer: Any, with_book: bool) -> None:
    book = OpenBook(TorchBackend(student, tokenizer), base_of() if with_book else None)
    book.save_pretrained(tmp_path / "model")
    again = OpenBook.from_pretrained(tmp_path / "model")
    assert (again.labels, again.kind, again.base is not None) == (LABELS, "classification", with_book)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), book.predict_proba(TEXTS))
    np.testing.assert_array_equal(again.predict_proba(PAIRS), book.predict_proba(PAIRS))
    if with_book:
        assert again.explain(TEXTS[0]).evidence.neighbours[0].text == book.explain(TEXTS[0]).evidence.neighbours[0].text


def test_a_folder_without_a_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere holds no finished student/ folder; name a run folder"):
        OpenBook.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"labels": LABELS[::-1]}, r"labels of the knowledge base is \['good', 'fair', 'bad'\]"),
        ({"labels": ("bad", "fair", "fine")}, "labels of the knowledge base"),
        ({"key_space": "elsewhere"}, "key_space of the knowledge base is 'elsewhere', but the student's is 'space'"),
    ],
)
def test_a_book_of_another_student_is_refused(
    tmp_path: Path, student: Encoder, tokenizer: Any, manifest: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        OpenBook(TorchBackend(student, tokenizer), base_of(**manifest))
    OpenBook(TorchBackend(student, tokenizer), base_of()).save_pretrained(tmp_path)
    path = tmp_path / "knowledge_base" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest}))
    with pytest.raises(UsageError, match=told):
        OpenBook.from_pretrained(tmp_path)


def test_a_book_of_another_width_is_refused(student: Encoder, tokenizer: Any) -> None:
    book = OpenBook(TorchBackend(student, tokenizer), base_of(width=8))
    with pytest.raises(UsageError, match="8 dimensions; use the student it was built for"):
        book.predict(TEXTS)


def test_a_student_that_openbook_did_not_teach_may_have_any_book(student: Encoder, tokenizer: Any) -> None:
    del student.model.config.key_space
    assert OpenBook(TorchBackend(student, tokenizer), base_of()).predict(TEXTS[0]) in LABELS


@pytest.fixture
def scorer(tokenizer: Any) -> Callable[[KnowledgeBase | None], OpenBook]:
    settings = StudentSettings(architecture="bert", layers=1, hidden_size=16, heads=2)
    student = new_student(settings, Head(None), tokenizer, len(tokenizer), positions=24, seed=4)
    return lambda base: OpenBook(TorchBackend(student, tokenizer), base)


def test_a_regression_gives_scores(scorer: Callable[[KnowledgeBase | None], OpenBook]) -> None:
    alone = scorer(None)
    base = replace(base_of(kind="regression", labels=None), values=np.full((30, 1), 3.0, np.float32))
    book = scorer(base)
    assert (book.kind, book.labels) == ("regression", None)
    score = book.predict(TEXTS[0])
    assert isinstance(score, float)
    assert score == pytest.approx(0.4 * alone.predict(TEXTS[0]) + 0.6 * 3.0, abs=1e-5)
    assert book.predict_proba(TEXTS).shape == (4, 1)
    told = book.explain(TEXTS[0])
    assert told.prediction == pytest.approx(score, abs=1e-6)
    assert told.alone == pytest.approx(alone.predict(TEXTS[0]), abs=1e-6)
