"""The routes: what a request asks of the service, and what it is told."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from openbook.answers import Text
from openbook.config import UsageError
from openbook.knowledge_base.editing import Edit
from openbook.server import messages as wire
from openbook.server.batching import Job
from openbook.server.guard import Guard
from openbook.server.limits import Limits, checked_key
from openbook.server.page import page_response
from openbook.server.refusals import Refusal, of_http, of_validation, reply, too_large
from openbook.server.replies import answered, book_told, explained
from openbook.server.service import Predictor, Service
from openbook.server.telemetry import Telemetry, log

ABOUT = """Labels for texts, by a small student and the book it may look things up in. Every reply has an
`x-request-id`, and every refusal the same shape."""
bearer = HTTPBearer(auto_error=False, description="The server's OPENBOOK_API_KEY.")

MEANINGS = {
    401: "The key is wrong or missing.",
    403: "Edits are off: the server has no key.",
    408: "The body did not arrive in time.",
    409: "The model has no knowledge base, or none that this edit fits.",
    413: "The body, a text or the number of texts is over a limit.",
    422: "The request is not understood; `field` names where.",
    429: "Too many requests wait.",
    500: "The model or its book failed; the log says why.",
    503: "The model is not loaded yet, or the server is shutting down.",
    504: "The model did not answer in time.",
}
ASKING = (408, 413, 422, 429, 500, 503, 504)
EDITING = (401, 403, 409, *ASKING)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": wire.Problem, "description": MEANINGS[status]} for status in statuses}


def create_app(
    load: Callable[[], Predictor],
    limits: Limits | None = None,
    key: str | None = None,
    name: str = "openbook",
    log_texts: bool = False,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The whole server, to be run by uvicorn or a test client.

    `load` gives an `openbook.OpenBook`, on the thread that will run it, after the server answers /health; if it raises,
    `on_failure` is called and `app.state.service.failure` has the error. Without a `key` the book cannot be edited.
    Raises UsageError for a key that is too short.
    """
    service, key = Service(load, limits or Limits()), checked_key(key)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            await service.start()
            if service.failure is not None:
                on_failure()

        starting = asyncio.create_task(start())
        yield
        service.drain()
        starting.cancel()
        service.close()

    app = FastAPI(title="openbook", description=ABOUT, version=version("openbook"), lifespan=life, docs_url=None,
                  redoc_url=None)  # fmt: skip
    app.state.service = service
    app.add_middleware(Guard, service=service)
    app.add_middleware(Telemetry, metrics=service.metrics, draining=lambda: service.state == "draining")
    add_refusals(app)
    add_operations(app, service, name, has_key=key is not None)
    add_questions(app, service, log_texts)
    add_edits(app, service, key)
    return app


def add_refusals(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return reply(refusal, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return reply(of_validation(error), request.state.request_id)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return reply(of_http(error.status_code, dict(error.headers or {})), request.state.request_id)


def add_operations(app: FastAPI, service: Service, name: str, has_key: bool) -> None:
    """What machines and the page ask."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()

    @app.get("/health", responses=refusals(503))
    async def health() -> wire.Status:
        """Whether the process is alive. It says nothing about the model."""
        if not service.alive:
            raise Refusal(503, "dead", "the thread of the model has ended; start the server again")
        return wire.Status(status="alive")

    @app.get("/ready", responses=refusals(503))
    async def ready() -> wire.Status:
        """Whether to send requests: the model is loaded and warm, and the server is not shutting down."""
        service.check_ready()
        return wire.Status(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/model", responses=refusals(500, 503))
    def model() -> wire.ModelTold:
        """What is served."""
        about, limits = service.model, service.limits
        return wire.ModelTold(
            name=name, kind=about.kind, labels=None if about.labels is None else list(about.labels),
            book=book_told(about.book), edits=has_key, max_texts=limits.max_texts,
            max_characters=limits.max_characters, max_body=limits.max_body,
        )  # fmt: skip


def add_questions(app: FastAPI, service: Service, log_texts: bool) -> None:
    async def asked(request: Request, rows: list[Text], work: Any) -> Job:
        if log_texts:
            request.state.told["asked"] = rows
        job = await service.ask(rows, work)
        cut = sum(one.cut for one in job.encoded)
        request.state.told.update(texts=len(rows), tokens=sum(map(len, job.encoded)), truncated=cut)
        service.metrics.texts.inc(len(rows))
        service.metrics.truncated.inc(cut)
        return job

    @app.post("/predict", responses=refusals(*ASKING))
    async def predict(body: wire.Asked, request: Request) -> wire.Predictions:
        """The label (regression: the score) of every text or pair."""
        model = service.model
        job = await asked(request, rows_of(body.texts, service.limits), model.answer)
        answers = [answered(model, *one) for one in zip(job.answers, job.encoded, strict=True)]
        return wire.Predictions(answers=answers)

    @app.post("/explain", responses=refusals(409, *ASKING))
    async def explain(body: wire.Asked, request: Request) -> wire.Explanations:
        """Every answer with the neighbours in the book that decided it."""
        model = service.model
        service.check_book()
        job = await asked(request, rows_of(body.texts, service.limits), model.evidence)
        answers = [explained(model, *one) for one in zip(job.answers, job.encoded, strict=True)]
        return wire.Explanations(answers=answers)


def permission(key: str | None) -> Callable[..., None]:
    """What an edit depends on: that there is a key, and that the client has it."""

    def permitted(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if key is None:
            raise Refusal(403, "edits_off", "edits are off; start the server with OPENBOOK_API_KEY in its environment")
        said = "" if given is None else given.credentials
        if not secrets.compare_digest(said.encode(), key.encode()):
            message = "give the server's key: Authorization: Bearer KEY"
            raise Refusal(401, "wrong_key", message, WWW_Authenticate="Bearer")

    return permitted


def add_edits(app: FastAPI, service: Service, key: str | None) -> None:
    permitted = permission(key)

    async def edited(function: Callable[[], Edit]) -> wire.Edited:
        service.check_book()

        def edit() -> Edit:
            _ = service.model.book  # one that cannot be read fails here
            try:
                return function()
            except UsageError as error:  # an id that is taken or unknown, another writer: as the book is, it cannot be
                raise Refusal(409, "conflict", str(error)) from error

        done = await service.edit(edit)
        log.info(done.what, extra={"fields": {"entries": done.entries, "generation": done.generation}})
        return wire.Edited(
            added=done.added, removed=done.removed, entries=done.entries, generation=done.generation, stale=done.stale
        )

    @app.post("/remember", responses=refusals(*EDITING), dependencies=[Depends(permitted)])
    async def remember(body: wire.Remembered) -> wire.Edited:
        """Add texts to the book: from the next prediction on they are looked up."""
        model, rows = service.model, rows_of(body.texts, service.limits)
        for field, given in (("labels", body.labels), ("ids", body.ids)):
            if given is not None and len(given) != len(rows):
                raise Refusal(422, "invalid", f"{field}: there are {len(given)} for {len(rows)} texts", field)
        check_labels(model, body.labels)
        return await edited(lambda: model.remember(rows, body.labels, body.ids))

    @app.post("/forget", responses=refusals(*EDITING), dependencies=[Depends(permitted)])
    async def forget(body: wire.Forgotten) -> wire.Edited:
        """Remove entries from the book: from the next prediction on they are not looked up."""
        model = service.model
        check_count(body.ids, "ids", service.limits)
        return await edited(lambda: model.forget(body.ids))


def check_count(given: Sequence[Any], field: str, limits: Limits) -> None:
    if len(given) > limits.max_texts:
        raise too_large(f"{field}: {len(given):,} are given; send at most {limits.max_texts:,} at a time", field)


def rows_of(texts: Sequence[Any], limits: Limits) -> list[Text]:
    """Texts or pairs as a predictor takes them. Raises a Refusal for too many, or one that is too long."""
    check_count(texts, "texts", limits)
    rows: list[Text] = [row if isinstance(row, str) else (row[0], row[1]) for row in texts]
    for place, row in enumerate(rows):
        size = len(row) if isinstance(row, str) else sum(map(len, row))
        if size > limits.max_characters:
            field = f"texts[{place}]"
            raise too_large(f"{field}: it has {size:,} characters; send at most {limits.max_characters:,}", field)
    return rows


def check_labels(model: Predictor, labels: Sequence[wire.Said] | None) -> None:
    for place, label in enumerate(labels or ()):
        if model.labels is None and not isinstance(label, float):
            raise Refusal(422, "invalid", f"labels[{place}]: give a number, the model scores", f"labels[{place}]")
        names = label if model.kind == "multi_label" and isinstance(label, list) else [label]
        if model.labels is not None and not all(name in model.labels for name in names):
            known = ", ".join(model.labels)
            raise Refusal(422, "invalid", f"labels[{place}]: the model knows {known}", f"labels[{place}]")
