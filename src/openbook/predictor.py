"""The small object users hold: a student and its knowledge base, asked with strings, lists and pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.inference import Answers, outputs_of
from openbook.knowledge_base import store
from openbook.knowledge_base.interpolate import Evidence, evidence, interpolate, neighbour_average
from openbook.knowledge_base.search import search
from openbook.models.encoder import Encoder, load_finished
from openbook.models.student import load_tokenizer
from openbook.types import Batch, KnowledgeBase

BATCH_SIZE = 32

Text = str | tuple[str, str]
Texts = Text | Sequence[Text]


@dataclass(frozen=True)
class Explanation:
    """An answer with the arithmetic behind it: the contributions in `evidence` sum to the answer's probability."""

    text: Text
    prediction: str | float
    alone: str | float  # what the student says without its book
    evidence: Evidence


class OpenBook:
    """A distilled student and, if it has one, the knowledge base it looks its neighbours up in.

    `predict`, `predict_proba` and `explain` take one text, a list of texts, one pair `(a, b)`, or a list of pairs.
    """

    def __init__(self, student: Encoder, tokenizer: Any, base: KnowledgeBase | None = None):
        self.student, self.tokenizer, self.base = student.eval(), tokenizer, base
        config = student.model.config
        self.kind = "regression" if config.problem_type == "regression" else "classification"
        self.labels = None if self.kind == "regression" else tuple(config.id2label[i] for i in range(config.num_labels))
        if base is not None:
            known = getattr(config, "key_space", base.manifest["key_space"])  # absent: a student openbook did not teach
            store.check_fits(base, known, self.labels)
        self.retrieval: Mapping[str, Any] = {"beta": 1.0} if base is None else base.manifest["retrieval"]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a run folder (`runs/quickstart`), or any folder with `student/` and, if wanted, `knowledge_base/`.

        Raises UsageError when there is no finished student, or the book does not belong to it.
        """
        folder = Path(folder)
        if not (folder / "student" / "config.json").is_file():
            raise UsageError(f"{folder} holds no finished student/ folder; name a run folder such as runs/quickstart")
        book = folder / "knowledge_base"
        base = store.load(book) if (book / "manifest.json").is_file() else None
        return cls(load_finished(str(folder / "student")), load_tokenizer(str(folder / "student")), base)

    def save_pretrained(self, folder: str | Path) -> None:
        self.student.save(Path(folder) / "student", self.tokenizer)
        if self.base is not None:
            store.save(self.base, Path(folder) / "knowledge_base")

    def predict(self, texts: Texts) -> Any:
        """The label name (regression: the score) of one text, or a list of them for a list."""
        rows, single = as_rows(texts)
        answers = [self.name(row) for row in self.answer(rows)]
        return answers[0] if single else answers

    def predict_proba(self, texts: Texts) -> NDArray[np.float64]:
        """Probabilities in the order of `labels`: (C,) for one text, (n, C) for a list. Regression: scores, C = 1."""
        rows, single = as_rows(texts)
        answers = self.answer(rows)
        return np.asarray(answers[0] if single else answers)

    def explain(self, texts: Texts) -> Any:
        """The answer with the neighbours that decided it: one Explanation, or a list of them for a list."""
        rows, single = as_rows(texts)
        if self.base is None:
            raise UsageError("this student has no knowledge base to explain its answers with; build one and load both")
        heard = self.read(rows)
        hits = search(heard.embedding, self.base.keys, self.retrieval["top_k"])
        outputs = outputs_of(heard, self.kind)
        found = evidence(self.base, hits, outputs, self.retrieval["temperature"], self.retrieval["beta"])
        told = [
            Explanation(row, self.name(one.result), self.name(one.student), one)
            for row, one in zip(rows, found, strict=True)
        ]
        return told[0] if single else told

    def answer(self, rows: Sequence[Text]) -> NDArray[Any]:
        heard = self.read(rows)
        outputs = outputs_of(heard, self.kind)
        if self.base is None or self.retrieval["beta"] == 1:  # a book that is not trusted is not opened
            return outputs
        hits = search(heard.embedding, self.base.keys, self.retrieval["top_k"])
        average = neighbour_average(hits, self.base.values, self.retrieval["temperature"])
        return interpolate(outputs, average, self.retrieval["beta"])

    def read(self, rows: Sequence[Text]) -> Answers:
        """The student's own logits and pooled vectors, in batches of similar length."""
        order = sorted(range(len(rows)), key=lambda place: -sum(map(len, fields(rows[place]))))
        logits: list[Any] = [None] * len(rows)
        embedding: list[Any] = [None] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                places = order[start : start + BATCH_SIZE]
                said = self.student(self.batch([rows[place] for place in places]))
                for place, one, vector in zip(places, said.logits.numpy(), said.embedding.numpy(), strict=True):
                    logits[place], embedding[place] = one, vector
        return Answers(np.stack(logits), np.stack(embedding), np.empty(0))

    def batch(self, rows: Sequence[Text]) -> Batch:
        first = [fields(row)[0] for row in rows]
        second = [fields(row)[1] for row in rows] if isinstance(rows[0], tuple) else None
        encoded = self.tokenizer(
            first, second, truncation="longest_first", padding=True, return_tensors="pt", return_token_type_ids=True
        )
        return Batch(
            ids=tuple(map(str, range(len(rows)))),
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            token_type_ids=encoded["token_type_ids"],
        )

    def name(self, answer: NDArray[Any]) -> str | float:
        return float(answer[0]) if self.labels is None else self.labels[int(answer.argmax())]


def fields(row: Text) -> tuple[str, ...]:
    return (row,) if isinstance(row, str) else row


def as_rows(texts: Texts) -> tuple[list[Text], bool]:
    """A list of texts or pairs, and whether a single one was given.

    Raises UsageError for an empty list, anything that is no text, and a mixture of texts and pairs.
    """
    single = isinstance(texts, str) or (isinstance(texts, tuple) and len(texts) == 2 and all(map(is_text, texts)))
    if not isinstance(texts, Iterable):
        raise UsageError(f"{texts!r} is no text; give a string, a pair of strings (a, b), or a list of either")
    rows: list[Any] = [texts] if single else list(texts)
    if not rows:
        raise UsageError("there is nothing to predict: the list of texts is empty")
    for place, row in enumerate(rows):
        is_pair = isinstance(row, list | tuple) and len(row) == 2 and all(map(is_text, row))
        if not is_text(row) and not is_pair:
            raise UsageError(f"text {place} is {row!r}; give a string, or a pair of strings (a, b)")
        if is_text(row) != is_text(rows[0]):
            raise UsageError(
                f"text {place} is {'a string' if is_text(row) else 'a pair'}, text 0 is not; do not mix them"
            )
    return [row if is_text(row) else tuple(row) for row in rows], single


def is_text(value: object) -> bool:
    return isinstance(value, str)
