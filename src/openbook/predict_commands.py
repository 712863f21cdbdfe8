"""The command that predicts: texts from the command line or standard input, or the rows of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from openbook.book_commands import Engine, Model, Threads
from openbook.config import UsageError
from openbook.console import console
from openbook.knowledge_base.interpolate import EMPTY

if TYPE_CHECKING:
    from openbook.batch_prediction import Job, Tally


def predict(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts to predict; read from standard input if absent.")
    ] = None,
    model: Model = Path("runs/quickstart"),
    pair: Annotated[bool, typer.Option("--pair", help="Each text is two, separated by a tab.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show the neighbours behind every answer.")] = False,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="No text finds an entry of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    backend: Engine = None,
    threads: Threads = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="Rows to predict: CSV, TSV, JSONL or Parquet, also .gz. Of any size.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="With --input: CSV, JSONL or Parquet. Resumes if it was killed."),
    ] = None,
    text: Annotated[str, typer.Option("--text", help="The column of --input that holds the texts.")] = "text",
    text_pair: Annotated[str | None, typer.Option("--text-pair", help="The column of second texts, of pairs.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add a column for each class.")] = False,
    prefix: Annotated[str, typer.Option("--prefix", help="Of the columns that are added.")] = "",
    quoting: Annotated[bool, typer.Option("--quoting/--no-quoting", help="Quotes group fields in CSV and TSV.")] = True,
    batch_rows: Annotated[int, typer.Option("--batch-rows", help="Rows of --input that are kept together.")] = 1024,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished --output.")] = False,
) -> None:
    """Predict texts, or the rows of a file, with a student and its knowledge base."""
    if (input_ is None) != (output is None):
        raise UsageError(f"--input is {input_} and --output is {output}; give both or neither")
    if input_ is not None and output is not None:
        from openbook.batch_prediction import Job

        if texts or pair or as_json or leave_out:
            raise UsageError(
                "--input names a file of rows; leave out texts, --pair (use --text-pair), --json and --leave-out"
            )
        job = Job(input_, output, text, text_pair, probabilities, explain, prefix, quoting, batch_rows)
        return predict_rows(model, job, backend, threads, force)
    predict_texts(texts, model, pair, explain, leave_out, as_json, backend, threads)


def predict_rows(model: Path, job: Job, backend: Engine, threads: Threads, force: bool) -> None:
    """Answer the rows of a file, and say how far it is and what came of it."""
    from openbook.batch_prediction import predict_file, prepared, rejected_file
    from openbook.predictor import OpenBook

    records = prepared(job, force)
    book = OpenBook.from_pretrained(model, backend, threads)
    say_if_empty(book)
    with console.status(escape(f"reading {job.input}")) as status:
        tally = predict_file(book, model, job, records, force, lambda done: status.update(so_far(done)))
    console.print(f"{job.output}: {so_far(tally)}", markup=False)
    if tally.rejected:
        console.print(f"rejected rows, each with its reason: {rejected_file(job.output)}", markup=False)


def so_far(tally: Tally) -> str:
    parts = [f"{tally.rows:,} rows", f"{tally.rows_per_second:,.0f} a second"]
    parts += [f"{100 * tally.share:.0f} % of the file"] if tally.share < 1 else []
    parts += [f"{tally.truncated:,} cut to what the model reads"] if tally.truncated else []
    return ", ".join(parts + ([f"{tally.rejected:,} rejected"] if tally.rejected else []))


def predict_texts(
    texts: list[str] | None,
    model: Path,
    pair: bool,
    explain: bool,
    leave_out: bool,
    as_json: bool,
    backend: Engine,
    threads: Threads,
) -> None:
    from openbook.predictor import OpenBook

    lines = list(texts or (line.rstrip("\n") for line in sys.stdin))
    rows = [as_pair(line, place) for place, line in enumerate(lines)] if pair else lines
    book = OpenBook.from_pretrained(model, backend, threads)
    say_if_empty(book)
    for line, record in zip(lines, predictions(book, rows, explain, leave_out), strict=True):
        if as_json:
            typer.echo(json.dumps({"text": line, **record}, ensure_ascii=False))
        else:
            show_prediction(line, record)


def say_if_empty(book: Any) -> None:
    if book.book is not None and not book.book.base.ids:
        typer.echo(f"note: {EMPTY}", err=True)


def as_pair(line: str, place: int) -> tuple[str, str]:
    first, tab, second = line.partition("\t")
    if not tab:
        raise UsageError(f"text {place} is {line!r}: with --pair give two texts separated by a tab")
    return first, second


def predictions(book: Any, rows: list[Any], explain: bool, leave_out: bool) -> list[dict[str, Any]]:
    answers, chances = book.predict(rows, leave_out), book.predict_proba(rows, leave_out)
    records = [
        {"prediction": answer, "probability": chance_of(book, answer, chance)}
        for answer, chance in zip(answers, chances, strict=True)
    ]
    if explain:
        for record, told in zip(records, book.explain(rows, leave_out), strict=True):
            record["alone"] = told.alone
            record["neighbours"], record["reason"] = told.evidence.as_records(), told.evidence.reason
    return records


def chance_of(book: Any, answer: Any, chances: Any) -> float | dict[str, float] | None:
    """The probability of an answer, or of each of several labels that are told; scores have none."""
    if isinstance(answer, list):
        return {name: float(chances[book.labels.index(name)]) for name in answer}
    return None if book.labels is None else float(chances.max())


def show_prediction(line: str, record: dict[str, Any]) -> None:
    answer, chance = record["prediction"], record["probability"]
    if isinstance(answer, list):
        told, shown = ", ".join(answer), ", ".join(f"{one:.2f}" for one in chance.values())
    else:
        told = answer if isinstance(answer, str) else str(round(answer, 3))
        shown = "" if chance is None else f"{chance:.2f}"
    typer.echo(f"{told}\t{shown}\t{line}")
    for neighbour in record.get("neighbours", ()):
        console.print(
            f"    {neighbour['weight']:.2f}  similarity {neighbour['similarity']:.2f}  {neighbour['text']}",
            markup=False,
        )
