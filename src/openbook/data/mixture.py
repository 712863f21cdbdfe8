"""Micro-batches of many tasks in turn: which task, and which of its examples, are pure functions of seed and step."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openbook.config import Optim, UsageError
from openbook.data.batches import Integers, Tokenised, epoch_batches
from openbook.types import Batch


@dataclass(frozen=True)
class Sampling:
    """How often a task is drawn: by its size, unless `alpha` or `cap` flatten that."""

    alpha: float = 1.0
    cap: int | None = None
    systematic: bool = False  # every update has each task as often as it should, to within one micro-batch


def probabilities(sizes: Sequence[int], alpha: float = 1.0, cap: int | None = None) -> NDArray[np.float64]:
    """p_t (T,), proportional to min(N_t, cap)^alpha: from uniform (alpha = 0) to the share of all examples (1).

    Raises UsageError for alpha < 0, a cap below 1, no task, or a task without examples.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise UsageError(f"teacher.mixture.alpha={alpha}: take 1 (by size), 0 (uniform) or something between")
    if cap is not None and cap < 1:
        raise UsageError(f"teacher.mixture.cap={cap}: take a number of examples above 0, or none")
    if not len(sizes) or min(sizes) < 1:
        raise UsageError(f"teacher.tasks have {list(sizes)} examples; name at least one task, each with examples")
    counted = np.minimum(np.asarray(sizes, np.float64), np.inf if cap is None else cap)
    weights = (counted / counted.max()) ** alpha
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def draws(
    p: NDArray[np.float64], updates: int, tasks_per_update: int, seed: int, systematic: bool = False
) -> NDArray[np.int64]:
    """The task of every micro-batch (S, M), drawn by probabilities p (T,).

    `systematic` draws M equally spaced points at once: a task then gets M p_t micro-batches of an update, rounded up
    or down.
    """
    generator = np.random.default_rng(seed)
    if systematic:
        points = (generator.random((updates, 1)) + np.arange(tasks_per_update)) / tasks_per_update
        points = generator.permuted(points, axis=1)
    else:
        points = generator.random((updates, tasks_per_update))
    return np.searchsorted(np.cumsum(p)[:-1], points, side="right")


class Mixture:
    """Which micro-batch every step gets: `optim.accumulation` of them, each of one drawn task, make an update.

    There are as many updates as `optim.epochs` passes over all tasks take. A task is read pass by pass, each in an
    order of its own, and every micro-batch is full. Any step may be asked for first: a resumed run sees the same.
    Raises UsageError without tasks, for a task without examples, and for `optim.tokens` or `optim.batch_tokens`.
    """

    def __init__(
        self, tasks: Mapping[str, Tokenised], optim: Optim, seed: int, sampling: Sampling | None = None
    ) -> None:
        for key in ("tokens", "batch_tokens"):
            if getattr(optim, key) is not None:
                raise UsageError(
                    f"optim.{key}={getattr(optim, key)}: a mixture of tasks is measured in examples;"
                    " set epochs, batch_size (of a micro-batch) and accumulation (micro-batches per update) instead"
                )
        sampling = sampling or Sampling()
        sizes = [len(tokenised) for tokenised in tasks.values()]
        p = probabilities(sizes, sampling.alpha, sampling.cap)
        passes = optim.epochs * sum(sizes) / (optim.accumulation * optim.batch_size)  # in updates
        updates = max(1, round(passes)) if passes else 0
        self._tasks, self._optim = dict(tasks), optim
        self._names = list(tasks)
        self._drawn = draws(p, updates, optim.accumulation, seed, sampling.systematic).reshape(-1)  # (steps,)
        self._turns = _turns(self._drawn)  # (steps,) how often its task was drawn before
        self._streams = [_Stream(tokenised.tokens, optim, _seed(seed, name)) for name, tokenised in tasks.items()]

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)}")
        task = int(self._drawn[step])
        name = self._names[task]
        return replace(self._tasks[name].batch(self._streams[task].rows(int(self._turns[step]))), task=name)

    def draws_of(self) -> dict[str, dict[str, float]]:
        """How many micro-batches every task gets, and how many passes over its examples they make."""
        counts = np.bincount(self._drawn, minlength=len(self._names)).tolist()
        return {
            name: {"draws": count, "passes": count * self._optim.batch_size / len(self._tasks[name])}
            for name, count in zip(self._names, counts, strict=True)
        }


class _Stream:
    """The micro-batches of one task without end: shuffled passes, each going on with what the last one left over."""

    def __init__(self, tokens: Integers, optim: Optim, seed: int) -> None:
        self._tokens, self._optim, self._seed = tokens, optim, seed
        self._starts = [0]  # first micro-batch of each pass begun
        self._carried = [np.empty(0, np.int64)]  # into it
        self._cached: tuple[int, list[Integers]] = (-1, [])

    def rows(self, number: int) -> Integers:
        """Positions (b,) of the examples in a micro-batch, numbered from 0."""
        while self._starts[-1] <= number:
            left = self._read(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(self._cached[1]))
            self._carried.append(left)
        place = bisect_right(self._starts, number) - 1
        if self._cached[0] != place:
            self._read(place)
        return self._cached[1][number - self._starts[place]]

    def _read(self, place: int) -> Integers:
        batches, left = epoch_batches(self._tokens, place, self._seed, self._optim, self._carried[place])
        self._cached = (place, batches)
        return left


def _turns(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every entry, how many equal ones stand before it."""
    order = np.argsort(drawn, kind="stable")
    counts = np.bincount(drawn)
    turns = np.empty(len(drawn), np.int64)
    turns[order] = np.arange(len(drawn)) - np.repeat(np.cumsum(counts) - counts, counts)
    return turns


def _seed(seed: int, name: str) -> int:
    """Of a task's own stream, whatever other tasks there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
