"""DSIR: bank sentences drawn so that their words and word pairs look like the task's (Xie et al., NeurIPS 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.parallel import Progress, map_jobs
from openbook.retrieval.bank import Bank
from openbook.retrieval.controls import read
from openbook.types import Passage

TOKEN = re.compile(r"\w+|[^\w\s]+")
BUCKETS = 10_000  # m
SMOOTHING = 1.0  # alpha: pseudo-counts a bucket of the task; without them unseen buckets outweigh all others
TINY = 1e-8  # keeps the logarithm of an empty bucket finite
AT_ONCE = 4096  # sentences

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def importance(
    bank: Bank, task_texts: Iterable[str], seed: int, workers: int = 1, progress: Progress | None = None
) -> Iterator[Passage]:
    """The whole bank in the order of `resample`: a budget cuts a sample without replacement from it."""
    return read(bank, resample(log_weights(bank, task_texts, workers, progress), seed))


def resample(weights: Floats, seed: int) -> Integers:
    """Positions by descending log weight + Gumbel noise, that of a position the same however large the bank: (n,).

    Any prefix is a sample without replacement with probabilities in proportion to the weights.
    """
    return descending(weights + np.random.default_rng(seed).gumbel(size=len(weights)))


def descending(scores: Floats) -> Integers:
    """Positions, the highest score first; of equal ones the first."""
    return np.argsort(-scores, kind="stable")


def log_weights(bank: Bank, task_texts: Iterable[str], workers: int = 1, progress: Progress | None = None) -> Floats:
    """How much likelier the task is to say each sentence of the bank than the bank itself (section 2.9): (n,).

        log w(s) = sum over buckets j of z_j(s) (ln(p_j + 1e-8) - ln(q_j + 1e-8))

    for the counts z of a sentence and the frequencies p of the task, q of the bank. It is not divided by length: long
    sentences have the largest weights and the smallest. `task_texts` should hold none that is evaluation text.
    `progress` hears the number of sentences read so far; each is read twice. No task text raises UsageError.
    """
    task = _counted(_blocks(task_texts))
    if not task.any():
        raise UsageError(
            "corpus.select=importance compares the bank with the task's training texts, and none is left that is not"
            " evaluation text too; choose another select, or other task.train rows"
        )
    bank_counts = _counted(_blocks(_texts(bank), progress), workers)
    ratio = log_ratio(frequencies(task, SMOOTHING), frequencies(bank_counts, 0))
    parts = map_jobs(weigh, _blocks(_texts(bank), progress, len(bank)), workers, once=(ratio,))
    return np.concatenate([np.empty(0), *parts])


def _texts(bank: Bank) -> Iterator[str]:
    return (passage.text for passage in bank.prefix())


def _blocks(texts: Iterable[str], progress: Progress | None = None, done: int = 0) -> Iterator[tuple[list[str]]]:
    waiting = iter(texts)
    while block := list(islice(waiting, AT_ONCE)):
        yield (block,)
        done += len(block)
        if progress:
            progress(done)


def _counted(blocks: Iterable[tuple[list[str]]], workers: int = 1) -> Integers:
    return sum(map_jobs(bucket_counts, blocks, workers, once=(BUCKETS,)), np.zeros(BUCKETS, np.int64))


def frequencies(counts: Integers, smoothing: float) -> Floats:
    """Shares of the buckets, each given `smoothing` pseudo-counts: (m,) summing to 1."""
    smoothed = counts + smoothing
    return np.asarray(smoothed / smoothed.sum())


def log_ratio(task: Floats, bank: Floats) -> Floats:
    """What each occurrence of a bucket adds to the log weight of a sentence: (m,)."""
    return np.log(task + TINY) - np.log(bank + TINY)


def weigh(ratio: Floats, texts: Sequence[str]) -> Floats:
    """The log weight of each text: (N,)."""
    found, owners = features(texts, len(ratio))
    return np.asarray(np.bincount(owners, weights=ratio[found], minlength=len(texts)), np.float64)


def bucket_counts(buckets: int, texts: Sequence[str]) -> Integers:
    """How often each bucket occurs: (m,)."""
    return np.bincount(features(texts, buckets)[0], minlength=buckets)


def features(texts: Sequence[str], buckets: int) -> tuple[Integers, Integers]:
    """The bucket of every word and word pair, and the text that each is in: (G,) and (G,)."""
    rows = [grams(text) for text in texts]
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return buckets_of(chain.from_iterable(rows), buckets), owners


def grams(text: str) -> list[str]:
    """Lower-cased words and punctuation, then pairs of neighbours joined by a blank."""
    words = TOKEN.findall(text.lower())
    return [*words, *map(" ".join, pairwise(words))]


def buckets_of(grams: Iterable[str], buckets: int) -> Integers:
    """SHA-256 mod m: (G,). Nothing is remembered: hashing takes no longer than looking up among millions of pairs."""
    digests = b"".join([sha256(gram.encode()).digest() for gram in grams])
    rests = np.zeros(len(digests) // 32, np.uint64)
    for digits in np.frombuffer(digests, ">u4").reshape(-1, 8).T:  # of 32 bits, the highest first
        rests = ((rests << np.uint64(32)) + digits) % np.uint64(buckets)
    return rests.astype(np.int64)
