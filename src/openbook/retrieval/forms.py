"""What becomes of a corpus before a student reads it: a part of it, pairs by rank, packed sequences (2.6, 2.13)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import floor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openbook.config import CorpusSettings, UsageError
from openbook.retrieval.anchors import Anchor
from openbook.retrieval.bank import Bank
from openbook.retrieval.budget import CountTokens, within
from openbook.retrieval.contextualize import about, blocks, nothing_fits, usable
from openbook.retrieval.hits import HitTable
from openbook.retrieval.merge import smallest_k
from openbook.retrieval.statistics import sizes
from openbook.types import Corpus, Example, Passage

Row = tuple[tuple[int, ...], tuple[int, ...]]  # the anchors of an example's first and of its second text


class Pair(NamedTuple):
    """Two sentences of the bank that the two texts of one row found at the same rank."""

    first: int
    second: int
    rank: int


def fraction_of(corpus: Corpus, settings: CorpusSettings) -> Corpus:
    """At most `fraction` of the tokens (section 2.13): the best sentences, or a prefix of one seeded permutation.

    Either way a smaller part lies within a larger one, and the order of merit stays. Raises UsageError for no sentence.
    """
    if settings.fraction == 1:
        return corpus
    passages, places = corpus.passages, np.arange(len(corpus.passages))
    if settings.fraction_order == "random":
        places = np.random.default_rng(settings.seed).permutation(places)
    totals = np.cumsum(np.array([passage.tokens for passage in passages])[places])
    room = floor(settings.fraction * float(totals[-1]) + 1e-6)  # 0.29 * 100 is 28.999...
    kept = sorted(places[: np.searchsorted(totals, room, side="right")].tolist())
    if not kept:
        raise UsageError(
            f"corpus.fraction={settings.fraction} of {totals[-1]} tokens is less than one sentence; raise it"
        )
    part = tuple(passages[place] for place in kept)
    return Corpus(part, {**corpus.statistics, **sizes(part)})


def rows_of(anchors: Sequence[Anchor], examples: Iterable[Example]) -> list[Row]:
    """The numbers of the anchors that each pair of texts gave, in the order of the examples.

    There are several for a text that was split into sentences, and none for one that equals an evaluation text.
    """
    carried: dict[tuple[str, str], list[int]] = {}
    for number, anchor in enumerate(anchors):
        for place in zip(anchor.rows, anchor.fields, strict=True):
            carried.setdefault(place, []).append(number)
    fields = ("text", "text_pair")
    found = [[tuple(carried.get((example.id, field), ())) for field in fields] for example in examples]
    return [(first, second) for first, second in found]


def rank_pairs(rows: Iterable[Row], hits: HitTable) -> Iterator[Pair]:
    """The j-th hit of a row's first text with the j-th of its second, by (j, row), until either list ends.

    A sentence with itself and a repeated ordered pair are dropped (section 2.6). The hits of a text that was split are
    those of its sentences by (rank, sentence), each once.
    """
    waiting = [(_listed(first, hits), _listed(second, hits)) for first, second in dict.fromkeys(rows)]
    seen: set[tuple[int, int]] = set()
    rank = 0
    while waiting := [lists for lists in waiting if rank < min(map(len, lists))]:
        for first, second in waiting:
            pair = int(first[rank]), int(second[rank])
            if pair[0] != pair[1] and pair not in seen:
                seen.add(pair)
                yield Pair(*pair, rank)
        rank += 1


def _listed(anchors: Sequence[int], hits: HitTable) -> NDArray[np.int64]:
    lists = [hits.row(anchor) for anchor in anchors]
    if len(lists) == 1:
        return lists[0]
    flat = np.concatenate([np.empty(0, np.int64), *lists])
    order = np.argsort(np.concatenate([np.empty(0, np.int64), *(np.arange(len(one)) for one in lists)]), kind="stable")
    _, places = np.unique(flat[order], return_index=True)  # of the first occurrences
    return flat[order][np.sort(places)]


def rank_paired(
    bank: Bank,
    hits: HitTable,
    anchors: Sequence[Anchor],
    examples: Sequence[Example],
    settings: CorpusSettings,
    count_tokens: CountTokens,
) -> Corpus:
    """The corpus of `rank_pairs` instead of single sentences, cut at `budget_tokens` in the same way.

    Raises UsageError if no row has two texts that found different sentences, or if the first pair does not fit.
    """
    hits = usable(hits, bank, anchors, settings)
    ranks: list[int] = []  # of the pairs read so far

    def candidates() -> Iterator[Passage]:
        for block in blocks(rank_pairs(rows_of(anchors, examples), hits)):
            ranks.extend(pair.rank for pair in block)
            sentences = iter(bank.passages([position for pair in block for position in (pair.first, pair.second)]))
            for pair, first, second in zip(block, sentences, sentences, strict=False):
                yield replace(_joined([first, second], 1), rank=pair.rank)

    passages, shortfall = within(candidates(), count_tokens, settings.budget_tokens)
    if not ranks:
        raise UsageError(
            "corpus.form=rank_pair: in no training row do the two texts find different sentences; take form: rand_pair"
        )
    if not passages:
        raise nothing_fits(count_tokens(list(islice(candidates(), 1)))[0], settings)
    k = smallest_k(np.array(ranks), [one.tokens for one in passages], settings.budget_tokens, settings.k_max)
    facts = {"k_star": k, "budget_tokens": settings.budget_tokens, "shortfall_tokens": shortfall}
    return Corpus(tuple(passages), about(anchors, hits, bank, settings) | facts | sizes(passages))


def packed(passages: Sequence[Passage], max_length: int, seed: int) -> Iterator[Passage]:
    """Sentences in seeded random order, filled up to `max_length` as in TinyBERT's general distillation (section 2.6).

    A text takes the next sentence as long as all their `tokens` and three special ones fit, so that none is cut but one
    that is too long by itself. It is split into A and B at a random sentence boundary; a sentence alone stays single.
    """
    random = np.random.default_rng(seed)
    held: list[Passage] = []
    for place in random.permutation(len(passages)).tolist():
        if held and sum(one.tokens for one in held) + passages[place].tokens > max_length - 3:
            yield _split(held, random)
            held = []
        held.append(passages[place])
    if held:
        yield _split(held, random)


def _split(held: Sequence[Passage], random: np.random.Generator) -> Passage:
    return held[0] if len(held) == 1 else _joined(held, int(random.integers(1, len(held))))


def _joined(passages: Sequence[Passage], boundary: int) -> Passage:
    """One pair of texts: the passages before the boundary, and those from there on."""
    texts = [" ".join(filter(None, (passage.text, passage.text_pair))) for passage in passages]
    return Passage(
        id="+".join(passage.id for passage in passages),
        text=" ".join(texts[:boundary]),
        document="+".join(dict.fromkeys(passage.document for passage in passages)),
        text_pair=" ".join(texts[boundary:]),
        tokens=sum(passage.tokens for passage in passages),
        rank=min(passage.rank for passage in passages),
    )
