"""Documents in, a bank of clean, unique sentences out; none of them repeats an evaluation text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import sentencex

from openbook.config import CorpusSettings, UsageError
from openbook.types import Passage

WORD = re.compile(r"\w+")
LEAST_LETTERS = 0.5  # of the non-blank characters: below it a line is a table, a number or markup


def lex(text: str) -> list[str]:
    r"""The words retrieval sees: maximal runs of `\w` in casefold(NFKC(text))."""
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
    """Knows all evaluation texts of a run, and blocks what equals one or shares `ngram` consecutive words with one."""

    def __init__(self, evaluation_texts: Iterable[str], ngram: int) -> None:
        self.keys: set[str] = set()
        self._ngram = ngram
        self._runs: set[tuple[str, ...]] = set()
        for text in evaluation_texts:
            words = lex(text)
            self.keys.add(" ".join(words))
            self._runs.update(self._runs_of(words))

    def blocks(self, text: str) -> bool:
        return self.blocks_words(lex(text))

    def blocks_words(self, words: Sequence[str]) -> bool:
        """The same for a text that is already `lex`ed."""
        return " ".join(words) in self.keys or not self._runs.isdisjoint(self._runs_of(words))

    def _runs_of(self, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return zip(*(words[start:] for start in range(self._ngram)), strict=False)  # nothing at all for ngram 0


def build_bank(
    documents: Iterable[tuple[str, str]],
    guard: LeakGuard,
    settings: CorpusSettings,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Passage], dict[str, int]]:
    """All sentences of (id, text) documents that pass the filters, unique by key, in one seeded shuffle.

    A prefix of the bank is therefore a uniform sample of it. Also returns how many sentences each filter removed.
    `progress` hears the number of documents done so far. An empty bank raises UsageError.
    """
    names = ("documents", "sentences", "too_short", "too_long", "not_text", "leaked", "duplicate", "kept")
    counts = dict.fromkeys(names, 0)
    kept: dict[str, tuple[str, str]] = {}
    for document, text in documents:
        for sentence in sentences(text, settings.language):
            words = lex(sentence)
            name = " ".join(words)
            fault = _fault(sentence, words, guard, settings) or ("duplicate" if name in kept else None)
            counts["sentences"] += 1
            counts[fault or "kept"] += 1
            if fault is None:
                kept[name] = (document, sentence)
        counts["documents"] += 1
        if progress:
            progress(counts["documents"])
    if not kept:
        found = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise UsageError(
            f"corpus.sources: no sentence passed the filters ({found}); give more text, or check corpus.min_words="
            f"{settings.min_words}, corpus.max_words={settings.max_words} and corpus.language={settings.language}"
        )
    return _shuffled(list(kept.values()), settings.seed), counts


def _fault(sentence: str, words: Sequence[str], guard: LeakGuard, settings: CorpusSettings) -> str | None:
    """The first filter that refuses the sentence, if any."""
    if len(words) < settings.min_words:
        return "too_short"
    if len(words) > settings.max_words:
        return "too_long"
    if sum(map(str.isalpha, sentence)) < LEAST_LETTERS * (len(sentence) - sentence.count(" ")):
        return "not_text"
    return "leaked" if guard.blocks_words(words) else None


def _shuffled(kept: Sequence[tuple[str, str]], seed: int) -> list[Passage]:
    order = np.random.default_rng(seed).permutation(len(kept))
    rows = (kept[row] for row in order)
    return [Passage(f"bank/{place:06d}", text, document) for place, (document, text) in enumerate(rows)]
