"""Task data augmentation: fixtures F12, F13 and F14 of the specification, then its property 7."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice, product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from openbook.config import AugmentSettings
from openbook.retrieval import augment
from openbook.retrieval.augment import (
    FUNCTION_WORDS,
    NearestWords,
    Place,
    Template,
    augmented,
    augmented_rows,
    basic_tokens,
    count_words,
    eligible,
    neighbours,
    replaceable_words,
    variants,
    vocabulary,
    word_vectors,
)
from openbook.retrieval.passages import key
from openbook.types import Example, Passage

WORDS = ("good", "great", "bad", "movie", "film")
VECTORS = np.array([(2, 1, 0), (2, 2, 0), (2, -1, 0), (1, 0, 2), (1, 0, 3)], dtype=np.float64)
NEAR = {"good": ["great", "bad"], "movie": ["film"]}
GOOD_MOVIE = Template(["good", "movie"], {0: ["great", "bad"], 1: ["film"]})


class Script:
    """Draws written down: (index, x) pairs."""

    def __init__(self, *pairs: tuple[int, float]) -> None:
        self.indices, self.numbers = ([pair[part] for pair in pairs] for part in (0, 1))
        self.stops: list[int] = []

    def randrange(self, stop: int, /) -> int:
        self.stops.append(stop)
        return self.indices.pop(0)

    def random(self) -> float:
        return self.numbers.pop(0)


class Table:
    """Candidates by word, and which places were asked for."""

    def __init__(self, options: dict[str, list[str]]) -> None:
        self.options = options
        self.asked: list[str] = []

    def __call__(self, places: Sequence[Place]) -> list[list[str]]:
        self.asked += [words[position] for words, position in places]
        return [self.options.get(words[position].lower(), []) for words, position in places]


def settings(**changes: object) -> AugmentSettings:
    return AugmentSettings(**changes)


def texts_of(passages: Sequence[Passage]) -> list[tuple[str, str | None]]:
    return [(one.text, one.text_pair) for one in passages]


def near_of(row: int, **changes: object) -> list[tuple[str, float]]:
    (found,) = neighbours(VECTORS, [row], settings(candidates=2, **changes))
    return [(WORDS[other], cosine) for other, cosine in found]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("good", [("great", 0.891544), ("bad", 0.146944)]),
        ("great", [("good", 0.891544)]),
        ("bad", [("good", 0.146944)]),
        ("movie", [("film", 0.961412)]),
        ("film", [("movie", 0.961412)]),
    ],
)
def test_f12_neighbours(word: str, expected: list[tuple[str, float]]) -> None:
    np.testing.assert_allclose(VECTORS.mean(0), [1.6, 0.4, 1])
    found = near_of(WORDS.index(word))
    assert [other for other, _ in found] == [other for other, _ in expected]
    assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in expected], abs=1e-6)


def test_f12_neighbours_uncentred() -> None:
    good, movie = dict(near_of(0, center=False)), dict(near_of(3, center=False))
    assert good == pytest.approx({"great": 0.948683, "bad": 0.6}, abs=1e-6)
    assert movie["film"] == pytest.approx(0.989949, abs=1e-6)


def test_f12_from_word_pieces_to_candidates() -> None:
    """The words in the order of their counts, each its own word-piece; a sixth piece belongs to none of them."""
    counts = {word: 10 - place for place, word in enumerate(WORDS)} | {"the": 99, "x": 99, "rare": 4}
    embeddings = np.vstack([VECTORS, [9, 9, 9]]).astype(np.float32)
    table = NearestWords.of(
        counts, {"good", "movie", "unseen"}, lambda words: [[WORDS.index(w)] for w in words], embeddings, settings()
    )
    words = ["Good", "movie", "great", "unseen", "GOOD"]
    found = table([(words, position) for position in range(len(words))])
    assert list(map(list, found)) == [["Great", "Bad"], ["film"], [], [], ["great", "bad"]]


def test_f13_draws() -> None:
    draws = Script((0, 0.10), (0, 0.90), (1, 0.39), (0, 0.40), (1, 0.55), (0, 0.41), (0, 0.10), (0, 0.70))
    assert list(variants(GOOD_MOVIE, settings(variants=4, probability=0.4), draws)) == ["great movie", "bad movie"]
    assert (draws.indices, draws.numbers) == ([], [])
    assert draws.stops == [2, 1] * 4


def test_f13_the_original_comes_first() -> None:
    row = Example("t/0", "good movie")
    for corpus in (augmented, augmented_rows):
        texts = texts_of(list(corpus([row], Table(NEAR), settings(), 0, set())))
        assert texts[0] == ("good movie", None)
        assert {text for text, _ in texts} == {"good movie", "great movie", "bad movie"} | {
            f"{word} film" for word in ("good", "great", "bad")
        }


@pytest.mark.parametrize(("options", "expected"), [(["great", "bad"], 0.8), (["great", "bad", "good"], 0.666667)])
def test_f13_expected_replacements_an_attempt(options: list[str], expected: float) -> None:
    """The mean over every option and ten equally likely x, one in each tenth, at both positions."""
    template = Template(["good", "movie"], {0: options, 1: ["film"]})
    tenths = [0.05 + tenth / 10 for tenth in range(10)]
    changes = []
    for index, x, y in product(range(len(options)), tenths, tenths):
        found = list(variants(template, settings(variants=1, probability=0.4), Script((index, x), (0, y))))
        words = found[0].split() if found else template.words
        changes.append(sum(word != own for word, own in zip(words, template.words, strict=True)))
    assert np.mean(changes) == pytest.approx(expected, abs=1e-6)


PAIR = Example("t/0", "The good one.", "A movie!")


def test_f14_pair_rows() -> None:
    texts = texts_of(list(augmented_rows([PAIR], Table(NEAR), settings(probability=1), 0, set())))
    assert texts[0] == ("The good one.", "A movie!")
    assert sorted(texts[1:3]) == [("The bad one .", "A movie!"), ("The great one .", "A movie!")]
    assert texts[3:] == [("The good one.", "A film !")]


def test_in_rounds_the_texts_of_a_pair_take_turns() -> None:
    passages = list(augmented([PAIR], Table(NEAR), settings(probability=1), 0, set()))
    assert [one.text_pair for one in passages] == ["A movie!", "A movie!", "A film !", "A movie!"]
    assert [one.text == PAIR.text for one in passages] == [True, False, True, False]
    assert len({one.id for one in passages}) == 4
    assert {one.document for one in passages} == {"t/0"}


texts = st.lists(
    st.sampled_from(["good", "Movie", "the", "don't", "fine,", "café", "3d", "GREAT", "...", "of"]),
    min_size=1,
    max_size=9,
).map(" ".join)
options = st.lists(st.sampled_from(["fun", "dull", "movie", "Good", "good"]), max_size=4)


@trying(max_examples=50, deadline=None)
@given(texts, st.dictionaries(st.sampled_from(["good", "movie", "fine", "great"]), options), st.integers(0, 9))
def test_property_7_variants_differ_and_only_eligible_words_change(
    text: str, near: dict[str, list[str]], seed: int
) -> None:
    row, chosen = Example("t/0", text), settings(variants=6, probability=0.6)
    own = basic_tokens(text)
    found = [one.text for one in augmented_rows([row], Table(near), chosen, seed, set())][1:]
    assert len(found) <= 6
    assert len({one.casefold() for one in [" ".join(own), *found]}) == len(found) + 1
    for one in found:
        words = one.split(" ")
        assert len(words) == len(own)
        for word, before in zip(words, own, strict=True):
            assert word == before or (eligible(before) and word in near[before.lower()])


@trying(max_examples=50, deadline=None)
@given(texts)
def test_property_7_probability_0_gives_none(text: str) -> None:
    near = {"good": ["bad"], "movie": ["film"], "fine": ["nice"]}
    for corpus in (augmented, augmented_rows):
        assert len(list(corpus([Example("t/0", text)], Table(near), settings(probability=0), 0, set()))) == 1


ROWS = [Example(f"t/{number}", f"good {number} movie", "good" if number % 2 else None) for number in range(30)]


@pytest.mark.parametrize("corpus", [augmented, augmented_rows])
def test_property_7_the_order_of_the_rows_makes_no_difference(corpus: object) -> None:
    orders = [ROWS, ROWS[::-1], Random(0).sample(ROWS, len(ROWS))]
    made = [list(corpus(rows, Table(NEAR), settings(), 5, set())) for rows in orders]
    assert made[0] == made[1] == made[2]
    assert made[0] != list(corpus(ROWS, Table(NEAR), settings(), 6, set()))


def test_a_row_has_the_same_variants_in_any_company() -> None:
    alone = list(augmented(ROWS[7:8], Table(NEAR), settings(), 5, set()))
    among = [one for one in augmented(ROWS, Table(NEAR), settings(), 5, set()) if one.document == "t/7"]
    assert among == alone


def test_rows_and_fields_have_different_random_numbers() -> None:
    near = {"good": [f"w{number}" for number in range(1000)]}
    rows = [Example(f"t/{number}", "good", "good") for number in range(20)]
    passages = list(augmented_rows(rows, Table(near), settings(variants=3, probability=1), 0, set()))
    drawn = [word for one in passages for word in (one.text, one.text_pair) if word != "good"]
    assert len(set(drawn)) > 110 > 100 < len(drawn) <= 120


def test_each_round_has_one_variant_of_every_row_that_is_not_exhausted() -> None:
    rows = [Example("t/few", "good"), Example("t/none", "the 3d"), *(Example(f"t/{n}", f"movie {n}") for n in range(9))]
    near = {"good": ["bad", "poor"], "movie": [f"film{n}" for n in range(3)]}
    made = [one.document for one in augmented(rows, Table(near), settings(probability=1), 0, set())]
    first = made[:11]
    assert sorted(first) == sorted(row.id for row in rows)
    assert first != sorted(first)
    second, third = ([name for name in first if name != left_out] for left_out in ("t/none", "t/none"))
    fourth = [name for name in first if name not in ("t/none", "t/few")]
    assert made[11:] == [*second, *third, *fourth]


def test_a_text_is_exhausted_after_twenty_attempts_in_sequence() -> None:
    """Attempts 1 and 21 give something new; 20 later it ends, whatever the number of attempts in the settings."""
    late = [(0, 0.1), *[(0, 0.9)] * 19, (1, 0.1)]
    script = Script(*late, *[(0, 0.9)] * 40)
    one = Template(["good"], {0: ["great", "bad"]})
    assert list(variants(one, settings(variants=1), script, endless=True)) == ["great", "bad"]
    assert len(script.numbers) == 20
    early = Script(*[(0, 0.9)] * 20, (1, 0.1))
    assert list(variants(one, settings(), early, endless=True)) == []


def test_a_change_of_case_is_nothing_new() -> None:
    one = Template(["Good", "Film"], {0: ["good", "GOOD"]})
    assert list(variants(one, settings(probability=1), Random(0))) == []


def test_a_place_without_candidates_keeps_its_word() -> None:
    table = Table({})
    assert len(list(augmented([Example("t/0", "good movie")], table, settings(probability=1), 0, set()))) == 1
    assert table.asked == ["good", "movie"]


@pytest.mark.parametrize("corpus", [augmented, augmented_rows])
def test_evaluation_text_is_neither_source_nor_variant(corpus: object) -> None:
    rows = [
        Example("t/0", "Good film!"),
        Example("t/1", "fine", "good FILM"),
        Example("t/2", "good film", "fine"),
        Example("t/3", "good movie", "good"),
    ]
    near = {**NEAR, "film": ["movie"]}
    made = list(corpus(rows, Table(near), settings(variants=200), 0, {"good film", "great movie"}))
    assert {one.document for one in made} == {"t/3"}
    keys = {key(text) for one in made for text in (one.text, one.text_pair)}
    assert keys == {"good movie", "bad movie", "great film", "bad film", "good", "great", "bad"}


def test_a_text_whose_variants_are_all_evaluation_text_ends() -> None:
    row = Example("t/0", "movie")
    assert len(list(augmented([row], Table(NEAR), settings(probability=1), 0, {"film"}))) == 1


def test_candidates_are_asked_for_when_they_are_due() -> None:
    table = Table(NEAR)
    corpus = augmented((Example(f"t/{n:03d}", f"good {n}") for n in range(200)), table, settings(), 0, set())
    assert len(list(islice(corpus, 200))) == 200
    assert table.asked == []
    next(corpus)
    assert len(table.asked) == augment.ROWS_AT_ONCE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't pay $3.5m, co-founder_x!", "Don ' t pay $ 3 . 5m , co - founder _ x !"),
        ("  a\tb\u200b\n", "a b"),
        ("Café ÜBER", "Café ÜBER"),
        ("x中文y", "x 中 文 y"),
    ],
)
def test_tokens_are_those_of_bert(text: str, expected: str) -> None:
    assert " ".join(basic_tokens(text)) == expected


@pytest.mark.parametrize("word", ["movie", "Movie", "GREAT", "b"])
def test_plain_words_are_eligible(word: str) -> None:
    assert eligible(word)


@pytest.mark.parametrize("word", ["the", "The", "NOT", "don", "t", "café", "3d", "2", "x_y", ",", "", "ﬁne"])
def test_function_words_and_others_are_not(word: str) -> None:
    assert not eligible(word)


def test_function_words_are_single_lower_case_words() -> None:
    assert len(FUNCTION_WORDS) > 200
    assert all(word.islower() and word.isalpha() and word.isascii() for word in FUNCTION_WORDS)


def test_words_are_counted_as_retrieval_sees_them() -> None:
    assert count_words(["The cat, the CAT", "a cat"]) == Counter({"cat": 3, "the": 2, "a": 1})


def test_replaceable_words_come_from_every_text() -> None:
    assert replaceable_words([PAIR, Example("t/1", "Great movie of 1999")]) == {"good", "movie", "great"}


def test_the_vocabulary_has_frequent_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"zebra": 7, "apple": 7, "pear": 5, "rare": 4, "x": 9, "the": 99, "b2b": 9, "don": 9, "über": 9}
    assert vocabulary(counts) == ["über", "apple", "zebra", "pear"]
    monkeypatch.setattr(augment, "LARGEST_VOCABULARY", 2)
    assert vocabulary(counts) == ["über", "apple"]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_word_is_the_mean_of_its_pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "WORDS_AT_ONCE", at_once)
    pieces = {"ab": [0, 1, 1], "lost": [], "c": [3], "dd": [2, 3]}
    embeddings = np.array([[3, 0], [0, 3], [8, 8], [1, 2]], dtype=np.float32)
    words, vectors = word_vectors(list(pieces), lambda some: [pieces[word] for word in some], embeddings)
    assert words == ["ab", "c", "dd"]
    np.testing.assert_allclose(vectors, [[1, 2], [1, 2], [4.5, 5]])


def test_no_words_have_no_vectors() -> None:
    words, vectors = word_vectors([], lambda some: [], np.ones((3, 2), np.float32))
    assert (words, vectors.shape) == ([], (0, 2))
    assert NearestWords.of({}, {"good"}, lambda some: [], np.ones((3, 2), np.float32), settings())([(["good"], 0)]) == [
        ()
    ]


@trying(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.booleans())
def test_neighbours_are_the_best_by_cosine_then_place(seed: int, count: int, center: bool) -> None:
    """Small whole numbers, so that many cosines are equal."""
    vectors = np.random.default_rng(seed).integers(-1, 2, (12, 2)).astype(np.float64)
    given_settings = settings(candidates=count, center=center)
    centred = vectors - vectors.mean(0) * center
    for row, found in enumerate(neighbours(vectors, range(12), given_settings)):
        cosines = {
            other: float(
                centred[row] @ centred[other] / np.sqrt((centred[row] ** 2).sum() * (centred[other] ** 2).sum())
            )
            for other in range(12)
            if other != row and centred[row].any() and centred[other].any()
        }
        best = sorted((-round(cosine, 9), other) for other, cosine in cosines.items() if round(cosine, 9) > 0)[:count]
        assert [other for other, _ in found] == [other for _, other in best]


@pytest.mark.parametrize("at_once", [1, 2])
def test_blocks_make_no_difference_to_neighbours(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = neighbours(VECTORS, range(5), settings())
    monkeypatch.setattr(augment, "ROWS_OF_COSINES", at_once)
    assert neighbours(VECTORS, range(5), settings()) == expected


def test_the_least_cosine_is_not_enough() -> None:
    square = np.array([[1.0, 0], [0, 1], [1, 1]])
    assert neighbours(square, [0], settings(center=False)) == [[(2, pytest.approx(0.5**0.5))]]
    assert neighbours(square, [0], settings(center=False, min_cos=0.8)) == [[]]
