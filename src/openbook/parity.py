"""Whether an exported student says what torch says: at every length, alone and in padded batches, on real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import SAID, Answers, Encoded, told
from openbook.config import RunError

TOLERANCE = 1e-4  # of logits and embeddings in fp32; relative to the largest number of a batch, where that is above 1
SHIFTS = {  # of int8: on average, and at most
    "classification": (0.02, 0.35),  # of probabilities
    "multi_label": (0.02, 0.35),
    "regression": (0.1, 1.0),  # of scores, in standard deviations of torch's
}
MEAN_COSINE, WORST_COSINE = 0.99, 0.9  # between the embeddings of int8 and torch: they are what the book is asked by
EVERY_LENGTH = 128  # up to here every length is tried; above, each is an eighth longer than the last
SHORT = 32
ODD = 3

Floats = NDArray[np.floating[Any]]
Ask = Callable[[Sequence[Encoded]], Answers]


@dataclass(frozen=True)
class Case:
    """One batch, and how it is named when it fails."""

    name: str
    rows: Sequence[Encoded]


def lengths_up_to(longest: int) -> list[int]:
    """Every length from 1, or for a long model every short one, then a geometric series, and the longest."""
    if longest <= EVERY_LENGTH:
        return list(range(1, longest + 1))
    lengths = list(range(1, SHORT + 1))
    while lengths[-1] < longest:
        lengths.append(min(longest, math.ceil(lengths[-1] * 9 / 8)))
    return lengths


def cases(rows: Sequence[Encoded], longest: int) -> Iterator[Case]:
    """Real word-pieces cut to every length: a row alone, an odd batch with padding, and at the ends one without."""
    lengths = lengths_up_to(longest)
    for place, length in enumerate(lengths):
        starts = [rows[(place * ODD + step) % len(rows) :] for step in range(ODD)]
        shorter = (length, (length + 1) // 2, 1)
        yield Case(f"length {length}, batch 1", [cut(starts[0], length)])
        padded = [cut(one, part) for one, part in zip(starts, shorter, strict=True)]
        yield Case(f"length {length}, batch {ODD} padded", padded)
        if length in (1, 2, lengths[len(lengths) // 2], longest):
            yield Case(f"length {length}, batch {ODD} not padded", [cut(one, length) for one in starts])


def cut(rows: Sequence[Encoded], length: int) -> Encoded:
    """Rows behind one another, from the first and as often as it takes, cut off after `length` word-pieces."""
    ids: list[int] = []
    types: list[int] = []
    while len(ids) < length:
        for row in rows:
            ids, types = ids + row.ids, types + row.types
            if len(ids) >= length:
                break
    return Encoded(ids[:length], types[:length])


def in_cases(rows: Sequence[Encoded], size: int) -> Iterator[Case]:
    """Whole rows in batches."""
    for start in range(0, len(rows), size):
        yield Case(f"rows {start + 1} to {min(start + size, len(rows))}", rows[start : start + size])


def prove_equal(name: str, torch: Ask, exported: Ask, batches: Sequence[Case]) -> dict[str, float]:
    """Logits and embeddings within `TOLERANCE` of torch's; so every class is the same, but for ties within twice that.

    The largest difference is returned. Raises RunError for the first batch that fails, naming it, the row and the
    difference.
    """
    worst = 0.0
    for case in batches:
        wanted, given = both(name, torch, exported, case)
        for what in ("logits", "embedding"):
            one, two = getattr(wanted, what), getattr(given, what)
            scale = max(1.0, float(np.abs(one).max(initial=0)))
            differences = np.abs(one - two).max(axis=1, initial=0) / scale  # (B,)
            row = int(differences.argmax())
            if differences[row] > TOLERANCE:
                found = f"{what} differ by {differences[row]:.2g}, and {TOLERANCE:g} is allowed"
                raise RunError(f"{name} does not say what torch says: {case.name}, row {row + 1}: {found}")
            worst = max(worst, float(differences[row]))
    return {"tolerance": TOLERANCE, "largest_difference": worst}


def both(name: str, torch: Ask, exported: Ask, case: Case) -> tuple[Answers, Answers]:
    """What the two say. Raises RunError if the exported one fails, or says something of another form."""
    wanted = torch(case.rows)
    try:
        given = exported(case.rows)
    except Exception as error:  # ONNX Runtime's have no class of their own
        raise RunError(f"{name} cannot answer {case.name}: {str(error).partition(chr(10))[0]}") from error
    for what in ("logits", "embedding"):
        one, two = getattr(wanted, what), getattr(given, what)
        if one.shape != two.shape or not np.isfinite(two).all():
            found = f"{what} {two.shape}, finite: {bool(np.isfinite(two).all())}, where torch gives {one.shape}"
            raise RunError(f"{name} does not say what torch says: {case.name}: {found}")
    return wanted, given


def prove_close(
    name: str, torch: Ask, exported: Ask, whole: Sequence[Case], cut_rows: Sequence[Case], kind: str, agreement: float
) -> dict[str, float]:
    """int8 answers near torch's. On whole rows: at least this share of equal classes (in regression, a correlation),
    probabilities or scores within the limits above, and embeddings of a mean cosine. On whole and cut ones: finite,
    and no embedding beyond the worst cosine.

    Returns what was found. Raises RunError with the limit that was passed, by how much, and where.
    """
    asked = [(case, *both(name, torch, exported, case)) for case in (*whole, *cut_rows)]
    of_rows = asked[: len(whole)]
    wanted = np.concatenate([said.logits for _, said, _ in of_rows])  # (n, C)
    given = np.concatenate([said.logits for _, _, said in of_rows])
    nearness = np.concatenate([cosines(one.embedding, two.embedding) for _, one, two in of_rows])  # (n,)
    found = {**closeness(wanted, given, kind), "mean_cosine": float(nearness.mean())}
    limits = {
        "agreement": agreement,
        "mean_shift": SHIFTS[kind][0],
        "worst_shift": SHIFTS[kind][1],
        "mean_cosine": MEAN_COSINE,
    }
    for what, limit in limits.items():
        too_far = found[what] > limit if what.endswith("shift") else not found[what] >= limit
        if too_far:
            side = "at most" if what.endswith("shift") else "at least"
            raise RunError(
                f"{name} is too far from torch on {len(wanted)} rows: {what.replace('_', ' ')} is {found[what]:.4f},"
                f" and {side} {limit:g} is allowed"
            )
    return {**found, "worst_cosine": worst_cosine(name, asked)}


def closeness(wanted: Floats, given: Floats, kind: str) -> dict[str, float]:
    """Of logits (n, C): the share of equal classes (of several labels: of equal decisions), and how far probabilities
    move.

    Of scores (n, 1): their correlation, and how far they move in standard deviations. Scores that are all alike
    correlate if they stay so.
    """
    if kind != "regression":
        before, after = SAID[kind](wanted), SAID[kind](given)
        agreement = float((told(before, kind) == told(after, kind)).mean())
        shift = np.abs(before - after)
    else:
        varies = wanted.std() > 0 and given.std() > 0
        agreement = float(np.corrcoef(wanted[:, 0], given[:, 0])[0, 1]) if varies else float(wanted.std() == 0)
        shift = np.abs(wanted - given) / (float(wanted.std()) or 1.0)
    return {"agreement": agreement, "mean_shift": float(shift.mean()), "worst_shift": float(shift.max())}


def worst_cosine(name: str, asked: Sequence[tuple[Case, Answers, Answers]]) -> float:
    """The least cosine of any embedding with torch's. Raises RunError below the limit."""
    worst = 1.0
    for case, wanted, given in asked:
        nearness = cosines(wanted.embedding, given.embedding)
        row = int(nearness.argmin())
        if nearness[row] < WORST_COSINE:
            raise RunError(
                f"{name} is too far from torch: {case.name}, row {row + 1}: its embedding has a cosine of"
                f" {nearness[row]:.4f} with torch's, and at least {WORST_COSINE:g} is allowed"
            )
        worst = min(worst, float(nearness[row]))
    return worst


def cosines(one: Floats, two: Floats) -> Floats:
    """Row by row: (n, d), (n, d) -> (n,). Two zero vectors are equal."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    both_zero = ~one.any(axis=1) & ~two.any(axis=1)
    products = np.divide((one * two).sum(axis=1), lengths, out=np.zeros(len(one)), where=lengths > 0)
    return np.where(both_zero, 1.0, products)
