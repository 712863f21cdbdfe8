"""The small object users hold: a student and its knowledge base, asked with strings, lists and pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Answers, Encoded, Text, Texts, as_rows, fields, outputs_of
from openbook.backends.base import BACKENDS, Backend, BackendName
from openbook.backends.onnx import EXPORT, RECORD, OnnxBackend
from openbook.checkpoint import read_json
from openbook.config import THRESHOLD, UsageError
from openbook.keys import keys_of, queries_in, save_queries, values_of
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.answering import answer
from openbook.knowledge_base.editing import Edit
from openbook.knowledge_base.interpolate import Evidence, evidence
from openbook.knowledge_base.search import normalise, search_of
from openbook.knowledge_base.shelf import Book, Shelf
from openbook.student_keys import is_by_student, queries, rekeyed, space
from openbook.types import KnowledgeBase

if TYPE_CHECKING:
    from openbook.knowledge_base.tuning import Tuned

OUTPUTS = "teacher_outputs"  # beside the knowledge base: where the map to its keys lies
REMEMBERED = "remembered"  # the origin of entries that were added to a finished book


Named = str | float | list[str]  # a label; in regression the score; of several labels those that are told


@dataclass(frozen=True)
class Explanation:
    """An answer with the arithmetic behind it: the contributions in `evidence` sum to the answer's probability."""

    text: Text
    prediction: Named
    alone: Named  # what the student says without its book
    evidence: Evidence


class OpenBook:
    """A distilled student and, if it has one, the knowledge base it looks its neighbours up in.

    `predict`, `predict_proba` and `explain` take one text, a list of texts, one pair `(a, b)`, or a list of pairs.
    """

    def __init__(self, backend: Backend, base: KnowledgeBase | Path | None = None):
        self.backend = backend
        self.shelf = None if base is None else Shelf(base)
        self._checked: Book | None = None
        self._teacher: OpenBook | None = None
        self.kind, self.labels = backend.about.kind, backend.about.labels
        self.key_space = backend.about.key_space
        self.projection = queries_in(backend.folder)
        _ = self.book

    @property
    def book(self) -> Book | None:
        """The knowledge base as it is now. Raises UsageError for one that was made for another student."""
        book = None if self.shelf is None else self.shelf.book()
        if book is not None and book is not self._checked:
            manifest = book.base.manifest
            by_student = is_by_student(book.base)
            if by_student and space(self.backend, manifest["key_space"]) != manifest["key_space"]:
                raise UsageError(
                    "the entries of the knowledge base were found by its student, and the student's weights are others"
                    " now; let these find them (`openbook book --keys student`), or put the old weights back"
                )
            known = None if by_student else self.key_space
            store.check_fits(book.base, known or manifest["key_space"], self.labels)
            self._checked = book
        return book

    @property
    def base(self) -> KnowledgeBase | None:
        return None if self.book is None else self.book.base

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: BackendName | None = None, threads: int | None = None
    ) -> Self:
        """Load a run folder (`runs/quickstart`), or any folder with `student/` and, if wanted, `knowledge_base/`.

        `backend` is torch, or what `openbook export` wrote: onnx (fp32) or onnx-int8, which need no torch. By default
        it is torch, and where that is not installed, what the export recommends. `threads` are those of the engine.
        Raises UsageError for an unknown backend, when there is no finished student, no such export of it, or when the
        book does not belong to it.
        """
        folder = Path(folder)
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"backend={backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        if not (folder / "student" / "config.json").is_file():
            raise UsageError(f"{folder} holds no finished student/ folder; name a run folder such as runs/quickstart")
        book = folder / "knowledge_base"
        base = book if (book / "manifest.json").is_file() else None
        return cls(load(folder / "student", backend or usual_backend(folder / "student"), threads), base)

    def save_pretrained(self, folder: str | Path) -> None:
        self.backend.save(Path(folder) / "student")
        save_queries(Path(folder) / "student", self.projection)
        if self.base is not None:
            store.save(self.base, Path(folder) / "knowledge_base")

    def predict(self, texts: Texts) -> Any:
        """The label name of one text, or a list of them for a list; in regression the score.

        Of several labels it is the list of those above 0.5, the most probable first, which may be empty.
        """
        rows, single = as_rows(texts)
        answers = [self.name(row) for row in self.answer(self.encode(rows))]
        return answers[0] if single else answers

    def predict_proba(self, texts: Texts) -> NDArray[np.float64]:
        """Probabilities in the order of `labels`: (C,) for one text, (n, C) for a list. Regression: scores, C = 1.

        Of several labels each has its own, and they need not sum to 1.
        """
        rows, single = as_rows(texts)
        answers = self.answer(self.encode(rows))
        return np.asarray(answers[0] if single else answers)

    def explain(self, texts: Texts) -> Any:
        """The answer with the neighbours that decided it: one Explanation, or a list of them for a list."""
        rows, single = as_rows(texts)
        explained = [
            Explanation(row, self.name(one.result), self.name(one.student), one)
            for row, one in zip(rows, self.evidence(self.encode(rows)), strict=True)
        ]
        return explained[0] if single else explained

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        """Rows as the student reads them; `cut` tells which were too long."""
        return self.backend.encode(rows)

    def answer(self, encoded: Sequence[Encoded]) -> NDArray[Any]:
        """Probabilities (n, C), or scores (n, 1), of rows that are encoded already."""
        heard = self.backend.run(encoded)
        outputs, book = outputs_of(heard, self.kind), self.book
        if book is None:
            return outputs
        asked = queries(book.base, heard.embedding, self.projection)
        return answer(outputs, asked, book.base, book.retrieval, book.index.search).outputs

    def evidence(self, encoded: Sequence[Encoded]) -> list[Evidence]:
        """Answers to encoded rows with the neighbours they are made of. Raises UsageError without a book."""
        book = self._opened()
        heard, how = self.backend.run(encoded), book.retrieval
        outputs, asked = outputs_of(heard, self.kind), queries(book.base, heard.embedding, self.projection)
        if how.opens_book:
            told = answer(outputs, asked, book.base, how, book.index.search)
            hits, betas = told.hits, told.betas
        else:  # asked for, it is searched
            hits, betas = book.index.search(asked, how.top_k), np.ones(len(encoded))
        return evidence(book.base, hits, outputs, how.temperature, betas)

    def remember(self, texts: Texts, labels: Any = None, ids: Sequence[str] | None = None, weight: float = 1.0) -> Edit:
        """Add texts to the book: from the next prediction on they are looked up. Nothing is trained.

        `labels` are a person's: names, lists of names where several may apply, or scores in regression, one for each
        text (for one text, one label). Without
        them, what the teacher says is kept. Entries are found as those of the book are: by the student's own embedding,
        or by the teacher's. Each counts as much as `weight` others that are equally near: a correction among many that
        say otherwise needs more than 1. Raises UsageError, and changes nothing, for unknown labels, ids or texts that
        are there already, where the teacher is needed and its folder is not beside the student's, and for a book that
        is not in a folder.
        """
        if not 0 < weight < np.inf:
            raise UsageError(f"weight={weight}: an entry counts as much as so many others; give a number above 0")
        rows, single = as_rows(texts)
        folder = self._folder()
        values = None if labels is None else self.values([labels] if single else labels, len(rows))
        book = self._opened()
        own = is_by_student(book.base)
        heard = None if own and values is not None else self._teacher_says(rows, "find" if not own else "label")
        if own:
            keys = normalise(self.read(rows).embedding).astype(np.float32)
        else:
            assert heard is not None
            keys = keys_of(folder.parent / OUTPUTS, heard.embedding)
        if values is None:
            assert heard is not None
            values = values_of(self.kind, heard.logits)
        told = tuple("\t".join(fields(row)) for row in rows)
        names = tuple(ids) if ids is not None else tuple(f"{REMEMBERED}/{digest_text(text)[:16]}" for text in told)
        about = {name: book.base.manifest[name] for name in ("kind", "labels", "key_space")}
        weights = None if weight == 1 else np.full(len(rows), weight, np.float32)
        origins = (REMEMBERED,) * len(rows)
        return editing.add(folder, KnowledgeBase(keys, values, names, told, about, weights, origins))

    def rekey(self) -> Edit:
        """Let all entries be found by the student's own embeddings, so that what is remembered from now on is found.

        How the book is opened should be tuned again afterwards. Raises UsageError for a book that keeps no texts, or is
        not in a folder.
        """
        folder = self._folder()
        return editing.rekey(folder, rekeyed(self._opened().base, self.backend))

    def forget(self, ids: Sequence[str]) -> Edit:
        """Remove entries: from the next prediction on they are not looked up. Raises UsageError for an unknown id."""
        return editing.remove(self._folder(), [ids] if isinstance(ids, str) else ids)

    def relabel(self, ids: Sequence[str], labels: Sequence[Any]) -> Edit:
        """Correct what entries say. Raises UsageError for an unknown id or label, and changes nothing then."""
        return editing.relabel(self._folder(), ids, self.values(labels, len(ids)))

    def tune(self, texts: Sequence[Text], labels: Sequence[Any], metric: str | None = None) -> Tuned:
        """Choose anew how the book is opened, on labelled texts that it does not hold, and keep that with the book.

        `metric` is accuracy, or pearson in regression, or micro_f1 of several labels, if absent. Raises UsageError for
        texts that the book holds, and for an unknown metric.
        """
        from openbook.knowledge_base.tuning import HeldOut, collect, tune
        from openbook.metrics import METRICS

        name = metric or {"regression": "pearson", "multi_label": "micro_f1"}.get(self.kind, "accuracy")
        if name not in METRICS:
            raise UsageError(f"metric={name!r} is unknown; choose from {', '.join(METRICS)}")
        rows, _ = as_rows(texts)
        folder, heard = self._folder(), self.read(rows)
        values = self.values(labels, len(rows))
        gold = {"regression": values[:, 0], "multi_label": values}.get(self.kind, values.argmax(axis=1))
        joined = tuple("\t".join(fields(row)) for row in rows)
        held_out = HeldOut(tuple(f"row {place}" for place in range(len(rows))), joined, gold)
        base = self._opened().base
        asked = queries(base, heard.embedding, self.projection)
        caches = collect(held_out, outputs_of(heard, self.kind), asked, base, search_of)
        as_it_is = {1.0: caches[1.0]}  # how often its entries count was settled when it was built
        tuned = tune(as_it_is, METRICS[name].function, self.kind, reported=())
        editing.settle(folder, tuned.retrieval.to_manifest())
        return tuned

    def values(self, labels: Sequence[Any], count: int) -> NDArray[np.float32]:
        """A person's labels as an entry's values: 1 for those that apply (n, C), or scores (n, 1)."""
        if isinstance(labels, str) or len(labels) != count:
            raise UsageError(f"there are {count} texts or ids; give as many labels, not {labels!r}")
        if self.labels is None:
            return np.array(labels, np.float32)[:, None]
        values = np.zeros((count, len(self.labels)), np.float32)
        for place, label in enumerate(labels):
            several = self.kind == "multi_label" and isinstance(label, list | tuple)
            for name in label if several else [label]:
                if name not in self.labels:
                    raise UsageError(f"label {place} is {name!r}; the student knows {', '.join(self.labels)}")
                values[place, self.labels.index(name)] = 1
        return values

    def teacher(self) -> OpenBook | None:
        """The teacher whose keys the book has, if its folder is beside the student's."""
        run = self._folder().parent
        if self._teacher is None and (run / "teacher" / "config.json").is_file() and (run / OUTPUTS).is_dir():
            self._teacher = OpenBook(load(run / "teacher", "torch"))
        return self._teacher

    def _teacher_says(self, rows: Sequence[Text], what: str) -> Answers:
        teacher = self.teacher()
        if teacher is None:
            advice = {
                "label": "give labels",
                "find": "let the student find all entries itself (OpenBook.rekey, or `openbook book --keys student`)",
            }
            raise UsageError(
                f"{self._folder().parent} has no teacher/ to {what} these texts with; {advice[what]}, or name the run"
                " folder that has it"
            )
        return teacher.read(rows)

    def _opened(self) -> Book:
        book = self.book
        if book is None:
            raise UsageError("this student has no knowledge base; build one and load both")
        return book

    def _folder(self) -> Path:
        _ = self._opened()
        assert self.shelf is not None
        if self.shelf.folder is None:
            raise UsageError(
                "this knowledge base is in memory only; save it, and load it with OpenBook.from_pretrained"
            )
        return self.shelf.folder

    def read(self, rows: Sequence[Text]) -> Answers:
        """The student's own logits and pooled vectors."""
        return self.backend.run(self.encode(rows))

    def name(self, answer: NDArray[Any]) -> Named:
        if self.labels is None:
            return float(answer[0])
        if self.kind == "multi_label":
            return [self.labels[place] for place in np.argsort(-answer, kind="stable") if answer[place] > THRESHOLD]
        return self.labels[int(answer.argmax())]


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def usual_backend(student: Path) -> BackendName:
    """Torch where it is installed; else the faster of the two exports, as it was timed when they were written."""
    record = student / EXPORT / RECORD
    if find_spec("torch") is not None or not record.is_file():
        return "torch"
    return "onnx-int8" if read_json(record).get("recommended") == "onnx-int8" else "onnx"


def load(folder: Path, backend: BackendName, threads: int | None = None) -> Backend:
    """The engine of this name over a student's, or a teacher's, folder."""
    if backend != "torch":
        return OnnxBackend(folder, backend, threads)
    try:
        from openbook.backends.pytorch import TorchBackend
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{folder} is run by torch, and {error.name} is not installed: pip install 'openbook[train]', or choose"
            " backend onnx or onnx-int8"
        ) from error
    return TorchBackend.load(folder, threads)
