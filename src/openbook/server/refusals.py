"""Every way to say no: one shape of reply, with the status, a word for programs and a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from openbook.server.limits import RETRY_AFTER
from openbook.server.messages import Problem

LONGEST = 200  # characters of a name that came from outside


class Refusal(Exception):
    """Ends a request. `headers` go along with the reply."""

    def __init__(self, status: int, error: str, message: str, field: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.error, self.message, self.field = status, error, message, field
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def reply(refusal: Refusal, request_id: str) -> Response:
    told = Problem(error=refusal.error, message=refusal.message, field=refusal.field, request_id=request_id)
    return Response(told.model_dump_json(), refusal.status, refusal.headers, "application/json")


def busy(what: str) -> Refusal:
    return Refusal(429, "busy", f"{what}; try again in a moment", Retry_After=RETRY_AFTER)


def unavailable(status: str) -> Refusal:
    said = {"loading": "the model is being loaded", "draining": "the server is shutting down"}
    return Refusal(503, status, said.get(status, "the model could not be loaded"), Retry_After=RETRY_AFTER)


def too_large(message: str, field: str | None = None) -> Refusal:
    return Refusal(413, "too_large", message, field)


def broken() -> Refusal:
    return Refusal(500, "failed", "the server could not answer this; its log has the reason under this request_id")


def of_validation(error: RequestValidationError) -> Refusal:
    """The first problem in words that name its field, and how many others there are."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return malformed()
    place = where(first["loc"][1:])
    if not place and "dictionary" in str(first["msg"]):
        return Refusal(422, "invalid", "the body must be a JSON object, sent with content-type application/json")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    known = first["type"] != "extra_forbidden"
    message = lowered(str(first["msg"])).replace(" after validation", "") if known else "this field is not known"
    return Refusal(422, "invalid", f"{place or 'the request'}: {message}{more}", place or None)


def malformed() -> Refusal:
    return Refusal(422, "invalid", "the body is not valid JSON")


def of_http(status: int, headers: dict[str, str] | None) -> Refusal:
    """What the framework refuses: unknown paths, other methods, and a body that it cannot parse."""
    if status == HTTPStatus.BAD_REQUEST:
        return malformed()
    phrase = HTTPStatus(status).phrase
    refusal = Refusal(status, phrase.lower().replace(" ", "_"), phrase.lower())
    refusal.headers.update(headers or {})
    return refusal


def where(loc: Sequence[Any]) -> str:
    """`texts[3][0]` of ('texts', 'pairs', 3, 0): behind a field's name, words are kinds of list."""
    name = "".join([*map(str, loc[:1]), *(f"[{part}]" for part in loc[1:] if isinstance(part, int))])
    return name.encode("utf-8", "replace").decode()[:LONGEST]


def lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
