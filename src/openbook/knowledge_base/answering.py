"""The settings of retrieval, and the one way from a student's outputs and a base to an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from openbook.config import UsageError
from openbook.knowledge_base.interpolate import Search, average_of, interpolate, weights
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase

Mode = Literal["constant", "gate", "bucket"]
Skip = Literal["none", "safe", "confident"]

FEATURES = 3  # that a gate reads
# what has no one class to be sure of, so that nothing is skipped
NO_CLASS: dict[str, str] = {"regression": "a regression", "multi_label": "a task of several labels"}
ROUNDING = 1e-4  # how far the sum of a stored value may be from 1


@dataclass(frozen=True)
class Retrieval:
    """How an answer is made of what is found; `mode` and `skip` of specification, section 2.8."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    top_k: int
    temperature: float
    beta: float  # share of the student; of a gate and of buckets, the constant they were tuned against
    mode: Mode = "constant"
    gate: tuple[float, ...] = ()  # b0, b: beta = sigmoid(b0 + b . features)
    edges: tuple[float, ...] = ()  # similarities between the buckets, ascending
    betas: tuple[float, ...] = ()  # of every bucket, one more than edges
    beta_min: float = 0.0  # what a gate never falls below
    skip: Skip = "none"
    theta: float | None = None  # confidence from which `confident` does not search

    def __post_init__(self) -> None:
        is_gate, is_bucket = self.mode == "gate", self.mode == "bucket"
        rules = {
            "top_k": (self.top_k >= 1, "at least 1"),
            "temperature": (0 < self.temperature < np.inf, "above 0"),
            "beta": (0 <= self.beta <= 1, "between 0 and 1"),
            "mode": (self.mode in get_args(Mode), f"one of {', '.join(get_args(Mode))}"),
            "gate": (not is_gate or _are_finite(self.gate, 1 + FEATURES), f"{1 + FEATURES} numbers"),
            "edges": (not is_bucket or list(self.edges) == sorted(self.edges), "ascending"),
            "betas": (
                not is_bucket or len(self.betas) == len(self.edges) + 1 and all(0 <= one <= 1 for one in self.betas),
                "one number between 0 and 1 for every bucket, which are one more than the edges",
            ),
            "beta_min": (0 <= self.beta_min <= 1, "between 0 and 1"),
            "skip": (self.skip in get_args(Skip), f"one of {', '.join(get_args(Skip))}"),
            "theta": (self.skip != "confident" or _are_finite((self.theta,), 1), "a number where skip is confident"),
        }
        for name, (holds, needed) in rules.items():
            if not holds:
                raise UsageError(f"retrieval.{name} is {getattr(self, name)!r}; it must be {needed}")

    @classmethod
    def from_manifest(cls, written: Mapping[str, Any]) -> Self:
        """Read what `to_manifest` wrote, also where there are but top_k, temperature and beta.

        Raises UsageError for settings that are missing, unknown or impossible.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(written))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()]
            raise UsageError(
                f"retrieval {dict(written)} of the knowledge base cannot be used: {'; '.join(problems)}; tune it again"
            ) from error

    def to_manifest(self) -> dict[str, Any]:
        """JSON: the three numbers, and what else differs from a plain constant."""
        plain = {field.name: field.default for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != plain[name]
        }

    @property
    def opens_book(self) -> bool:
        """False where the student answers alone anyway."""
        return self.mode != "constant" or self.beta < 1

    @property
    def lowest_beta(self) -> float:
        """No answer trusts the student less."""
        return {"constant": self.beta, "gate": self.beta_min, "bucket": min(self.betas, default=0.0)}[self.mode]


ALONE = Retrieval(top_k=1, temperature=1.0, beta=1.0)  # of a student without a base


@dataclass(frozen=True)
class Mixed:
    """Answers, and what they were made of. Row i belongs to query i."""

    outputs: NDArray[Any]  # (n, C)
    average: NDArray[np.float64]  # (n, C) of the neighbours; NaN where nothing was found
    betas: NDArray[np.float64]  # (n,) 1 where nothing was found


@dataclass(frozen=True)
class Answered:
    """Answers, and what was looked up for them. Row i belongs to query i; `evidence` takes hits and betas."""

    outputs: NDArray[Any]  # (n, C) the very array of the student where nothing was looked up at all
    retrieved: NDArray[np.bool_]  # (n,) false: skipped, or nothing found; then the output is the student's own
    hits: Hits  # (n, K); a row that was skipped is padding
    betas: NDArray[np.float64]  # (n,) share of the student


def answer(
    outputs: NDArray[Any],
    queries: NDArray[Any],
    base: KnowledgeBase,
    retrieval: Retrieval,
    search: Search,
    exclude: Sequence[Iterable[int]] | None = None,
) -> Answered:
    """Answer with the book: skip, search, weigh, average, mix (specification, sections 2.4, 2.7, 2.8 and 2.13).

    outputs (n, C) probabilities, of several labels each by itself, or scores (n, 1) in regression; queries (n, d) of
    any length; `exclude` names, per query, positions it must not find. Skipped rows are not searched. Beta 1 returns
    the very outputs, without a search.
    """
    asked = _asked(outputs, base, retrieval)
    if asked is not None and not len(asked):
        return _without_book(outputs)
    rows = slice(None) if asked is None else asked
    kept_out = exclude if exclude is None or asked is None else [exclude[row] for row in asked]
    hits = search(queries[rows], retrieval.top_k, kept_out)
    counts = None if base.weights is None else base.weights[hits.positions]
    mixed = mix(outputs[rows], hits.similarities, base.values[hits.positions], counts, retrieval)
    found = Answered(mixed.outputs, ~np.isnan(mixed.average[:, 0]), hits, mixed.betas)
    return found if asked is None else _spread(found, asked, outputs)


def mix(
    outputs: NDArray[Any],
    similarities: NDArray[Any],
    values: NDArray[Any],
    counts: NDArray[Any] | None,
    retrieval: Retrieval,
) -> Mixed:
    """Answers from hits that are there: outputs (n, C), similarities and counts (n, K), values (n, K, C)."""
    shares = weights(similarities, retrieval.temperature, counts)
    average = average_of(shares, values)
    if retrieval.mode == "constant":
        betas = np.full(len(outputs), retrieval.beta)
    else:
        betas = betas_of(retrieval, features_of(outputs, similarities, shares, values, average))
    betas[np.isnan(average[:, 0])] = 1
    return Mixed(interpolate(outputs, average, betas), average, betas)


def features_of(
    outputs: NDArray[Any],
    similarities: NDArray[Any],
    shares: NDArray[np.float64],
    values: NDArray[Any],
    average: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What a gate reads of every query (n, 3), 0 where nothing was found (specification, sections 2.7 and 2.8).

    The largest similarity, max_c Avg_c and max_c p_c; in regression the largest similarity, the weighted variance of
    the neighbours' values and |y - Avg|.
    """
    nearest = similarities.max(axis=1, initial=-np.inf)
    if outputs.shape[1] == 1:
        variance = np.einsum("bk,bkc->b", shares, (values - average[:, None]) ** 2)
        features = np.stack([nearest, variance, np.abs(outputs - average)[:, 0]], axis=1)
    else:
        features = np.stack([nearest, average.max(axis=1), outputs.max(axis=1)], axis=1)
    features[np.isnan(average[:, 0])] = 0
    return np.asarray(features, dtype=np.float64)


def betas_of(retrieval: Retrieval, features: NDArray[np.float64]) -> NDArray[np.float64]:
    """beta(x) of a gate, sigmoid(b0 + b . f), or of the bucket of the largest similarity (Drozdov et al., 2022).

    features (n, 3) -> (n,)
    """
    if retrieval.mode == "gate":
        score = retrieval.gate[0] + features @ np.array(retrieval.gate[1:])
        return np.asarray(np.maximum((1 + np.tanh(score / 2)) / 2, retrieval.beta_min))
    bucket = np.searchsorted(retrieval.edges, features[:, 0], side="right")
    return np.array(retrieval.betas)[bucket]


def skipped(outputs: NDArray[Any], retrieval: Retrieval) -> NDArray[np.bool_]:
    """Which answers (n, C) need no search -> (n,) (specification, section 2.8).

    `safe`: the student's class leads by p1 - p2 > (1 - beta) / beta, so no neighbour can change it: it leads y' by
    beta (p1 - p2) - (1 - beta) or more. `confident`: max p >= theta. Raises UsageError for a skip in regression.
    """
    if retrieval.skip == "none":
        return np.zeros(len(outputs), dtype=bool)
    if outputs.shape[1] == 1:
        raise UsageError(f"retrieval.skip is {retrieval.skip!r}; a regression has no confidence to skip by, set none")
    if retrieval.skip == "confident":
        return np.asarray(outputs.max(axis=1) >= retrieval.theta)
    second, first = np.partition(outputs, -2, axis=1)[:, -2:].T
    beta = retrieval.lowest_beta
    return np.asarray(beta * (first - second) > (1 - beta) * (1 + ROUNDING))


def _asked(outputs: NDArray[Any], base: KnowledgeBase, retrieval: Retrieval) -> NDArray[np.int64] | None:
    """The rows to search; None stands for all of them. Raises UsageError for a skip where no class wins."""
    if retrieval.skip != "none" and base.manifest.get("kind") == "multi_label":
        raise UsageError(f"retrieval.skip is {retrieval.skip!r}; {NO_CLASS['multi_label']} has no class to be sure of")
    if not retrieval.opens_book or not base.ids or not len(outputs):
        return np.empty(0, np.int64)
    return None if retrieval.skip == "none" else np.flatnonzero(~skipped(outputs, retrieval))


def _without_book(outputs: NDArray[Any]) -> Answered:
    count = len(outputs)
    return Answered(outputs, np.zeros(count, dtype=bool), _padding(count, 0), np.ones(count))


def _spread(found: Answered, asked: NDArray[np.int64], outputs: NDArray[Any]) -> Answered:
    """Answers to some of the rows, among the student's own to the others."""
    told = outputs.astype(np.result_type(outputs, found.outputs))
    retrieved, betas = np.zeros(len(outputs), dtype=bool), np.ones(len(outputs))
    hits = _padding(len(outputs), found.hits.positions.shape[1])
    told[asked], retrieved[asked], betas[asked] = found.outputs, found.retrieved, found.betas
    hits.positions[asked], hits.similarities[asked] = found.hits.positions, found.hits.similarities
    return Answered(told, retrieved, hits, betas)


def _padding(count: int, k: int) -> Hits:
    return Hits(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32))


def _are_finite(numbers: Sequence[float | None], count: int) -> bool:
    return len(numbers) == count and all(one is not None and bool(np.isfinite(one)) for one in numbers)
