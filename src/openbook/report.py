"""The report of a run for people: a terminal table, Markdown, a self-contained HTML page, and the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from openbook import plots
from openbook.findings import (
    NOTHING,
    Report,
    comparison,
    duration,
    limits,
    megabytes,
    millions,
    percent,
    points,
    title,
    verdicts,
)
from openbook.markdown import Columns, environment
from openbook.provenance import Ingredient, place_name, task_of, without_places

__all__ = ["Report", "Shipped", "console_table", "html", "markdown", "model_card", "verdicts"]

MODELS = {
    "teacher": "the large model, fine-tuned on the task",
    "student-labels": "the small model, trained on the gold labels alone",
    "student-kd": "the small model, distilled: it imitates the teacher's answers on the task's own text",
    "student-corpus": "the small model, distilled first on general text retrieved for the task (the corpus), "
    "then on the task's own text",
    "student-open-book": "student-corpus with its book open: it also looks up similar texts, and mixes what the "
    "teacher said about them into its answer",
}
CORPUS_FACTS = {
    "anchors": "task texts used as queries",
    "anchors_without_hit": "queries that found nothing",
    "k_star": "best hits used of each query",
    "unique_fraction": "share of the hits that are different sentences",
    "sentences": "sentences in the corpus",
    "tokens": "word-pieces in the corpus",
    "budget_tokens": "word-pieces allowed",
    "shortfall_tokens": "word-pieces missing to that",
    "mean_words": "words a sentence, on average",
}
BANK_FACTS = {
    "documents": "general documents read",
    "sentences": "sentences in them",
    "too_short": "left out: too short",
    "too_long": "left out: too long",
    "not_text": "left out: tables, numbers, markup",
    "leaked": "left out: share a run of words with an evaluation text",
    "duplicate": "left out: duplicates",
    "near_duplicate": "left out: near duplicates",
    "kept": "sentences searched",
}
ENGINES = {"torch": "model.safetensors", "onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_qint8.onnx"}
INPUTS = {
    False: {"transformers": '"a text"', "openbook": '"a text"', "command": '"a text"'},
    True: {
        "transformers": '{"text": "a text", "text_pair": "another"}',
        "openbook": '("a text", "another")',
        "command": "--pair $'a text\\tanother'",
    },
}  # whether it reads pairs -> how a text is given
VERSIONS = ("python", "openbook", "torch", "transformers")  # that a stranger may need
HUB_METRICS = {
    "pearson": "pearsonr",
    "micro_f1": "f1",
    "macro_f1": "f1",
    "subset_accuracy": "accuracy",
}  # where the Hub's name is not ours
NO_LABEL = "no label"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Shipped:
    """A packed folder, as far as its card tells of it."""

    name: str
    engines: tuple[str, ...] = ()  # that its files can be run by
    engine: str | None = None  # the one of ONNX that its container runs
    export: Mapping[str, Any] = field(default_factory=dict)  # what `openbook export` recorded
    book: Mapping[str, Any] = field(default_factory=dict)  # its manifest
    has_texts: bool = True
    seed: int | None = None  # of these weights
    licence: str | None = None
    ingredients: tuple[Ingredient, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)  # with their bytes


def console_table(report: Report) -> Table:
    """The comparison of all models for a terminal."""
    columns = comparison(report)
    table = Table(title=Text(title(report)))
    for header in columns:
        is_name = header == "model"
        table.add_column(Text(header), justify="left" if is_name else "right", no_wrap=is_name)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def markdown(report: Report) -> str:
    """The whole report without its figures."""
    return _environment(html=False).get_template("report.md.j2").render(_context(report))


def html(report: Report) -> str:
    """One page that needs nothing from outside and no JavaScript; every text of the data is escaped."""
    return _environment(html=True).get_template("report.html.j2").render(_context(report), **_figures(report))


def model_card(report: Report, shipped: Shipped | None = None) -> str:
    """The README of a student: front matter as the Hugging Face Hub documents it, use, results, limits, making.

    Without `shipped` it is about a run's own folder. No local path of the recipe appears in it.
    """
    recipe = without_places(yaml.safe_load(report.recipe) or {})
    task = recipe.get("task") or {}
    known = task_of(task)
    front_matter = yaml.safe_dump(_front_matter(report, shipped), sort_keys=False, allow_unicode=True)
    context = _context(report) | {
        "front_matter": Markup(front_matter),  # YAML, not Markdown
        "shipped": shipped,
        "place": Markup(re.sub(r"[^\w.+-]+", "-", shipped.name)) if shipped else f"runs/{report.run}",
        "teacher": place_name(report.teacher_model),
        "small": millions(report.student["parameters"]),
        "what": "a pair of texts" if known and known.text_pair else "a text",
        "family": known.family if known else "",
        "input": {name: Markup(code) for name, code in INPUTS[bool(known and known.text_pair)].items()},
        "score": _shipped_score(report, shipped),
        "engines": _engines(shipped) if shipped else {},
        "book_size": megabytes(sum(size for name, size in shipped.files.items() if name.startswith("knowledge_base/")))
        if shipped
        else "",
        "versions": {name: one for name, one in report.environment.items() if name in VERSIONS},
        "language": (recipe.get("corpus") or {}).get("language") if report.corpus else None,
        "max_length": task.get("max_length"),
        "public_recipe": yaml.safe_dump(_told(recipe), sort_keys=False, allow_unicode=True),
    }
    context["lessons"] = {**context["lessons"], "teacher": place_name(report.teacher_model)}
    return _environment(html=False).get_template("model_card.md.j2").render(context)


def _shipped_score(report: Report, shipped: Shipped | None) -> float | None:
    """Of the very weights in the folder."""
    seeds = list(report.results["seeds"])
    if shipped is None or shipped.seed not in seeds:
        return None
    return float(report.student["scores"][seeds.index(shipped.seed)])


def _engines(shipped: Shipped) -> Columns:
    """What the student can be run by: file, distance from torch, and speed where it was exported."""
    parity, timing = shipped.export.get("parity", {}), shipped.export.get("timing", {})
    columns = {
        "engine": list(shipped.engines),
        "file": [f"student/{ENGINES[name]}" for name in shipped.engines],
        "MB": [megabytes(shipped.files[f"student/{ENGINES[name]}"]) for name in shipped.engines],
        "against torch": [_nearness(parity.get(name, {})) for name in shipped.engines],
    }
    for shape in timing.get("torch", {}):
        columns[f"ms a text, {shape}"] = [f"{timing[name][shape]:.2f}" for name in shipped.engines if name in timing]
    return {header: cells for header, cells in columns.items() if len(cells) == len(shipped.engines)}


def _nearness(found: Mapping[str, Any]) -> str:
    if "largest_difference" in found:
        return f"equal within {found['largest_difference']:.0e}"
    return f"agreement {percent(found['agreement'])}" if "agreement" in found else NOTHING


def _told(recipe: Any) -> Any:
    """A recipe without keys that say nothing."""
    if isinstance(recipe, dict):
        return {key: _told(value) for key, value in recipe.items() if value is not None}
    return [_told(value) for value in recipe] if isinstance(recipe, list) else recipe


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "results": report.results,
        "title": title(report),
        "verdicts": verdicts(report),
        "comparison": comparison(report),
        "models": {name: MODELS[name] for name in report.models if name in MODELS},
        "corpus_facts": _facts(report.corpus, CORPUS_FACTS),
        "bank_facts": _facts(report.corpus.get("bank", {}), BANK_FACTS),
        "anchors": report.corpus.get("examples", ()),
        "tuning": _tuning(report),
        "stages": {name: duration(seconds) for name, seconds in report.stages.items()},
        "limits": limits(report),
        "lessons": _lessons(report),
    }


def _facts(statistics: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Plain name -> number, for those that are known."""
    facts = {}
    for key, name in names.items():
        value = statistics.get(key)
        if value is not None:
            is_share = key == "unique_fraction"
            facts[name] = percent(value) if is_share else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
    return facts


def _tuning(report: Report) -> dict[str, list[str]]:
    """How the book was set with each seed, as the columns of a table."""
    rows = report.tuning
    return {
        "seed": [str(row.get("seed", seed)) for row, seed in zip(rows, report.results["seeds"], strict=False)],
        "book": ["open" if row["kept"] else "closed" for row in rows],
        "score without book": [points(row["baseline_score"]) for row in rows],
        "gain with it": [f"{points(row['gain'], '+')} ± {points(row['standard_error'])}" for row in rows],
        "neighbours": [str(row["top_k"]) for row in rows],
        "temperature": [f"{row['temperature']:g}" for row in rows],
        "weight of the student's own answer": [f"{row['beta']:g}" for row in rows],
    }


def _lessons(report: Report) -> dict[str, str]:
    """What the student is and how it was taught, from the resolved recipe."""
    recipe = yaml.safe_load(report.recipe) or {}
    student, distill = recipe.get("student", {}), recipe.get("distill", {})
    lessons = {"teacher": report.teacher_model, "seeds": ", ".join(map(str, report.results["seeds"]))}
    if student:
        lessons["student"] = (
            f"{student['layers']} layers of width {student['hidden_size']} with {student['heads']} attention heads"
        )
    if "corpus" in distill and report.corpus:
        lessons["first, on the corpus"] = _training(distill["corpus"])
    if "task" in distill:
        lessons["then, on the task's text"] = _training(distill["task"])
    return lessons


def _training(settings: Mapping[str, Any]) -> str:
    terms, optim = settings["terms"], settings["optim"]
    used = [name.replace("_", " ") for name, weight in terms.items() if isinstance(weight, float) and weight > 0]
    losses = [name for name in used if not name.endswith("temperature")]
    return f"{optim['epochs']:g} epochs, learning rate {optim['learning_rate']:g}, losses: {', '.join(losses)}"


def _figures(report: Report) -> dict[str, Any]:
    models = report.results["models"]
    timed = [model for model in models if model.get("latency_ms")]
    described = report.corpus.get("described", {})
    described = described.get("corpora", described)
    millions = [model["parameters"] / 1e6 for model in models]
    milliseconds = [model["latency_ms"]["p50"] for model in timed]
    return {
        "score_figures": [
            plots.score_plot(models, millions, "parameters, millions", report.metric),
            *([plots.score_plot(timed, milliseconds, "ms a text, median", report.metric)] if timed else []),
        ],
        "curves": [plots.learning_curve(name, rows) for name, rows in report.histories.items() if rows],
        "corpus_figure": plots.corpus_bars(described) if described else None,
    }


def _front_matter(report: Report, shipped: Shipped | None) -> dict[str, Any]:
    """Metadata as the Hub documents it; of its four relations to a base model `finetune` is nearest to distillation."""
    recipe, results = yaml.safe_load(report.recipe) or {}, report.results
    metric = HUB_METRICS.get(results["metric"], results["metric"])
    source = recipe.get("task", {}).get("train") or {}
    dataset = place_name(source.get("dataset") or re.sub(r"[^\w.-]+", "-", results["task"]))
    lineage = {"base_model": report.teacher_model, "base_model_relation": "finetune"}
    score = _shipped_score(report, shipped)
    value = report.student["mean"] if score is None else score
    result = {
        "task": {"type": "text-classification", "name": "Text Classification"},
        "dataset": {"type": dataset, "name": results["task"], "split": results["split"]},
        "metrics": [{"type": metric, "name": report.metric, "value": round(value, 4)}],
    }
    return {
        **({"license": shipped.licence} if shipped and shipped.licence else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        **(lineage if HUB_ID.fullmatch(report.teacher_model) else {}),
        "datasets": [dataset],
        "metrics": [metric],
        "tags": [
            "knowledge-distillation",
            "contextualized-corpus",
            "retrieval-augmented",
            "openbook",
            *(["onnx"] if shipped and shipped.export else []),
        ],
        "model-index": [{"name": shipped.name if shipped else report.run, "results": [result]}],
    }


def _environment(html: bool) -> Environment:
    made = environment(html)
    made.globals.update(zip=zip, model_names=plots.MODELS)
    made.filters.update(label=_label, percent=percent, fenced=_fenced)
    return made


def _label(value: str | float | list[str] | None) -> str:
    """A class name, the names of several labels, or a score of a regression."""
    if isinstance(value, list):
        return ", ".join(value) or NO_LABEL
    return NOTHING if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _fenced(text: str, language: str) -> Markup:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")
