"""Anchors, merge and budget (fixtures F4, F5, F6 of the specification), and the whole against its pseudo-code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.config import CorpusSettings, FileSource, UsageError
from openbook.retrieval.bm25 import Index
from openbook.retrieval.contextualize import Anchor, Found, anchors_of, contextualize, cut, merge
from openbook.retrieval.passages import key
from openbook.types import Corpus, Example, Passage

BANK = ["the cat sat on the mat", "the dog sat", "cats and dogs", "the cat chased the dog"]
ROWS = [Example("t/0", "The cat sat.", "A dog ran!"), Example("t/1", "the cat sat", "Birds fly.")]


def settings(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def passages(texts: Sequence[str]) -> list[Passage]:
    return [Passage(f"bank/{i:06d}", text, f"d{i}") for i, text in enumerate(texts)]


def anchors(*texts: str) -> list[Anchor]:
    return anchors_of([Example(f"t/{i}", text) for i, text in enumerate(texts)], settings(), set())


def corpus_of(texts: Sequence[str], queries: Sequence[Anchor], **changes: object) -> Corpus:
    recipe = settings(**changes)
    return contextualize(passages(texts), Index.build(texts, recipe.k1, recipe.b), queries, recipe, count_words)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("each", {"the cat sat": 2, "a dog ran": 1, "birds fly": 1}),
        ("concat", {"the cat sat a dog ran": 1, "the cat sat birds fly": 1}),
        ("first", {"the cat sat": 2}),
        ("second", {"a dog ran": 1, "birds fly": 1}),
    ],
)
def test_anchors_are_unique_by_key_and_count_their_rows(mode: str, expected: dict[str, int]) -> None:
    found = anchors_of(ROWS, settings(anchor_mode=mode), set())
    assert [(anchor.key, anchor.weight) for anchor in found] == list(expected.items())
    assert all(key(anchor.text) == anchor.key for anchor in found)
    assert len({anchor.id for anchor in found}) == len(found)


def test_the_first_occurrence_is_kept_and_a_row_counts_once() -> None:
    (anchor,) = anchors_of([Example("t/7", "A dog ran!", "a dog ran"), *ROWS[:0]], settings(), set())
    assert anchor == Anchor("t/7#0", "A dog ran!", "a dog ran", 1)
    assert [a.id for a in anchors_of(ROWS, settings(), set())] == ["t/0#0", "t/0#1", "t/1#1"]


@pytest.mark.parametrize(
    ("mode", "expected"), [("each", ["a dog ran", "birds fly"]), ("concat", ["a dog ran", "birds fly"])]
)
def test_texts_that_equal_evaluation_text_are_no_anchors(mode: str, expected: list[str]) -> None:
    found = anchors_of([*ROWS, Example("t/2", "...")], settings(anchor_mode=mode), {"the cat sat"})
    assert [anchor.key for anchor in found] == expected


def test_a_long_text_is_queried_by_sentence() -> None:
    sentence = "w " * 63 + "end. "
    whole = [Example("t/0", sentence * 2)]  # 128 words
    split = [Example("t/0", "Leaked here. " + sentence + "Another one. " + sentence)]
    assert [anchor.text for anchor in anchors_of(whole, settings(), set())] == [sentence * 2]
    found = anchors_of(split, settings(), {"leaked here"})
    assert [(anchor.id, anchor.text) for anchor in found] == [("t/0#1", sentence.strip()), ("t/0#2", "Another one.")]


def test_labels_and_repeated_rows_change_weights_at_most() -> None:
    once = anchors_of(ROWS, settings(), set())
    assert anchors_of([replace(row, label=1) for row in ROWS], settings(), set()) == once
    twice = anchors_of([*ROWS, ROWS[0]], settings(), set())
    assert [anchor.weight for anchor in twice] == [3, 2, 1]
    assert [replace(anchor, weight=0) for anchor in twice] == [replace(anchor, weight=0) for anchor in once]


ORDER = [Found(1, 0, 2), Found(0, 0, 1), Found(3, 1, 1)]


def test_merge_orders_by_rank_then_anchors_then_position() -> None:
    assert merge([[0, 1], [1, 3]]) == ORDER
    assert merge([[2], [1]]) == [Found(1, 0, 1), Found(2, 0, 1)]
    assert merge([[], []]) == []


@pytest.mark.parametrize(
    ("budget", "k", "sentences", "shortfall"),
    [
        (2, 1, 0, 0),
        (3, 1, 1, 0),
        (8, 1, 1, 0),
        (9, 1, 2, 0),
        (10, 2, 2, 0),
        (13, 2, 2, 0),
        (14, 2, 3, 0),
        (20, 2, 3, 6),
    ],
)
def test_the_budget_cuts_a_prefix_and_skips_nothing(budget: int, k: int, sentences: int, shortfall: int) -> None:
    assert cut(ORDER, [3, 6, 5], budget, k_max=2) == (k, sentences, shortfall)


def test_k_comes_from_the_grid_and_never_exceeds_k_max() -> None:
    order = [Found(position, position, 1) for position in range(60)]
    assert [cut(order, [1] * 60, budget, k_max=60).k for budget in (1, 2, 3, 6, 11, 20, 21, 51)] == [
        1, 2, 5, 10, 20, 20, 50, 60
    ]  # fmt: skip
    assert cut(order, [1] * 60, 60, k_max=5000) == (100, 60, 0)  # just enough is no shortfall


def test_a_corpus_of_the_specification() -> None:
    corpus = corpus_of(BANK, anchors("cat sat", "dog"), k_max=2, budget_tokens=14)
    assert [(p.id, p.document, p.rank, p.anchors, p.tokens) for p in corpus.passages] == [
        ("bank/000001", "d1", 0, 2, 3),
        ("bank/000000", "d0", 0, 1, 6),
        ("bank/000003", "d3", 1, 1, 5),
    ]
    examples = corpus.statistics["examples"]
    assert {one["anchor"]: one["hits"] for one in examples} == {
        "cat sat": [BANK[0], BANK[1]],
        "dog": [BANK[1], BANK[3]],
    }
    assert {name: value for name, value in corpus.statistics.items() if name != "examples"} == {
        "anchors": 2, "anchors_without_hit": 0, "k_star": 2, "unique_fraction": 0.75, "sentences": 3, "tokens": 14,
        "budget_tokens": 14, "shortfall_tokens": 0, "mean_words": pytest.approx(14 / 3),
    }  # fmt: skip


def test_a_sentence_that_is_an_anchor_is_left_out_and_ranks_close_up() -> None:
    corpus = corpus_of(BANK, anchors("cat sat", "dog", "The dog sat.", "zebra"), k_max=2, budget_tokens=20)
    assert [(p.id, p.rank, p.anchors) for p in corpus.passages] == [("bank/000003", 0, 3), ("bank/000000", 0, 2)]
    assert corpus.statistics["anchors_without_hit"] == 1
    assert corpus.statistics["shortfall_tokens"] == 9
    assert {one["anchor"]: one["hits"] for one in corpus.statistics["examples"]} == {
        "cat sat": [BANK[0], BANK[3]],
        "dog": [BANK[3]],
        "The dog sat.": [BANK[3], BANK[0]],
    }


def pseudo_code(
    texts: list[str], queries: list[str], k_max: int, budget: int
) -> tuple[list[tuple[int, int, int]], int]:
    """Section 2.5 line by line over complete rankings: (position, r, c) of the corpus, and k*."""
    rankings = Index.build(texts, 1.2, 0.75).search(queries, len(texts))
    hits = [[hit.position for hit in row if texts[hit.position] not in queries][:k_max] for row in rankings]
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
    return [(s, r[s], c[s]) for s in chosen], k, unique


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join)


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
    assert [(int(p.id[5:]), p.rank, p.anchors) for p in corpus.passages] == expected
    assert corpus.statistics["k_star"] == k
    assert corpus.statistics["unique_fraction"] == pytest.approx(unique)
    assert all(p.rank < k for p in corpus.passages)
    assert not {p.text for p in corpus.passages} & set(queries)
    shuffle.shuffle(asked)
    assert corpus_of(texts, asked, k_max=k_max, budget_tokens=budget) == corpus
    larger = corpus_of(texts, asked, k_max=k_max, budget_tokens=budget + 5)
    assert larger.passages[: len(corpus.passages)] == corpus.passages


def test_chunks_change_nothing_and_tokens_are_counted_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = anchors("cat sat", "dog", "cats")
    whole = corpus_of(BANK, queries, budget_tokens=4)
    monkeypatch.setattr("openbook.retrieval.contextualize.CHUNK", 1)
    measured: list[str] = []
    heard: list[int] = []

    def count(texts: Sequence[str]) -> list[int]:
        measured.extend(texts)
        return count_words(texts)

    recipe = settings(budget_tokens=4)
    again = contextualize(passages(BANK), Index.build(BANK, 1.2, 0.75), queries, recipe, count, heard.append)
    assert again == whole
    assert measured == [BANK[1], BANK[0]]
    assert heard == [1, 2, 3]


@pytest.mark.parametrize(("queries", "count"), [(["zebra"], 1), ([], 0), (["cats and dogs"], 1)])
def test_anchors_that_find_nothing_are_refused(queries: list[str], count: int) -> None:
    with pytest.raises(UsageError, match=rf"none of the task's {count} anchors.*among the 4 sentences"):
        corpus_of(BANK, anchors(*queries))


def test_a_budget_below_the_first_sentence_is_refused() -> None:
    with pytest.raises(UsageError, match=r"corpus\.budget_tokens=2 is less than the first sentence, 3"):
        corpus_of(BANK, anchors("cat sat", "dog"), budget_tokens=2)


def test_an_index_of_another_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 4 texts, the bank 3"):
        contextualize(passages(BANK[:3]), Index.build(BANK, 1.2, 0.75), anchors("dog"), settings(), count_words)
