"""The command line: one command per stage, plus run, init, tasks and env; others in modules beside this one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads cost small models a factor of ten
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.metadata
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from openbook import bench_commands, book_commands, export_commands, package_commands, predict_commands, serve_commands
from openbook.config import RunError, UsageError
from openbook.console import console

TRAINING = {"torch", "transformers", "accelerate", "datasets", "numba", "scipy", "sentencex", "jinja2", "matplotlib"}
VERSIONED = ("openbook", "torch", "transformers", "accelerate", "numpy", "tokenizers", "onnxruntime")  # in `env`

app = typer.Typer(
    help="Compress a large text encoder into a small, fast one: the right textbook, then the exam with the book open.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Lay key=value over the recipe, such as student.layers=4. Repeatable.")
]
RunFolder = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives. Default: runs/<name>.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show which stages would run and why; run nothing.")]
Model = Annotated[Path, typer.Option("--model", help="A run folder, such as runs/quickstart.")]


def start(path: Path, overrides: list[str] | None, folder: Path | None, dry_run: bool, until: str | None) -> Any:
    from openbook.pipeline import execute
    from openbook.recipe import load_recipe

    recipe = load_recipe(path, overrides or [])
    return execute(recipe, folder or Path("runs") / recipe.name, until, dry_run)


@app.command()
def run(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Run a whole recipe: teacher, corpus, students, knowledge base, evaluation, report. Skips what is done."""
    from openbook.workspace import Run

    done = start(recipe, set_, run_dir, dry_run, None)
    if isinstance(done, Run) and not dry_run:
        show_report(done)
    elif not dry_run:
        show_students(done)


@app.command()
def train_teacher(
    recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False
) -> None:
    """Fine-tune the pretrained teacher on the task, or on many at once."""
    stage(recipe, set_, run_dir, dry_run, "train-teacher")


@app.command()
def build_bank(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Split general text into clean, unique sentences, none of them near an evaluation text."""
    stage(recipe, set_, run_dir, dry_run, "build-bank")


@app.command()
def retrieve(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Find what the task's texts retrieve from the bank; builds the index it needs."""
    stage(recipe, set_, run_dir, dry_run, "retrieve")


@app.command()
def build_corpus(
    recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False
) -> None:
    """Retrieve the textbook: general sentences that belong to the task."""
    stage(recipe, set_, run_dir, dry_run, "build-corpus")


@app.command()
def record_answers(
    recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False
) -> None:
    """Let the teacher read corpus and task once, and keep what it says."""
    stage(recipe, set_, run_dir, dry_run, "record-answers")


@app.command()
def distill(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Teach the students: every kind under every seed, or students of several shapes for any task."""
    stage(recipe, set_, run_dir, dry_run, "distill")


@app.command()
def build_text(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Cut general text into the blocks that task-agnostic students read."""
    stage(recipe, set_, run_dir, dry_run, "build-text")


@app.command()
def train_students(
    recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False
) -> None:
    """Let task-agnostic students learn many tasks themselves, where the recipe asks for that."""
    stage(recipe, set_, run_dir, dry_run, "train-students")


@app.command()
def build_kb(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Fill the knowledge base with the teacher's answers and tune how far it is trusted."""
    stage(recipe, set_, run_dir, dry_run, "build-kb")


@app.command()
def evaluate(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Score, compare and time all models on the reported split."""
    stage(recipe, set_, run_dir, dry_run, "evaluate")


@app.command()
def report(recipe: RecipePath, set_: Overrides = None, run_dir: RunFolder = None, dry_run: DryRun = False) -> None:
    """Write the report and the model card; runs what they still need."""
    done = start(recipe, set_, run_dir, dry_run, "report")
    if not dry_run:
        show_report(done)


def stage(recipe: Path, overrides: list[str] | None, folder: Path | None, dry_run: bool, until: str) -> None:
    from openbook.pipeline import stages_of

    done = start(recipe, overrides, folder, dry_run, until)
    if not dry_run:
        console.print(f"{done.folder / stages_of(done.recipe)[until].folder}", markup=False)


def show_students(done: Any) -> None:
    from openbook.stages.evaluate_agnostic import overview

    columns = overview(done.folder / "evaluation")
    table = Table(*(Column(Text(name)) for name in columns), title="Fine-tuned on every task, in points")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console.print()
    console.print(table)
    for student in done.recipe.students:
        console.print(f"{student.name}: {done.folder / 'students' / student.name}", markup=False)


def show_report(done: Any) -> None:
    from openbook.report import console_table, verdicts
    from openbook.stages.write_report import gather

    found = gather(done)
    console.print()
    console.print(console_table(found))
    for verdict in verdicts(found):
        console.print(f"- {verdict}", markup=False)
    console.print(f"\nreport:  {done.folder / 'report.html'}\nstudent: {done.folder / 'student'}", markup=False)


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="The experiment, a YAML file such as experiments/corpus.yaml.")],
    scale: Annotated[
        str | None, typer.Option("--scale", help="Size of the grid; chosen by the machine if absent.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task. Repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm. Repeatable.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Large files. Default: runs/experiments/<name>.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="One JSON a training. Default: benchmarks/results/<name>.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Default: docs/results/<name>.md.")] = None,
) -> None:
    """Run a grid of arms, tasks and seeds; skips what is done, and writes a page of results."""
    from openbook import agnostic_experiment, cells, experiment
    from openbook.agnostic_grid import agnostic_grid, is_agnostic
    from openbook.grid import grid_of, raw_grid

    raw = raw_grid(file)
    grid: Any = agnostic_grid(raw, file) if is_agnostic(raw) else grid_of(raw, file)
    if is_agnostic(raw) and task:
        raise UsageError(f"--task {task[0]!r}: {file} fine-tunes every student on all tasks; choose arms with --arm")
    for given, known, option in (
        (task, {} if is_agnostic(raw) else grid.tasks, "--task"),
        (arm, grid.arms, "--arm"),
        ([scale] if scale else [], grid.scales, "--scale"),
    ):
        for name in given or ():
            if name not in known:
                raise UsageError(f"{option} {name!r} is not in {file}; choose from {', '.join(known)}")
    scale = scale or experiment.default_scale(grid)
    root = run_dir or Path("runs", "experiments", grid.name)
    kept = results or Path("benchmarks", "results", grid.name)
    target = page or Path("docs", "results", f"{grid.name}.md")
    if is_agnostic(raw):
        work = agnostic_experiment.AgnosticExperiment(grid, scale, root, kept)
        agnostic_experiment.execute(work, arm, target)
    else:
        experiment.execute(cells.Experiment(grid, scale, root, kept), task or list(grid.tasks), arm, target)
    console.print(f"results: {kept}\npage:    {target}", markup=False)


app.command()(predict_commands.predict)
app.command()(export_commands.export)
app.command()(package_commands.package)
app.command()(package_commands.verify)
app.command()(serve_commands.serve)
app.command()(book_commands.remember)
app.command()(book_commands.forget)
app.command()(book_commands.book)


@app.command()
def init(
    data: Annotated[Path, typer.Option("--data", help="Your labelled rows: CSV, TSV, JSONL or Parquet.")],
    test: Annotated[Path | None, typer.Option("--test", help="Rows to report on; else a share of the data.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of task and run; else the file's.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where to write. Default: recipes/<name>.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing recipe.")] = False,
) -> None:
    """Look at a file of yours and write a commented recipe that runs as it is."""
    from openbook.starter import recipe_for

    text = recipe_for(data, test, name)
    target = output or Path("recipes") / f"{name or data.stem}.yaml"
    if target.exists() and not force:
        raise UsageError(f"{target} exists; choose another --output, or overwrite it with --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    console.print(f"{target}\nnext: openbook run {target}", markup=False)


@app.command()
def tasks() -> None:
    """List the tasks that can be named here: what they are about, how many rows they have, and where these are."""
    from openbook.data.catalogue import known_tasks

    names = ("task", "family", "provenance", "kind", "labels", "metrics", "rows", "found")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for task in known_tasks():
        rows = ", ".join(f"{split} {count:,}" for split, count in (task.rows or {}).items())
        labels = "" if task.labels is None else str(task.labels)
        cells = (task.name, task.family, ", ".join(sorted(task.groups)), task.kind or task.problem, labels)
        table.add_row(*map(Text, (*cells, ", ".join(task.metrics), rows, task.found)))
    console.print(table)


app.add_typer(bench_commands.bench, name="bench")


@app.command()
def env() -> None:
    """Print versions to paste into a bug report."""
    facts = {"python": platform.python_version(), **{name: version_of(name) for name in VERSIONED}}
    facts |= {"platform": platform.platform(), "cores": str(os.cpu_count())}
    if find_spec("torch") is not None:
        import torch

        from openbook.training import has_bf16

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts |= {"device": device.type, "bf16": str(has_bf16(device))}
    for name, value in facts.items():
        console.print(f"{name}: {value}", markup=False)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Exit status 2 for what the user can mend, 1 for a run that failed; no traceback for either."""
    try:
        app()
    except UsageError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        fail(f"{error.name} is not installed, which this command needs: pip install 'openbook[train]'", 2)


def fail(message: str, status: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(status)
