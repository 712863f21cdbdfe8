"""How varied a corpus is and how close to the task (contextualized corpus, section 2.7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from openbook.retrieval.passages import lex

DRAWS = 5
LARGEST_SAMPLE = 1_000_000  # words
TOP_WORDS = 5000


def distinct_n(sentences: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams / n-grams, none of them across two sentences; 0 if there are none."""
    different = {gram for words in sentences for gram in zip(*(words[start:] for start in range(n)), strict=False)}
    return len(different) / sum(max(0, len(words) - n + 1) for words in sentences) if different else 0.0


def overlap(corpus: Sequence[Sequence[str]], task: Sequence[Sequence[str]], k: int = TOP_WORDS) -> float:
    """Share of the k most frequent words (ties: alphabetical) that both have; k is at most the words of either."""
    most = [_by_frequency(sentences) for sentences in (corpus, task)]
    k = min(k, *map(len, most))
    return len(set(most[0][:k]) & set(most[1][:k])) / k if k else 0.0


def describe(corpora: Mapping[str, Sequence[str]], task_texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Variety and closeness of several corpora, on random samples of equally many words, as the mean of 5 draws.

    Both measures depend on size, so only numbers of one call may be compared.
    """
    task = [lex(text) for text in task_texts]
    words = {name: [lex(text) for text in texts] for name, texts in corpora.items()}
    size = min([LARGEST_SAMPLE, *(sum(map(len, sentences)) for sentences in words.values())])
    means = {name: _means(sentences, task, size, seed) for name, sentences in words.items()}
    return {"sample_words": size, "corpora": means}


def _means(sentences: Sequence[list[str]], task: Sequence[list[str]], size: int, seed: int) -> dict[str, float]:
    samples = [_sample(sentences, size, [seed, draw]) for draw in range(DRAWS)]
    measures = {f"distinct_{n}": float(np.mean([distinct_n(sample, n) for sample in samples])) for n in (1, 2, 3)}
    return measures | {"overlap": float(np.mean([overlap(sample, task) for sample in samples]))}


def _sample(sentences: Sequence[list[str]], size: int, seed: Sequence[int]) -> list[list[str]]:
    """The longest prefix of a seeded shuffle that has at most `size` words."""
    order = np.random.default_rng(seed).permutation(len(sentences)).tolist()
    totals = np.cumsum([len(sentences[place]) for place in order])
    return [sentences[place] for place in order[: int(np.searchsorted(totals, size, side="right"))]]


def _by_frequency(sentences: Sequence[Sequence[str]]) -> list[str]:
    counts = Counter(chain.from_iterable(sentences))
    return sorted(counts, key=lambda word: (-counts[word], word))
