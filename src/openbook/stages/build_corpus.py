"""Bank + hits -> the corpus a student reads: the retrieved one, or a control of the same size; and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openbook.answers import probabilities_of
from openbook.candidates import candidates_for
from openbook.checkpoint import write_json
from openbook.config import Recipe, UsageError
from openbook.inference import answers_of
from openbook.knowledge_base.answering import NO_CLASS
from openbook.models.encoder import load_finished
from openbook.retrieval.anchors import load_anchors
from openbook.retrieval.augment import augmented, augmented_rows
from openbook.retrieval.bank import Bank
from openbook.retrieval.budget import within
from openbook.retrieval.contextualize import Judge, contextualize
from openbook.retrieval.controls import allowed_texts, random_length, random_text, task_text
from openbook.retrieval.forms import fraction_of, packed, rank_paired
from openbook.retrieval.hits import HitTable
from openbook.retrieval.importance import importance
from openbook.retrieval.passages import key, lex
from openbook.retrieval.statistics import describe, sizes
from openbook.types import Corpus, Example, Passage
from openbook.workspace import Run, tokenizer_digest

RETRIEVED = ("retrieved", "other_task", "random_length")  # what reads hits
KEYS = {
    "select", "budget_tokens", "fraction", "fraction_order", "form", "balance_labels", "confidence", "include_task",
    "augment", "seed", "k_max",
}  # fmt: skip
SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("document", pa.string()), ("text_pair", pa.string()),
     ("tokens", pa.int64()), ("rank", pa.int64()), ("anchors", pa.int64())]
)  # fmt: skip


def upstream(recipe: Recipe) -> tuple[str, ...]:
    """The bank, unless the task's own text is all; the hits where they are read; the teacher where it is asked."""
    corpus = recipe.corpus
    source = ("retrieve",) if corpus.select in RETRIEVED else ("build-bank",)
    return (*source, "train-teacher") if corpus.confidence else source


def inputs(run: Run) -> dict[str, Any]:
    general = run.recipe.distill.general
    return {
        "task": run.task_digest,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "settings": run.recipe.corpus.model_dump(mode="json", include=KEYS),
        "general_tokens": None if general is None else general.budget_tokens,
        "words": run.teacher_digest if run.recipe.corpus.select == "augmented" else None,
    }


def check(run: Run) -> None:
    """The switches fit the task."""
    corpus, task = run.recipe.corpus, run.task
    if task.kind in NO_CLASS and (corpus.balance_labels or corpus.confidence):
        name = "balance_labels" if corpus.balance_labels else "confidence"
        raise UsageError(f"corpus.{name} goes by class, and {task.name} is {NO_CLASS[task.kind]}; remove it")
    if task.pair and corpus.confidence:
        raise UsageError(
            f"corpus.confidence={corpus.confidence}: {task.name} is a pair task, whose teacher cannot judge lone"
            " sentences; set it to 0"
        )
    if not task.pair and corpus.form in ("rand_pair", "rank_pair"):
        raise UsageError(f"corpus.form={corpus.form} makes pairs, and {task.name} has single texts; use single or auto")


def build(run: Run, folder: Path) -> None:
    settings, bank = run.recipe.corpus, Bank.load(run.folder / "bank")
    corpus = fraction_of(chosen(run, bank), settings)
    passages = list(corpus.passages)
    if settings.include_task:
        own = [Passage(row.id, row.text, "task", row.text_pair) for row in run.task.train]
        passages += [replace(one, tokens=tokens) for one, tokens in zip(own, count_tokens(run, own), strict=True)]
    told = {**corpus.statistics, "bank": bank.counts, "described": described(run, bank, passages)}
    if settings.form == "packed":
        passages = list(packed(passages, run.recipe.task.max_length, settings.seed))
    write_passages(passages, folder / "passages.parquet")
    write_json(folder / "statistics.json", told)
    general = run.recipe.distill.general
    if general is not None:
        random, _ = within(random_text(bank), lambda some: count_tokens(run, some), general.budget_tokens)
        write_passages(random, folder / "general.parquet")


def chosen(run: Run, bank: Bank) -> Corpus:
    """The corpus of `corpus.select`, cut at the budget."""
    settings, task = run.recipe.corpus, run.task
    if settings.select in ("retrieved", "other_task"):
        return retrieved(run, bank)
    keys = {key(text) for text in run.evaluation_texts}
    augment = augmented_rows if settings.augment.native else augmented
    texts: dict[str, Any] = {
        "random": lambda: random_text(bank),
        "random_length": lambda: random_length(bank, words_of(retrieved(run, bank)), settings.seed),
        "importance": lambda: importance(bank, task_texts(run), settings.seed),
        "augmented": lambda: augment(task.train, candidates_for(run, bank), settings.augment, settings.seed, keys),
        "task": lambda: task_text(task.train),
    }
    passages, shortfall = within(texts[settings.select](), lambda some: count_tokens(run, some), settings.budget_tokens)
    if not passages:
        raise UsageError(f"corpus.budget_tokens={settings.budget_tokens} is less than the first text; raise it")
    facts = {"budget_tokens": settings.budget_tokens, "shortfall_tokens": shortfall}
    return Corpus(tuple(passages), facts | sizes(passages))


def retrieved(run: Run, bank: Bank) -> Corpus:
    settings, folder = run.recipe.corpus, run.folder / "hits"
    hits, anchors = HitTable.load(folder), load_anchors(folder)
    if settings.form == "rank_pair":
        return rank_paired(bank, hits, anchors, run.task.train, settings, lambda some: count_tokens(run, some))
    judge = Judge(teacher_of(run), label_shares(run)) if settings.confidence else None
    return contextualize(bank, hits, anchors, settings, lambda some: count_tokens(run, some), judge)


def teacher_of(run: Run) -> Callable[[Sequence[Passage]], NDArray[np.float64]]:
    """The fine-tuned teacher's probabilities (n, C) of lone sentences."""
    teacher = load_finished(str(run.folder / "teacher"))

    def judge(passages: Sequence[Passage]) -> NDArray[np.float64]:
        rows = run.tokens("judged", [Example(one.id, one.text) for one in passages], run.teacher_tokenizer)
        return probabilities_of(answers_of(teacher, rows).logits)

    return judge


def label_shares(run: Run) -> NDArray[np.float64]:
    labels = [row.label for row in run.task.train if isinstance(row.label, int)]
    counts = np.bincount(labels, minlength=len(run.task.labels or ()))
    return np.asarray(counts / counts.sum())


def words_of(corpus: Corpus) -> list[int]:
    return [len(lex(passage.text)) for passage in corpus.passages]


def task_texts(run: Run) -> list[str]:
    """The training texts that no evaluation text equals: what a corpus may be compared with, or drawn toward."""
    return list(allowed_texts(run.task.train, {key(text) for text in run.evaluation_texts}))


def described(run: Run, bank: Bank, passages: Sequence[Passage]) -> dict[str, Any]:
    """How varied the corpus is and how close to the task, beside random text and the task's own."""
    texts = [text for one in passages for text in (one.text, one.text_pair) if text]
    sample = [passage.text for passage, _ in zip(bank.prefix(), texts, strict=False)]
    own = task_texts(run)
    return describe({"corpus": texts, "random": sample, "task": own}, own, run.recipe.corpus.seed)


def write_passages(passages: Sequence[Passage], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([asdict(passage) for passage in passages], schema=SCHEMA), path)


def count_tokens(run: Run, passages: Sequence[Passage]) -> list[int]:
    """Word-pieces of each passage as the student will read it: cut, without special tokens."""
    tokenizer, length = run.tokenizer, run.recipe.task.max_length
    alone = length - tokenizer.num_special_tokens_to_add()
    together = length - tokenizer.num_special_tokens_to_add(pair=True)
    first = pieces(tokenizer, [one.text for one in passages], alone)
    second = pieces(tokenizer, [one.text_pair or "" for one in passages], alone)
    room = together // 2 if run.task.pair else alone
    return [
        min(a, room) if one.text_pair is None else min(a + b, together)
        for one, a, b in zip(passages, first, second, strict=True)
    ]


def pieces(tokenizer: Any, texts: list[str], most: int) -> list[int]:
    encoded = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=most)
    return [len(row) for row in encoded["input_ids"]]
