"""The report's figures as inline SVG. Colours are CSS variables, so that one figure serves light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

MODELS = ("teacher", "student-labels", "student-kd", "student-corpus", "student-open-book")
INK, LINE = "#010101", "#010102"  # stand-ins that no drawing uses by chance; the page's variables replace them
STAND_INS = {INK: "var(--ink)", LINE: "var(--line)"} | {f"#01020{n}": f"var(--model-{n})" for n in range(len(MODELS))}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
CURVE: dict[str, Any] = {"linewidth": 1.6, "elinewidth": 1, "markersize": 5, "capsize": 3}
ANYWHERE = {  # each at least 3:1 against white and against GitHub's dark page, text at least 4:1
    "ink": "#767b82",
    "line": "#767b82",
    "model-0": "#767b82",
    "model-1": "#b0781f",
    "model-2": "#3f83c4",
    "model-3": "#2a8a5a",
    "model-4": "#9a5fb8",
}
POINTS_APART, LABELS_APART = 0.02, 0.085  # at least, as shares of the axis


def color(name: str) -> str:
    """A model has the same colour in every figure."""
    return f"#01020{MODELS.index(name)}" if name in MODELS else INK


CORPORA = {  # of the statistics: its name here, its colour
    "corpus": ("retrieved", color("student-corpus")),
    "random": ("random", LINE),
    "task": ("task's own text", color("teacher")),
}
MEASURES = {
    "distinct_1": "different\nwords",
    "distinct_2": "different\nword pairs",
    "distinct_3": "different\ntriples",
    "overlap": "frequent words\nshared with task",
}


def score_plot(models: Sequence[Mapping[str, Any]], values: Sequence[float], unit: str, metric: str) -> Markup:
    """Score with its standard deviation over seeds against a cost of each model; points that coincide are set apart."""
    scores = np.array([100 * model["mean"] for model in models])
    errors = np.array([100 * (model.get("sd") or 0.0) for model in models])
    low, high = float((scores - errors).min()), float((scores + errors).max())
    margin = 0.2 * max(high - low, 1.0)
    width = 1.15 * max(values)
    places = spread(np.array(values, dtype=float), POINTS_APART * width)

    def draw(axes: Axes) -> None:
        axes.set(xlim=(0, width), ylim=(low - margin, high + margin), xlabel=unit)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color=LINE, linewidth=0.4, alpha=0.6)
        axes.set_title(f"{metric}, points", loc="left", fontsize=10)
        for model, place, score, error in zip(models, places, scores, errors, strict=True):
            tint = color(model["name"])
            axes.errorbar(place, score, yerr=error or None, fmt="o", color=tint, capsize=3, markersize=6, zorder=3)
        _label(axes, [str(model["name"]) for model in models], places, scores)

    return _drawn(draw, f"{metric} of each model against {unit}")


def _label(axes: Axes, names: Sequence[str], places: NDArray[Any], scores: NDArray[Any]) -> None:
    """Names beside their points: to the right of those in the left half, to the left of the others."""
    (_, width), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for is_left in (True, False):
        side = np.flatnonzero((places < width / 2) == is_left)
        if not len(side):
            continue
        edge = places[side].max() + 0.04 * width if is_left else places[side].min() - 0.04 * width
        heights = spread(scores[side], LABELS_APART * (top - bottom))
        for point, height in zip(side.tolist(), heights, strict=True):
            axes.plot([places[point], edge], [scores[point], height], color=LINE, linewidth=0.7, zorder=1)
            side_of_text = "left" if is_left else "right"
            axes.text(edge, height, f" {names[point]} ", color=color(names[point]), ha=side_of_text, va="center")


def spread(values: NDArray[Any], gap: float) -> NDArray[np.float64]:
    """The nearest positions (least squares) in the same order that are at least `gap` apart. (n,) -> (n,)."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    apart = np.empty(len(values))
    apart[order] = isotonic_regression(values[order] - steps).x + steps
    return apart


def learning_curve(name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """The loss of one model over its trainings, one after the other, each under its name."""
    losses = [row["loss"] for row in rows]

    def draw(axes: Axes) -> None:
        start = 0.0
        for stage in dict.fromkeys(row["stage"] for row in rows):
            own = [row for row in rows if row["stage"] == stage]
            steps = [start + row["step"] for row in own]
            axes.plot(steps, [row["loss"] for row in own], color=color(name), linewidth=1.6)
            axes.text((start + steps[-1]) / 2, 0.97, stage, ha="center", va="top", transform=axes.get_xaxis_transform())
            axes.axvline(start, color=LINE, linewidth=1)
            start = steps[-1]
        axes.set(xlim=(0, start), xlabel="updates", ylim=(min(0.0, *losses), 1.25 * max(losses)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{name}: loss", loc="left", fontsize=10)

    return _drawn(draw, f"training loss of {name}", height=2.4)


def corpus_bars(described: Mapping[str, Mapping[str, float]]) -> Markup:
    """Variety and closeness of the retrieved corpus, a random one of the same size, and the task's own text."""
    shown = [name for name in CORPORA if name in described]

    def draw(axes: Axes) -> None:
        for place, name in enumerate(shown):
            heights = [100 * described[name].get(measure, 0.0) for measure in MEASURES]
            label, tint = CORPORA[name]
            centres = np.arange(len(MEASURES)) + (place - (len(shown) - 1) / 2) * 0.27
            bars = axes.bar(centres, heights, 0.25, color=tint, label=label)
            axes.bar_label(bars, fmt="%.0f", padding=1, fontsize=8)
        axes.set(ylim=(0, 112), xticks=range(len(MEASURES)), xticklabels=list(MEASURES.values()), yticks=[0, 50, 100])
        axes.tick_params(axis="x", length=0, labelsize=8.5)
        axes.set_title("percent", loc="left", fontsize=10)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, handlelength=0.8)

    return _drawn(draw, "variety of the corpora and their closeness to the task")


def score_curve(title: str, series: Mapping[str, Sequence[tuple[float, float, float | None]]]) -> Markup:
    """Scores against the share of a corpus: a line a series, of (share, mean score, sd or None), scores as fractions.

    Lines are told apart by colour and by the shape of their points, which stand a little aside so that bars do not
    cover each other.
    """

    def draw(axes: Axes) -> None:
        for place, (name, points) in enumerate(series.items()):
            if not points:
                continue  # the others keep their colours
            aside = 0.008 * (place - (len(series) - 1) / 2)
            shares, scores = [share + aside for share, _, _ in points], [100 * score for _, score, _ in points]
            errors = [100 * (error or 0.0) for _, _, error in points]
            tint, dashes = f"#01020{(place + 1) % len(MODELS)}", "-" if place < len(MODELS) else ":"
            axes.errorbar(shares, scores, errors, fmt=f"{dashes}{'osD^v'[place % 5]}", color=tint, label=name, **CURVE)
        axes.set(xlim=(0, 1.05), xlabel="share of the corpus")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color=LINE, linewidth=0.4, alpha=0.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=9)

    return _drawn(draw, title, height=3.4)


def standalone(drawing: Markup) -> str:
    """A figure as a file of its own, in colours that are legible on white and on black pages alike."""
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: ANYWHERE[match[1]], drawing) + "\n"


def _drawn(draw: Callable[[Axes], None], description: str, height: float = 3.2) -> Markup:
    """One `<svg>` element without XML header, date or font files; the page sets the font and the colours."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    drawing = re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :])  # they would repeat on a page
    drawing = re.sub("|".join(STAND_INS), lambda match: STAND_INS[match[0]], drawing)
    return Markup(drawing.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
