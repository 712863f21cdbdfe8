"""The commands that pack a finished run into a folder that travels, and that check such a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openbook.console import console

Folder = Annotated[Path, typer.Argument(help="A folder that `openbook package` wrote.")]


def package(
    output: Annotated[Path, typer.Option("--output", help="The folder to write, such as dist/trec.")],
    model: Annotated[Path, typer.Option("--model", help="A run folder, such as runs/quickstart.")] = Path(
        "runs/quickstart"
    ),
    form: Annotated[
        str | None, typer.Option("--form", help="How the book's keys are stored: fp32, fp16, sq8, pca-64, opq-64.")
    ] = None,
    torch_weights: Annotated[
        bool, typer.Option("--torch-weights/--no-torch-weights", help="With them, or for ONNX Runtime alone.")
    ] = True,
    without_texts: Annotated[bool, typer.Option("--without-texts", help="Leave the book's texts out.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="Of this student, for its card, such as apache-2.0.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="A wheel of openbook for the container to install.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older package.")] = False,
) -> None:
    """Pack a finished run into one folder: student, exports, book, card, Dockerfile and digests."""
    from openbook.packaging import Choices, package

    choices = Choices(form, torch_weights, not without_texts, license_, wheel, force)
    packed = package(model, output, choices)
    console.print(f"{packed.folder}: {packed.bytes / 1e6:.1f} MB, for {', '.join(packed.engines)}", markup=False)
    for note in packed.notes:
        console.print(f"left out: {note}", markup=False)
    console.print(f"sha256 of its digests.json: {packed.digest}", markup=False)


def verify(folder: Folder) -> None:
    """Check a packed folder: every file, its book, and its answers. Exit status 2 and a list if something is wrong."""
    from openbook.verification import verify

    found = verify(folder)
    for problem in found.problems:
        typer.echo(f"wrong: {problem}", err=True)
    if found.problems:
        raise typer.Exit(2)
    console.print(f"{folder} is whole; its answers are as recorded with {', '.join(found.answered)}", markup=False)
    for name in found.skipped:
        console.print(f"not tried, since it is not installed: {name}", markup=False)
    console.print(f"sha256 of its digests.json: {found.digest}", markup=False)
