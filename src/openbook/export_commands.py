"""The command that exports a finished student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from openbook.config import UsageError
from openbook.console import console


def export(
    model: Annotated[Path, typer.Option("--model", help="A run folder, such as runs/quickstart.")] = Path(
        "runs/quickstart"
    ),
    int8: Annotated[
        bool, typer.Option("--int8/--no-int8", help="Also with int8 weights: smaller, mostly faster.")
    ] = True,
    agreement: Annotated[
        float, typer.Option("--agreement", help="Share of rows that int8 must give torch's class.")
    ] = 0.98,
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX. Default: the exporter's own choice.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Real rows to prove parity on. Default: the texts of the book.")
    ] = None,
    text: Annotated[str, typer.Option("--text", help="The column of --rows that holds the texts.")] = "text",
    text_pair: Annotated[str | None, typer.Option("--text-pair", help="The column of second texts, of pairs.")] = None,
) -> None:
    """Write a student as ONNX, in fp32 and int8, each proven to answer like torch before it is there."""
    from openbook.stages.export import Wish
    from openbook.stages.export import export as write

    record = write(model, Wish(int8, opset, agreement), None if rows is None else read_rows(rows, text, text_pair))
    show(record)
    console.print(f"{model / 'student' / 'onnx'}", markup=False)
    if refusal := record["parity"].get("onnx-int8", {}).get("refused"):
        typer.echo(f"error: int8 was refused, and fp32 is written alone: {refusal}", err=True)
        raise typer.Exit(1)


def read_rows(path: Path, text: str, text_pair: str | None) -> list[Any]:
    """Texts or pairs of a file. Raises UsageError for a column that is absent, and for what is no text."""
    from openbook.config import FileSource
    from openbook.data.sources import read

    found = read(FileSource(path=str(path)), "--rows")
    columns = {"--text": text} if text_pair is None else {"--text": text, "--text-pair": text_pair}
    for option, column in columns.items():
        if column not in found[0]:
            raise UsageError(f"{option} {column}: {path} has the columns {', '.join(found[0])}; name one of them")
        for place, row in enumerate(found):
            if not isinstance(row.get(column), str):
                raise UsageError(f"{option} {column}: row {place + 1} of {path} has {row.get(column)!r}; give texts")
    return [row[text] if text_pair is None else (row[text], row[text_pair]) for row in found]


def show(record: dict[str, Any]) -> None:
    """One line an engine: its file, how near it is to torch, and its speed here."""
    from openbook.backends.onnx import FILES

    timing = record["timing"]
    shapes = list(timing["torch"])
    table = Table("engine", "MB", "against torch", *(f"ms a row, {shape}" for shape in shapes))
    for name in ("torch", "onnx", "onnx-int8"):
        if name not in timing:
            continue
        files = [about["bytes"] for file, about in record["files"].items() if file.startswith(FILES.get(name, "-"))]
        speeds = [
            f"{timing[name][shape]:.3f} ({timing['torch'][shape] / timing[name][shape]:.1f}x)" for shape in shapes
        ]
        table.add_row(name, f"{sum(files) / 1e6:.1f}" if files else "", nearness(record["parity"].get(name)), *speeds)
    console.print(table)
    parity = record["parity"]
    console.print(f"proven on {parity['rows']} real rows, and at lengths 1 to {parity['longest']}")
    console.print(f"fastest here: {record['recommended']}", markup=False)


def nearness(found: dict[str, float] | None) -> str:
    if not found:
        return ""
    if "largest_difference" in found:
        return f"within {found['largest_difference']:.1g}"
    return f"agreement {found['agreement']:.3f}, cosine {found['mean_cosine']:.4f}"
