"""The inner loops of BM25, compiled: counting postings, and finding the best texts without scoring them all.

Texts are numbered by (length, position), so that a block of neighbours has one length norm and tight bounds. Block by
block, the postings of a query's rarer words are added up and its other words are only bounded (MaxScore: Turtle and
Flood, Query evaluation: strategies and optimizations, 1995). What may still be among the best is scored exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openbook.native import compiled

COUNT_BITS = 4  # of a posting: occurrences in the text; the upper 28 are the number of the text
MANY = (1 << COUNT_BITS) - 1  # stands for this many occurrences or more
DECIMALS = 10  # scores equal up to rounding tie
GRID = 2.0**-44  # weights are multiples of it: below 512 their float64 sums do not depend on the order
SHARE = 0.4  # of the score to beat, left to words that are only bounded; measured, any value finds the same
ROUNDING = 2.0**-20  # a word: more than float32 sums can be off by
TINY = 1e-30


class Arrays(NamedTuple):
    """An index. Words are numbered by (-df, first occurrence), texts by (length, position)."""

    positions: NDArray[np.int32]  # (n,) of the text in the bank
    text_starts: NDArray[np.int64]  # (n + 1,)
    text_words: NDArray[np.int32]  # (W,) those of text t, ascending, repeated, at text_starts[t]:text_starts[t + 1]
    word_starts: NDArray[np.int64]  # (V + 1,)
    postings: NDArray[np.uint32]  # (P,) those of word w ascending at word_starts[w]:word_starts[w + 1]
    edges: NDArray[np.int64]  # (B + 1,) block i holds the texts edges[i]:edges[i + 1]
    block_starts: NDArray[np.int64]  # (F, B + 1) where the postings of a frequent word enter each block
    block_counts: NDArray[np.uint8]  # (F, B) most occurrences of a frequent word in one text of the block, up to MANY


class Weights(NamedTuple):
    """What follows from an index, k1 and b."""

    idf: NDArray[np.float64]  # (V,)
    base: float  # the norm of a text of length |s|, k1 (1 - b + b |s| / L), is base + slope |s|
    slope: float
    saturation: NDArray[np.float32]  # (B, MANY + 1) bound of tf / (tf + norm) for each count of a posting
    schedule: NDArray[np.int64]  # (B,) the blocks, so that the first few are a sample of all lengths


class Scratch(NamedTuple):
    """What a thread works in."""

    slots: NDArray[np.int32]  # (V,) numbers the words of the query from 1; 0 = not in it
    sums: NDArray[np.float32]  # what was added up so far for each text of the block
    found: NDArray[np.int64]  # texts of the block that may be among the best
    begins: NDArray[np.int64]  # where their words are


class Heap(NamedTuple):
    """The best hits so far; the worst of them is the root."""

    scores: NDArray[np.float64]  # (k,)
    positions: NDArray[np.int64]  # (k,)


@compiled
def place_texts(
    words: NDArray[np.int32],
    lengths: NDArray[np.int32],
    number_of: NDArray[np.int32],
    places: NDArray[np.int64],
    text_starts: NDArray[np.int64],
    text_words: NDArray[np.int32],
) -> None:
    """Writes the words of one shard's texts, renumbered and ascending, to where the texts belong."""
    start = 0
    for text in range(len(lengths)):
        target = text_starts[places[text]]
        length = lengths[text]
        for word in range(length):
            text_words[target + word] = number_of[words[start + word]]
        text_words[target : target + length].sort()
        start += length


@compiled
def count_texts(words: NDArray[np.int32], lengths: NDArray[np.int32], vocabulary: int) -> NDArray[np.int64]:
    """In how many texts each word occurs: (V,)."""
    frequencies, last = np.zeros(vocabulary, np.int64), np.full(vocabulary, -1, np.int64)
    start = 0
    for text in range(len(lengths)):
        for word in words[start : start + lengths[text]]:
            if last[word] != text:
                last[word] = text
                frequencies[word] += 1
        start += lengths[text]
    return frequencies


@compiled
def invert(
    text_starts: NDArray[np.int64],
    text_words: NDArray[np.int32],
    word_starts: NDArray[np.int64],
    postings: NDArray[np.uint32],
) -> None:
    """Fills the postings from the words of the texts."""
    ends = word_starts[:-1].copy()
    for text in range(len(text_starts) - 1):
        place, end = text_starts[text], text_starts[text + 1]
        while place < end:
            word, count = text_words[place], 0
            while place < end and text_words[place] == word:
                place += 1
                count += 1
            postings[ends[word]] = (text << COUNT_BITS) | min(count, MANY)
            ends[word] += 1


@compiled
def find_blocks(
    word_starts: NDArray[np.int64],
    postings: NDArray[np.uint32],
    edges: NDArray[np.int64],
    block_starts: NDArray[np.int64],
    block_counts: NDArray[np.uint8],
) -> None:
    """Fills the tables of the frequent words."""
    for word in range(len(block_starts)):
        place, end = word_starts[word], word_starts[word + 1]
        block_starts[word, 0] = place
        for block in range(len(edges) - 1):
            most = 0
            while place < end and (postings[place] >> COUNT_BITS) < edges[block + 1]:
                most = max(most, postings[place] & MANY)
                place += 1
            block_starts[word, block + 1] = place
            block_counts[word, block] = most


@compiled
def exact_score(words: NDArray[np.int32], norm: float, slots: NDArray[np.int32], factors: NDArray[np.float64]) -> float:
    """The score in float64 of a text with these words, ascending. Rounded: equal sums tie."""
    total, place = 0.0, 0
    while place < len(words):
        word, count = words[place], 1
        place += 1
        if slots[word]:
            while place < len(words) and words[place] == word:
                place += 1
                count += 1
            total += np.rint(factors[slots[word] - 1] * count / (count + norm) / GRID) * GRID
    return float(np.rint(total * 10.0**DECIMALS) / 10.0**DECIMALS)


@compiled
def is_worse(score: float, position: int, other: float, other_position: int) -> bool:
    return score < other or (score == other and position > other_position)


@compiled
def sift_down(heap: Heap, size: int, score: float, position: int) -> None:
    """Puts a hit where the root was, and lets it sink to its place."""
    scores, positions = heap
    place = 0
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and is_worse(scores[child + 1], positions[child + 1], scores[child], positions[child]):
            child += 1
        if not is_worse(scores[child], positions[child], score, position):
            break
        scores[place], positions[place] = scores[child], positions[child]
        place = child
    scores[place], positions[place] = score, position


@compiled
def offer(heap: Heap, size: int, score: float, position: int) -> int:
    """Puts a hit into the heap if there is room or it beats the worst; the heap's new size."""
    scores, positions = heap
    if size == len(scores):
        if is_worse(scores[0], positions[0], score, position):
            sift_down(heap, size, score, position)
        return size
    place = size
    while place and is_worse(score, position, scores[(place - 1) // 2], positions[(place - 1) // 2]):
        scores[place], positions[place] = scores[(place - 1) // 2], positions[(place - 1) // 2]
        place = (place - 1) // 2
    scores[place], positions[place] = score, position
    return size + 1


@compiled
def sort_heap(heap: Heap, size: int) -> None:
    """Best first."""
    scores, positions = heap
    for last in range(size - 1, 0, -1):
        score, position = scores[last], positions[last]
        scores[last], positions[last] = scores[0], positions[0]
        sift_down(heap, last, score, position)


@compiled
def enter_blocks(
    arrays: Arrays, weights: Weights, words: NDArray[np.int32], factors: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where the postings of each word enter each block: (B + 1, T); and what the word can add there: (B, T)."""
    blocks = len(arrays.edges) - 1
    enters, bounds = np.empty((blocks + 1, len(words)), np.int64), np.empty((blocks, len(words)), np.float32)
    for term in range(len(words)):
        word = words[term]
        place, end = arrays.word_starts[word], arrays.word_starts[word + 1]
        enters[0, term] = place
        for block in range(blocks):
            if word < len(arrays.block_starts):
                place, most = arrays.block_starts[word, block + 1], np.uint32(arrays.block_counts[word, block])
            else:
                edge, most = arrays.edges[block + 1], np.uint32(0)
                while place < end and (arrays.postings[place] >> COUNT_BITS) < edge:
                    most = max(most, arrays.postings[place] & MANY)
                    place += 1
            enters[block + 1, term] = place
            bounds[block, term] = factors[term] * weights.saturation[block, most]
    return enters, bounds


@compiled
def add_up(
    postings: NDArray[np.uint32],
    factor: float,
    saturation: NDArray[np.float32],
    low: int,
    cut: float,
    scratch: Scratch,
    count: int,
) -> int:
    """Adds one word's postings to the sums of a block, and notes the texts that reach `cut`; how many there are now."""
    weight, least = np.float32(factor), np.float32(cut)
    for posting in postings:  # unsigned throughout: a signed index would be checked for being negative
        text = (np.uint64(posting) >> np.uint64(COUNT_BITS)) - np.uint64(low)
        before = scratch.sums[text]
        after = before + weight * saturation[np.uint64(posting) & np.uint64(MANY)]
        scratch.sums[text] = after
        if after >= least and before < least:
            scratch.found[count] = text
            count += 1
    return count


@compiled
def clear(postings: NDArray[np.uint32], low: int, scratch: Scratch) -> None:
    """Sets to zero the sums that these postings changed."""
    for posting in postings:
        scratch.sums[(np.uint64(posting) >> np.uint64(COUNT_BITS)) - np.uint64(low)] = 0


@compiled
def fetch(arrays: Arrays, low: int, count: int, scratch: Scratch) -> None:
    """Touches the words of all texts that were noted, so that the waits for memory overlap."""
    for place in range(count):
        scratch.begins[place] = arrays.text_starts[low + scratch.found[place]]
    touched = 0
    for place in range(count):
        touched += arrays.text_words[scratch.begins[place]]
    scratch.begins[count] = touched


@compiled
def score_found(
    arrays: Arrays,
    weights: Weights,
    factors: NDArray[np.float64],
    hidden: NDArray[np.bool_],
    low: int,
    margin: float,
    count: int,
    scratch: Scratch,
    best: Heap,
    size: int,
) -> int:
    """Scores the texts that were noted, unless sum and `margin` rule them out; the heap's new size."""
    fetch(arrays, low, count, scratch)
    full = len(best.scores)
    for place in range(count):
        text = low + scratch.found[place]
        if (size == full and scratch.sums[text - low] + margin < best.scores[0]) or hidden[text]:
            continue
        begin, end = scratch.begins[place], arrays.text_starts[text + 1]
        norm = weights.base + weights.slope * (end - begin)
        score = exact_score(arrays.text_words[begin:end], norm, scratch.slots, factors)
        if score > 0 and (size < full or score >= best.scores[0]):
            size = offer(best, size, score, arrays.positions[text])
    return size


@compiled
def search_one(
    arrays: Arrays,
    weights: Weights,
    words: NDArray[np.int32],
    factors: NDArray[np.float64],
    hidden: NDArray[np.bool_],
    scratch: Scratch,
    best: Heap,
) -> int:
    """The best hits of one query, best first; returns how many there are.

    `words` are different, those first whose postings cost most for what they can add; `factors` are idf times
    multiplicity. The first few words, whose bounds make up SHARE of the score to beat, are not added up.
    """
    size, terms = 0, len(words)
    slack = terms * ROUNDING * factors.sum() + 10.0**-DECIMALS
    enters, bounds = enter_blocks(arrays, weights, words, factors)
    for block in weights.schedule:
        low, high = arrays.edges[block], arrays.edges[block + 1]
        to_beat = best.scores[0] if size == len(best.scores) else 0.0
        if bounds[block].sum() + slack < to_beat:
            continue
        rest, first = 0.0, 0
        while first < terms and rest + bounds[block, first] <= SHARE * to_beat:
            rest += bounds[block, first]
            first += 1
        cut, count, added = max(to_beat - rest - slack, TINY), 0, 0
        for term in range(terms - 1, first - 1, -1):
            span = arrays.postings[enters[block, term] : enters[block + 1, term]]
            count = add_up(span, factors[term], weights.saturation[block], low, cut, scratch, count)
            added += len(span)
        size = score_found(arrays, weights, factors, hidden, low, rest + slack, count, scratch, best, size)
        if added > (high - low) // 8:
            scratch.sums[: high - low] = 0
        else:
            for term in range(first, terms):
                clear(arrays.postings[enters[block, term] : enters[block + 1, term]], low, scratch)
    sort_heap(best, size)
    return size


@compiled
def search_many(
    arrays: Arrays,
    weights: Weights,
    starts: NDArray[np.int64],
    words: NDArray[np.int32],
    factors: NDArray[np.float64],
    hidden: NDArray[np.bool_],
    scores: NDArray[np.float64],
    positions: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    """The queries starts[i]:starts[i + 1] one after the other, into the rows of `scores` and `positions`: (Q, k)."""
    most = np.diff(arrays.edges).max()
    scratch = Scratch(
        np.zeros(len(weights.idf), np.int32),
        np.zeros(most, np.float32),
        np.empty(most, np.int64),
        np.empty(most + 1, np.int64),
    )
    for query in range(len(counts)):
        own, weight = words[starts[query] : starts[query + 1]], factors[starts[query] : starts[query + 1]]
        for term in range(len(own)):
            scratch.slots[own[term]] = term + 1
        best = Heap(scores[query], positions[query])
        counts[query] = search_one(arrays, weights, own, weight, hidden, scratch, best)
        for word in own:
            scratch.slots[word] = 0
