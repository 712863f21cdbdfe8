"""What a course reads: the task's texts, or passages of the corpus in the form that the recipe asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from openbook.checkpoint import building, digest_file, fingerprint, is_fresh
from openbook.data.batches import Tokenised, tokenise
from openbook.types import Example
from openbook.workspace import Run, tokenizer_digest

Texts = Literal["task", "corpus", "general"]
FILES = {"corpus": "passages.parquet", "general": "general.parquet"}  # in the corpus folder


def passages_file(run: Run, texts: Texts) -> Path:
    return run.folder / "corpus" / FILES[texts]


def tokens_of(run: Run, texts: Texts, tokenizer: Any) -> Tokenised:
    """What a course reads, as word-pieces: tokenised once, then mapped from disk."""
    if texts == "task":
        return run.tokens("task", run.task.train, tokenizer)
    inputs = reading_inputs(run, texts, tokenizer)
    folder = run.folder / "tokens" / f"{texts}-{fingerprint(inputs)[:12]}"
    if not is_fresh(folder, inputs):
        with building(folder, inputs) as partial:
            tokenise(corpus_examples(run, texts), tokenizer, run.recipe.task.max_length, partial)
    return Tokenised.load(folder)


def reading_inputs(run: Run, texts: Texts, tokenizer: Any) -> dict[str, Any]:
    """All that decides which word-pieces a course reads."""
    if texts == "task":
        return {"task": run.task_digest, "tokenizer": tokenizer_digest(tokenizer)}
    return {
        "passages": digest_file(passages_file(run, texts)),
        "cut_by": tokenizer_digest(run.tokenizer) if run.task.pair else None,
        "paired_by": run.recipe.corpus.seed if pairs_sentences(run) else None,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": run.recipe.task.max_length,
    }


def pairs_sentences(run: Run) -> bool:
    """Whether the sentences of a corpus are read two by two."""
    return run.task.pair and run.recipe.corpus.form in ("auto", "rand_pair")


def corpus_examples(run: Run, texts: Texts = "corpus") -> list[Example]:
    """The passages in the input form of the recipe (specification, 2.6).

    For a pair task, a sentence has half of the room; `rand_pair` takes two in seeded random order, and an odd one stays
    alone. Passages that are pairs stay as they are.
    """
    table = pq.read_table(passages_file(run, texts), columns=["id", "text", "text_pair"])
    passages = [Example(**row) for row in table.to_pylist()]
    if not run.task.pair:
        return passages
    ready = [passage for passage in passages if passage.text_pair is not None]
    single = in_half([passage for passage in passages if passage.text_pair is None], run)
    if not pairs_sentences(run):
        return ready + single
    random.Random(run.recipe.corpus.seed).shuffle(single)
    made = [Example(f"{a.id}+{b.id}", a.text, b.text) for a, b in zip(single[::2], single[1::2], strict=False)]
    return ready + made + single[2 * len(made) :]


def in_half(sentences: Sequence[Example], run: Run) -> list[Example]:
    """The sentences without what goes beyond half of the word-pieces that a pair may have."""
    if not sentences:
        return []
    half = (run.recipe.task.max_length - run.tokenizer.num_special_tokens_to_add(pair=True)) // 2
    encoded = run.tokenizer(
        [sentence.text for sentence in sentences],
        add_special_tokens=False,
        truncation=True,
        max_length=half,
        return_offsets_mapping=True,
    )
    ends = [spans[-1][1] if len(spans) == half else None for spans in encoded["offset_mapping"]]
    return [Example(sentence.id, sentence.text[:end]) for sentence, end in zip(sentences, ends, strict=True)]
