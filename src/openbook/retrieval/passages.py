"""What a text is to retrieval: its words, its key, its sentences, and whether it repeats an evaluation text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, shake_256
from itertools import islice

import numpy as np
import sentencex
from numpy.typing import NDArray

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
ASCII_WORD = re.compile(r"\w+", re.ASCII)
AT_ONCE = 4096  # evaluation texts hashed together
BANDS = 16
FOUND = 0.99
MOST_MINHASHES = 16  # a band
ODD = 0x9E3779B97F4A7C15  # its powers tell the places in a word run apart
CODES = np.frombuffer(b"".join(blake2b(bytes([byte]), digest_size=8).digest() for byte in range(256)), "<u8")


def lex(text: str) -> list[str]:
    r"""The words retrieval sees: maximal runs of `\w` in casefold(NFKC(text)); a Chinese character is one by itself.

    Chinese is written without blanks, so that a whole clause would be one word. Kana and hangul stay runs.
    """
    if text.isascii():  # the same, sooner
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def key(text: str) -> str:
    """What two texts share when they differ only in case, punctuation or white space."""
    return " ".join(lex(text))


def sentences(text: str, language: str) -> Iterator[str]:
    """Sentences in NFC with single blanks, by rules alone; a line end is always a sentence end."""
    for paragraph in unicodedata.normalize("NFC", text).splitlines():
        for sentence in sentencex.segment(language, " ".join(paragraph.split())):
            yield sentence.strip()


class LeakGuard:
    """Knows all evaluation texts of a run, and blocks what equals one or shares `ngram` consecutive words with one.

    Word runs are kept as 64-bit hashes, 8 bytes each; should two ever collide, a sentence is lost that need not be.
    0 for `ngram` compares whole texts only.
    """

    def __init__(self, evaluation_texts: Iterable[str], ngram: int) -> None:
        self.keys: set[str] = set()
        self._ngram = ngram
        runs = [np.empty(0, np.uint64)]
        texts = iter(evaluation_texts)
        while keys := [key(text) for text in islice(texts, AT_ONCE)]:
            self.keys.update(keys)
            runs.append(_runs_of(keys, ngram)[0])
        self._runs = np.unique(np.concatenate(runs))

    def blocks(self, text: str) -> bool:
        return bool(self.blocked([key(text)])[0])

    def blocked(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts, given by their keys, repeat an evaluation text: (N,)."""
        found = np.array([name in self.keys for name in keys], dtype=np.bool_)
        if len(self._runs):
            runs, row_of = _runs_of(keys, self._ngram)
            places = np.searchsorted(self._runs, runs).clip(max=len(self._runs) - 1)
            found[row_of[self._runs[places] == runs]] = True
        return found

    def digest(self) -> str:
        """Changes with what is blocked."""
        total = blake2b(f"{self._ngram}".encode(), digest_size=16)
        for name in sorted(self.keys):
            total.update(f"\n{name}".encode())
        return total.hexdigest()


def band_hashes(keys: Sequence[str], threshold: float) -> NDArray[np.uint64]:
    """Hashes of which two texts share one if their word sets are similar enough: (N, BANDS). No key may be empty.

    A band is as many MinHashes (Broder, 1997) as make it equal with a probability that finds `FOUND` of all pairs of
    Jaccard similarity `threshold` in one band or another.
    """
    words, row_of = _runs_of(keys, 1)
    starts = np.searchsorted(row_of, np.arange(len(keys)))
    equal = 1 - (1 - FOUND) ** (1 / BANDS)
    width = (
        MOST_MINHASHES if threshold == 1 else max(1, min(MOST_MINHASHES, int(math.log(equal) / math.log(threshold))))
    )
    numbers = np.frombuffer(shake_256(b"MinHash").digest(16 * BANDS * width), "<u8").reshape(BANDS, width, 2)
    bands = np.zeros((len(keys), BANDS), np.uint64)
    for band, functions in enumerate(numbers):
        for factor, shift in functions:
            smallest = np.minimum.reduceat(words * (factor | np.uint64(1)) + shift, starts)
            bands[:, band] = (bands[:, band] + smallest) * np.uint64(ODD)
    return bands


def _runs_of(keys: Sequence[str], ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all runs of `ngram` words of a key, and the number of the key each lies in.

    The hash of the bytes b_0 b_1 ... is the sum of code(b_i) ODD^i mod 2^64: a difference of two prefix sums.
    """
    joined = np.frombuffer("\n".join(keys).encode(), np.uint8)
    ends = np.flatnonzero((joined == ord(" ")) | (joined == ord("\n")))
    row_of = np.concatenate([[0], np.cumsum(joined[ends] == ord("\n"))])  # of every word
    count = len(row_of) - ngram + 1
    if ngram == 0 or count <= 0 or not keys:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    starts, stops = np.concatenate([[0], ends + 1])[:count], np.concatenate([ends, [len(joined)]])[ngram - 1 :]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(CODES[joined] * _powers(ODD, len(joined)))])
    hashes = (sums[stops] - sums[starts]) * _powers(pow(ODD, -1, 2**64), len(joined) + 1)[starts]
    within = (row_of[:count] == row_of[ngram - 1 :]) & (stops > starts)  # an empty key has no word
    return hashes[within], row_of[:count][within]


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)
