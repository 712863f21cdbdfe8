"""The command that serves a finished student over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from openbook.book_commands import Engine, Threads
from openbook.config import UsageError

KEY = "OPENBOOK_API_KEY"


def serve(
    model: Annotated[Path, typer.Option("--model", help="A run folder, such as runs/quickstart.")] = Path(
        "runs/quickstart"
    ),
    backend: Engine = None,
    threads: Threads = None,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_body: Annotated[int, typer.Option("--max-body", help="Bytes of a request.")] = 1 << 20,
    max_texts: Annotated[int, typer.Option("--max-texts", help="Texts of a request.")] = 128,
    max_characters: Annotated[int, typer.Option("--max-characters", help="Of a text, or a pair.")] = 100_000,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help="Requests read and not answered.")] = 512,
    max_waiting_bytes: Annotated[int, typer.Option("--max-waiting-bytes", help="Of all requests held.")] = 1 << 26,
    max_connections: Annotated[int, typer.Option("--max-connections", help="Open at a time.")] = 1024,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="Of a batch, padding included.")] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds a request may take.")] = 30.0,
    read_timeout: Annotated[float, typer.Option("--read-timeout", help="Seconds for its head, and its body.")] = 10.0,
    grace: Annotated[float, typer.Option("--grace", help="Seconds to finish requests after SIGTERM.")] = 30.0,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write the texts to the log as well.")] = False,
) -> None:
    """Serve a student and its book over HTTP, with a page to try it; edits need OPENBOOK_API_KEY."""
    try:
        from openbook.server.launch import serve as run
        from openbook.server.limits import Limits
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; the server needs pip install 'openbook[serve]'") from error
    from openbook.predictor import OpenBook

    limits = Limits(
        max_body, max_texts, max_characters, max_waiting, max_waiting_bytes, max_connections, batch_tokens, timeout,
        read_timeout, grace,
    )  # fmt: skip
    if not (model / "student" / "config.json").is_file():
        raise UsageError(
            f"--model {model} holds no finished student/ folder; name a run folder such as runs/quickstart"
        )

    def load() -> OpenBook:
        return OpenBook.from_pretrained(model, backend, threads)

    if run(load, limits, host, port, os.environ.get(KEY), model.resolve().name, log_texts):
        raise typer.Exit(1)
