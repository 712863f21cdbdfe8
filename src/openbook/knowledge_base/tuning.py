"""How many neighbours, how sharply weighed, how far trusted: chosen on held-out examples that are not in the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.config import UsageError, WholeKind
from openbook.knowledge_base.adaptive import BETAS, Metric, Sample, adapted, confident_theta, losses
from openbook.knowledge_base.answering import NO_CLASS, Mode, Retrieval, Skip, features_of, mix, skipped
from openbook.knowledge_base.interpolate import Search, average_of, interpolate, own_positions, scaled, weights
from openbook.knowledge_base.search import Hits
from openbook.types import KnowledgeBase

TOP_K = (1, 2, 4, 8, 12, 16, 20, 32)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5)
OMEGAS = (0.0, 0.25, 0.5, 1.0)  # how often an entry of the corpus counts
CORPUS = "corpus"
GROUPS = 500  # metric evaluations that a standard error may cost


@dataclass(frozen=True)
class HeldOut:
    """Labelled examples that nothing learned from and no base holds."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    gold: NDArray[Any]  # (n,), or of several labels (n, C)


@dataclass(frozen=True)
class HitCache:
    """What the student says of held-out examples and what it finds for them: all that tuning reads.

    It holds values rather than positions, so that examples asked of different bases can be pooled.
    """

    held_out: HeldOut
    outputs: NDArray[Any]  # (n, C)
    similarities: NDArray[np.float32]  # (n, K), -inf where there are fewer
    values: NDArray[np.float32]  # (n, K, C)
    counts: NDArray[np.float32]  # (n, K) how often each counts
    found: NDArray[np.str_]  # (n, K) ids


Caches = Mapping[float, HitCache]  # by omega


@dataclass(frozen=True)
class Choices:
    """What may be chosen; by default the three numbers."""

    modes: tuple[Mode, ...] = ("constant",)
    skips: tuple[Skip, ...] = ("none",)  # the one that skips most; of equals the first
    top_k: tuple[int, ...] = TOP_K
    betas: tuple[float, ...] = BETAS  # shares of the student
    one_se: bool = True  # retrieve only if its gain exceeds its standard error
    reported_split: bool = False  # allow tuning on what is reported; it is written down


@dataclass(frozen=True)
class Cell:
    """One setting and how well it does on the held-out examples."""

    top_k: int
    temperature: float
    beta: float
    score: float
    loss: float  # negative log-likelihood; mean squared error in regression
    omega: float = 1.0


@dataclass(frozen=True)
class Tuned:
    """The setting to predict with. Without a clear gain `kept` is false and beta is 1: the student answers alone."""

    retrieval: Retrieval
    omega: float  # how often an entry of the corpus counts
    score: float  # of the best setting, whether kept or not, always searching; cross-validated of a gate or buckets
    baseline_score: float  # of beta = 1
    gain: float
    standard_error: float  # of the gain
    kept: bool
    skip_rate: float  # of the held-out examples
    rank: int  # in the table, from 1, of the three numbers that were chosen
    held_out: int  # examples
    held_out_digest: str  # of their ids and texts
    on_reported_split: bool  # then the scores that are reported are no evidence
    table: tuple[Cell, ...]  # the whole sweep, best first
    weight: float | None = None  # of what was remembered, where it was chosen too

    @property
    def reached(self) -> float:
        """The score of what is kept."""
        return self.score if self.kept else self.baseline_score

    @property
    def top_k(self) -> int:
        return self.retrieval.top_k

    @property
    def temperature(self) -> float:
        return self.retrieval.temperature

    @property
    def beta(self) -> float:
        return self.retrieval.beta

    def report(self) -> dict[str, Any]:
        """JSON, with the three numbers in plain sight; `retrieval` is what a manifest takes."""
        plain = {"top_k": self.top_k, "temperature": self.temperature, "beta": self.beta}
        return {**plain, **asdict(self), "retrieval": self.retrieval.to_manifest()}


def check_disjoint(
    base: KnowledgeBase,
    ids: Sequence[str],
    texts: Sequence[str],
    anchors: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Refuse to tune on examples that the base holds, by id or by normalised text, or that retrieved any of it.

    They would find themselves, or what is there because of them. `anchors` names, by entry, who retrieved it.
    """
    shared = [id for id, own in zip(ids, own_positions(base, ids, texts), strict=True) if len(own)]
    if shared:
        raise UsageError(
            f"{len(shared)} of {len(ids)} held-out examples are in the knowledge base too, by id or by text "
            f"(the first is {shared[0]!r}); build it without them"
        )
    retrieved = {name for id in base.ids for name in (anchors or {}).get(id, ())}
    guilty = [id for id in ids if id in retrieved]
    if guilty:
        raise UsageError(
            f"{len(guilty)} of {len(ids)} held-out examples retrieved entries of the knowledge base "
            f"(the first is {guilty[0]!r}); retrieve the corpus without them"
        )


def collect(
    held_out: HeldOut,
    outputs: NDArray[Any],
    queries: NDArray[Any],
    base: KnowledgeBase,
    search_of: Callable[[KnowledgeBase], Search],
    top_k: int = max(TOP_K),
) -> dict[float, HitCache]:
    """Ask every held-out example of the base once, and once without the corpus if it has any (sections 2.6 and 2.11).

    outputs (n, C), queries (n, d); `search_of` gives the search of a base. -> one cache for every omega; 1 alone
    without a corpus. Raises UsageError for examples that the base holds.
    """
    check_disjoint(base, held_out.ids, held_out.texts)
    base = scaled(base, CORPUS, 1)  # without what counts nothing, so that all omegas share positions
    hits = search_of(base)(queries, top_k, None)
    if CORPUS not in base.origins:
        return {1.0: cached(held_out, outputs, hits, base)}
    without = scaled(base, CORPUS, 0)
    caches = {0.0: cached(held_out, outputs, search_of(without)(queries, top_k, None), without)}
    for omega in OMEGAS[1:]:  # the same entries, counted less often
        caches[omega] = cached(held_out, outputs, hits, scaled(base, CORPUS, omega))
    return caches


def cached(held_out: HeldOut, outputs: NDArray[Any], hits: Hits, base: KnowledgeBase) -> HitCache:
    counts = np.ones(len(base.ids), np.float32) if base.weights is None else base.weights
    names = np.array((*base.ids, ""))  # padding is position -1
    return HitCache(
        held_out,
        outputs,
        hits.similarities,
        base.values[hits.positions],
        counts[hits.positions],
        names[hits.positions],
    )


def pooled(folds: Sequence[Caches]) -> dict[float, HitCache]:
    """All folds of a cross-fitting as one held-out set: each was asked of its own student and base (section 2.6).

    Raises UsageError for an example that is in two folds.
    """
    omegas = set.intersection(*(set(fold) for fold in folds))
    return {omega: _joined([fold[omega] for fold in folds]) for omega in sorted(omegas)}


def tune(
    caches: Caches,
    metric: Metric,
    kind: WholeKind,
    reported: Collection[str],
    choices: Choices | None = None,
) -> Tuned:
    """Choose ReAugKD's interpolation (Zhang et al., ACL 2023) on held-out examples (specification, section 2.6).

    `caches` as `collect` or `pooled` gives them; `reported` holds the ids of the rows that will be reported.
    The best metric wins; ties go to the lower loss, then the larger beta, then the smaller top_k and temperature, then
    the larger omega. A gate or buckets must have less loss than the best constant by one standard error,
    cross-validated; and whatever was chosen is kept only if its gain over beta = 1 exceeds one standard error of that
    paired gain. Raises UsageError for fewer than two examples, numbers that differ between the inputs, examples of the
    reported split, and a skip in regression.
    """
    choices = choices or Choices()
    held_out = next(iter(caches.values())).held_out
    gold, alone = held_out.gold, next(iter(caches.values())).outputs
    _check(caches, kind, choices)
    on_reported_split = _check_split(held_out, reported, choices.reported_split)

    def measure(outputs: NDArray[Any]) -> tuple[float, float]:
        return metric(outputs, gold), float(losses(outputs, gold, kind).mean())

    cells = [
        cell
        for omega, cache in caches.items()
        for cell in sweep(cache, measure, choices.top_k, omega, betas=choices.betas)
    ]
    table = sorted(cells, key=_merit)
    cell, retrieval, outputs = _best(caches, table, kind, choices.modes)

    def gain(rows: NDArray[np.bool_]) -> float:
        return metric(outputs[rows], gold[rows]) - metric(alone[rows], gold[rows])

    score, baseline_score = metric(outputs, gold), metric(alone, gold)
    error = standard_error(gain, len(gold))
    kept = retrieval.opens_book and (score - baseline_score > error or not choices.one_se)
    if kept:
        retrieval = _with_skip(retrieval, alone, outputs, gold, metric, choices.skips)
    else:
        retrieval = Retrieval(cell.top_k, cell.temperature, 1.0)
        cell = next(one for one in table if one.beta == 1)
    return Tuned(
        retrieval=retrieval,
        omega=cell.omega,
        score=score,
        baseline_score=baseline_score,
        gain=score - baseline_score,
        standard_error=error,
        kept=kept,
        skip_rate=float(skipped(alone, retrieval).mean()),
        rank=table.index(cell) + 1,
        held_out=len(gold),
        held_out_digest=digest(held_out),
        on_reported_split=on_reported_split,
        table=tuple(table),
    )


def sweep(
    cache: HitCache,
    measure: Callable[[NDArray[Any]], tuple[float, float]],
    top_k: Sequence[int] = TOP_K,
    omega: float = 1.0,
    betas: Sequence[float] = BETAS,
) -> list[Cell]:
    """Score every cell of the grid; `measure` maps outputs (n, C) to a score and a loss. Nothing is searched."""
    available = max(1, cache.similarities.shape[1])
    cells = []
    for k in sorted({min(k, available) for k in top_k}):
        near = _top(cache, k)
        for temperature in TEMPERATURES:
            average = average_of(weights(near.similarities, temperature, near.counts), near.values)
            for beta in betas:
                cells.append(Cell(k, temperature, beta, *measure(interpolate(cache.outputs, average, beta)), omega))
    return cells


def standard_error(statistic: Callable[[NDArray[np.bool_]], float], count: int) -> float:
    """Delete-one jackknife (Efron and Stein, 1981) of a statistic of `count` rows, given a mask of those to use.

    For a mean it is exactly the sample standard deviation over sqrt(count), and it serves correlations as well.
    Above GROUPS rows it leaves out groups of rows instead.
    """
    groups = min(count, GROUPS)
    group_of = np.arange(count) % groups
    left_out = np.array([statistic(group_of != group) for group in range(groups)])
    return float(np.sqrt((groups - 1) * left_out.var()))


def digest(held_out: HeldOut) -> str:
    """The same for the same examples in any order."""
    rows = sorted(zip(held_out.ids, held_out.texts, strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _best(
    caches: Caches, table: Sequence[Cell], kind: WholeKind, modes: Sequence[Mode]
) -> tuple[Cell, Retrieval, NDArray[Any]]:
    """The cell to go by, what it, or a mode fitted on it, retrieves with, and the outputs (n, C) that gives.

    Those of a fitted mode are cross-validated. Its rival is the constant of least loss, which need not score best.
    """
    best, gentlest = table[0], min(table, key=lambda cell: cell.loss)
    start = next(cell for cell in table if cell.beta < 1)  # at beta = 1, top_k and temperature mean nothing
    gold = caches[start.omega].held_out.gold
    sample, found = _sample(caches[start.omega], start, kind)
    rival = losses(_outputs(caches, gentlest), gold, kind)[found]
    chosen = adapted(_constant(start), sample, modes, rival)
    if chosen is None:
        return best, _constant(best), _outputs(caches, best)
    outputs = np.array(caches[start.omega].outputs, dtype=np.float64)
    outputs[found] = interpolate(sample.outputs, sample.average, chosen[1])
    return start, chosen[0], outputs


def _constant(cell: Cell) -> Retrieval:
    return Retrieval(cell.top_k, cell.temperature, cell.beta)


def _outputs(caches: Caches, cell: Cell) -> NDArray[Any]:
    near = _top(caches[cell.omega], cell.top_k)
    return mix(near.outputs, near.similarities, near.values, near.counts, _constant(cell)).outputs


def _sample(cache: HitCache, cell: Cell, kind: WholeKind) -> tuple[Sample, NDArray[np.bool_]]:
    """What a mode is fitted on, and which of the examples (n,) those are: the ones that found something."""
    near = _top(cache, cell.top_k)
    shares = weights(near.similarities, cell.temperature, near.counts)
    average = average_of(shares, near.values)
    features = features_of(near.outputs, near.similarities, shares, near.values, average)
    found = ~np.isnan(average[:, 0])
    return Sample(near.outputs, average, features, near.held_out.gold, kind).rows(found), found


def _top(cache: HitCache, k: int) -> HitCache:
    return replace(
        cache, similarities=cache.similarities[:, :k], values=cache.values[:, :k], counts=cache.counts[:, :k]
    )


def _with_skip(
    retrieval: Retrieval,
    alone: NDArray[Any],
    told: NDArray[Any],
    gold: NDArray[Any],
    metric: Metric,
    skips: Sequence[Skip],
) -> Retrieval:
    """The skip that saves most searches of the held-out examples."""
    theta = confident_theta(alone, told, gold, metric) if "confident" in skips else None
    candidates = [replace(retrieval, skip=skip, theta=theta if skip == "confident" else None) for skip in skips]
    return max(candidates, key=lambda one: float(skipped(alone, one).mean()))


def _merit(cell: Cell) -> tuple[float, ...]:
    """Sorts the best cell first."""
    return (-cell.score, cell.loss, -cell.beta, cell.top_k, cell.temperature, -cell.omega)


def _joined(caches: Sequence[HitCache]) -> HitCache:
    ids = tuple(id for cache in caches for id in cache.held_out.ids)
    if len(set(ids)) < len(ids):
        raise UsageError(f"{len(ids) - len(set(ids))} examples are held out in more than one fold; split them anew")
    texts = tuple(text for cache in caches for text in cache.held_out.texts)
    widest = max(cache.similarities.shape[1] for cache in caches)

    def joined(name: str, padding: Any) -> NDArray[Any]:
        parts = []
        for cache in caches:
            part = getattr(cache, name)
            missing = [(0, 0), (0, widest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
            parts.append(np.pad(part, missing, constant_values=padding))
        return np.concatenate(parts)

    return HitCache(
        HeldOut(ids, texts, np.concatenate([cache.held_out.gold for cache in caches])),
        np.concatenate([cache.outputs for cache in caches]),
        joined("similarities", -np.inf),
        joined("values", 0),
        joined("counts", 0),
        joined("found", ""),
    )


def _check(caches: Caches, kind: WholeKind, choices: Choices) -> None:
    for cache in caches.values():
        rows = len(cache.outputs), len(cache.similarities), len(cache.held_out.gold), len(cache.held_out.ids)
        if len(set(rows)) > 1 or rows[0] < 2:
            raise UsageError(
                f"tuning got {rows[0]} predictions, {rows[1]} rows of hits, {rows[2]} labels and {rows[3]} ids; "
                "it needs the same number of each, and at least 2: hold out more examples"
            )
    if kind in NO_CLASS and set(choices.skips) != {"none"}:
        raise UsageError(f"skip {', '.join(choices.skips)}: {NO_CLASS[kind]} has no confidence to skip by; set none")


def _check_split(held_out: HeldOut, reported: Collection[str], allowed: bool) -> bool:
    """Whether the examples are those of the reported split, at least in part."""
    shared = set(held_out.ids) & set(reported)
    if shared and not allowed:
        raise UsageError(
            f"{len(shared)} of {len(held_out.ids)} examples to tune on are in the reported split "
            f"(one is {min(shared)!r}); hold out training rows, or set reported_split and it is reported"
        )
    return bool(shared)
