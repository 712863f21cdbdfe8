"""Between the network and the app: bodies are read whole, in time and within limits, and who hangs up is noticed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openbook.server.limits import Limits
from openbook.server.refusals import Refusal, reply, too_large
from openbook.server.service import Service

DISCARDED = 1 << 26  # bytes of a refused body that are still read, so that its sender gets to see the refusal


class HungUp(Exception):
    """The client is gone."""


class Guard:
    """Lets requests in whose body it has read; those that carry none (GET, HEAD) pass as they are."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        limits, is_read = self.service.limits, False
        try:
            self.service.check_ready()
            with self.service.holding(size_of(scope, limits)):
                body = await read_body(receive, limits)
                is_read = True
                with self.service.answering():
                    await self.answer(body, scope, receive, send)
        except Refusal as refusal:
            response = reply(refusal, scope["state"]["request_id"])
            if is_read:
                await response(scope, receive, send)
            else:
                await refuse(response.status_code, response.raw_headers, bytes(response.body), receive, send, limits)
        except HungUp:
            return

    async def answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; stop it, and with it what it waits for, when the client hangs up."""
        work = asyncio.ensure_future(self.app(scope, once(body), send))
        gone = asyncio.ensure_future(until_hung_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HungUp
            work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


def size_of(scope: Scope, limits: Limits) -> int:
    """The most bytes that this body may have: what its head says, or what is allowed where that says nothing."""
    said = next((value for name, value in scope["headers"] if name == b"content-length"), None)
    size = limits.max_body if said is None else int(said)
    if size > limits.max_body:
        raise over(limits)
    return size


def over(limits: Limits) -> Refusal:
    return too_large(f"the body has more than {limits.max_body:,} bytes; send fewer texts at a time")


async def read_body(receive: Receive, limits: Limits) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                body += message.get("body", b"")
                if len(body) > limits.max_body:
                    raise over(limits)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, "too_slow", f"the body did not arrive within {limits.read_timeout:g} seconds") from None


async def refuse(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, receive: Receive, send: Send, limits: Limits
) -> None:
    """Say no while the body is still on its way.

    The reply goes out at once, then some of the body is discarded before the connection is closed: closing it under a
    client that still sends would take the reply away from it.
    """
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    left = DISCARDED
    with suppress(TimeoutError):
        async with asyncio.timeout(limits.read_timeout):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
                left -= len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b""})


def once(body: bytes) -> Receive:
    """What the app receives: a body that is there."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive


async def until_hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
