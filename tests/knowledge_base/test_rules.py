"""What a book remembers of how it was tuned: the metric, the mode, the skip, and the texts that are reported."""

import json
from typing import Any

import numpy as np
import pytest

from openbook.config import UsageError
from openbook.knowledge_base.rules import DIGEST_BYTES, Rules
from openbook.types import KnowledgeBase


def test_rules_come_back_from_a_manifest() -> None:
    rules = Rules.of("f1", "gate", "safe", [f"text {number}" for number in range(500)])
    written = json.loads(json.dumps(rules.to_manifest()))
    assert Rules.from_manifest({"tuning": written}) == rules
    assert len(rules.reported) == 500
    assert len(written["reported"]) < 500 * DIGEST_BYTES * 1.4
    assert Rules.from_manifest({"tuning": Rules.of("f1", "constant", "none", ()).to_manifest()}).reported == frozenset()


def test_a_book_that_was_not_told_its_rules_keeps_to_how_it_is_opened() -> None:
    retrieval = {"top_k": 4, "temperature": 0.1, "beta": 0.5, "mode": "bucket", "skip": "safe"}
    assert Rules.from_manifest({"retrieval": retrieval}) == Rules(None, "bucket", "safe")
    assert Rules.from_manifest({"retrieval": {"top_k": 4, "temperature": 0.1, "beta": 1.0}}) == Rules()
    assert Rules.from_manifest({}) == Rules()


@pytest.mark.parametrize("written", [{"mode": "guess"}, {"reported": "§"}, {"reported": "abc"}, {"more": 1}, [], 5])
def test_rules_that_cannot_be_read_are_refused(written: Any) -> None:
    with pytest.raises(UsageError, match="tuning in the manifest of the knowledge base cannot be used"):
        Rules.from_manifest({"tuning": written})


def test_texts_of_the_reported_split_are_recognised_whatever_their_case_and_spacing() -> None:
    rules = Rules.of("accuracy", "constant", "none", ["A  film", "one\tother"])
    base = KnowledgeBase(
        np.eye(3, dtype=np.float32), np.eye(2, dtype=np.float32)[[0, 1, 0]], ("a", "b", "c"), ("x", "y", "z"), {}
    )

    def tuned(*texts: str, **allowed: bool) -> Any:
        outputs, queries = np.full((len(texts), 2), 0.5), np.ones((len(texts), 3))
        gold = np.arange(len(texts)) % 2
        accuracy = lambda said, gold: float((said.argmax(1) == gold).mean())  # noqa: E731
        return rules.tuned(texts, gold, outputs, queries, base, accuracy, "classification", **allowed)

    assert not tuned("a song", "another", "one other").on_reported_split
    for text in ("a film", "ONE\tother"):
        with pytest.raises(UsageError, match="1 of 3 examples to tune on are in the reported split .one is 'text 1'."):
            tuned("a song", text, "another")
        assert tuned("a song", text, "another", reported_split=True).on_reported_split
