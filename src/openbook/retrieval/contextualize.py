"""The contextualized corpus: general sentences that the task's own texts retrieve (Liu et al., EMNLP 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from openbook.config import CorpusSettings, UsageError
from openbook.retrieval.anchors import Anchor
from openbook.retrieval.bank import Bank
from openbook.retrieval.budget import AT_ONCE, CountTokens, within
from openbook.retrieval.hits import HitTable
from openbook.retrieval.merge import Found, grid_k, merge, smallest_k
from openbook.retrieval.statistics import sizes
from openbook.types import Corpus, Passage

FIRST_READ, LARGEST_READ = 4096, 262_144  # sentences; a read opens every shard, so few and large ones are cheap
REACH = 4  # times the budget: the teacher is shown no more text than that
EXAMPLES, SHOWN = 5, 3  # anchors in the statistics, and hits of each

Item = TypeVar("Item")


@dataclass(frozen=True)
class Judge:
    """What `corpus.confidence` asks: the teacher, and how frequent each label is in training."""

    probabilities: Callable[[Sequence[Passage]], NDArray[np.floating[Any]]]  # n passages -> (n, C)
    shares: NDArray[np.float64]  # (C,) summing to 1


def contextualize(
    bank: Bank,
    hits: HitTable,
    anchors: Sequence[Anchor],
    settings: CorpusSettings,
    count_tokens: CountTokens,
    judge: Judge | None = None,
) -> Corpus:
    """Merges and ranks what the anchors found, and keeps the longest prefix within `budget_tokens` (section 2.5).

    `hits` has a row for each anchor, from any engine, without the sentences that are anchors themselves; rows deeper
    than `k_max` are cut there. With `confidence`, sentences that the `judge` is not sure of are passed over.
    `k_star` is then the k that takes in every sentence it was shown.
    Raises UsageError if no anchor found anything, or if nothing fits.
    """
    hits = usable(hits, bank, anchors, settings)
    found = merge(hits, len(bank), [anchor.labels for anchor in anchors] if settings.balance_labels else None)
    candidates, budget = _candidates(bank, found), settings.budget_tokens
    if settings.confidence:
        passages, shown = confident(candidates, count_tokens, judge, settings)
        shortfall = budget - sum(passage.tokens for passage in passages)
        k = grid_k(int(found.ranks[:shown].max()), settings.k_max)
    else:
        passages, shortfall = within(candidates, count_tokens, budget)
        k = smallest_k(found.ranks, [one.tokens for one in passages], budget, settings.k_max)
    if not passages:
        raise nothing_fits(count_tokens(bank.passages(found.positions[:1]))[0], settings)
    counts = np.minimum(np.diff(hits.offsets), k)
    facts = {
        "k_star": k,
        "unique_fraction": int((found.ranks < k).sum()) / int(counts.sum()),
        "budget_tokens": budget,
        "shortfall_tokens": shortfall,
    }
    return Corpus(tuple(passages), about(anchors, hits, bank, settings) | facts | sizes(passages))


def confident(
    candidates: Iterable[Passage], count_tokens: CountTokens, judge: Judge | None, settings: CorpusSettings
) -> tuple[list[Passage], int]:
    """Candidates whose most probable label has at least the probability `confidence`, and how many were looked at.

    The train set's shares of labels are kept (section 8.1): each label has its share of the budget, and takes its
    candidates in their order until the first that does not fit. So a rare label is never overrun by a frequent one,
    and one that the teacher hardly ever gives leaves its own share empty, not those of the others. Looking ends when
    every share is full, or after 4 budgets of text. Raises UsageError if nothing is kept, and in regression.
    """
    if judge is None or len(judge.shares) < 2:
        raise UsageError(f"corpus.confidence={settings.confidence} needs the teacher of a classification; set it to 0")
    room = np.floor(judge.shares * settings.budget_tokens)  # (C,) tokens
    closed = room == 0
    kept: list[Passage] = []
    shown = read = 0
    waiting = iter(candidates)
    while not closed.all() and read < REACH * settings.budget_tokens and (block := list(islice(waiting, AT_ONCE))):
        for passage, tokens, chances in zip(block, count_tokens(block), judge.probabilities(block), strict=True):
            shown, read = shown + 1, read + tokens
            label = int(chances.argmax())
            if chances[label] < settings.confidence:
                continue
            closed[label] |= tokens > room[label]
            if not closed[label]:
                room[label] -= tokens
                kept.append(replace(passage, tokens=tokens))
    if not kept:
        raise UsageError(
            f"corpus.confidence={settings.confidence}: of {shown} retrieved sentences none of which the teacher is as"
            f" sure fits corpus.budget_tokens={settings.budget_tokens}; lower the first or raise the second"
        )
    return kept, shown


def usable(hits: HitTable, bank: Bank, anchors: Sequence[Anchor], settings: CorpusSettings) -> HitTable:
    """The hits up to `k_max`. UsageError if there are none, ValueError if they are not these anchors'."""
    highest = int(hits.positions.max(initial=-1))
    if len(hits) != len(anchors) or highest >= len(bank):
        raise ValueError(
            f"hits of {len(hits)} queries, up to position {highest}, do not belong to {len(anchors)} anchors and a bank"
            f" of {len(bank)} sentences"
        )
    if highest < 0:
        raise UsageError(
            f"corpus.sources: none of the task's {len(anchors)} anchors (corpus.anchor_mode={settings.anchor_mode}) "
            f"shares a word with another text among the {len(bank)} sentences; give text in the task's language"
        )
    own = np.zeros(len(bank), dtype=np.bool_)
    own[bank.positions_of(anchor.key for anchor in anchors)] = True
    if own[hits.positions].any():
        raise ValueError("the hits hold sentences that are anchors themselves; search with these excluded")
    return hits.top(settings.k_max) if np.diff(hits.offsets).max() > settings.k_max else hits


def about(anchors: Sequence[Anchor], hits: HitTable, bank: Bank, settings: CorpusSettings) -> dict[str, Any]:
    """How many anchors there are, how many found nothing, and what a few, drawn by seed, found first."""
    found = np.diff(hits.offsets) > 0
    answered = sorted((anchor.key, query) for query, anchor in enumerate(anchors) if found[query])
    drawn = [answered[place][1] for place in np.random.default_rng(settings.seed).permutation(len(answered))[:EXAMPLES]]
    rows = [hits.row(query)[:SHOWN] for query in drawn]
    texts = iter(bank.texts(np.concatenate(rows)))
    return {
        "anchors": len(anchors),
        "anchors_without_hit": int((~found).sum()),
        "examples": [
            {"anchor": anchors[query].text, "hits": list(islice(texts, len(row)))}
            for query, row in zip(drawn, rows, strict=True)
        ],
    }


def nothing_fits(tokens: int, settings: CorpusSettings) -> UsageError:
    return UsageError(f"corpus.budget_tokens={settings.budget_tokens} is less than the first sentence, {tokens}")


def blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Few and large, since each is one read of the bank; the first are smaller, as a small budget needs no more."""
    waiting, size = iter(items), FIRST_READ
    while block := list(islice(waiting, size)):
        yield block
        size = min(2 * size, LARGEST_READ)


def _candidates(bank: Bank, found: Found) -> Iterator[Passage]:
    """Every sentence that was found, the best first."""
    for block in blocks(zip(found.positions.tolist(), found.ranks.tolist(), found.anchors.tolist(), strict=True)):
        passages = bank.passages([position for position, _, _ in block])
        for passage, (_, rank, anchors) in zip(passages, block, strict=True):
            yield replace(passage, rank=rank, anchors=anchors)
