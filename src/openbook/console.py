"""What a run says: one line a stage, and progress bars with remaining time where someone watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WIDE = 140  # columns of a table that goes to a file

console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDE)


@contextmanager
def track(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar for `total` pieces of work; call what it yields with the number done. Silent off a terminal."""
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(what), total=total)
        yield lambda done: progress.update(task, completed=done)
