"""The page of a grid's results: the answer in plain words, then every table and figure behind it, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openbook import experiment_tables as tables
from openbook import plots
from openbook.comparison import summarise
from openbook.conclusions import (
    Summary,
    census,
    claim,
    cost,
    drawn_rows,
    metric_of,
    opening,
    peak,
    rows_of,
    task_title,
    trainings,
)
from openbook.markdown import environment

COVERAGE = (  # 2,000 simulated grids each; the spread of tasks is that of their true differences
    "75 % with 3 seeds of one task, 84 % with 5 and 90 % with 10; with 5 seeds of 3 tasks 84 % where tasks differ as "
    "much as seeds do and 96 % where they do not; with 5 seeds of 8 tasks 92 % and 98 %"
)
EXAMPLES = 5


def publish(results: Path, page: Path) -> None:
    """Write the page and, beside it, its figures. Raises UsageError for results that cannot be read."""
    summary = summarise(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(summary), encoding="utf-8")
    for name, drawing in figures(summary).items():
        (page.parent / name).write_text(drawing, encoding="utf-8")


def render(folder: Path) -> str:
    """The page of a folder of results."""
    return markdown(summarise(folder))


def markdown(summary: Summary) -> str:
    """The page of what `comparison.summarise` found."""
    text = environment().get_template("experiment.md.j2").render(_context(summary))
    return re.sub(r"\n{3,}", "\n\n", text)


def figures(summary: Summary) -> dict[str, str]:
    """File name -> SVG of every curve that has a point."""
    drawn = {}
    for number, curve in enumerate(summary["curves"], start=1):
        series = {
            name: [(point["share"], point["mean"], point["sd"]) for point in line if point["mean"] is not None]
            for name, line in curve["series"].items()
        }
        if any(series.values()):
            label = f"{task_title(summary, curve['task'])}: {metric_of(summary, curve['task'])}, points"
            drawn[_file(summary, number)] = plots.standalone(plots.score_curve(label, series))
    return drawn


def _context(s: Summary) -> dict[str, Any]:
    by_task = tables.pairs_by_task(s)
    return {
        "s": s,
        "opening": opening(s),
        "verdicts": [claim(s, one) for one in s["hypotheses"]],
        "scores": tables.scores(s),
        "rows": {task_title(s, task): rows_of(s, task) for task in s["tasks"]},
        "metrics": tables.metrics(s),
        "pairs": tables.pairs(s),
        "pairs_by_task": by_task,
        "has_mcnemar": tables.MCNEMAR in by_task,
        "curves": [_curve(s, number, curve) for number, curve in enumerate(s["curves"], start=1)],
        "agreement": tables.agreement(s),
        "terms": tables.terms(s),
        "books": tables.books(s),
        "by_similarity": tables.by_similarity(s),
        "corpora": tables.corpora(s),
        "examples": _examples(s),
        "cost": [cost(s, task) for task in s["tasks"]],
        "seconds": tables.seconds(s),
        "rates": tables.rates(s),
        "tried": tables.tuning(s),
        "census": census(s),
        "trainings": trainings(s),
        "seeds": tables.seeds(s),
        "coverage": COVERAGE,
        "drawn_rows": drawn_rows(s),
        "machine": ", ".join(f"{name} {value}" for name, value in (s["machine"] or {}).items()),
    }


def _file(s: Summary, number: int) -> str:
    return f"{s['name']}-curve-{number}.svg"


def _curve(s: Summary, number: int, curve: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": curve["title"],
        "task": task_title(s, curve["task"]),
        "file": _file(s, number),
        "is_drawn": any(point["mean"] is not None for line in curve["series"].values() for point in line),
        "table": tables.curve(curve),
        "peaks": [peak(s, name, found) for name, found in curve["peaks"].items()],
    }


def _examples(s: Summary) -> dict[str, list[Any]]:
    """Of each task, a few queries of the first arm that retrieved anything, and what they found."""
    found = {}
    for task, arms in s["corpora"].items():
        retrieved = [(arm, told["examples"]) for arm, told in arms.items() if told and told.get("examples")]
        for arm, examples in retrieved[:1]:
            found[f"{task_title(s, task)}, {arm}"] = examples[:EXAMPLES]
    return found
