"""What operators see: one JSON line a request, and figures for Prometheus. Neither holds a text."""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openbook.server.refusals import broken, reply

log = logging.getLogger("openbook.server")

GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HUNG_UP = 499  # in log and figures only: there was nobody to tell
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
POWERS = tuple(2**power for power in range(0, 18, 2))
METHODS = ("GET", "POST", "HEAD", "OPTIONS")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class JsonLines(logging.Formatter):
    """A record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)  # ASCII, so that no text can break a line


class Metrics:
    """Figures in a registry of their own, so that several apps fit in one process."""

    def __init__(self, waiting: Callable[[], int], in_flight: Callable[[], int], ready: Callable[[], bool]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "openbook_"
        self.requests = Counter(
            f"{name}requests", "Requests by route and status; 499: the client hung up.", ["route", "method", "status"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            f"{name}request_seconds", "From the head of a request to its reply.", ["route"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.texts = Counter(f"{name}texts", "Texts and pairs that were answered.", registry=registry)
        self.truncated = Counter(f"{name}truncated_texts", "Of those, longer than the model reads.", registry=registry)
        self.batch_rows = Histogram(f"{name}batch_rows", "Rows of a batch.", buckets=POWERS, registry=registry)
        self.batch_tokens = Histogram(
            f"{name}batch_tokens", "Tokens of a batch, padding included.", buckets=POWERS, registry=registry
        )
        self.batch_seconds = Histogram(
            f"{name}batch_seconds", "What the model and the book take for a batch.", buckets=SECONDS, registry=registry
        )
        for gauge, about, now in (
            ("waiting_requests", "Requests that wait for the model.", waiting),
            ("requests_in_flight", "Requests that were read and are not answered.", in_flight),
            ("ready", "1 when the model answers.", ready),
        ):
            Gauge(f"{name}{gauge}", about, registry=registry).set_function(now)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)


class Telemetry:
    """Outermost layer: names every request, answers what went wrong inside, logs and counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, draining: Callable[[], bool]):
        self.app, self.metrics, self.draining = app, metrics, draining
        self.start, self.count = secrets.token_hex(8), itertools.count()  # a token for every request takes longer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name, began, status = self.request_id(scope), time.perf_counter(), HUNG_UP
        scope.setdefault("state", {}).update(request_id=name, told={})

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.headers(name, dict(message["headers"]))]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            log.exception("failed", extra={"fields": {"id": name}})
            if status != HUNG_UP:  # a reply has begun: the connection is cut
                raise
            await reply(broken(), name)(scope, receive, answer)
        finally:
            self.record(scope, status, time.perf_counter() - began)

    def request_id(self, scope: Scope) -> str:
        """The client's, if it gave one that can be written down, or a new one."""
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        return given if GIVEN_ID.fullmatch(given) else f"{self.start}-{next(self.count)}"

    def headers(self, name: str, given: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        closing = [(b"connection", b"close")] if self.draining() and b"connection" not in given else []
        return [(b"x-request-id", name.encode()), *HEADERS, *closing]

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.requests.labels(route, method, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        state = scope["state"]
        told = {"id": state["request_id"], "method": method, "route": route, "status": status}
        told.update(ms=round(1000 * seconds, 2), **state["told"])
        quiet = status < 400 and route in ("/health", "/ready", "/metrics")
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": told})
