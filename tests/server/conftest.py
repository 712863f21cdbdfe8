"""Servers around a predictor that answers at once: inside the test's process, and as processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from stand_in import StandIn
from starlette.testclient import TestClient

from openbook.server.app import create_app
from openbook.server.limits import Limits

KEY = "a key of this test, long".replace(" ", "-").replace(",", "")
PROGRAM = """\
import json, sys
from openbook.server.launch import serve
from openbook.server.limits import Limits
from stand_in import StandIn
options = json.loads(sys.argv[1])
limits = Limits(**options.pop("limits", {}))
model = StandIn(**options.pop("model", {}))
wait = options.pop("wait", 0)
def load():
    import time
    time.sleep(wait)
    return model
sys.exit(1 if serve(load, limits, port=0, **options) else 0)
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests reach this machine, and nothing else."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(f"this test tried to reach {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


Open = Callable[..., TestClient]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens an app in this process, and waits until it is ready; its model is in `client.model`."""
    clients: list[TestClient] = []

    def open_app(model: Any = None, key: str | None = KEY, wait: bool = True, **limits: Any) -> TestClient:
        model = StandIn() if model is None else model
        app = create_app(lambda: model, Limits(**limits), key, name="the model")
        client = TestClient(app, raise_server_exceptions=False)
        client.model = model  # type: ignore[attr-defined]
        clients.append(client.__enter__())
        until(lambda: not wait or client.get("/ready").status_code == 200)
        return client

    yield open_app
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(opened: Open) -> TestClient:
    return opened()


class Process:
    """A server of its own, its address, and what it logged."""

    def __init__(self, options: dict[str, Any]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(options)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        until(lambda: bool(self.lines), 30)
        self.url = str(self.logged("listening")[0]["url"])
        self.address = ("127.0.0.1", int(self.url.rpartition(":")[2]))
        if not options.get("wait"):
            until(self.is_ready, 30)

    def read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, list(self.lines)) if line["event"] == event]

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.reader.join(5)
        return status


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[..., Process]]:
    found: list[Process] = []

    def start(**options: Any) -> Process:
        found.append(Process(options))
        return found[-1]

    yield start
    for one in found:
        one.process.kill()
        one.process.wait()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that another thread or process does."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)
