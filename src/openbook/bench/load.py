"""Clients of a server on this machine: as many requests as it answers, or so many a second, and how long each took."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

GOOD = 200


@dataclass
class Seen:
    """What the clients of one load saw."""

    seconds: list[float] = field(default_factory=list)  # of every answer
    failures: dict[str, int] = field(default_factory=dict)  # by status or error
    elapsed: float = 0.0

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.elapsed

    def told(self) -> dict[str, Any]:
        p50, p95, p99 = (float(one) for one in np.percentile(self.seconds or [np.nan], (50, 95, 99)))
        return {
            "requests": len(self.seconds), "per_second": self.per_second, "p50": p50, "p95": p95, "p99": p99,
            "failures": self.failures,
        }  # fmt: skip


def closed(url: str, bodies: Sequence[Any], connections: int, seconds: float) -> Seen:
    """Every connection asks again as soon as it is answered."""
    return asyncio.run(_loaded(url, bodies, connections, lambda elapsed: elapsed < seconds))


def counted(url: str, bodies: Sequence[Any], connections: int, requests: int) -> Seen:
    """The same until so many requests have been made."""
    left = iter(range(requests))
    return asyncio.run(_loaded(url, bodies, connections, lambda _: next(left, None) is not None))


def open_loop(
    url: str, bodies: Sequence[Any], rate: float, seconds: float, connections: int = 64, seed: int = 0
) -> Seen:
    """Requests come `rate` a second at random (Poisson), whether or not the ones before are answered.

    Each is timed from the moment it was due, so that waiting for a free connection counts.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
    return asyncio.run(_scheduled(url, bodies, np.cumsum(gaps), connections))


async def _loaded(url: str, bodies: Sequence[Any], connections: int, goes_on: Callable[[float], bool]) -> Seen:
    seen, rows = Seen(), itertools.cycle(bodies)
    async with _session(connections) as session:
        started = time.perf_counter()  # not before: to open a session takes time of its own
        clients = (_client(session, url, rows, seen, started, goes_on) for _ in range(connections))
        await asyncio.gather(*clients)
        seen.elapsed = time.perf_counter() - started
    return seen


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    rows: Iterator[Any],
    seen: Seen,
    started: float,
    goes_on: Callable[[float], bool],
) -> None:
    while goes_on((now := time.perf_counter()) - started):
        await _ask(session, url, next(rows), seen, now)


async def _scheduled(url: str, bodies: Sequence[Any], due: Any, connections: int) -> Seen:
    seen, rows = Seen(), itertools.cycle(bodies)
    async with _session(connections) as session:
        started, asked = time.perf_counter(), []
        for moment in due.tolist():
            await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
            asked.append(asyncio.create_task(_ask(session, url, next(rows), seen, started + moment)))
        await asyncio.gather(*asked)
        seen.elapsed = time.perf_counter() - started
    return seen


def _session(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), timeout=aiohttp.ClientTimeout(total=60)
    )


async def _ask(session: aiohttp.ClientSession, url: str, body: Any, seen: Seen, since: float) -> None:
    try:
        async with session.post(url, json=body) as reply:
            await reply.read()
            problem = None if reply.status == GOOD else str(reply.status)
    except (aiohttp.ClientError, TimeoutError) as error:
        problem = type(error).__name__
    if problem is None:
        seen.seconds.append(time.perf_counter() - since)
    else:
        seen.failures[problem] = seen.failures.get(problem, 0) + 1
