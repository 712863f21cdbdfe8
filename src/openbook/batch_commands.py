"""The part of `openbook predict` that answers a file."""

from __future__ import annotations

from pathlib import Path

from openbook.backends.base import BackendName
from openbook.batch_prediction import Job, Tally, predict_file, prepared, rejected_file
from openbook.console import console
from openbook.predictor import OpenBook


def predict_rows(
    model: Path, job: Job, backend: BackendName | None = None, threads: int | None = None, force: bool = False
) -> None:
    """Answer the rows of a file, and say how far it is and what came of it."""
    records = prepared(job, force)
    book = OpenBook.from_pretrained(model, backend, threads)
    with console.status(f"reading {job.input}") as status:
        tally = predict_file(book, model, job, records, force, lambda done: status.update(so_far(done)))
    console.print(f"{job.output}: {so_far(tally)}", markup=False)
    if tally.rejected:
        console.print(f"rejected rows, each with its reason: {rejected_file(job.output)}", markup=False)


def so_far(tally: Tally) -> str:
    parts = [f"{tally.rows:,} rows", f"{tally.rows_per_second:,.0f} a second"]
    parts += [f"{100 * tally.share:.0f} % of the file"] if tally.share < 1 else []
    parts += [f"{tally.truncated:,} cut to what the model reads"] if tally.truncated else []
    return ", ".join(parts + ([f"{tally.rejected:,} rejected"] if tally.rejected else []))
