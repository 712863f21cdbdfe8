"""A light install, without torch and all that training needs, can do what a finished student needs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
"""
MODULES = {"faiss-cpu": "faiss"}


def names_of(requirements: list[str]) -> set[str]:
    return {line.partition("[")[0].partition(">")[0] for line in requirements}


def project() -> dict[str, dict[str, list[str]]]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": found["dependencies"], **found["optional-dependencies"]}


def light(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    absent = {MODULES.get(name, name) for name in names_of(project()["train"])}
    whole = WITHOUT.format(absent=absent) + code
    return subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, check=False)


def test_what_only_training_needs_is_an_extra() -> None:
    extras = project()
    assert {"torch", "transformers", "scipy", "numba", "faiss-cpu"} <= names_of(extras["train"])
    assert not names_of(extras["train"]) & names_of(extras[""])


@pytest.mark.parametrize(
    "name",
    [
        "cli",
        "predictor",
        "backends.onnx",
        "book_commands",
        "predict_commands",
        "batch_prediction",
        "verification",
        "package_commands",
        "serve_commands",
        "server.launch",
    ],
)
def test_it_imports_what_predicts(name: str) -> None:
    done = light(f"import openbook.{name}")
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_more_says_what_to_install(tmp_path: Path) -> None:
    run = "import sys; sys.argv = ['openbook', *sys.argv[1:]]; from openbook.cli import main; main()"
    done = light(run, "run", str(ROOT / "recipes" / "quickstart.yaml"), "--run-dir", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "pip install 'openbook[train]'" in done.stderr
    assert "Traceback" not in done.stderr
