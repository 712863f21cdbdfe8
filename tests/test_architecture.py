"""Imports point down, also those inside functions, and nothing that is read can run code."""

import ast
import re
from pathlib import Path

import pytest

import openbook

PACKAGE = Path(openbook.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"types"},
    {"config"},
    {"agnostic"},
    {"recipe", "console"},
    {"parallel", "native", "answers"},
    {"data", "retrieval", "models", "distillation", "knowledge_base", "metrics"},
    {"checkpoint", "findings", "provenance", "parity", "row_answers", "inference", "manifest", "gains", "markdown"},
    {"results"},
    {"openings"},
    {"plots", "training", "comparison", "conclusions", "task_scores", "keys", "backends"},
    {"student_keys", "loading"},
    {"book_teacher"},
    {"report", "workspace", "predictor", "starter", "experiment_tables", "grid", "agnostic_grid"},
    {
        "readings",
        "engines",
        "batch_prediction",
        "verification",
        "server",
        "candidates",
        "experiment_page",
        "agnostic_run",
        "agnostic_page",
    },
    {"courses", "fine_tuning"},
    {"recordings", "multitask"},
    {"lessons"},
    {"starts", "cross_fit"},
    {"stages"},
    {"pipeline", "book_arms", "packaging", "drift"},
    {"cells"},
    {"experiment", "agnostic_experiment", "bench"},
    {"book_commands", "bench_commands", "export_commands", "package_commands"},
    {"predict_commands", "serve_commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALONE = ("data", "retrieval", "models", "distillation", "knowledge_base", "metrics")
SIBLINGS = (*ALONE, "backends", "bench", "server")  # folders whose modules may import each other
FORBIDDEN = re.compile(
    r"pickle\.loads?\b|allow_pickle\s*=\s*True|torch\.load\b|trust_remote_code\s*=\s*True|yaml\.unsafe"
)


def owner(path: Path) -> str:
    """The name a module goes by in the table: its folder, or its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(source: str) -> set[tuple[str, str]]:
    """(module of openbook, name in it) of every import statement, wherever it stands."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it points"
            names = [
                (f"{node.module}.{alias.name}" if node.module == "openbook" else node.module) for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = str(name).partition(".")
            if first == "openbook":
                found.add((rest.partition(".")[0], rest))
    return found


def test_every_module_has_its_place() -> None:
    found = {owner(path) for path in MODULES} - {"__init__"}
    assert found == set(LEVEL)
    assert len(MODULES) == 188
    assert sum(len(imported(path.read_text())) for path in MODULES) > 150


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = owner(path)
    for target, whole in imported(path.read_text()):
        if target == own:
            assert own in SIBLINGS, f"{path.name} imports its sibling {whole}"
        elif own != "__init__":
            assert LEVEL[target] < LEVEL[own], f"{own} imports {whole}, which is not below it"


@pytest.mark.parametrize("folder", ALONE)
def test_a_folder_of_the_second_row_stands_alone(folder: str) -> None:
    """Delete any one of them and the others still work."""
    paths = [path for path in MODULES if owner(path) == folder]
    assert paths
    for path in paths:
        targets = {target for target, _ in imported(path.read_text())} - {folder}
        assert targets <= {"types", "config", "parallel", "native"}, path


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from openbook.cli import app", "cli"),
        ("import openbook.cli", "cli"),
        ("from openbook import cli", "cli"),
        ("def f():\n    from openbook.stages.distill import teach", "stages"),
        ("if TYPE_CHECKING:\n    import openbook.pipeline as p", "pipeline"),
    ],
)
def test_no_way_to_import_goes_unseen(source: str, target: str) -> None:
    assert [name for name, _ in imported(source)] == [target]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_runs_code(path: Path) -> None:
    assert not FORBIDDEN.search(path.read_text())
    assert not {"pickle", "dill", "joblib", "marshal"} & {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }


@pytest.mark.parametrize(
    "line", ["pickle.load(file)", "np.load(path, allow_pickle = True)", "torch.load(path)", "f(trust_remote_code=True)"]
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert FORBIDDEN.search(line)
