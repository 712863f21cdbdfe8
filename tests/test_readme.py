"""README shows the committed results of the shipped recipe, and a tree that is the package's."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openbook.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "quickstart.json").read_text(encoding="utf-8"))
RENDER = ROOT / "benchmarks" / "render.py"
rendered = runpy.run_path(str(RENDER))["rendered"]


def test_the_results_are_those_of_the_committed_file() -> None:
    assert rendered(README, RESULTS) == README, "run benchmarks/render.py"


def test_every_model_has_its_row_and_its_score() -> None:
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in README.splitlines() if row.startswith("| ")}
    assert len(RESULTS["models"]) == 5
    for model in RESULTS["models"]:
        assert f" {100 * model['mean']:.1f} " in rows[model["name"]]


def test_other_results_make_another_page_between_the_markers_only() -> None:
    other = copy.deepcopy(RESULTS)
    other["models"][0]["mean"] -= 0.125
    page = rendered(README, other)
    assert page != README
    before, after = README.split("<!-- results:start -->")[0], README.split("<!-- results:end -->")[1]
    assert page.startswith(before)
    assert page.endswith(after)


@pytest.mark.parametrize("readme", ["no markers", "<!-- results:end --> <!-- results:start -->"])
def test_a_page_without_its_markers_is_refused(readme: str) -> None:
    with pytest.raises(SystemExit, match="results:start"):
        rendered(readme, RESULTS)


def test_check_says_whether_the_page_is_current(tmp_path: Path) -> None:
    for name in ("README.md", "benchmarks/quickstart.json", "benchmarks/render.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, str(tmp_path / "benchmarks" / "render.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    stale = README.replace("| teacher |", "| the teacher |")
    (tmp_path / "README.md").write_text(stale, encoding="utf-8")
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "benchmarks/render.py" in refused.stderr
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == stale


def test_the_committed_results_belong_to_the_shipped_recipe() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert (RESULTS["task"], RESULTS["seeds"]) == (recipe.task.name, list(recipe.seeds))


def test_the_tree_names_every_module() -> None:
    block = next(found for found in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if "src/openbook/" in found)
    top, _, package = block.partition("src/openbook/\n")
    for line in top.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    named = {line.split()[0].rstrip("/") for line in package.splitlines()}
    folder = ROOT / "src" / "openbook"
    there = {path.name for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert named == {name for name in there if not name.startswith("__")}
