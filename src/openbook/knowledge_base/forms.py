"""Keys as they lie on disk: in full, in half precision, projected or quantised; and a few entries in place of many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError, WholeKind
from openbook.types import KnowledgeBase

Constants = dict[str, NDArray[np.float32]]

BLOCK = 1 << 14  # keys worked on at once
CENTROIDS = 256  # of every part of a key: its number is one byte
BINS = 10  # of scores, in place of classes
ROUNDS = 10  # of k-means
TAUGHT = 64  # keys a centroid that take part in k-means, at most
TINY = 1e-12  # of the largest variance: less counts as this


def fit(keys: NDArray[np.float32], form: str) -> Constants:
    """What a form has to know about the keys (M, d) before it stores one of them (specification, section 2.12).

    `fp32` and `fp16` nothing; `pca-R` the `basis` (d, R) of the R largest singular values of the keys themselves,
    not of their distances to the mean, which would reorder neighbours; `sq8` `low` and `step` (d,), which cut the range
    of every dimension into 255; `pq-P` the `codebooks` (P, 256, d / P) of k-means in each of P parts of a key (Jegou,
    Douze and Schmid, 2011); `opq-P` the same of turned keys, and their `rotation` (d, d), which shares what varies most
    out over the parts (Ge, He, Ke and Sun, Optimized Product Quantization, 2013, the parametric solution). Raises
    UsageError for a form that does not exist or does not fit d.
    """
    kind, size = _parse(form, keys.shape[1])
    if kind == "pca":
        return {"basis": _basis(keys, size)}
    if kind == "sq8":
        low, high = (keys.min(axis=0), keys.max(axis=0)) if len(keys) else np.zeros((2, keys.shape[1]), np.float32)
        return {"low": low, "step": np.asarray((high - low) / 255, dtype=np.float32)}
    if kind == "pq":
        return {"codebooks": _codebooks(keys, size)}
    if kind == "opq":
        rotation = _rotation(keys, size)
        return {"rotation": rotation, "codebooks": _codebooks(keys @ rotation, size)}
    return {}


def encode(keys: NDArray[np.float32], form: str, constants: Constants) -> NDArray[Any]:
    """Keys (M, d) as they are stored: (M, d) fp32, fp16 or, in `sq8`, bytes; (M, R) fp16; (M, P) bytes.

    A key that was not there when `fit` was called may lie outside the range of `sq8` and is moved to its border.
    """
    kind, size = _parse(form, keys.shape[1])
    if kind == "pca":
        return (keys @ constants["basis"]).astype(np.float16)
    if kind == "sq8":
        step = np.where(constants["step"] > 0, constants["step"], 1)
        return np.clip(np.rint((keys - constants["low"]) / step), 0, 255).astype(np.uint8)
    if kind == "pq":
        return _nearest_centroids(keys, constants["codebooks"])
    if kind == "opq":
        return _nearest_centroids(keys @ constants["rotation"], constants["codebooks"])
    return keys.astype(np.float32 if kind == "fp32" else np.float16)


def decode(codes: NDArray[Any], form: str, constants: Constants) -> NDArray[np.float32]:
    """Stored codes as the keys that a query is compared with: fp32 (M, d), or (M, R) where there is a basis.

    For a unit query x, the similarity is wrong by at most 2^-11 in `fp16` and by sum_j |x_j| step_j / 2 in `sq8`.
    """
    if form == "sq8":
        return np.asarray(constants["low"] + codes * constants["step"], dtype=np.float32)
    if "codebooks" in constants:
        parts, _, width = constants["codebooks"].shape
        found = constants["codebooks"][np.arange(parts), codes].reshape(len(codes), parts * width)  # (M, d)
        return np.ascontiguousarray(found @ constants["rotation"].T if "rotation" in constants else found, np.float32)
    return codes.astype(np.float32)


def size_of(entries: int, dimensions: int, classes: int, form: str, weighted: bool = False) -> int:
    """Bytes of a base of M entries: codes, constants, 8 for an id, 4 C for a value, 4 for a weight; not the texts."""
    kind, size = _parse(form, dimensions)
    key, once = {
        "fp32": (4 * dimensions, 0),
        "fp16": (2 * dimensions, 0),
        "pca": (2 * size, 4 * dimensions * size),
        "sq8": (dimensions, 8 * dimensions),
        "pq": (size, 4 * CENTROIDS * dimensions),
        "opq": (size, 4 * CENTROIDS * dimensions + 4 * dimensions**2),
    }[kind]
    return entries * (key + 8 + 4 * classes + 4 * weighted) + once


def prototypes(base: KnowledgeBase, count: int, seed: int, kind: WholeKind) -> KnowledgeBase:
    """At most `count` entries in place of all: k-means among the entries of a class (regression: of a bin of scores).

    A prototype's key is the plain mean of its members' keys, which is no unit vector, its value their mean value, its
    weight how many they are; members are weighed by their own weights. It shows the text of the member nearest to it.
    Classes, and origins within them, share `count` by their size, so that as many prototypes as entries are the
    entries. Together they stand for the softmax over all entries: look up all of them, and tune the temperature anew.
    Raises UsageError for a count that cannot give every class and origin one.
    """
    weights = np.ones(len(base.ids)) if base.weights is None else base.weights.astype(np.float64)
    present = np.flatnonzero(weights > 0)
    groups = _groups(base, present, kind)
    if count < len(groups):
        raise UsageError(
            f"prototypes={count}: there are {len(groups)} groups of entries of one class and origin; "
            "give each at least one prototype"
        )
    clusters = [
        members
        for number, (group, share) in enumerate(zip(groups, _shares(groups, count), strict=True))
        for members in _clusters(base.keys, group, share, seed + number)
    ]
    clusters.sort(key=lambda members: int(members[0]))
    means = [_mean_of(base, members, weights[members]) for members in clusters]
    faces = [_nearest_to(mean, base.keys, members) for (mean, _), members in zip(means, clusters, strict=True)]
    return replace(
        base,
        keys=_stacked([mean for mean, _ in means], base.keys),
        values=_stacked([value for _, value in means], base.values),
        ids=tuple(f"prototype/{base.ids[face]}" for face in faces),
        texts=tuple(base.texts[face] for face in faces),
        origins=tuple(base.origins[face] for face in faces) if base.origins else (),
        weights=np.array([weights[members].sum() for members in clusters], dtype=np.float32),
        manifest={**base.manifest, "prototypes_of": len(present)},
    )


def _parse(form: str, dimensions: int) -> tuple[str, int]:
    """The name of a form and its number, 0 where it has none."""
    found = re.fullmatch(r"(?:(fp32|fp16|sq8)|(pca|pq|opq)-(\d{1,6}))", form)
    if not found:
        raise UsageError(
            f"form={form!r} is no form of keys; give fp32, fp16, sq8, pca-64, pq-64 or opq-64 (or other numbers)"
        )
    plain, kind, number = found.groups()
    if plain:
        return plain, 0
    size = int(number)
    if not 1 <= size <= dimensions:
        raise UsageError(f"form={form!r}: keys have {dimensions} dimensions; give a number from 1 to {dimensions}")
    if kind in ("pq", "opq") and dimensions % size:
        raise UsageError(f"form={form!r}: keys of {dimensions} dimensions have no {size} equal parts; give a divisor")
    return kind, size


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _basis(keys: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """Eigenvectors (d, R) of keys' keys, largest first; the largest number of each is positive."""
    vectors = _axes(keys)[1][:, :rank]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)  # (1, R)
    return np.ascontiguousarray(np.where(largest < 0, -vectors, vectors), dtype=np.float32)


def _rotation(keys: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Principal axes (d, d), of equal number a part: the next goes where the product of variances is least."""
    variances, vectors = _axes(keys - keys.mean(axis=0) if len(keys) else keys)
    sizes = np.log(np.maximum(variances / max(float(variances[0]), TINY), TINY) / TINY)
    columns: list[list[int]] = [[] for _ in range(parts)]
    products = np.zeros(parts)
    for axis, size in enumerate(sizes):
        part = min((one for one in range(parts) if len(columns[one]) < len(sizes) // parts), key=products.__getitem__)
        columns[part].append(axis)
        products[part] += size
    return np.ascontiguousarray(vectors[:, np.concatenate(columns).astype(np.int64)], dtype=np.float32)


def _axes(keys: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues (d,) and eigenvectors (d, d) of keys' keys, largest first."""
    moments = np.zeros((keys.shape[1], keys.shape[1]))
    for rows in _blocks(len(keys)):
        block = keys[rows].astype(np.float64)
        moments += block.T @ block
    values, vectors = np.linalg.eigh(moments)
    return values[::-1], vectors[:, ::-1]


def _codebooks(keys: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Centroids (P, 256, d / P). Few keys are their own centroids, and the last of them fills the table."""
    width = keys.shape[1] // parts
    if len(keys) <= CENTROIDS:
        filled = np.zeros((CENTROIDS, keys.shape[1]), dtype=np.float32)
        filled[: len(keys)] = keys
        filled[len(keys) :] = keys[-1:] if len(keys) else 0
        return np.ascontiguousarray(filled.reshape(CENTROIDS, parts, width).transpose(1, 0, 2))
    import faiss

    quantizer = faiss.ProductQuantizer(keys.shape[1], parts, 8)
    quantizer.cp.min_points_per_centroid = 1  # silences a warning on the error stream
    quantizer.cp.max_points_per_centroid, quantizer.cp.niter = TAUGHT, ROUNDS
    quantizer.train(np.ascontiguousarray(keys))
    centroids: NDArray[np.float32] = faiss.vector_to_array(quantizer.centroids)
    return centroids.reshape(parts, CENTROIDS, width)


def _nearest_centroids(keys: NDArray[np.float32], codebooks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numbers (M, P) of the centroids nearest to every part of every key."""
    parts, _, width = codebooks.shape
    codes = np.empty((len(keys), parts), dtype=np.uint8)
    for rows in _blocks(len(keys)):
        for part, book in enumerate(codebooks):
            own = keys[rows, part * width : (part + 1) * width]
            codes[rows, part] = (own @ book.T - (book**2).sum(axis=1) / 2).argmax(axis=1)
    return codes


def _groups(base: KnowledgeBase, present: NDArray[np.int64], kind: WholeKind) -> list[NDArray[np.int64]]:
    """Positions of the entries of each class, or bin of about as many scores, and origin."""
    values = base.values[present]
    if kind == "regression":
        scores = values[:, 0]
        numbers = np.searchsorted(np.quantile(scores, np.arange(1, BINS) / BINS) if len(scores) else scores, scores)
    else:
        numbers = values.argmax(axis=1)
    origins = np.asarray(base.origins, dtype=np.str_)[present] if base.origins else np.zeros(len(present), np.str_)
    found: dict[tuple[int, str], list[int]] = {}
    for place, number, origin in zip(present.tolist(), numbers.tolist(), origins.tolist(), strict=True):
        found.setdefault((number, origin), []).append(place)
    return [np.array(found[name]) for name in sorted(found)]


def _shares(groups: list[NDArray[np.int64]], count: int) -> list[int]:
    """Numbers of prototypes by size, at least one each and at most the members; they sum to `count` where they can."""
    sizes = np.array([len(group) for group in groups])
    count = min(count, int(sizes.sum()))
    spare = sizes - 1  # members beyond the one that stands for the group anyway
    wanted = spare * ((count - len(groups)) / max(1, spare.sum()))
    shares = np.floor(wanted).astype(np.int64)
    for place in np.argsort(shares - wanted, kind="stable")[: count - len(groups) - int(shares.sum())]:
        shares[place] += 1
    return [int(share) + 1 for share in shares]


def _clusters(keys: NDArray[np.float32], group: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """The members of every cluster that has any, ascending."""
    if count >= len(group):
        return list(group[:, None])
    if count == 1:
        return [group]
    import faiss

    points = np.ascontiguousarray(keys[group])
    means = faiss.Kmeans(
        keys.shape[1], count, niter=ROUNDS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=TAUGHT
    )
    means.train(points)
    nearest = means.index.search(points, 1)[1][:, 0]
    order = np.argsort(nearest, kind="stable")
    cuts = np.flatnonzero(np.diff(nearest[order])) + 1
    return np.split(group[order], cuts)


def _mean_of(
    base: KnowledgeBase, members: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean key (d,) and mean value (C,)."""
    shares = weights / weights.sum()
    return shares @ base.keys[members].astype(np.float64), shares @ base.values[members].astype(np.float64)


def _nearest_to(point: NDArray[np.float64], keys: NDArray[np.float32], members: NDArray[np.int64]) -> int:
    return int(members[((keys[members] - point) ** 2).sum(axis=1).argmin()])


def _stacked(rows: list[NDArray[np.float64]], like: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(len(rows), like.shape[1])
