"""The contextualized corpus: general sentences that the task's own texts retrieve (Liu et al., EMNLP 2022)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from openbook.config import CorpusSettings, UsageError
from openbook.retrieval.bm25 import Index
from openbook.retrieval.passages import key, lex, sentences
from openbook.types import Corpus, Example, Passage

LONGEST_QUERY = 128  # words; a longer text is queried sentence by sentence
FIELDS = {"each": slice(0, 2), "concat": slice(0, 2), "first": slice(0, 1), "second": slice(1, 2)}
GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # the values of k that are tried
CHUNK = 1024  # anchors searched, or sentences measured, at once: bounds memory and wasted work
EXAMPLES = 5


@dataclass(frozen=True)
class Anchor:
    """A text of the task that serves as a query. It carries no label, so retrieval cannot depend on one."""

    id: str
    text: str
    key: str
    weight: int  # how many rows carry it


class Found(NamedTuple):
    """A bank sentence that some anchor retrieved."""

    position: int
    rank: int  # best over all anchors, from 0
    anchors: int


class Cut(NamedTuple):
    """Where the ordered corpus ends."""

    k: int
    sentences: int
    shortfall: int  # tokens missing to the budget after every found sentence was taken


def anchors_of(examples: Sequence[Example], settings: CorpusSettings, excluded: AbstractSet[str]) -> list[Anchor]:
    """The task's texts as queries (section 2.4): unique by key, the first occurrence first.

    Texts whose key is `excluded`, because an evaluation text has the same, are no anchors.
    """
    anchors: dict[str, Anchor] = {}
    for example in examples:
        row: dict[str, Anchor] = {}
        for number, text in enumerate(_queries(example, settings, excluded)):
            name = key(text)
            if name and name not in excluded:
                row.setdefault(name, Anchor(f"{example.id}#{number}", text, name, weight=0))
        for name, anchor in row.items():
            known = anchors.get(name, anchor)
            anchors[name] = replace(known, weight=known.weight + 1)
    return list(anchors.values())


def _queries(example: Example, settings: CorpusSettings, excluded: AbstractSet[str]) -> Iterator[str]:
    both: tuple[str | None, ...] = (example.text, example.text_pair)
    fields = both[FIELDS[settings.anchor_mode]]
    texts = [text for text in fields if text is not None and key(text) not in excluded]
    for text in [" ".join(texts)] if settings.anchor_mode == "concat" else texts:
        if len(lex(text)) > LONGEST_QUERY:
            yield from sentences(text, settings.language)
        else:
            yield text


def merge(hits: Iterable[Sequence[int]]) -> list[Found]:
    """All positions that any anchor hit, by (best rank, most anchors, position): the rank-0 hits of all anchors first.

    Scores of different anchors are not comparable, so they never enter (section 2.5).
    """
    ranks: dict[int, int] = {}
    anchors: Counter[int] = Counter()
    for positions in hits:
        anchors.update(positions)
        for rank, position in enumerate(positions):
            ranks[position] = min(rank, ranks.get(position, rank))
    found = [Found(position, rank, anchors[position]) for position, rank in ranks.items()]
    return sorted(found, key=lambda one: (one.rank, -one.anchors, one.position))


def cut(order: Sequence[Found], tokens: Sequence[int], budget: int, k_max: int) -> Cut:
    """The longest prefix within the budget of CC_k, the sentences with rank < k, for the smallest k that fills it.

    `tokens` may end where the budget is full. No sentence that does not fit is skipped for one that does.
    """
    totals = np.cumsum(tokens)
    if totals[-1] < budget:
        return Cut(k_max, len(tokens), budget - int(totals[-1]))
    filling = order[int(np.searchsorted(totals, budget))].rank
    k = next((k for k in GRID if filling < k < k_max), k_max)
    within = sum(found.rank < k for found in order)
    return Cut(k, int(np.searchsorted(totals[:within], budget, side="right")), 0)


def contextualize(
    bank: Sequence[Passage],
    index: Index,
    anchors: Sequence[Anchor],
    settings: CorpusSettings,
    count_tokens: Callable[[Sequence[str]], list[int]],
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Retrieves up to `k_max` sentences an anchor, merges, ranks and cuts them at `budget_tokens` (section 2.5).

    Bank sentences whose key is an anchor's are left out. `count_tokens` gives each text's word-pieces in the student's
    tokenizer after truncation. `progress` hears the number of anchors done so far.
    Raises UsageError if no anchor finds anything, or if the budget is below the first sentence.
    """
    if len(index) != len(bank):
        raise ValueError(f"the index holds {len(index)} texts, the bank {len(bank)}: they do not belong together")
    keys = {anchor.key for anchor in anchors}
    own = [position for position, passage in enumerate(bank) if key(passage.text) in keys]
    hits = _hits(index, anchors, settings.k_max, own, progress)
    order = merge(hits)
    if not order:
        raise UsageError(
            f"corpus.sources: none of the task's {len(anchors)} anchors (corpus.anchor_mode={settings.anchor_mode}) "
            f"shares a word with another text among the {len(bank)} sentences; give text in the task's language"
        )
    tokens = _tokens(bank, order, settings.budget_tokens, count_tokens)
    end = cut(order, tokens, settings.budget_tokens, settings.k_max)
    if not end.sentences:
        raise UsageError(f"corpus.budget_tokens={settings.budget_tokens} is less than the first sentence, {tokens[0]}")
    passages = tuple(
        replace(bank[found.position], tokens=count, rank=found.rank, anchors=found.anchors)
        for found, count in zip(order[: end.sentences], tokens, strict=False)
    )
    statistics = _describe(passages, order, hits, end, settings)
    return Corpus(passages, statistics | {"examples": _examples(bank, anchors, hits, settings.seed)})


def _hits(
    index: Index, anchors: Sequence[Anchor], k: int, excluded: Sequence[int], progress: Callable[[int], None] | None
) -> list[list[int]]:
    """The bank positions each anchor finds, best first."""
    hits: list[list[int]] = []
    for start in range(0, len(anchors), CHUNK):
        found = index.search([anchor.text for anchor in anchors[start : start + CHUNK]], k, excluded=excluded)
        hits += [[hit.position for hit in row] for row in found]
        if progress:
            progress(len(hits))
    return hits


def _tokens(
    bank: Sequence[Passage], order: Sequence[Found], budget: int, count_tokens: Callable[[Sequence[str]], list[int]]
) -> list[int]:
    """Tokens of the found sentences, in order, until the budget is full: the rest cannot enter the corpus."""
    tokens: list[int] = []
    while len(tokens) < len(order) and sum(tokens) < budget:
        chunk = order[len(tokens) : len(tokens) + CHUNK]
        tokens += count_tokens([bank[found.position].text for found in chunk])
    return tokens


def _describe(
    passages: Sequence[Passage],
    order: Sequence[Found],
    hits: Sequence[Sequence[int]],
    end: Cut,
    settings: CorpusSettings,
) -> dict[str, Any]:
    return {
        "anchors": len(hits),
        "anchors_without_hit": sum(not positions for positions in hits),
        "k_star": end.k,
        "unique_fraction": sum(found.rank < end.k for found in order) / sum(min(end.k, len(row)) for row in hits),
        "sentences": len(passages),
        "tokens": sum(passage.tokens for passage in passages),
        "budget_tokens": settings.budget_tokens,
        "shortfall_tokens": end.shortfall,
        "mean_words": float(np.mean([len(lex(passage.text)) for passage in passages])),
    }


def _examples(
    bank: Sequence[Passage], anchors: Sequence[Anchor], hits: Sequence[Sequence[int]], seed: int
) -> list[dict[str, Any]]:
    """A few anchors, drawn by seed, with their first three hits: what a reader wants to see first."""
    answered = sorted((anchor.key, anchor.text, row) for anchor, row in zip(anchors, hits, strict=True) if row)
    drawn = np.random.default_rng(seed).permutation(len(answered))[:EXAMPLES]
    rows = [answered[place] for place in drawn]
    return [{"anchor": text, "hits": [bank[position].text for position in row[:3]]} for _, text, row in rows]
