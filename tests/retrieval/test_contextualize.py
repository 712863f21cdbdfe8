"""The corpus as a whole (fixtures F5 and F6 of the specification), against its pseudo-code, and its refusals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from openbook.config import CorpusSettings, FileSource, UsageError
from openbook.retrieval.anchors import Anchor, anchors_of
from openbook.retrieval.bank import build_bank
from openbook.retrieval.bm25 import Index
from openbook.retrieval.contextualize import Judge, blocks, confident, contextualize
from openbook.retrieval.hits import HitTable
from openbook.retrieval.passages import LeakGuard, key
from openbook.types import Corpus, Example, Passage

BANK = ["the cat sat on the mat", "the dog sat", "cats and dogs", "the cat chased the dog"]


class Shelf:
    """A bank in memory whose positions are the places in a list."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, positions: Sequence[int]) -> list[str]:
        return [self._texts[position] for position in positions]

    def passages(self, positions: Sequence[int]) -> list[Passage]:
        self.reads.append(len(positions))
        return [Passage(f"bank/{p}", self._texts[p], f"d{p}") for p in positions]

    def positions_of(self, keys: Iterable[str]) -> np.ndarray:
        wanted = set(keys)
        return np.array([p for p, text in enumerate(self._texts) if key(text) in wanted], dtype=np.int64)


def recipe(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


def count_words(passages: Sequence[Passage]) -> list[int]:
    return [len(passage.text.split()) for passage in passages]


def anchors(*texts: str) -> list[Anchor]:
    return anchors_of([Example(f"t/{i}", text, label=i % 2) for i, text in enumerate(texts)], recipe(), set())


def table(*rows: Sequence[int]) -> HitTable:
    return HitTable.of([[(position, 0.0) for position in row] for row in rows])


def hits_of(texts: Sequence[str], asked: Sequence[Anchor], k: int) -> HitTable:
    own = Shelf(texts).positions_of(anchor.key for anchor in asked)
    return Index.of(texts, 1.2, 0.75).search([anchor.text for anchor in asked], k, own)


def corpus_of(texts: Sequence[str], asked: Sequence[Anchor], **changes: object) -> Corpus:
    settings = recipe(**changes)
    return contextualize(Shelf(texts), hits_of(texts, asked, settings.k_max), asked, settings, count_words)


def rows_of(corpus: Corpus) -> list[tuple[str, int, int]]:
    return [(passage.document, passage.rank, passage.anchors) for passage in corpus.passages]


def test_a_corpus_of_the_specification() -> None:
    corpus = corpus_of(BANK, anchors("cat sat", "dog"), k_max=2, budget_tokens=14)
    assert corpus.passages == (
        Passage("bank/1", BANK[1], "d1", tokens=3, rank=0, anchors=2),
        Passage("bank/0", BANK[0], "d0", tokens=6, rank=0, anchors=1),
        Passage("bank/3", BANK[3], "d3", tokens=5, rank=1, anchors=1),
    )
    examples = corpus.statistics["examples"]
    assert {one["anchor"]: one["hits"] for one in examples} == {
        "cat sat": [BANK[0], BANK[1]],
        "dog": [BANK[1], BANK[3]],
    }
    lengths = {"under 5": 1 / 3, "5 to 9": 2 / 3, "10 to 19": 0, "20 to 39": 0, "40 to 79": 0, "from 80": 0}
    assert {name: value for name, value in corpus.statistics.items() if name != "examples"} == {
        "anchors": 2, "anchors_without_hit": 0, "k_star": 2, "unique_fraction": 0.75, "sentences": 3, "tokens": 14,
        "budget_tokens": 14, "shortfall_tokens": 0, "mean_words": pytest.approx(14 / 3), "lengths": lengths,
    }  # fmt: skip


def test_a_sentence_that_is_an_anchor_is_left_out_and_ranks_close_up() -> None:
    asked = anchors("cat sat", "dog", "The dog sat.")
    assert [hits_of(BANK, asked, 2).row(query).tolist() for query in range(3)] == [[0, 3], [3], [3, 0]]
    corpus = corpus_of(BANK, anchors("cat sat", "dog", "The dog sat.", "zebra"), k_max=2, budget_tokens=20)
    assert rows_of(corpus) == [("d3", 0, 3), ("d0", 0, 2)]
    assert corpus.statistics["anchors_without_hit"] == 1
    assert corpus.statistics["shortfall_tokens"] == 9
    assert {one["anchor"]: one["hits"] for one in corpus.statistics["examples"]} == {
        "cat sat": [BANK[0], BANK[3]],
        "dog": [BANK[3]],
        "The dog sat.": [BANK[3], BANK[0]],
    }


@pytest.mark.parametrize(
    ("budget", "k", "documents", "shortfall"),
    [
        (3, 1, ["d1"], 0),
        (8, 1, ["d1"], 0),
        (9, 1, ["d1", "d0"], 0),
        (10, 2, ["d1", "d0"], 0),
        (13, 2, ["d1", "d0"], 0),
        (14, 2, ["d1", "d0", "d3"], 0),
        (20, 2, ["d1", "d0", "d3"], 6),
    ],
)
def test_the_budget_cuts_a_prefix_and_skips_nothing(budget: int, k: int, documents: list[str], shortfall: int) -> None:
    corpus = corpus_of(BANK, anchors("cat sat", "dog"), k_max=2, budget_tokens=budget)
    assert [passage.document for passage in corpus.passages] == documents
    assert (corpus.statistics["k_star"], corpus.statistics["shortfall_tokens"]) == (k, shortfall)


def pseudo_code(
    texts: list[str], queries: list[str], k_max: int, budget: int
) -> tuple[list[tuple[str, int, int]], int]:
    """Section 2.5 line by line over complete rankings: (document, r, c) of the corpus, k*, and u."""
    rankings = Index.of(texts, 1.2, 0.75).search(queries, len(texts))
    lists = [rankings.row(query).tolist() for query in range(len(queries))]
    hits = [[s for s in row if texts[s] not in queries][:k_max] for row in lists]
    r = {s: min(row.index(s) for row in hits if s in row) for row in hits for s in row}
    c = {s: sum(s in row for row in hits) for s in r}
    order = sorted(r, key=lambda s: (r[s], -c[s], s))

    def tokens(chosen: list[int]) -> int:
        return sum(len(texts[s].split()) for s in chosen)

    grid = [k for k in (1, 2, 5, 10) if k < k_max] + [k_max]
    k = next((k for k in grid if tokens([s for s in order if r[s] < k]) >= budget), k_max)
    chosen = [s for s in order if r[s] < k]
    unique = len(chosen) / max(1, sum(len(row[:k]) for row in hits))
    while tokens(chosen) > budget:
        chosen.pop()
    return [(f"d{s}", r[s], c[s]) for s in chosen], k, unique


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join)


@trials(max_examples=40, deadline=None)
@given(
    texts=st.lists(words, min_size=3, max_size=25, unique=True),
    queries=st.lists(words, min_size=1, max_size=8, unique=True),
    k_max=st.integers(1, 12),
    budget=st.integers(6, 60),
    shuffle=st.randoms(use_true_random=False),
)
def test_equals_the_pseudo_code_in_any_order_of_anchors(texts, queries, k_max, budget, shuffle) -> None:
    expected, k, unique = pseudo_code(texts, queries, k_max, budget)
    asked = anchors(*queries)
    if not expected:
        with pytest.raises(UsageError, match="none of the task's"):
            corpus_of(texts, asked, k_max=k_max, budget_tokens=budget)
        return
    corpus = corpus_of(texts, asked, k_max=k_max, budget_tokens=budget)
    assert rows_of(corpus) == expected
    assert corpus.statistics["k_star"] == k
    assert corpus.statistics["unique_fraction"] == pytest.approx(unique)
    shuffle.shuffle(asked)
    assert corpus_of(texts, asked, k_max=k_max, budget_tokens=budget) == corpus
    larger = corpus_of(texts, asked, k_max=k_max, budget_tokens=budget + 6)
    assert larger.passages[: len(corpus.passages)] == corpus.passages


@trials(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 19), unique=True, max_size=9), min_size=1, max_size=9).filter(any),
    budget=st.integers(6, 80),
    k_max=st.integers(1, 9),
    balance=st.booleans(),
)
def test_every_corpus_fills_its_budget_with_distinct_hits_of_rank_below_k(rows, budget, k_max, balance) -> None:
    texts = [" ".join(["w"] * (position % 5 + 1) + [f"x{position}"]) for position in range(20)]
    asked = anchors(*(f"anchor {place}" for place in range(len(rows))))
    settings = recipe(budget_tokens=budget, k_max=k_max, balance_labels=balance)
    corpus = contextualize(Shelf(texts), table(*rows), asked, settings, count_words)
    whole = contextualize(
        Shelf(texts), table(*rows), asked, settings.model_copy(update={"budget_tokens": 10**6}), count_words
    )
    size, statistics = len(corpus.passages), corpus.statistics
    assert whole.passages[:size] == corpus.passages
    tokens = sum(passage.tokens for passage in corpus.passages)
    if size < len(whole.passages):
        assert statistics["shortfall_tokens"] == 0
        assert tokens <= budget < tokens + whole.passages[size].tokens
    else:
        assert statistics["shortfall_tokens"] == budget - tokens >= 0
    below = {position for row in rows for position in row[: statistics["k_star"]]}
    assert {int(passage.document[1:]) for passage in corpus.passages} <= below
    assert len({key(passage.text) for passage in corpus.passages}) == size
    assert statistics["k_star"] <= k_max


def test_labels_change_nothing_unless_they_take_turns() -> None:
    asked = anchors("cat sat", "dog", "mat")
    other = [replace(anchor, labels=(1 - anchor.labels[0],)) for anchor in asked]
    hits = table([0, 2], [3, 1], [0, 1])

    def documents(asked: Sequence[Anchor], balance: bool) -> list[str]:
        settings = recipe(budget_tokens=100, balance_labels=balance)
        return [one.document for one in contextualize(Shelf(BANK), hits, asked, settings, count_words).passages]

    assert documents(asked, False) == documents(other, False) == ["d0", "d3", "d1", "d2"]
    assert documents(asked, True) == ["d0", "d3", "d1", "d2"]  # label 0: 0 1 2; label 1: 3 1
    assert documents(other, True) == ["d3", "d0", "d1", "d2"]


def test_hits_beyond_k_max_are_not_counted() -> None:
    corpus = contextualize(
        Shelf(BANK), table([0, 1, 2], [1, 2]), anchors("cat sat", "dog"), recipe(k_max=1), count_words
    )
    assert rows_of(corpus) == [("d0", 0, 1), ("d1", 0, 1)]
    assert corpus.statistics["unique_fraction"] == 1


def test_a_large_bank_is_read_in_few_blocks_and_no_further_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(block) for block in blocks(range(20_000))] == [4096, 8192, 7712]
    monkeypatch.setattr("openbook.retrieval.contextualize.FIRST_READ", 1)
    monkeypatch.setattr("openbook.retrieval.contextualize.LARGEST_READ", 3)
    assert list(blocks(range(9))) == [[0], [1, 2], [3, 4, 5], [6, 7, 8]]
    monkeypatch.setattr("openbook.retrieval.budget.AT_ONCE", 1)
    shelf = Shelf([f"word{place}" for place in range(9)])
    corpus = contextualize(shelf, table(range(9)), anchors("dog"), recipe(budget_tokens=2), count_words)
    assert [passage.document for passage in corpus.passages] == ["d0", "d1"]
    assert shelf.reads == [1, 2]


def judged(chances: dict[str, list[float]], shares: list[float]) -> Judge:
    return Judge(lambda passages: np.array([chances[passage.document] for passage in passages]), np.array(shares))


def test_labels_keep_their_shares_among_sentences_the_teacher_is_sure_of() -> None:
    candidates = [Passage(str(place), "a b", f"d{place}") for place in range(8)]
    chances = {f"d{place}": [0.9, 0.1] for place in range(8)} | {"d1": [0.6, 0.4], "d5": [0.2, 0.8], "d6": [0.1, 0.9]}
    settings = recipe(budget_tokens=8, confidence=0.8)
    kept, shown = confident(candidates, count_words, judged(chances, [0.5, 0.5]), settings)
    assert [passage.document for passage in kept] == ["d0", "d2", "d5", "d6"]
    assert all(passage.tokens == 2 for passage in kept)
    assert shown == 8
    kept, _ = confident(candidates, count_words, judged(chances, [0.75, 0.25]), settings)
    assert [passage.document for passage in kept] == ["d0", "d2", "d3", "d5"]


def test_a_label_that_is_never_given_leaves_only_its_own_share_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook.retrieval.contextualize.AT_ONCE", 2)
    candidates = [Passage(str(place), "a b", f"d{place}") for place in range(90)]
    chances = {f"d{place}": [0.9, 0.1, 0.0] for place in range(90)}
    settings = recipe(budget_tokens=10, confidence=0.5)
    kept, shown = confident(candidates, count_words, judged(chances, [0.4, 0.6, 0.0]), settings)
    assert [passage.document for passage in kept] == ["d0", "d1"]
    assert shown == 20  # 4 budgets of 10 tokens
    kept, shown = confident(candidates, count_words, judged(chances, [1.0, 0.0, 0.0]), settings)
    assert (len(kept), shown) == (5, 6)  # every share is full: the teacher reads no further


def test_a_sentence_that_does_not_fit_ends_its_label() -> None:
    texts = ["a b", "a b c", "a", "a b c"]
    candidates = [Passage(str(place), text, f"d{place}") for place, text in enumerate(texts)]
    chances = {"d0": [1, 0], "d1": [1, 0], "d2": [1, 0], "d3": [0, 1]}
    kept, _ = confident(candidates, count_words, judged(chances, [0.5, 0.5]), recipe(budget_tokens=8, confidence=0.5))
    assert [passage.document for passage in kept] == ["d0", "d3"]


def test_a_corpus_of_confident_sentences_says_what_it_is_short_of() -> None:
    chances = {"d0": [0.9, 0.1], "d1": [0.6, 0.4], "d2": [0.5, 0.5], "d3": [0.05, 0.95]}
    settings = recipe(budget_tokens=12, confidence=0.8)
    hits, asked = table([0, 1], [1, 3]), anchors("cat sat", "dog")
    corpus = contextualize(Shelf(BANK), hits, asked, settings, count_words, judged(chances, [0.5, 0.5]))
    assert rows_of(corpus) == [("d0", 0, 1), ("d3", 1, 1)]
    assert (corpus.statistics["k_star"], corpus.statistics["shortfall_tokens"]) == (2, 1)
    strict = settings.model_copy(update={"confidence": 0.99})
    with pytest.raises(UsageError, match=r"corpus\.confidence=0\.99: of 3 retrieved sentences none .*budget_tokens=12"):
        contextualize(Shelf(BANK), hits, asked, strict, count_words, judged(chances, [0.5, 0.5]))
    for judge in (None, judged(chances, [1.0])):
        with pytest.raises(UsageError, match=r"corpus\.confidence=0\.8 needs the teacher of a classification"):
            contextualize(Shelf(BANK), hits, asked, settings, count_words, judge)


@pytest.mark.parametrize(("queries", "count"), [(["zebra"], 1), ([], 0), (["cats and dogs"], 1)])
def test_anchors_that_find_nothing_are_refused(queries: list[str], count: int) -> None:
    with pytest.raises(UsageError, match=rf"none of the task's {count} anchors.*among the 4 sentences"):
        corpus_of(BANK, anchors(*queries))


def test_a_budget_below_the_first_sentence_is_refused() -> None:
    with pytest.raises(UsageError, match=r"corpus\.budget_tokens=2 is less than the first sentence, 3"):
        corpus_of(BANK, anchors("cat sat", "dog"), budget_tokens=2)


@pytest.mark.parametrize(
    ("hits", "message"),
    [
        (table([0], [1], [2]), "hits of 3 queries.*2 anchors"),
        (table([0], [4]), "up to position 4.*4 sentences"),
        (table([0], [1]), "anchors themselves"),
    ],
)
def test_hits_of_other_anchors_or_another_bank_are_refused(hits: HitTable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contextualize(Shelf(BANK), hits, anchors("cat sat", "The dog sat!"), recipe(), count_words)


def test_a_bank_on_disk_gives_the_same_corpus(tmp_path: Path) -> None:
    settings = recipe(min_words=1, k_max=2, budget_tokens=14)
    documents = [(f"d{place}", text) for place, text in enumerate(BANK)]
    bank = build_bank(documents, LeakGuard([], 0), settings, tmp_path / "bank", tmp_path / "scratch")
    asked = anchors("cat sat", "dog")
    hits = Index.of(bank.texts(range(4)), 1.2, 0.75).search([anchor.text for anchor in asked], 2)
    corpus = contextualize(bank, hits, asked, settings, count_words)
    assert rows_of(corpus) == [("d1", 0, 2), ("d0", 0, 1), ("d3", 1, 1)]
    assert corpus.statistics == corpus_of(BANK, asked, k_max=2, budget_tokens=14).statistics
