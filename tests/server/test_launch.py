"""A server process: it drains without losing a request, and no client can hold it up."""

import http.client
import inspect
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from openbook.config import UsageError
from openbook.serve_commands import serve
from openbook.server.launch import bound
from openbook.server.limits import Limits

Start = Callable[..., Any]
BODY = json.dumps({"texts": ["a b c"]})
JSON = {"content-type": "application/json"}


def request(body: str, *headers: str) -> bytes:
    lines = ["POST /predict HTTP/1.1", "host: here", "content-type: application/json", *headers]
    return "\r\n".join([*lines, "", body]).encode()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def figure(server: Any, name: str) -> float:
    lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def ask_until_told_to_go(server: Any, seen: Counter[str]) -> None:
    """One request after the other over one connection that is idle between them, as in the pool of a client."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    while True:
        time.sleep(0.02)
        try:
            connection.request("POST", "/predict", BODY, JSON)
        except ConnectionRefusedError:
            seen["refused"] += 1
            return
        except OSError:
            seen["lost"] += 1
            return
        try:
            reply = connection.getresponse()
            reply.read()
        except (OSError, http.client.HTTPException):
            seen["lost"] += 1
            return
        seen[str(reply.status)] += 1
        if reply.status == 503:
            return


def test_sigterm_under_load_loses_no_accepted_request(started: Start) -> None:
    server = started()
    seen: list[Counter[str]] = [Counter() for _ in range(16)]
    threads = [threading.Thread(target=ask_until_told_to_go, args=(server, one)) for one in seen]
    for thread in threads:
        thread.start()
    until(lambda: all(one["200"] > 2 for one in seen))
    assert server.stop() == 0
    for thread in threads:
        thread.join(10)
    told = sum(seen, Counter())
    assert set(told) <= {"200", "503", "refused"}, told
    statuses = Counter(line["status"] for line in server.logged("request") if line["route"] == "/predict")
    assert statuses[200] == told["200"]
    assert statuses.total() - statuses[503] == told["200"]
    assert server.logged("stopped")[0]["cut_off"] == 0


def test_what_was_accepted_is_finished_and_nothing_else_is_taken(started: Start) -> None:
    server = started(model={"seconds": 1.0})
    replies: list[httpx2.Response] = []
    thread = threading.Thread(
        target=lambda: replies.append(httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON))
    )
    slow = socket.create_connection(server.address)
    slow.sendall(request(BODY[:5], f"content-length: {len(BODY)}"))  # accepted: its body is still on the way
    idle = http.client.HTTPConnection(*server.address)
    idle.request("GET", "/health")
    idle.getresponse().read()
    thread.start()
    until(lambda: figure(server, "openbook_requests_in_flight") == 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: bool(server.logged("draining")))
    assert server.logged("draining")[0]["requests"] == 2
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")
    idle.request("GET", "/ready")
    reply = idle.getresponse()
    assert (reply.status, reply.getheader("connection"), json.loads(reply.read())["error"]) == (
        503,
        "close",
        "draining",
    )
    slow.sendall(BODY[5:].encode())
    assert read_all(slow).startswith(b"HTTP/1.1 200")
    assert server.process.wait(20) == 0
    thread.join(10)
    assert replies[0].status_code == 200
    assert replies[0].headers["connection"] == "close"


def test_a_drain_that_takes_too_long_says_so(started: Start) -> None:
    server = started(model={"seconds": 0.01}, limits={"grace": 0.4})
    stuck = socket.create_connection(server.address)
    stuck.sendall(request("", "content-length: 10"))
    until(lambda: figure(server, "openbook_ready") == 1)
    began = time.monotonic()
    assert server.stop() == 1
    assert time.monotonic() - began < 8
    assert server.logged("stopped")[0]["cut_off"] == 1


def test_a_second_signal_ends_at_once(started: Start) -> None:
    server = started(model={"seconds": 0.01})
    stuck = socket.create_connection(server.address)
    stuck.sendall(request("", "content-length: 10"))
    figure(server, "openbook_ready")
    server.process.send_signal(signal.SIGTERM)
    until(lambda: bool(server.logged("draining")))
    assert server.stop() == 1


def test_a_server_that_is_still_loading_can_be_stopped(started: Start) -> None:
    server = started(wait=20)
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert httpx2.get(f"{server.url}/ready").status_code == 503
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).json()["error"] == "loading"
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 12


def test_clients_that_dawdle_are_let_go_and_hold_nobody(started: Start) -> None:
    server = started(limits={"read_timeout": 0.5})
    silent, slow_head, slow_body, second = (socket.create_connection(server.address) for _ in range(4))
    second.sendall(request(BODY, f"content-length: {len(BODY)}"))
    reply = second.recv(65536)
    while not reply.endswith(b"]}"):
        reply += second.recv(65536)
    slow_head.sendall(b"POST /predict HTTP/1.1\r\nhost:")
    slow_body.sendall(request("{", "content-length: 100"))
    began = time.monotonic()
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).status_code == 200
    for _ in range(20):  # a byte now and then keeps no connection open
        time.sleep(0.05)
        with suppress(OSError):  # it may be cut off already
            slow_head.sendall(b"x")
    assert read_all(slow_body).startswith(b"HTTP/1.1 408")
    second.sendall(b"POST ")  # it was idle for longer than a head may take, which is no fault
    for connection in (silent, slow_head, second):
        assert read_all(connection) == b""
    assert time.monotonic() - began < 5
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).status_code == 200


def test_a_body_that_is_too_big_is_refused_and_its_sender_sees_it(started: Start) -> None:
    server = started()
    for chunked in (False, True):
        connection = http.client.HTTPConnection(*server.address, timeout=20)
        parts = (b" " * 65536 for _ in range(160))
        connection.request("POST", "/predict", parts if chunked else b" " * 10_485_760, JSON, encode_chunked=chunked)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]) == (413, "too_large")
        assert reply.getheader("connection") == "close"
    for header in ("accept: */*", "expect: 100-continue"):  # refused before any of it is sent
        large = socket.create_connection(server.address)
        large.sendall(request("", "content-length: 10000000000", header))
        large.settimeout(5)
        assert large.recv(65536).startswith(b"HTTP/1.1 413")
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).status_code == 200


def test_bodies_on_their_way_take_no_more_room_than_is_given(started: Start) -> None:
    server = started(limits={"max_body": 1000, "max_waiting_bytes": 1500})
    holding = socket.create_connection(server.address)
    holding.sendall(request("{", "content-length: 900"))
    unknown = socket.create_connection(server.address)
    until(lambda: httpx2.post(f"{server.url}/predict", content=b" " * 700, headers=JSON).status_code == 429)
    unknown.sendall(request("", "transfer-encoding: chunked"))  # may become 1000
    unknown.settimeout(5)
    assert unknown.recv(65536).startswith(b"HTTP/1.1 429")
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).status_code == 200
    holding.close()
    until(lambda: httpx2.post(f"{server.url}/predict", content=b" " * 700, headers=JSON).status_code == 422)


def test_more_connections_than_are_given_are_turned_away(started: Start) -> None:
    server = started(limits={"max_connections": 3})
    held = [socket.create_connection(server.address) for _ in range(3)]
    until(lambda: httpx2.get(f"{server.url}/health").status_code == 503)
    for one in held:
        one.close()
    until(lambda: httpx2.get(f"{server.url}/health").status_code == 200)


def test_the_work_of_clients_that_hang_up_is_dropped(started: Start) -> None:
    server = started(model={"seconds": 0.5}, limits={"batch_tokens": 1})  # one request at a time
    gone = [socket.create_connection(server.address) for _ in range(8)]
    for one in gone:
        one.sendall(request(BODY, f"content-length: {len(BODY)}"))
    until(lambda: figure(server, "openbook_requests_in_flight") == 8)
    for one in gone:
        one.close()
    began = time.monotonic()
    assert httpx2.post(f"{server.url}/predict", content=BODY, headers=JSON).status_code == 200
    assert time.monotonic() - began < 2.0  # eight would take four seconds
    until(lambda: len([line for line in server.logged("request") if line["status"] == 499]) >= 7)
    assert figure(server, "openbook_requests_in_flight") == 0


def test_open_connections_are_told_of_the_end_and_all_that_is_logged_is_json(started: Start) -> None:
    server = started()
    garbage = socket.create_connection(server.address)
    garbage.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    assert b"400" in read_all(garbage)
    idle = http.client.HTTPConnection(*server.address, timeout=10)
    idle.request("GET", "/health")
    assert idle.getresponse().read()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # what is on its way over an open connection is not cut off at once
    idle.request("POST", "/predict", BODY, JSON)
    assert idle.getresponse().status in (200, 503)
    assert server.process.wait(20) == 0
    server.reader.join(5)
    events = [json.loads(line)["event"] for line in server.lines]
    assert events[0] == "listening"
    assert events[-1] == "stopped"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_an_address_that_is_taken_is_refused_by_name(host: str) -> None:
    with bound(host, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"--host {host} --port {port} cannot be used"):
            bound(host, port)


def test_replies_are_not_held_back_to_fill_packets() -> None:
    with bound("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        assert listener.accept()[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--host 300.1.1.1"):
        bound("300.1.1.1", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model nowhere holds no finished student"),
        (["--max-texts", "0"], "--max-texts is 0; it must be above 0"),
        (["--max-body", "100000000"], "--max-waiting-bytes is 67108864, less than --max-body"),
        (["--timeout", "-1"], "--timeout is -1.0"),
        (["--grace", "nan"], "--grace is nan"),
    ],
)
def test_the_command_refuses_before_it_loads_anything(options: list[str], message: str) -> None:
    app = typer.Typer()
    app.command()(serve)
    told = CliRunner().invoke(app, options)
    assert isinstance(told.exception, UsageError)
    assert message in str(told.exception)


def test_the_options_are_the_limits() -> None:
    """Every limit is an option of the same name and default."""
    options = {name: one.default for name, one in inspect.signature(serve).parameters.items()}
    assert {name: options[name] for name in asdict(Limits())} == asdict(Limits())
    assert Path(options["model"]).as_posix() == "runs/quickstart"
    assert options["host"] == "127.0.0.1"
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    named = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)[` ]", page)}
    assert set(asdict(Limits())) <= named <= {*options, "help"}
