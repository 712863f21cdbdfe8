"""BM25 in Lucene's form over sentences: exact in float64, ties by position, also at the cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from math import log
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from openbook.retrieval.passages import lex

DECIMALS = 12  # equal sums of float64 weights may differ in the last bits; rounded, they tie


class Hit(NamedTuple):
    position: int  # of the text in the sequence the index was built from
    score: float


class Postings(NamedTuple):
    """Where words occur. Those of word w lie at starts[w]:starts[w + 1], texts ascending."""

    starts: NDArray[np.int64]  # (V + 1,)
    texts: NDArray[np.int32]  # (P,)
    counts: NDArray[np.int32]  # (P,)
    lengths: NDArray[np.int32]  # (n,) words a text


class Index:
    """Scores, for a query q and a text s (contextualized corpus, section 2.3; Lucene drops the usual factor k1 + 1),

        sum over the words w of q, repeated ones repeatedly, of idf(w) tf / (tf + k1 (1 - b + b |s| / L))
        idf(w) = ln(1 + (n - df + 0.5) / (df + 0.5))

    with n texts of mean length L, df of which hold w, and tf occurrences of w in s.
    """

    def __init__(self, vocabulary: Sequence[str], postings: Postings, k1: float, b: float) -> None:
        starts, texts, counts, lengths = postings
        frequencies = np.diff(starts)  # (V,)
        idf = [log(1 + (len(lengths) - df + 0.5) / (df + 0.5)) for df in frequencies.tolist()]
        norms = k1 * (1 - b + b * lengths[texts] / lengths.mean())  # (P,)
        self._vocabulary, self._postings, self._k1, self._b = vocabulary, postings, k1, b
        self._number_of = {word: number for number, word in enumerate(vocabulary)}
        self._weights = np.repeat(idf, frequencies) * counts / (counts + norms)  # (P,) float64

    def __len__(self) -> int:
        return len(self._postings.lengths)

    @classmethod
    def build(cls, texts: Sequence[str], k1: float, b: float) -> Self:
        number_of: dict[str, int] = {}
        rows = [[number_of.setdefault(word, len(number_of)) for word in lex(text)] for text in texts]
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        numbers = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        owners = np.repeat(np.arange(len(texts)), lengths)
        cells, counts = np.unique(numbers * len(texts) + owners, return_counts=True)  # sorted by word, then text
        starts = np.searchsorted(cells, np.arange(len(number_of) + 1) * len(texts))
        postings = Postings(starts, (cells % len(texts)).astype(np.int32), counts.astype(np.int32), lengths)
        return cls(list(number_of), postings, k1, b)

    def search(
        self,
        queries: Sequence[str],
        k: int,
        progress: Callable[[int], None] | None = None,
        excluded: Sequence[int] = (),
    ) -> list[list[Hit]]:
        """The k best texts of each query by (-score, position); fewer if fewer share a word with it.

        Texts at the `excluded` positions are passed over, yet still count in n, df and L.
        `progress` hears the number of queries done so far.
        """
        hidden = np.asarray(excluded, dtype=np.int64)
        found = []
        for done, query in enumerate(queries, start=1):
            scores = self._scores(query)
            scores[hidden] = 0
            found.append(_best(scores, k))
            if progress:
                progress(done)
        return found

    def _scores(self, query: str) -> NDArray[np.float64]:
        scores = np.zeros(len(self))
        for word, times in Counter(lex(query)).items():
            if (number := self._number_of.get(word)) is not None:
                span = slice(*self._postings.starts[number : number + 2])
                np.add.at(scores, self._postings.texts[span], times * self._weights[span])
        return scores

    def save(self, folder: Path) -> None:
        """Writes what was counted; the weights follow from it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._postings._asdict().items():
            np.save(folder / f"{name}.npy", array)
        described = {"k1": self._k1, "b": self._b, "vocabulary": self._vocabulary}
        (folder / "index.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        described = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        postings = Postings(*(np.load(folder / f"{name}.npy", allow_pickle=False) for name in Postings._fields))
        return cls(described["vocabulary"], postings, described["k1"], described["b"])


def _best(scores: NDArray[np.float64], k: int) -> list[Hit]:
    positions = np.flatnonzero(scores > 0)
    rounded = scores[positions].round(DECIMALS)
    if len(positions) > k:
        kept = rounded >= np.partition(rounded, -k)[-k]  # all that tie with the k-th, so that the cut falls by position
        positions, rounded = positions[kept], rounded[kept]
    order = np.lexsort((positions, -rounded))[:k]
    return [Hit(*hit) for hit in zip(positions[order].tolist(), rounded[order].tolist(), strict=True)]
