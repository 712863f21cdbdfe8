"""How varied a corpus is, how close to the task, how long its sentences (contextualized corpus, section 2.7)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openbook.retrieval.passages import lex
from openbook.types import Passage

DRAWS = 5
LARGEST_SAMPLE = 1_000_000  # words
TOP_WORDS = 5000
LONGER = (5, 10, 20, 40, 80)  # words from which a sentence counts to the next bin
BINS = (f"under {LONGER[0]}", *(f"{low} to {high - 1}" for low, high in pairwise(LONGER)), f"from {LONGER[-1]}")

LARGEST_NUMBER = 2**63 - 1

Counts = NDArray[np.int64]  # (V,) how often each word occurs
Numbers = defaultdict[str, int]
Words = Callable[[int], list[int]]  # the numbers of a sentence's words


class Coded(NamedTuple):
    """Sentences as numbers, one a word."""

    words: NDArray[np.int64]  # (W,)
    lengths: NDArray[np.int64]  # (S,) words a sentence; they sum to W


def distinct_n(sentences: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams / n-grams, none of them across two sentences; 0 if there are none."""
    return _distinct(_coded(sentences, _numbers()), n)


def overlap(corpus: Sequence[Sequence[str]], task: Sequence[Sequence[str]], k: int = TOP_WORDS) -> float:
    """Share of the k most frequent words (ties: alphabetical) that both have; k is at most the words of either."""
    numbers = _numbers()
    coded = [_coded(sentences, numbers) for sentences in (corpus, task)]
    ours, theirs = (np.bincount(one.words, minlength=len(numbers)) for one in coded)
    return _overlap(ours, theirs, list(numbers), k)


def describe(corpora: Mapping[str, Sequence[str]], task_texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Variety, closeness and lengths of several corpora, on random samples of equally many words, mean of 5 draws.

    Variety and closeness depend on size, so only numbers of one call may be compared. Of a large corpus no more is
    read than its samples hold.
    """
    numbers = _numbers()
    task = _coded([lex(text) for text in task_texts], numbers)
    words = {name: _reader(texts, numbers) for name, texts in corpora.items()}
    size = min([LARGEST_SAMPLE, *(_size(words[name], len(texts)) for name, texts in corpora.items())])
    described = {}
    for name, texts in corpora.items():
        samples = [_sample(words[name], len(texts), size, [seed, draw]) for draw in range(DRAWS)]
        described[name] = _means(samples, task, list(numbers))
    return {"sample_words": size, "corpora": described}


def sizes(passages: Sequence[Passage]) -> dict[str, Any]:
    """Sentences (or pairs), tokens, words each on average, and which share of them has how many words."""
    lengths = np.array([len(lex(one.text)) + len(lex(one.text_pair or "")) for one in passages], dtype=np.int64)
    return {
        "sentences": len(passages),
        "tokens": sum(passage.tokens for passage in passages),
        **_lengths(lengths),
    }


def _numbers() -> Numbers:
    """Numbers each word when it is first looked up."""
    numbers: Numbers = defaultdict()
    numbers.default_factory = numbers.__len__
    return numbers


def _coded(sentences: Iterable[Sequence[str]], numbers: Numbers) -> Coded:
    return _joined([list(map(numbers.__getitem__, words)) for words in sentences])


def _joined(rows: Sequence[Sequence[int]]) -> Coded:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Coded(np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())), lengths)


def _reader(texts: Sequence[str], numbers: Numbers) -> Words:
    """Splits a sentence when it is first asked for."""

    @cache
    def words(place: int) -> list[int]:
        return list(map(numbers.__getitem__, lex(texts[place])))

    return words


def _size(words: Words, sentences: int) -> int:
    """Words of a corpus, counted up to the largest sample."""
    total = 0
    for place in range(sentences):
        total += len(words(place))
        if total >= LARGEST_SAMPLE:
            return LARGEST_SAMPLE
    return total


def _sample(words: Words, sentences: int, size: int, seed: Sequence[int]) -> Coded:
    """The longest prefix of a seeded shuffle that has at most `size` words."""
    rows: list[list[int]] = []
    total = 0
    for place in np.random.default_rng(seed).permutation(sentences).tolist():
        row = words(place)
        total += len(row)
        if total > size:
            break
        rows.append(row)
    return _joined(rows)


def _means(samples: Sequence[Coded], task: Coded, vocabulary: Sequence[str]) -> dict[str, Any]:
    of_task = np.bincount(task.words, minlength=len(vocabulary))
    counts = [np.bincount(sample.words, minlength=len(vocabulary)) for sample in samples]
    measures = {f"distinct_{n}": float(np.mean([_distinct(sample, n) for sample in samples])) for n in (1, 2, 3)}
    measures["overlap"] = float(np.mean([_overlap(one, of_task, vocabulary, TOP_WORDS) for one in counts]))
    return measures | _lengths(np.concatenate([sample.lengths for sample in samples]))


def _lengths(words: NDArray[np.int64]) -> dict[str, Any]:
    """From the words of every sentence: their mean, and the share of sentences in each bin."""
    counts = np.bincount(np.digitize(words, LONGER), minlength=len(BINS))
    shares = (counts / max(1, len(words))).tolist()
    return {"mean_words": float(words.mean()) if len(words) else 0.0, "lengths": dict(zip(BINS, shares, strict=True))}


def _distinct(coded: Coded, n: int) -> float:
    """Distinct-n of coded sentences: an n-gram is one number, in base V of its words'."""
    grams, base = coded.words, 1 + int(coded.words.max(initial=0))
    bound = base
    for later in range(1, n):
        if bound > LARGEST_NUMBER // base:
            grams = np.unique(grams, return_inverse=True)[1]
            bound = 1 + int(grams.max(initial=0))
        grams = grams[:-1] * base + coded.words[later:]
        bound *= base
    owners = np.repeat(np.arange(len(coded.lengths)), coded.lengths)
    grams = np.sort(grams[owners[: len(grams)] == owners[n - 1 :]])  # np.unique hashes integers, 50 times as slow
    return (1 + int(np.count_nonzero(grams[1:] != grams[:-1]))) / len(grams) if len(grams) else 0.0


def _overlap(corpus: Counts, task: Counts, vocabulary: Sequence[str], k: int) -> float:
    k = min(k, int(np.count_nonzero(corpus)), int(np.count_nonzero(task)))
    both = np.intersect1d(_most_frequent(corpus, vocabulary, k), _most_frequent(task, vocabulary, k))
    return len(both) / k if k else 0.0


def _most_frequent(counts: Counts, vocabulary: Sequence[str], k: int) -> NDArray[np.int64]:
    """The numbers of the k most frequent words; of those that tie for the last places the alphabetically first."""
    if not k:
        return np.empty(0, dtype=np.int64)
    least = np.partition(counts, -k)[-k]
    above = np.flatnonzero(counts > least)
    ties = sorted(np.flatnonzero(counts == least).tolist(), key=vocabulary.__getitem__)
    return np.concatenate([above, ties[: k - len(above)]]).astype(np.int64)
