"""What an open book may cost at most, and which of its forms is small enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALONE, EXACT, POLICY, SKIPPING, COMPACT = "alone", "exact", "policy", "policy, skipping", "pca-64"
LARGEST = 67_000  # entries up to which a compact book is to be small and exact
QUARTER = 0.25  # of the student's bytes
EXACT_FIRST = ("fp32", "fp16", "sq8", "pca-64", "opq-64", "pq-64", "pca-32", "opq-32", "pq-32")
LIMITS = {("6 x 768", 32): 0.03, ("6 x 768", 1): 0.10, ("3 x 128", 32): 0.25}  # of the median overhead


def targets(timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the book may cost at most with what the policy chooses, and what it did."""
    told = []
    for one in timings:
        who = f"{one['student']}, {one['entries']:,} entries"
        chosen = POLICY if POLICY in one["indexes"] else EXACT
        for batch, arms in one["batches"].items():
            limit = LIMITS.get((one["student"], int(batch)))
            if limit is not None:
                told.append(target(f"{who}, batch {batch}: overhead", arms[chosen]["overhead_p50"], limit))
        told.append(target(f"{who}: missed neighbours", 1 - one["indexes"][chosen]["recall"], 0.01))
        if one["entries"] <= LARGEST:
            form = fitting(one)
            told.append(
                target(f"{who}: bytes of {form} / student", one["book_bytes"][form] / one["student_bytes"], QUARTER)
            )
    return told


def fitting(timing: Mapping[str, Any]) -> str:
    """The most exact form of a book in a quarter of its student's bytes; the smallest where none is."""
    sizes, limit = timing["book_bytes"], QUARTER * timing["student_bytes"]
    known = [form for form in EXACT_FIRST if form in sizes]
    return next((form for form in known if sizes[form] <= limit), min(known, key=lambda form: int(sizes[form])))


def accuracy_targets(accuracy: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the first, the compact form that is timed; of the others, the one that fits their student."""
    told = []
    for number, judged in enumerate(accuracy):
        form = COMPACT if number == 0 else next((name for name in judged["forms"] if name != "fp32"), "fp32")
        if form in judged["forms"]:
            lost = judged["forms"][form]["with_student_points_lost"]
            told.append(target(f"{form} of {judged['keys']} keys, {judged['width']} wide: points lost", lost, 0.1))
    return told


def edit_target(edit: Mapping[str, Any]) -> dict[str, Any]:
    seconds = sum(edit[part] for part in ("add_seconds", "load_seconds", "index_seconds"))
    what = f"{edit['added']:,} entries added to {edit['entries']:,}: seconds / embedding them"
    return target(what, seconds / edit["embed_seconds"], 1.0)


def target(what: str, found: float, limit: float) -> dict[str, Any]:
    return {"what": what, "found": round(found, 4), "at_most": limit, "met": found <= limit}
