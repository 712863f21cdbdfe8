"""The KL of one relation and its gradient on a processor, compiled: a row of scores lives and dies in the cache.

For each query, its scores against the keys of its head are made on both sides, turned into probabilities and into
gradients before the next query's; no map (L, L) is ever written to memory. Scores are in units of log 2, since powers
of two are what a processor makes fast.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.native import compiled

Floats = NDArray[np.float32]

ZERO, ONE, HALF, LN2 = np.float32(0), np.float32(1), np.float32(0.5), np.float32(math.log(2))
SAFE = np.float32(60)  # a score of at most this size needs no shift: 2 to that power, times any length, is a float32
LEAST = np.float32(-126)  # of the exponents that float32 has
BIAS, FRACTION_BITS = np.int32(127), np.int32(23)  # of a float32
# 2^f on [-1/2, 1/2]: Taylor's series, whose first term left out is below 2^-26
C1, C2, C3, C4, C5, C6, C7 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 8))

# sums may be reordered, which is what makes them fast; what comes in is finite, and so is what comes of it
fast = partial(compiled, fastmath={"reassoc", "contract", "arcp", "nsz", "nnan"})


@fast
def power_of_two(x: Any) -> Any:
    """2^x of a float32, x <= 60."""
    x = max(x, LEAST)
    whole = np.floor(x + HALF)
    f = x - whole
    part = ((((((C7 * f + C6) * f + C5) * f + C4) * f + C3) * f + C2) * f + C1) * f + ONE
    return part * np.int32((np.int32(whole) + BIAS) << FRACTION_BITS).view(np.float32)


@fast
def score(query: Floats, keys: Floats, scores: Floats, count: int) -> None:
    """Products of a query (d,) with the first `count` of keys (d, L)."""
    scores[:count] = ZERO
    c = 0
    while c + 4 <= len(query):  # four at a time: a quarter of the passes over the scores
        a0, a1, a2, a3 = query[c], query[c + 1], query[c + 2], query[c + 3]
        k0, k1, k2, k3 = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
        for j in range(count):
            scores[j] += a0 * k0[j] + a1 * k1[j] + a2 * k2[j] + a3 * k3[j]
        c += 4
    while c < len(query):
        a0, k0 = query[c], keys[c]
        for j in range(count):
            scores[j] += a0 * k0[j]
        c += 1


@fast
def exponentiate(scores: Floats, bound: Any, powers: Floats, count: int) -> Any:
    """Powers of two of scores no larger than `bound` in size, the shift taken from them first, and their sum."""
    shift = ZERO
    if bound > SAFE:
        shift = scores[0]
        for j in range(count):
            shift = max(shift, scores[j])
    for j in range(count):
        powers[j] = power_of_two(scores[j] - shift)
    total = ZERO
    for j in range(count):
        total += powers[j]
    return shift, total


@fast
def give_back(error: Floats, query: Floats, keys: Floats, to_query: Floats, to_keys: Floats, count: int) -> None:
    """The gradient of a query (d,), and what it adds to that of the keys (d, L), from that of its scores."""
    c = 0
    while c + 4 <= len(query):
        q0, q1, q2, q3 = query[c], query[c + 1], query[c + 2], query[c + 3]
        k0, k1, k2, k3 = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
        g0, g1, g2, g3 = to_keys[c], to_keys[c + 1], to_keys[c + 2], to_keys[c + 3]
        s0 = s1 = s2 = s3 = ZERO
        for j in range(count):
            s0 += error[j] * k0[j]
            s1 += error[j] * k1[j]
            s2 += error[j] * k2[j]
            s3 += error[j] * k3[j]
        for j in range(count):
            g0[j] += error[j] * q0
            g1[j] += error[j] * q1
            g2[j] += error[j] * q2
            g3[j] += error[j] * q3
        to_query[c], to_query[c + 1], to_query[c + 2], to_query[c + 3] = s0, s1, s2, s3
        c += 4
    while c < len(query):
        q0, k0, g0, s0 = query[c], keys[c], to_keys[c], ZERO
        for j in range(count):
            s0 += error[j] * k0[j]
        for j in range(count):
            g0[j] += error[j] * q0
        to_query[c] = s0
        c += 1


@fast
def take_columns(side: Floats, places: NDArray[np.int64], scale: Any, columns: Floats) -> Any:
    """Rows of one head (L, d) as columns (d, L), scaled; the length of the longest."""
    longest = ZERO
    for j in range(len(places)):
        square = ZERO
        for c in range(side.shape[1]):
            columns[c, j] = side[places[j], c] * scale
            square += columns[c, j] * columns[c, j]
        longest = max(longest, square)
    return np.sqrt(longest)


@fast
def take_row(side: Floats, row: Floats) -> Any:
    """A copy of one row (d,); its length."""
    square = ZERO
    for c in range(len(row)):
        row[c] = side[c]
        square += row[c] * row[c]
    return np.sqrt(square)


@fast
def relation_heads(
    student_left: Floats,  # (B, A, L, d_S/A)
    student_right: Floats,
    teacher_left: Floats,  # (B, A, L, d_T/A)
    teacher_right: Floats,
    real: NDArray[np.bool_],  # (B, L)
    rows: Floats,  # (B, L) weight of each query
    left_gradient: Floats,  # written, like student_left
    right_gradient: Floats,
    losses: NDArray[np.float64],  # (BA,) written
    first: int,
    last: int,
) -> None:
    """Losses and gradients of the heads first..last, counted through the batch."""
    heads, length, width = student_left.shape[1:]
    teacher_width = teacher_left.shape[3]
    root = np.float32(1 / math.sqrt(width))
    scale, aim_scale = root / LN2, np.float32(1 / math.sqrt(teacher_width)) / LN2
    keys, aim_keys = np.empty((width, length), np.float32), np.empty((teacher_width, length), np.float32)
    scores, aims = np.empty(length, np.float32), np.empty(length, np.float32)
    shares, targets = np.empty(length, np.float32), np.empty(length, np.float32)
    query, aim = np.empty(width, np.float32), np.empty(teacher_width, np.float32)
    to_query, to_keys = np.empty(width, np.float32), np.empty((width, length), np.float32)
    for unit in range(first, last):
        b, a = unit // heads, unit % heads
        places = np.nonzero(real[b])[0]
        count = len(places)
        longest = take_columns(student_right[b, a], places, scale, keys)
        aim_longest = take_columns(teacher_right[b, a], places, aim_scale, aim_keys)
        to_keys[:] = ZERO
        losses[unit] = 0
        for i in range(length):
            weight = rows[b, i]
            if weight == 0:
                left_gradient[b, a, i] = ZERO
                continue
            bound = take_row(student_left[b, a, i], query) * longest
            aim_bound = take_row(teacher_left[b, a, i], aim) * aim_longest
            score(query, keys, scores, count)
            score(aim, aim_keys, aims, count)
            shift, total = exponentiate(scores, bound, shares, count)
            aim_shift, aim_total = exponentiate(aims, aim_bound, targets, count)
            own, other = weight / total, weight / aim_total
            lead = ZERO
            for j in range(count):
                lead += targets[j] * (aims[j] - scores[j])
                shares[j] = shares[j] * own - targets[j] * other
            kl = LN2 * (lead / aim_total + (shift - aim_shift)) + np.log(total) - np.log(aim_total)
            losses[unit] += weight * max(kl, ZERO)  # rounding may leave it just below
            give_back(shares, query, keys, to_query, to_keys, count)
            for c in range(width):
                left_gradient[b, a, i, c] = to_query[c] * LN2  # the keys are in units of log 2, and scaled
        right_gradient[b, a] = ZERO
        for j in range(count):
            for c in range(width):
                right_gradient[b, a, places[j], c] = to_keys[c, j] * root


@cache
def helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "relations")


def relation(
    student: tuple[Floats, Floats],
    teacher: tuple[Floats, Floats],
    real: NDArray[np.bool_],
    rows: Floats,
    threads: int,
) -> tuple[float, Floats, Floats]:
    """The weighted KL, and the gradients of the student's sides; arguments as of `relation_heads`, all finite.

    Neither depends on the number of threads.
    """
    left_gradient, right_gradient = np.empty_like(student[0]), np.empty_like(student[1])
    losses = np.empty(student[0].shape[0] * student[0].shape[1])
    cuts = np.linspace(0, len(losses), threads + 1).astype(int).tolist()
    work = partial(relation_heads, *student, *teacher, real, rows, left_gradient, right_gradient, losses)
    if threads == 1:
        work(*cuts)
    else:
        list(helpers(threads).map(work, cuts[:-1], cuts[1:]))
    return float(losses.sum()), left_gradient, right_gradient
