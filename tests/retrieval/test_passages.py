"""The bank: words, sentences, filters, the leak guard and the shuffle (fixtures F1 and F7 of the specification)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.config import CorpusSettings, FileSource, UsageError
from openbook.retrieval.passages import LeakGuard, build_bank, key, sentences

NO_GUARD = LeakGuard((), 8)


def settings(**changes: object) -> CorpusSettings:
    return CorpusSettings(sources=(FileSource(path="unused"),), **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Cat, sat. ", "the cat sat"),
        ("Don't  panic!", "don t panic"),
        ("Straße \ufb01n", "strasse fin"),
        ("Ｎo. ②", "no 2"),
        ("…", ""),
    ],
)
def test_key_keeps_only_folded_words(text: str, expected: str) -> None:
    assert key(text) == expected


def test_sentences_end_at_full_stops_and_line_ends() -> None:
    text = "Dr. Smith  went\thome. He left the cafe\u0301\n\nand a new line\u2028begins"
    assert list(sentences(text, "en")) == ["Dr. Smith went home.", "He left the café", "and a new line", "begins"]


@pytest.mark.parametrize(("ngram", "left"), [(0, [1, 2, 3]), (3, [3])])
def test_guard_blocks_equal_texts_and_shared_runs(ngram: int, left: list[int]) -> None:
    guard = LeakGuard(["the cat sat", "a quick brown fox jumps"], ngram)
    bank = ["The cat sat!", "the cat sat down today", "one quick brown fox", "quick brown dogs jump"]
    assert [i for i, text in enumerate(bank) if not guard.blocks(text)] == left
    assert guard.keys == {"the cat sat", "a quick brown fox jumps"}


def test_each_filter_counts_what_it_removes() -> None:
    documents = [
        ("short", "one two three four"),
        ("ok", "one two three four five"),
        ("long", "a b c d e f g h"),
        ("digits", "a 1 b 2 c 345"),
        ("half", "ab 1 cd 2 e 345"),
        ("leak", "the leaked sentence is here"),
        ("again", "One, two, three, four: FIVE!"),
        ("many", "The first of them is good. The second of them is good."),
    ]
    bank, counts = build_bank(documents, LeakGuard(["The leaked sentence is here."], 8), settings(max_words=6))
    assert counts == {
        "documents": 8, "sentences": 9, "kept": 4,
        "too_short": 1, "too_long": 1, "not_text": 1, "leaked": 1, "duplicate": 1,
    }  # fmt: skip
    assert {(passage.document, passage.text) for passage in bank} == {
        ("ok", "one two three four five"),  # the first occurrence stays
        ("half", "ab 1 cd 2 e 345"),  # 5 letters of 10
        ("many", "The first of them is good."),
        ("many", "The second of them is good."),
    }


def test_the_shuffle_depends_on_the_seed_alone() -> None:
    documents = [(f"d{i}", f"this is sentence number {i}") for i in range(50)]
    bank, _ = build_bank(documents, NO_GUARD, settings())
    again, _ = build_bank(iter(documents), NO_GUARD, settings())
    other, _ = build_bank(documents, NO_GUARD, settings(seed=1))
    assert bank == again
    assert [passage.id for passage in bank] == [f"bank/{i:06d}" for i in range(50)]
    texts, other_texts = ([passage.text for passage in one] for one in (bank, other))
    assert texts != other_texts
    assert sorted(texts) == sorted(other_texts) == sorted(text for _, text in documents)
    assert texts != [text for _, text in documents]


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map(" ".join)


@given(bank=st.lists(words, min_size=1, max_size=20), evaluation=st.lists(words, max_size=4), ngram=st.integers(0, 4))
def test_nothing_in_the_bank_repeats_evaluation_text(bank: list[str], evaluation: list[str], ngram: int) -> None:
    documents = [("only", text) for text in ["x y z", *bank]]  # "x y z" keeps the bank from being empty
    kept, counts = build_bank(documents, LeakGuard(evaluation, ngram), settings(min_words=1))

    def leaks(text: str) -> bool:
        tokens = text.split()
        runs = {" ".join(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)} if ngram else set()
        return any(text == other or any(f" {run} " in f" {other} " for run in runs) for other in evaluation)

    assert sorted(passage.text for passage in kept) == sorted({text for text in ["x y z", *bank] if not leaks(text)})
    removed = ("too_short", "too_long", "not_text", "leaked", "duplicate", "kept")
    assert sum(counts[name] for name in removed) == counts["sentences"]


def test_an_empty_bank_is_refused_with_its_counts() -> None:
    with pytest.raises(
        UsageError, match=r"corpus\.sources.*documents=1, sentences=2, too_short=2.*corpus\.min_words=5"
    ):
        build_bank([("d", "Too short. This too.")], NO_GUARD, settings())


def test_progress_hears_the_documents_done() -> None:
    heard: list[int] = []
    build_bank([("d", "one two three four five"), ("e", "")], NO_GUARD, settings(), heard.append)
    assert heard == [1, 2]
