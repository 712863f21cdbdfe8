"""Task data augmentation: task texts with some words replaced by likely ones (TinyBERT, Jiao et al., 2020)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice, repeat
from random import Random
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from openbook.config import AugmentSettings
from openbook.retrieval.controls import texts_of
from openbook.retrieval.passages import key, lex
from openbook.types import Example, Passage

PATIENCE = 20  # attempts in sequence that gave nothing new: then a text is exhausted
ROWS_AT_ONCE = 64  # rows whose places the candidates are asked for together
LEAST_COUNT, LEAST_LENGTH, LARGEST_VOCABULARY = 5, 2, 100_000  # of words that may replace others
WORDS_AT_ONCE = 8192  # averaged
ROWS_OF_COSINES = 128  # looked up: as many by 100,000 float64 are 100 MB
DECIMALS = 12  # cosines equal up to rounding tie

_FUNCTION_WORDS = """
a an the this that these those each every either neither some any no none all both half such same other another
much many more most few fewer fewest less least several enough own
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves one ones oneself
who whom whose which what whoever whomever whichever whatever where when why how wherever whenever however
someone somebody something anyone anybody anything everyone everybody everything nobody nothing
others somewhere anywhere everywhere nowhere elsewhere here there sometime sometimes
about above across after against along among amongst around as at before behind below beneath beside besides between
beyond but by despite down during except for from in inside into like near of off on onto out outside over past per
since than through throughout till to toward towards under underneath until unto up upon via with within without
and or nor so yet if unless because although though while whilst whereas whether lest else
am is are was were be been being have has had having do does did doing done
can could may might must shall should will would ought cannot
not never ever always often again once twice also too very just only even still already almost quite rather then
thus now therefore hence moreover nevertheless nonetheless otherwise meanwhile perhaps maybe indeed anyway
somehow further
s t d m ll re ve don didn doesn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn mightn mustn needn
"""  # the last line: what apostrophes cut off
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

NORMALIZER = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
SPLITTER = BertPreTokenizer()

Place = tuple[Sequence[str], int]  # the words of a text, and a position in them
Candidates = Callable[[Sequence[Place]], Sequence[Sequence[str]]]  # what may stand at each place; empty: nothing else
PiecesOf = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # word-piece ids of each word; empty: it has no vector
Texts = tuple[str, str | None]  # of a row
Item = TypeVar("Item")


class Draws(Protocol):
    """Random numbers, as from `random.Random`."""

    def randrange(self, stop: int, /) -> int: ...

    def random(self) -> float: ...


class Template(NamedTuple):
    """A text as words, and what may stand at each position that can change, ascending."""

    words: Sequence[str]
    options: Mapping[int, Sequence[str]]


def augmented(
    examples: Iterable[Example],
    candidates: Candidates,
    settings: AugmentSettings,
    seed: int,
    guard_keys: AbstractSet[str],
) -> Iterator[Passage]:
    """The task's texts, then new variants of them for as long as there are any (section 2.9, `taskda`).

    Rows come in a seeded order, in each round one variant of every row that still has one. In a pair the two texts
    take turns to change. A text is exhausted after 20 attempts in sequence that gave nothing new; `settings.variants`
    is no limit. Rows with evaluation text are left out, and so are variants that equal one.
    The order of `examples` makes no difference, and candidates are asked for when the first variant of a row is due.
    """
    rows = _sources(examples, guard_keys)
    Random(seed).shuffle(rows)
    yield from map(_original, rows)
    yield from _in_turns(
        _numbered(example, _in_turns(_changed(example, templates, settings, seed, guard_keys, endless=True)))
        for example, templates in _prepared(rows, candidates)
    )


def augmented_rows(
    examples: Iterable[Example],
    candidates: Candidates,
    settings: AugmentSettings,
    seed: int,
    guard_keys: AbstractSet[str],
) -> Iterator[Passage]:
    """The same at its native size, row by row: the original, and what `settings.variants` attempts a text give (2.8).

    In a pair, the variants of the first text come before those of the second, each beside the other's original.
    """
    for example, templates in _prepared(_sources(examples, guard_keys), candidates):
        yield _original(example)
        yield from _numbered(example, chain(*_changed(example, templates, settings, seed, guard_keys)))


def variants(
    template: Template,
    settings: AugmentSettings,
    draws: Draws,
    dropped: AbstractSet[str] = frozenset(),
    *,
    endless: bool = False,
) -> Iterator[str]:
    """Different texts, none of them the original or one whose key is `dropped`; a change of case alone is none.

    Each attempt draws, for every position that can change, an option and whether it is put there (section 2.8).
    After `settings.variants` attempts it ends; if `endless`, when 20 in sequence gave nothing new.
    """
    seen = {" ".join(template.words).casefold()}
    fruitless = 0
    for _ in repeat(None) if endless else repeat(None, settings.variants):
        text = _attempt(template, settings.probability, draws)
        if text.casefold() not in seen and not (dropped and key(text) in dropped):
            seen.add(text.casefold())
            fruitless = 0
            yield text
        else:
            fruitless += 1
            if endless and fruitless == PATIENCE:
                return


def _attempt(template: Template, probability: float, draws: Draws) -> str:
    words = list(template.words)
    for position, options in template.options.items():
        option = options[draws.randrange(len(options))]
        if draws.random() < probability:
            words[position] = option
    return " ".join(words)


def basic_tokens(text: str) -> list[str]:
    """Words and punctuation as BERT has them before it cuts word-pieces, in their own case."""
    return [token for token, _ in SPLITTER.pre_tokenize_str(NORMALIZER.normalize_str(text))]


def eligible(word: str) -> bool:
    """Whether a word may be replaced: ASCII letters alone, and no function word."""
    return word.isascii() and word.isalpha() and word.lower() not in FUNCTION_WORDS


def _places(words: Sequence[str]) -> list[Place]:
    return [(words, position) for position, word in enumerate(words) if eligible(word)]


def _sources(examples: Iterable[Example], guard_keys: AbstractSet[str]) -> list[Example]:
    """The rows without evaluation text, by id."""
    allowed = (example for example in examples if guard_keys.isdisjoint(map(key, texts_of(example))))
    return sorted(allowed, key=lambda example: example.id)


def _prepared(rows: Iterable[Example], candidates: Candidates) -> Iterator[tuple[Example, list[Template]]]:
    """Every row with a template for each of its texts."""
    waiting = iter(rows)
    while block := list(islice(waiting, ROWS_AT_ONCE)):
        texts = [[basic_tokens(text) for text in texts_of(example)] for example in block]
        found = iter(candidates([place for row in texts for words in row for place in _places(words)]))
        for example, row in zip(block, texts, strict=True):
            options = [{at: next(found) or [words[at]] for _, at in _places(words)} for words in row]
            yield example, [Template(*parts) for parts in zip(row, options, strict=True)]


def _changed(
    example: Example,
    templates: Sequence[Template],
    settings: AugmentSettings,
    seed: int,
    dropped: AbstractSet[str],
    endless: bool = False,
) -> list[Iterator[Texts]]:
    """For each text of the row, what the row becomes by its variants; each has random numbers of its own."""

    def changed(field: int, template: Template) -> Iterator[Texts]:
        draws = Random(f"{seed} {example.id} {field}")
        for text in variants(template, settings, draws, dropped, endless=endless):
            yield (example.text, text) if field else (text, example.text_pair)

    return [changed(*one) for one in enumerate(templates)]


def _in_turns(streams: Iterable[Iterator[Item]]) -> Iterator[Item]:
    """The first of every stream, then the second of every one that has a second, and so on."""
    while streams:
        going = []
        for stream in streams:
            for item in islice(stream, 1):
                yield item
                going.append(stream)
        streams = going


def _original(example: Example) -> Passage:
    return Passage(f"{example.id}~0", example.text, example.id, example.text_pair)


def _numbered(example: Example, changed: Iterable[Texts]) -> Iterator[Passage]:
    for number, (text, text_pair) in enumerate(changed, start=1):
        yield Passage(f"{example.id}~{number}", text, example.id, text_pair)


class NearestWords:
    """Candidates from a table of each word's neighbours, whatever stands around it. Title case is carried over."""

    def __init__(self, neighbours: Mapping[str, Sequence[str]]) -> None:
        self._neighbours = neighbours

    @classmethod
    def of(
        cls,
        counts: Mapping[str, int],
        words: AbstractSet[str],
        pieces_of: PiecesOf,
        embeddings: NDArray[np.floating[Any]],
        settings: AugmentSettings,
    ) -> Self:
        """A table for these lower-case `words`, from word-piece embeddings (P, d) (section 2.8, fallback (ii)).

        `counts` is of all words in bank and training text; those it makes neighbours of are chosen by `vocabulary`.
        """
        known, vectors = word_vectors(vocabulary(counts), pieces_of, embeddings)
        wanted = [row for row, word in enumerate(known) if word in words]
        found = neighbours(vectors, wanted, settings)
        return cls({known[row]: [known[other] for other, _ in near] for row, near in zip(wanted, found, strict=True)})

    def __call__(self, places: Sequence[Place]) -> list[Sequence[str]]:
        return [self._near(words[position]) for words, position in places]

    def _near(self, word: str) -> Sequence[str]:
        near = self._neighbours.get(word.lower(), ())
        return [other.capitalize() for other in near] if word.istitle() else near


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each `lex` word occurs."""
    return Counter(chain.from_iterable(map(lex, texts)))


def replaceable_words(examples: Iterable[Example]) -> set[str]:
    """The words of the task that may be replaced, in lower case."""
    texts = (basic_tokens(text) for example in examples for text in texts_of(example))
    return {word.lower() for words in texts for word in words if eligible(word)}


def vocabulary(counts: Mapping[str, int]) -> list[str]:
    """The words that may replace others: letters alone, at least two, seen five times, no function words.

    At most the 100,000 most frequent, in the order (-count, word).
    """
    kept = (
        word
        for word, count in counts.items()
        if count >= LEAST_COUNT and len(word) >= LEAST_LENGTH and word.isalpha() and word not in FUNCTION_WORDS
    )
    return sorted(kept, key=lambda word: (-counts[word], word))[:LARGEST_VOCABULARY]


def word_vectors(
    words: Sequence[str], pieces_of: PiecesOf, embeddings: NDArray[np.floating[Any]]
) -> tuple[list[str], NDArray[np.float64]]:
    """The mean of its pieces' embeddings (P, d) for every word that has pieces: those words, and (V, d)."""
    known: list[str] = []
    vectors = [np.empty((0, embeddings.shape[1]))]
    for start in range(0, len(words), WORDS_AT_ONCE):
        block = words[start : start + WORDS_AT_ONCE]
        spelt = [(word, pieces) for word, pieces in zip(block, pieces_of(block), strict=True) if pieces]
        if spelt:
            lengths = np.array([len(pieces) for _, pieces in spelt])
            rows = embeddings[list(chain.from_iterable(pieces for _, pieces in spelt))].astype(np.float64)
            vectors.append(np.add.reduceat(rows, np.cumsum(lengths) - lengths) / lengths[:, None])
            known += [word for word, _ in spelt]
    return known, np.concatenate(vectors)


def neighbours(
    vectors: NDArray[np.float64], wanted: Sequence[int], settings: AugmentSettings
) -> list[list[tuple[int, float]]]:
    """The nearest other rows of `vectors` (V, d) to each wanted one, with their cosines, by (-cosine, row).

    At most `settings.candidates` of them, all with a cosine above `settings.min_cos`; with `center`, of the vectors
    minus their mean over all V.
    """
    if not len(wanted):
        return []
    centred = vectors - vectors.mean(0) if settings.center else vectors
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    found = []
    for start in range(0, len(wanted), ROWS_OF_COSINES):
        block = np.asarray(wanted[start : start + ROWS_OF_COSINES])
        cosines = (unit[block] @ unit.T).round(DECIMALS)  # (B, V)
        cosines[np.arange(len(block)), block] = -np.inf
        found += [_best(line, settings.candidates, settings.min_cos) for line in cosines]
    return found


def _best(cosines: NDArray[np.float64], count: int, least: float) -> list[tuple[int, float]]:
    rows = np.flatnonzero(cosines > least)
    if len(rows) > count:  # the others need no sorting
        rows = rows[cosines[rows] >= np.partition(cosines[rows], -count)[-count]]
    order = np.lexsort((rows, -cosines[rows]))[:count]
    return [(row, float(cosines[row])) for row in rows[order].tolist()]
