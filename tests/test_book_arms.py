"""What is told of a book is of the arm as it answers: with its own beta, its own gate, its own count of the corpus."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from openbook import book_arms
from openbook.answers import Answers, probabilities_of
from openbook.book_arms import Heard, consult
from openbook.grid import BookReading
from openbook.knowledge_base.search import normalise
from openbook.types import Example, KnowledgeBase

ROWS = {"train": 80, "holdout": 60, "test": 200}
Ask = Callable[[BookReading], dict[str, Any]]
CLASSES = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]])


def world(seed: int, noise: float, doubt: float, corpus: int = 0) -> tuple[Any, Heard, KnowledgeBase]:
    """Texts of two classes around an axis each; the student is in `doubt`; entries of the `corpus` are wrong."""
    random = np.random.default_rng(seed)

    def said(count: int) -> Answers:
        gold = random.integers(2, size=count)
        embedding = CLASSES[gold] + noise * random.normal(size=(count, 4))
        logits = 2 * np.eye(2)[gold] + doubt * random.normal(size=(count, 2))
        return Answers(logits.astype(np.float32), embedding.astype(np.float32), gold)

    heard = Heard(**{split: said(count) for split, count in ROWS.items()})
    rows = {split: [Example(f"{split}/{row}", f"{split} {row}") for row in range(ROWS[split])] for split in ROWS}
    task = SimpleNamespace(**rows, metric="accuracy", metrics=("accuracy",))
    wrong = random.integers(2, size=corpus)
    keys = np.concatenate([heard.train.embedding, CLASSES[wrong] + noise * random.normal(size=(corpus, 4))])
    base = KnowledgeBase(
        keys=normalise(keys).astype(np.float32),
        values=np.eye(2, dtype=np.float32)[np.concatenate([heard.train.labels, 1 - wrong])],
        ids=tuple(f"entry/{row}" for row in range(len(keys))),
        texts=("",) * len(keys),
        manifest={},
        origins=("train",) * ROWS["train"] + ("corpus",) * corpus,
    )
    return SimpleNamespace(task=task, kind="classification"), heard, base


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ask]:
    def of(*args: Any, **more: Any) -> Ask:
        run, heard, base = world(*args, **more)
        monkeypatch.setattr(book_arms, "filled", lambda run: (base, {}))
        theirs = probabilities_of(heard.test.logits)
        return lambda how: consult(run, heard, how, 0, theirs)[0]

    return of


def changed(found: dict[str, Any]) -> float:
    """Accuracy that opening the book gains on the reported rows."""
    effect = found["book"]["if_opened"]
    return float((effect["better"] - effect["worse"]) / effect["rows"])


def accuracy(answers: Answers) -> float:
    return float((answers.logits.argmax(axis=1) == answers.labels).mean())


@pytest.mark.parametrize("beta", [0.0, 0.35])
def test_a_given_share_of_the_student_is_what_is_told_of(ask: Callable[..., Ask], beta: float) -> None:
    asked, heard = ask(0, noise=0.6, doubt=1.0), world(0, noise=0.6, doubt=1.0)[1]
    found, tuned = asked(BookReading(beta=beta)), asked(BookReading())
    assert (found["book"]["retrieval"]["beta"], found["book"]["kept"]) == (beta, True)
    assert tuned["book"]["retrieval"]["beta"] != beta
    assert changed(found) == pytest.approx(found["scores"]["accuracy"] - accuracy(heard.test))
    assert found["book"]["gain_held_out"] == pytest.approx(found["holdout"] - accuracy(heard.holdout))
    assert found["book"]["gain_held_out"] != tuned["book"]["gain_held_out"]


@pytest.mark.parametrize(("seed", "kept"), [(24, True), (0, False)])
def test_a_gate_is_what_is_told_of(ask: Callable[..., Ask], seed: int, kept: bool) -> None:
    asked, heard = ask(seed, noise=0.6, doubt=1.0), world(seed, noise=0.6, doubt=1.0)[1]
    found, constant = asked(BookReading(modes=("constant", "gate"))), asked(BookReading())
    assert (found["book"]["kept"], found["book"]["retrieval"].get("mode", "constant")) == (
        (True, "gate") if kept else (False, "constant")
    )
    assert changed(found) != changed(constant)
    expected = changed(found) if kept else 0.0
    assert found["scores"]["accuracy"] == pytest.approx(accuracy(heard.test) + expected)


def test_a_closed_book_is_judged_with_its_corpus_counted_as_where_it_would_open(ask: Callable[..., Ask]) -> None:
    """Entries of the corpus are wrong here: where it would open, they count nothing."""
    found = ask(0, noise=0.2, doubt=0.7, corpus=200)(BookReading())["book"]
    assert (found["kept"], found["omega"], found["entries"]) == (False, 1.0, 280)
    assert (found["if_opened"]["better"], found["if_opened"]["worse"]) == (5, 0)


def test_a_tenth_of_rows_is_as_near_as_its_rows_are_also_where_some_are_skipped(ask: Callable[..., Ask]) -> None:
    asked = ask(0, noise=0.6, doubt=1.0)
    found, plain = (asked(BookReading(beta=0.6, skips=skips))["book"] for skips in (("safe",), ("none",)))
    assert found["searched"] < plain["searched"] == 1
    near, also = ([bucket["similarity"] for bucket in one["if_opened"]["buckets"]] for one in (found, plain))
    assert near == pytest.approx(also)


def test_an_arm_that_never_opens_its_book_is_none() -> None:
    with pytest.raises(ValidationError, match="less than 1"):
        BookReading(beta=1)
