"""Words, keys, sentences and the leak guard (fixtures F1 and F7 of the specification)."""

from __future__ import annotations

import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.retrieval.passages import BANDS, FOUND, LeakGuard, band_hashes, key, lex, sentences


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我爱北京2008！", ["我", "爱", "北", "京", "2008"]),
        ("東京タワーへ行く", ["東", "京", "タワーへ", "行", "く"]),
        ("서울 한국", ["서울", "한국"]),
        ("C罗 is 𠮷 々〇", ["c", "罗", "is", "𠮷", "々", "〇"]),
    ],
)
def test_a_chinese_character_is_a_word_of_its_own(text: str, expected: list[str]) -> None:
    assert lex(text) == expected


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_text_is_lexed_like_any_other(text: str) -> None:
    assert lex(text) == lex(f"{text} é")[:-1]


@given(st.text())
def test_words_cover_every_letter_and_digit_once(text: str) -> None:
    folded = unicodedata.normalize("NFKC", text).casefold()
    assert [c for word in lex(text) for c in word if c.isalnum()] == [c for c in folded if c.isalnum()]


def test_sentences_end_at_full_stops_and_line_ends() -> None:
    text = "Dr. Smith  went\thome. He left the cafe\u0301\n\nand a new line\u2028begins"
    assert list(sentences(text, "en")) == ["Dr. Smith went home.", "He left the café", "and a new line", "begins"]


def test_chinese_sentences_end_at_their_own_full_stops() -> None:
    assert list(sentences("我爱北京。天安门很大！你去过吗？", "zh")) == ["我爱北京。", "天安门很大！", "你去过吗？"]


@pytest.mark.parametrize(("ngram", "left"), [(0, [1, 2, 3]), (3, [3])])
def test_guard_blocks_equal_texts_and_shared_runs(ngram: int, left: list[int]) -> None:
    guard = LeakGuard(["the cat sat", "a quick brown fox jumps"], ngram)
    bank = ["The cat sat!", "the cat sat down today", "one quick brown fox", "quick brown dogs jump"]
    assert [i for i, text in enumerate(bank) if not guard.blocks(text)] == left
    assert np.flatnonzero(~guard.blocked([key(text) for text in bank])).tolist() == left
    assert guard.keys == {"the cat sat", "a quick brown fox jumps"}


words = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é"]), max_size=9).map(" ".join)


@given(texts=st.lists(words, max_size=8), evaluation=st.lists(words, max_size=4), ngram=st.integers(0, 4))
def test_the_guard_blocks_what_a_comparison_word_by_word_would(
    texts: list[str], evaluation: list[str], ngram: int
) -> None:
    def leaks(text: str) -> bool:
        tokens = text.split()
        runs = {" ".join(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)} if ngram else set()
        return any(text == other or any(f" {run} " in f" {other} " for run in runs) for other in evaluation)

    guard = LeakGuard(evaluation, ngram)
    assert guard.blocked(texts).tolist() == [leaks(text) for text in texts]
    assert [guard.blocks(text) for text in texts] == [leaks(text) for text in texts]


def test_the_guard_travels_small_and_unchanged() -> None:
    texts = [f"{i} one of many evaluation texts that are quite long {i} so that runs abound {i}" for i in range(5000)]
    guard = LeakGuard(texts, 8)
    packed = pickle.dumps(guard)
    assert len(packed) < 2 * len("".join(texts))
    again = pickle.loads(packed)  # noqa: S301 - our own bytes, as they go to a worker
    assert again.digest() == guard.digest()
    probes = ["x many evaluation texts that are quite long 17 y", "x many evaluation texts that are quite short 17 y"]
    assert again.blocked(probes).tolist() == [True, False]


def test_the_digest_of_a_guard_follows_what_it_blocks() -> None:
    first, *others = (LeakGuard(texts, n) for texts, n in [(["a b", "c"], 8), (["a b"], 8), (["a b", "c"], 0)])
    assert first.digest() == LeakGuard(["C", "a, b", "c"], 8).digest()
    assert first.digest() not in [other.digest() for other in others]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_similar_texts_share_a_band_and_others_do_not(threshold: float) -> None:
    """Pairs of word sets at exactly the threshold: about `FOUND` of them share a band; unlike ones none."""
    total, pairs = 20, 600
    shared = round(threshold * total)
    alone = (total - shared) // 2

    def text(pair: int, side: int) -> str:
        common = [f"p{pair}w{word}" for word in range(shared)]
        return " ".join([*common, *(f"p{pair}s{side}w{word}" for word in range(alone))])

    one, two = (band_hashes([text(pair, side) for pair in range(pairs)], threshold) for side in range(2))
    assert one.shape == (pairs, BANDS)
    assert (one == two).any(axis=1).mean() > FOUND - 0.02
    assert (one == np.roll(two, 1, axis=0)).sum() == 0


def test_bands_depend_on_the_set_of_words_alone() -> None:
    hashes = band_hashes(["a b c", "c b a", "a b b c a", "a b d"], 1)
    assert (hashes[0] == hashes[1]).all()
    assert (hashes[0] == hashes[2]).all()
    assert not (hashes[0] == hashes[3]).any()


def test_an_empty_evaluation_text_blocks_nothing_but_its_like() -> None:
    guard = LeakGuard(["", "…"], ngram=1)
    assert guard.blocked([]).tolist() == []
    assert guard.blocked(["", "a"]).tolist() == [True, False]
