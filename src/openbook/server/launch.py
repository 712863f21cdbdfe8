"""A server process: its socket, its logs, clients that dawdle, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from openbook.config import UsageError
from openbook.server.app import create_app
from openbook.server.limits import Limits
from openbook.server.service import Predictor, Service
from openbook.server.telemetry import JsonLines, log

KEEP_ALIVE = 75  # seconds a connection may be idle: longer than the usual proxies keep theirs
FLUSH = 1  # seconds for replies that are written to reach their clients
LINGER = 1.0  # seconds after SIGTERM in which what is on the way over an open connection is told 503, not cut off


class Patient(H11Protocol):
    """HTTP/1.1 that waits a limited time for the head of a request, and for a client to take its reply."""

    read_timeout = 10.0
    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self.waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.read_timeout, self.transport.abort)  # of a reply that nobody reads

    def _wait(self) -> None:
        self.waiting = self.loop.call_later(self.read_timeout, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


class Server(uvicorn.Server):
    """uvicorn that drains: nothing accepted is lost, and a clean end has exit status 0."""

    service: Service
    grace = 30.0
    cut_off = 0  # requests that were not done in time

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. uvicorn would exit with its status, this with 0."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, answer what was accepted, then close the connections.

        Until then a request over an open connection is told 503, with `connection: close`, rather than cut off.
        """
        service = self.service
        service.drain()
        log.info("draining", extra={"fields": {"requests": service.accepted}})
        for server in self.servers:
            server.close()
        ends = time.monotonic() + self.grace
        await asyncio.sleep(LINGER)
        while service.accepted and time.monotonic() < ends and not self.force_exit:
            await asyncio.sleep(0.02)
        self.cut_off = service.accepted
        await super().shutdown(sockets)
        log.info("stopped", extra={"fields": {"cut_off": self.cut_off}})


def serve(
    load: Callable[[], Predictor],
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    name: str = "openbook",
    log_texts: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was accepted. Logs go to standard error.

    Port 0 takes a free one, which the first line of the log names. Returns how many requests `limits.grace` was too
    short for. Raises UsageError for an address that cannot be used, and what `load` raises.
    """
    write_logs()
    listener = bound(host, port)
    servers: list[Server] = []

    def stop() -> None:
        servers[0].should_exit = True

    app = create_app(lambda: settled(load), limits, key, name, log_texts, on_failure=stop)
    config = uvicorn.Config(
        app, http=type("Protocol", (Patient,), {"read_timeout": limits.read_timeout}), ws="none", lifespan="on",
        log_config=None, access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE,
        limit_concurrency=limits.max_connections, timeout_graceful_shutdown=FLUSH,
    )  # fmt: skip
    server = Server(config)
    servers.append(server)
    server.service, server.grace = app.state.service, limits.grace
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log.info("listening", extra={"fields": {"url": f"http://{shown}:{address[1]}", "model": name}})
    server.run([listener])
    if server.service.failure is not None:
        raise server.service.failure
    return server.cut_off


def settled(load: Callable[[], Predictor]) -> Predictor:
    """The model, which the garbage collector need not look through again: that would stop all requests for long."""
    model = load()
    gc.collect()
    gc.freeze()
    return model


def bound(host: str, port: int) -> socket.socket:
    """A listening socket, whose connections send small packets at once: waiting for more costs 40 ms a reply."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--host {host} --port {port} cannot be used ({error}); choose others") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves it out for a socket it is given
    return listener


def write_logs() -> None:
    """JSON lines on standard error, also what uvicorn has to say of itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((log.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
