"""Everything a run found -> a table, report.md, report.html, and the model card that travels with the student."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from openbook.checkpoint import open_artifact, read_json
from openbook.config import PackagedModel
from openbook.courses import CORPUS, KD, LABELS, reads_corpus
from openbook.recipe import dump_recipe
from openbook.report import Report, html, markdown, model_card
from openbook.workspace import Run

VERSIONED = ("openbook", "torch", "transformers", "accelerate", "numpy")
TIMED = (
    "teacher", "bank", "index", "hits", "corpus", "teacher_outputs", "student", "knowledge_base", "evaluation"
)  # fmt: skip


def inputs(run: Run) -> dict[str, Any]:
    return {"recipe": dump_recipe(run.recipe)}


def build(run: Run, folder: Path) -> None:
    report = gather(run)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    (folder / "model_card.md").write_text(model_card(report), encoding="utf-8")


def publish(run: Run, folder: Path) -> None:
    """Put the finished pages where they are looked for: beside run.yaml, and the card into the student's folder."""
    places = {
        "report.md": run.folder / "report.md",
        "report.html": run.folder / "report.html",
        "model_card.md": run.folder / "student" / "README.md",
    }
    for name, place in places.items():
        aside = place.with_name(f".{place.name}.partial")
        shutil.copyfile(folder / name, aside)
        os.replace(aside, place)


def gather(run: Run) -> Report:
    model = run.recipe.teacher.model
    return Report(
        run=run.recipe.name,
        results=read_json(run.folder / "evaluation" / "results.json"),
        histories=histories(run),
        corpus=read_json(run.folder / "corpus" / "statistics.json") if reads_corpus(run.recipe) else {},
        tuning=list(read_json(run.folder / "knowledge_base" / "tuning.json").values()),
        examples=read_json(run.folder / "evaluation" / "examples.json"),
        stages={name: seconds for name in TIMED if (seconds := seconds_of(run.folder / name)) > 0},
        environment=environment(),
        recipe=dump_recipe(run.recipe),
        teacher_model=model.package if isinstance(model, PackagedModel) else model,
        data_notes=[*run.task.warnings, *read_json(run.folder / "teacher" / "scores.json")["warnings"]],
    )


def histories(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The loss over time of the teacher, and of every kind of student under the first seed."""
    first = f"seed-{run.recipe.seeds[0]}"
    folders = {"teacher": run.folder / "teacher"}
    folders |= {name: run.folder / "students" / name / first for name in (LABELS, KD, CORPUS)}
    return {name: read_json(folder / "history.json") for name, folder in folders.items()}


def seconds_of(folder: Path) -> float:
    artifact = open_artifact(folder)
    return 0.0 if artifact is None else float(artifact.manifest["seconds"])


def environment() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), **versions, "platform": platform.platform()}
