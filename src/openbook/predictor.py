"""The small object users hold: a student and its knowledge base, asked with strings, lists and pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Answers, Encoded, Text, Texts, as_rows, joined, outputs_of
from openbook.backends.base import BACKENDS, Backend, BackendName
from openbook.book_teacher import BookTeacher
from openbook.config import THRESHOLD, UsageError
from openbook.keys import queries_in, save_queries, values_of
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.answering import answer
from openbook.knowledge_base.editing import Difference, Edit
from openbook.knowledge_base.entries import Entry, Hidden, LeaveOut, entries_with, hiding
from openbook.knowledge_base.interpolate import Evidence, check_weight, evidence, weighed
from openbook.knowledge_base.search import normalise
from openbook.knowledge_base.shelf import Book, Shelf, build_index
from openbook.loading import load, student_in, usual_backend
from openbook.student_keys import is_by_student, queries, rekeyed, space
from openbook.types import KnowledgeBase

if TYPE_CHECKING:
    from openbook.knowledge_base.tuning import Tuned

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

    `predict`, `predict_proba` and `explain` take one text, a list of texts, one pair `(a, b)`, or a list of pairs. With
    `leave_out=True` no text finds an entry of its own (specification, 2.5); with ids, these entries are not found.
    """

    def __init__(self, backend: Backend, base: KnowledgeBase | Path | None = None):
        self.backend = backend
        self.shelf = None if base is None else Shelf(base)
        self._checked: Book | None = None
        self._teacher: BookTeacher | None = None
        self.kind, self.labels = backend.about.kind, backend.about.labels
        self.key_space = backend.about.key_space
        self.projection = queries_in(backend.folder)
        _ = self.book

    @property
    def book(self) -> Book | None:
        """The knowledge base as it is now. Raises UsageError for one that was made for another student."""
        book = None if self.shelf is None else self.shelf.book()
        if book is not None and book is not self._checked:
            manifest, made_from = book.base.manifest, self.backend.about.made_from
            by_student = is_by_student(book.base)
            if by_student and space(self.backend, manifest["key_space"]) != manifest["key_space"]:
                others = [name for name, *_ in store.differences(manifest, {"made_from": made_from})]
                made = f" (and they were made from another {', another '.join(others)})" if others else ""
                raise UsageError(
                    "the entries of the knowledge base were found by its student, and the student's weights are others"
                    f" now{made}; let these find them (`openbook book --keys student`), or put the old weights back"
                )
            known = None if by_student else self.key_space
            parts = None if by_student else made_from
            store.check_fits(book.base, known or manifest["key_space"], self.labels, parts)
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
        student = student_in(folder)
        book = folder / "knowledge_base"
        base = book if (book / "manifest.json").is_file() else None
        return cls(load(student, backend or usual_backend(student), threads), base)

    def save_pretrained(self, folder: str | Path) -> None:
        self.backend.save(Path(folder) / "student")
        save_queries(Path(folder) / "student", self.projection)
        if self.base is not None:
            store.save(self.base, Path(folder) / "knowledge_base")

    def predict(self, texts: Texts, leave_out: LeaveOut = False) -> Any:
        """The label name of one text, or a list of them for a list; in regression the score.

        Of several labels it is the list of those above 0.5, the most probable first, which may be empty.
        """
        rows, single = as_rows(texts)
        answers = [self.name(row) for row in self.answer(self.encode(rows), hiding(joined(rows), leave_out))]
        return answers[0] if single else answers

    def predict_proba(self, texts: Texts, leave_out: LeaveOut = False) -> NDArray[np.float64]:
        """Probabilities in the order of `labels`: (C,) for one text, (n, C) for a list. Regression: scores, C = 1.

        Of several labels each has its own, and they need not sum to 1.
        """
        rows, single = as_rows(texts)
        answers = self.answer(self.encode(rows), hiding(joined(rows), leave_out))
        return np.asarray(answers[0] if single else answers)

    def explain(self, texts: Texts, leave_out: LeaveOut = False) -> Any:
        """The answer with the neighbours that decided it: one Explanation, or a list of them for a list."""
        rows, single = as_rows(texts)
        explained = [
            Explanation(row, self.name(one.result), self.name(one.student), one)
            for row, one in zip(rows, self.evidence(self.encode(rows), hiding(joined(rows), leave_out)), strict=True)
        ]
        return explained[0] if single else explained

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        """Rows as the student reads them; `cut` tells which were too long."""
        return self.backend.encode(rows)

    def answer(self, encoded: Sequence[Encoded], hidden: Hidden | None = None) -> NDArray[Any]:
        """Probabilities (n, C), or scores (n, 1), of rows that are encoded already; `hidden` as `hiding` gives it."""
        heard = self.backend.run(encoded)
        outputs, book = outputs_of(heard, self.kind), self.book
        if book is None:
            return outputs
        exclude = None if hidden is None else hidden(book.base)
        asked = queries(book.base, heard.embedding, self.projection)
        return answer(outputs, asked, book.base, book.retrieval, book.index.search, exclude).outputs

    def evidence(self, encoded: Sequence[Encoded], hidden: Hidden | None = None) -> list[Evidence]:
        """Answers to encoded rows with the neighbours they are made of. Raises UsageError without a book."""
        book = self._opened()
        heard, how = self.backend.run(encoded), book.retrieval
        outputs, asked = outputs_of(heard, self.kind), queries(book.base, heard.embedding, self.projection)
        exclude = None if hidden is None else hidden(book.base)
        if how.opens_book:
            told = answer(outputs, asked, book.base, how, book.index.search, exclude)
            hits, betas = told.hits, told.betas
        else:  # asked for, it is searched
            hits, betas = book.index.search(asked, how.top_k, exclude), np.ones(len(encoded))
        return evidence(book.base, hits, outputs, how.temperature, betas)

    def remember(self, texts: Texts, labels: Any = None, ids: Sequence[str] | None = None, weight: float = 1.0) -> Edit:
        """Add texts to the book: from the next prediction on they are looked up. Nothing is trained.

        `labels` are a person's: names, lists of names where several may apply, or scores in regression, one for each
        text (for one text, one label). Without them, what the teacher says is kept, as soft as the book's other values.
        Entries are found as those of the book are: by the student's own embedding, or by the teacher's. Each counts as
        much as `weight` others that are equally near: a correction among many that say otherwise needs more than 1.
        Raises UsageError, and changes nothing, for unknown labels, ids or texts that are there already, where the
        teacher is needed and its folder is not beside the student's, and for a book that is not in a folder.
        """
        check_weight(weight)
        rows, single = as_rows(texts)
        folder = self._folder()
        values = None if labels is None else self.values([labels] if single else labels, len(rows))
        book = self._opened()
        own = is_by_student(book.base)
        if own:
            keys = normalise(self.read(rows).embedding).astype(np.float32)
        if not own or values is None:
            teacher = self._asked("label" if own else "find", book.base)
            heard = teacher.read(rows)
            keys = keys if own else teacher.keys(heard)
            if values is None:
                values = values_of(self.kind, heard.logits, book.base.manifest.get("value_temperature", 1.0))
        told = joined(rows)
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
        edit = editing.rekey(folder, rekeyed(self._opened().base, self.backend))
        build_index(folder)
        return edit

    def forget(self, ids: Sequence[str]) -> Edit:
        """Remove entries: from the next prediction on they are not looked up. Raises UsageError for an unknown id."""
        return editing.remove(self._folder(), [ids] if isinstance(ids, str) else ids)

    def relabel(self, ids: Sequence[str], labels: Sequence[Any]) -> Edit:
        """Correct what entries say. Raises UsageError for an unknown id or label, and changes nothing then."""
        return editing.relabel(self._folder(), ids, self.values(labels, len(ids)))

    def find(self, words: str) -> list[Entry]:
        """The entries whose text holds these words, whatever their case."""
        return entries_with(self._opened().base, words)

    def diff(self, other: KnowledgeBase | str | Path) -> Difference:
        """What has to be added to, removed from and changed in the book to make it another, or that of a folder."""
        return editing.diff(self._opened().base, base_of(other))

    def merge(self, other: KnowledgeBase | str | Path) -> Edit:
        """Append all entries of another book, or of that in a folder, which must not share an id.

        A student that finds its entries itself finds these too. Raises UsageError, and changes nothing, for other
        labels, keys of another teacher or map, and ids that are taken.
        """
        folder = self._folder()
        return editing.merge(folder, self._found_here(base_of(other)))

    def swap(self, other: KnowledgeBase | str | Path) -> Edit:
        """Put another domain's entries in place of all, as `merge` takes them; tune again afterwards."""
        folder = self._folder()
        edit = editing.swap(folder, self._found_here(base_of(other)))
        build_index(folder)
        return edit

    def compact(self, form: str | None = None) -> Edit:
        """Delete for good what was removed, and store keys in `form` if given: fp16, sq8, pca-64, opq-64."""
        folder = self._folder()
        edit = editing.compact(folder, form)
        build_index(folder)
        return edit

    def _found_here(self, other: KnowledgeBase) -> KnowledgeBase:
        """Its entries where this book's are found, if the student finds those."""
        base = self._opened().base
        is_elsewhere = other.manifest.get("key_space") != base.manifest["key_space"]
        return rekeyed(other, self.backend) if is_by_student(base) and is_elsewhere else other

    def tune(
        self,
        texts: Sequence[Text],
        labels: Sequence[Any],
        metric: str | None = None,
        reported_split: bool = False,
        weights: Sequence[float] = (),
    ) -> Tuned:
        """Choose anew how the book is opened, on labelled texts that it does not hold, and keep that with the book.

        As when it was built: by the same metric, in the same mode, with the same skip, and not on texts of the reported
        split, unless `reported_split` allows it. Of `weights`, the one that serves these texts best is given to all
        that was remembered, as `remember` gives it. Raises UsageError for texts that the book holds or that are
        reported, for a metric that is none of this kind of answer, and for weights where nothing was remembered.
        """
        from openbook.knowledge_base.rules import Rules
        from openbook.metrics import OF_KIND

        folder, base = self._folder(), self._opened().base
        rules = Rules.from_manifest(base.manifest)
        name, known = metric or rules.metric or next(iter(OF_KIND[self.kind])), OF_KIND[self.kind]
        if name not in known:
            raise UsageError(f"metric={name!r} is unknown in {self.kind}; choose from {', '.join(known)}")
        rows, _ = as_rows(texts)
        values, heard = self.values(labels, len(rows)), self.read(rows)
        gold = {"regression": values[:, 0], "multi_label": values}.get(self.kind, values.argmax(axis=1))
        outputs, asked = outputs_of(heard, self.kind), queries(base, heard.embedding, self.projection)

        def tried(base: KnowledgeBase) -> Tuned:
            metric = known[name].function
            return rules.tuned(joined(rows), gold, outputs, asked, base, metric, self.kind, reported_split)

        trials = {weight: tried(weighed(base, REMEMBERED, weight)) for weight in weights}
        best = max(trials, key=lambda weight: trials[weight].reached, default=None)
        tuned = tried(base) if best is None else replace(trials[best], weight=best)
        tuned_on = f"{len(rows)} texts of one's own{', some of the reported split' * tuned.on_reported_split}"
        given = {} if best is None else {REMEMBERED: best}
        editing.settle(folder, tuned.retrieval.to_manifest(), tuned_on, given)
        return tuned

    def values(self, labels: Sequence[Any], count: int) -> NDArray[np.float32]:
        """A person's labels as an entry's values: 1 for those that apply (n, C), or scores (n, 1)."""
        if isinstance(labels, str) or len(labels) != count:
            raise UsageError(f"there are {count} texts or ids; give as many labels, not {labels!r}")
        if self.labels is None:
            scores = [score_of(label, f"label {place}") for place, label in enumerate(labels)]
            return np.array(scores, np.float32)[:, None]
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
        teacher = self._beside()
        return None if teacher is None else OpenBook(teacher.engine)

    def _beside(self) -> BookTeacher | None:
        if self._teacher is None:
            self._teacher = BookTeacher.beside(self._folder().parent)
        return self._teacher

    def _asked(self, what: str, base: KnowledgeBase) -> BookTeacher:
        """The teacher that finds or labels texts. Raises UsageError without one, and for another than the book's."""
        teacher = self._beside()
        if teacher is None:
            advice = {
                "label": "give labels",
                "find": "let the student find all entries itself (OpenBook.rekey, or `openbook book --keys student`)",
            }
            raise UsageError(
                f"{self._folder().parent} has no teacher/ to {what} these texts with; {advice[what]}, or name the run"
                " folder that has it"
            )
        teacher.check(base, finds=what == "find")
        return teacher

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


def base_of(book: KnowledgeBase | str | Path) -> KnowledgeBase:
    """A book itself, or that of its folder, or of a run's."""
    if isinstance(book, KnowledgeBase):
        return book
    inside = Path(book) / "knowledge_base"
    return store.load(inside if inside.is_dir() else book)


def score_of(label: Any, where: str) -> float:
    """Raises UsageError for a label that is no finite number; `where` it stands."""
    try:
        score = float(label)
    except (TypeError, ValueError, OverflowError):
        score = np.nan
    if not np.isfinite(score):
        raise UsageError(f"{where} is {label!r}; the student gives scores, so a number is needed")
    return score


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
