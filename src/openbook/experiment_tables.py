"""The tables of a grid's page: header -> cells, as plain text, from its summary (`comparison.summarise`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from markupsafe import Markup

from openbook.conclusions import Summary, interval, task_title
from openbook.findings import METRICS, NOTHING, points

Cell = Mapping[str, Any]
Columns = dict[str, list[str]]  # header -> cells; no cells, or no headers, if nothing is known
CORPUS_FACTS = {
    "sentences": "sentences",
    "tokens": "tokens",
    "budget_tokens": "tokens allowed",
    "shortfall_tokens": "tokens missing",
    "mean_words": "words a sentence",
    "anchors": "queries",
    "anchors_without_hit": "without a hit",
    "k_star": "hits used of each",
    "unique_fraction": "different hits, %",
    "distinct_1": "distinct words, %",
    "distinct_2": "pairs, %",
    "distinct_3": "triples, %",
    "overlap": "overlap with task, %",
    "sample_words": "measured on words",
    "seconds": "seconds to build",
}
MCNEMAR = "McNemar's p, by seed"
SHARES = ("unique_fraction", "distinct_1", "distinct_2", "distinct_3", "overlap")


def scores(s: Summary) -> Columns:
    """The teacher, then arms x tasks and their average."""
    arms = main_arms(s)
    teachers = {task: _teacher(s, task) for task in s["tasks"]}
    columns = {"arm": ["teacher", *(f"{arm}: {s['arms'][arm]['title']}" for arm in arms)]}
    for task, cells in s["cells"].items():
        own = [_score(cells.get(arm), is_best=arm == s["best"][task]) for arm in arms]
        columns[task_title(s, task)] = [_number(teachers[task], points), *own]
    if len(teachers) > 1:
        known = [score for score in teachers.values() if score is not None]
        mean = sum(known) / len(known) if len(known) == len(teachers) else None
        own = [_average(s["averages"].get(arm), is_best=arm == s["best_average"]) for arm in arms]
        columns["average"] = [_number(mean, points), *own]
    return columns


def main_arms(s: Summary) -> list[str]:
    """All but those that are only points of a curve."""
    named = {s["baseline"]} | {arm for _, pair in _pairs(s) for arm in (pair["a"], pair["b"])}
    of_curves = {point["arm"] for curve in s["curves"] for line in curve["series"].values() for point in line}
    return [arm for arm in s["arms"] if arm in named or arm not in of_curves]


def metrics(s: Summary) -> Columns:
    """Every metric of the tasks that have several."""
    arms, columns = main_arms(s), {}
    for task, cells in s["cells"].items():
        names = list(next(iter(cells.values()))["metrics"]) if cells else []
        for name in names if len(names) > 1 else ():
            own = [cells[arm] | cells[arm]["metrics"][name] if arm in cells else None for arm in arms]
            columns[f"{task_title(s, task)}: {METRICS.get(name, name)}"] = [_score(cell) for cell in own]
    return {"arm": arms, **columns} if columns else {}


def agreement(s: Summary) -> Columns:
    """Percent of the reported rows that get the teacher's answer."""
    return _matrix(s, lambda cell: _number(cell["agreement"], lambda share: f"{100 * share:.1f}"))


def terms(s: Summary) -> dict[str, Columns]:
    """Loss terms at the end of the first lesson, a table each."""
    names = dict.fromkeys(name for cells in s["cells"].values() for cell in cells.values() for name in cell["terms"])

    def shown(name: str) -> Callable[[Cell], str]:
        return lambda cell: _number(cell["terms"].get(name), lambda value: f"{value:.4g}")

    return {name: _matrix(s, shown(name)) for name in names}


def seconds(s: Summary) -> Columns:
    return _matrix(s, lambda cell: _number(cell["seconds"], lambda value: f"{value:,.0f}"))


def pairs(s: Summary) -> Columns:
    """The differences behind every hypothesis, over tasks and seeds."""
    return _columns(
        {
            "claim": one["name"],
            "pair": f"{pair['a']} − {pair['b']}",
            "difference": _signed(pair["difference"]),
            "95 % interval": interval(pair),
            "p": _number(pair["p"], lambda value: f"{value:.2g}"),
            "tested value": points(one["null"]) if one["null"] else "0",
            "pairs": f"{pair['pairs']} of {pair['planned']}",
            "tasks": f"{sum(found['pairs'] > 0 for found in pair['tasks'].values())} of {len(pair['tasks'])}",
        }
        for one, pair in _pairs(s)
    )


def pairs_by_task(s: Summary) -> Columns:
    """The same in each task, over its seeds."""
    different = {(pair["a"], pair["b"]): pair for _, pair in _pairs(s)}
    columns = _columns(
        {
            "pair": f"{pair['a']} − {pair['b']}",
            "task": task_title(s, task),
            "difference": _signed(found["difference"]),
            "95 % interval": interval(found),
            "smallest": _signed(found["smallest"]),
            "largest": _signed(found["largest"]),
            "seeds": f"{found['pairs']} of {found['planned']}",
            MCNEMAR: ", ".join(f"{p:.2g}" for p in found["mcnemar"] or ()) or NOTHING,
        }
        for pair in different.values()
        for task, found in pair["tasks"].items()
    )
    return columns if set(columns.get(MCNEMAR, ())) - {NOTHING} else {k: v for k, v in columns.items() if k != MCNEMAR}


def curve(found: Mapping[str, Any]) -> Columns:
    """Series x shares."""
    lines = {name: {point["share"]: point for point in line} for name, line in found["series"].items()}
    shares = sorted({share for line in lines.values() for share in line})
    columns = {f"{share:g}": [_score(line.get(share)) for line in lines.values()] for share in shares}
    return {"share of the corpus": list(lines), **columns}


def corpora(s: Summary) -> Columns:
    """A row a corpus, a column a fact that is known of any."""
    columns = _columns(
        {"task": task_title(s, task), "arm": arm, **_facts(statistics)}
        for task, arms in s["corpora"].items()
        for arm, statistics in arms.items()
        if statistics is not None
    )
    return {header: cells for header, cells in columns.items() if set(cells) != {NOTHING}}


def books(s: Summary) -> Columns:
    """How the students of every arm opened their books."""
    return _columns(
        {
            "task": task_title(s, task),
            "arm": arm,
            "opened": f"{one['opened']} of {one['students']}",
            "share of the student": _number(one["beta"], lambda beta: f"{beta:.2f}"),
            "gain held out": _signed(one["gain"]),
            "put right": f"{one['better']:.1f}",
            "put wrong": f"{one['worse']:.1f}",
            "of rows": f"{one['rows']:,.0f}",
            "entries": f"{one['entries']:,.0f}",
        }
        for task, arms in s["books"].items()
        for arm, one in arms.items()
    )


def by_similarity(s: Summary) -> Columns:
    """Points that opening the book gains in every tenth of the rows."""
    tenths = max((len(buckets) for buckets in s["by_similarity"].values()), default=0)

    def shown(buckets: list[Cell], place: int) -> str:
        if place >= len(buckets):
            return NOTHING
        one = buckets[place]
        return f"{_signed((one['better'] - one['worse']) / one['rows'])} ({one['similarity']:.2f})"

    return _columns(
        {"arm": arm, **{f"tenth {place + 1}": shown(buckets, place) for place in range(tenths)}}
        for arm, buckets in s["by_similarity"].items()
    )


def rates(s: Summary) -> Columns:
    """The rates of the final trainings; a mark where one lies at the edge of the values tried."""
    edges = {one["name"]: (min(one["values"]), max(one["values"])) for one in s["tune"] or () if len(one["values"]) > 1}
    known = [(task, arm, used) for task, arms in s["cells"].items() for arm in arms for used in arms[arm]["rates"]]
    names = dict.fromkeys(name for _, _, used in known for name in used)

    def shown(name: str, value: float | None) -> str:
        return _number(value, lambda rate: f"{rate:g}{' †' if rate in edges.get(name, ()) else ''}")

    return _columns(
        {"task": task_title(s, task), "arm": arm, **{name: shown(name, used.get(name)) for name in names}}
        for task, arm, used in known
    )


def tuning(s: Summary) -> Columns:
    """Every training that served to choose rates."""
    notes = [(task, arm, note) for task, arms in s["tuning"].items() for arm, note in arms.items() if note]
    names = dict.fromkeys(name for _, _, note in notes for run in note["runs"] for name in run["rates"])

    def became(run: Mapping[str, Any], chosen: Any) -> str:
        return "failed" if run.get("status") == "failed" else "chosen" if run["rates"] == chosen else NOTHING

    return _columns(
        {
            "task": task_title(s, task),
            "arm": arm,
            **{name: _number(run["rates"].get(name), lambda rate: f"{rate:g}") for name in names},
            "held-out score": _number(run.get("holdout"), points),
            "what became of it": became(run, note.get("chosen")),
        }
        for task, arm, note in notes
        for run in note["runs"]
    )


def seeds(s: Summary) -> Columns:
    """The score of every final training, or what became of it."""
    failed = {(run["task"], run["arm"], run["seed"]) for run in s["runs"]["failed"]}
    numbers = sorted({seed for task in s["tasks"].values() for seed in task["seeds"]})

    def shown(task: str, arm: str, seed: int) -> str:
        if seed not in s["tasks"][task]["seeds"]:
            return NOTHING
        score = s["cells"][task][arm]["scores"].get(str(seed))
        return ("failed" if (task, arm, seed) in failed else "to come") if score is None else points(score)

    return _columns(
        {"task": task_title(s, task), "arm": arm, **{f"seed {seed}": shown(task, arm, seed) for seed in numbers}}
        for task, arms in s["cells"].items()
        for arm in arms
    )


def _teacher(s: Summary, task: str) -> float | None:
    scores: Mapping[str, float] = (s["teachers"][task] or {}).get("scores", {})
    return scores.get(s["tasks"][task]["metric"])


def _pairs(s: Summary) -> list[tuple[Cell, Cell]]:
    return [(one, pair) for one in s["hypotheses"] for pair in one["pairs"]]


def _facts(statistics: Mapping[str, Any]) -> dict[str, str]:
    described = statistics.get("described") or {}
    own = described.get("corpora", {}).get("corpus", described)  # in a folder of several, or alone
    known = {**statistics, **own, "sample_words": described.get("sample_words")}
    return {name: _fact(key, known.get(key)) for key, name in CORPUS_FACTS.items()}


def _fact(key: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return NOTHING
    return f"{100 * value:.1f}" if key in SHARES else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _score(cell: Cell | None, is_best: bool = False) -> str:
    """Mean and standard deviation; how many trainings that is, where some are absent."""
    if cell is None:
        return NOTHING
    done = len(cell["scores"])
    if not done:
        return f"0 of {cell['planned']}"
    text = points(cell["mean"]) + (f" ± {points(cell['sd'])}" if cell["sd"] is not None else "")
    return _bold(text, is_best) + _of(done, cell["planned"])


def _average(average: Cell | None, is_best: bool) -> str:
    if average is None:
        return NOTHING
    if average["mean"] is None:
        return f"{average['runs']} of {average['planned']}"
    return _bold(points(average["mean"]), is_best) + _of(average["runs"], average["planned"])


def _bold(text: str, is_best: bool) -> Markup:
    return Markup(f"**{text}**" if is_best else text)


def _of(done: int, planned: int) -> str:
    return "" if done == planned else f" ({done} of {planned})"


def _number(value: float | None, shown: Callable[[float], str]) -> str:
    return NOTHING if value is None else shown(value)


def _signed(value: float | None) -> str:
    return _number(value, lambda known: points(known, "+"))


def _matrix(s: Summary, shown: Callable[[Cell], str]) -> Columns:
    """Arms x tasks, without arms of which nothing is known."""

    def told(task: str, arm: str) -> str:
        cell = s["cells"][task].get(arm)
        text = NOTHING if cell is None else shown(cell)
        return text if text == NOTHING else text + _of(len(cell["scores"]), cell["planned"])

    rows = {arm: [told(task, arm) for task in s["tasks"]] for arm in main_arms(s)}
    return _columns(
        {"arm": arm, **{task_title(s, task): text for task, text in zip(s["tasks"], texts, strict=True)}}
        for arm, texts in rows.items()
        if set(texts) != {NOTHING}
    )


def _columns(rows: Iterable[Mapping[str, str]]) -> Columns:
    """Rows with equal keys -> header and cells."""
    known = list(rows)
    return {header: [row[header] for row in known] for header in (known[0] if known else ())}
