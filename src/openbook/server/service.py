"""What all requests share: the model once it is there, the queue before it, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.answers import Encoded, Text
from openbook.knowledge_base.editing import Edit
from openbook.knowledge_base.interpolate import Evidence
from openbook.server.batching import Batcher, Job, Work
from openbook.server.limits import Limits
from openbook.server.refusals import Refusal, busy, unavailable
from openbook.server.telemetry import Metrics

State = Literal["loading", "ready", "draining", "failed"]
LONG = "word " * 2000  # warms the longest input up, whatever the model's length


class Predictor(Protocol):
    """What is asked of `openbook.OpenBook`. `encode` may be called by several threads at once, the others by one."""

    kind: Any
    labels: tuple[str, ...] | None

    @property
    def book(self) -> Any: ...
    def encode(self, rows: Sequence[Text]) -> list[Encoded]: ...
    def answer(self, encoded: Sequence[Encoded]) -> NDArray[Any]: ...
    def evidence(self, encoded: Sequence[Encoded]) -> list[Evidence]: ...
    def remember(self, texts: Any, labels: Any = None, ids: Sequence[str] | None = None) -> Edit: ...
    def forget(self, ids: Sequence[str]) -> Edit: ...
    def name(self, answer: NDArray[Any]) -> str | float | list[str]: ...


class Service:
    """Loads a model on the thread that will run it, counts what is in flight, and passes rows to the queue."""

    def __init__(self, load: Callable[[], Predictor], limits: Limits):
        self.load, self.limits = load, limits
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.accepted = self.in_flight = 0  # requests that may be read, and of these those that were
        self.held = 0  # bytes of the accepted
        self.has_book = False
        self._model: Predictor | None = None
        self._batcher: Batcher | None = None
        self.metrics = Metrics(
            lambda: 0 if self._batcher is None else len(self._batcher), lambda: self.in_flight, self.is_ready
        )

    async def start(self) -> None:
        """Load and warm the model; `state` tells how it went, and `failure` why not."""
        self._batcher = Batcher(self.limits.batch_tokens, self.metrics.batch)
        try:
            (self._model,) = await asyncio.wrap_future(self._batcher.call(self._loaded).future)
        except Exception as error:
            self.state, self.failure = "failed", error
        else:
            self.state = "ready" if self.state == "loading" else self.state

    def drain(self) -> None:
        self.state = "draining"

    def close(self) -> None:
        if self._batcher is not None:
            self._batcher.close(5.0 if self._model is not None else 0.0)

    def check_book(self) -> None:
        if not self.has_book:
            raise Refusal(409, "no_book", "this model has no knowledge base; it answers /predict only")

    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def alive(self) -> bool:
        """Whether the thread of the model is; without it the process should be started anew."""
        return self._batcher is None or self._batcher.alive

    def check_ready(self) -> None:
        if self.state != "ready":
            raise unavailable(self.state)

    @property
    def model(self) -> Predictor:
        """Raises a Refusal as long as it is not there."""
        if self._model is None:
            raise unavailable(self.state)
        return self._model

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Keep room for a body while it is read and answered."""
        if self.held + size > self.limits.max_waiting_bytes:
            raise busy("the server holds as many bytes of requests as it takes")
        self.held, self.accepted = self.held + size, self.accepted + 1
        try:
            yield
        finally:
            self.held, self.accepted = self.held - size, self.accepted - 1

    @contextmanager
    def answering(self) -> Iterator[None]:
        if self.in_flight >= self.limits.max_waiting:
            raise busy(f"{self.in_flight} requests are waiting")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def ask(self, rows: Sequence[Text], work: Work) -> Job:
        """The finished job of these rows."""
        assert self._batcher is not None
        return await self._finished(self._batcher.submit(rows, self.model.encode, work))

    async def edit(self, function: Callable[[], Edit]) -> Edit:
        """Run an edit between two batches: it may need the model."""
        assert self._batcher is not None
        (edit,) = (await self._finished(self._batcher.call(function))).answers
        assert isinstance(edit, Edit)
        return edit

    async def _finished(self, job: Job) -> Job:
        """Raises a Refusal when the time of a request is over. Whatever ends the request also ends the job.

        504, not 503: the model behind this server was too slow for one request, while 503 means that another replica
        should be asked.
        """
        try:
            async with asyncio.timeout(self.limits.timeout):
                await asyncio.wrap_future(job.future)
        except TimeoutError:
            message = f"there was no answer within {self.limits.timeout:g} seconds; send fewer texts, or later"
            raise Refusal(504, "timeout", message) from None
        return job

    def _loaded(self) -> Predictor:
        """The model after a short and a long text, so that the first request finds everything in place."""
        model = self.load()
        encoded = model.encode(["warm", LONG])
        for rows in (encoded[:1], encoded):
            answers = model.answer(rows)
            if not np.isfinite(answers).all():
                raise ValueError("the model answers with something that is no number")
        self.has_book = model.book is not None
        if self.has_book:
            model.evidence(encoded[:1])
        return model
