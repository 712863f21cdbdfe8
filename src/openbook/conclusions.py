"""What a grid of trainings found, in plain sentences made from its summary (`comparison.summarise`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openbook.findings import METRICS, NOTHING, points

Summary = Mapping[str, Any]
VERDICTS = {"not shown": "is not shown", "unfinished": "is unfinished"}


def task_title(s: Summary, task: str) -> str:
    return str(s["tasks"][task]["title"])


def metric_of(s: Summary, task: str) -> str:
    name: str = s["tasks"][task]["metric"]
    return METRICS.get(name, name)


def interval(found: Mapping[str, Any]) -> str:
    return NOTHING if found["low"] is None else f"{points(found['low'], '+')} to {points(found['high'], '+')}"


def opening(s: Summary) -> str:
    """What was done, and how much of it."""
    budget, bank = s["budget"] or {}, s["bank"] or {}
    titles = ", ".join(task_title(s, task) for task in s["tasks"])
    told = [f"{len(s['arms'])} arms on {len(s['tasks'])} tasks ({titles}), repeated with several seeds. {census(s)}"]
    if s["runs"]["missing"]:
        told.append("The grid is unfinished: every number here may still change.")
    if bank.get("sentences"):
        told.append(f"The bank of general text holds {bank['sentences']:,} sentences.")
    if budget.get("tokens"):
        told.append(f"A corpus may hold {budget['tokens']:,} tokens.")
    if budget.get("training_tokens"):
        told.append(f"The first lesson reads {budget['training_tokens']:,} tokens, however large its corpus is.")
    return " ".join(told)


def census(s: Summary) -> str:
    """Every training that was started or planned, counted."""
    runs = s["runs"]
    tuning = [run for arms in s["tuning"].values() for note in arms.values() if note for run in note["runs"]]
    failed = sum(run.get("status") == "failed" for run in tuning)
    return (
        f"Of {runs['planned']:,} final trainings {runs['ok']:,} are done, {len(runs['failed']):,} failed and "
        f"{len(runs['missing']):,} are still to come; {len(tuning):,} served to choose rates ({failed:,} failed)."
    )


def drawn_rows(s: Summary) -> str:
    """Whether the intervals hold what other rows of the same tasks would change; where not, for want of what."""
    pairs = {(pair["a"], pair["b"]): pair["tasks"] for one in s["hypotheses"] for pair in one["pairs"]}
    known = {pair: [task for task in tasks if tasks[task]["rows"]] for pair, tasks in pairs.items()}
    without = {
        pair: [task for task in tasks if tasks[task]["pairs"] and not tasks[task]["rows"]]
        for pair, tasks in pairs.items()
    }
    if not any(known.values()):
        return (
            "Rows are not drawn, since what was said of each was not kept: what others would change is in no interval."
        )
    told = "Rows of the reported split are drawn too, the same for all trainings of a task"
    lacking = [
        f"{a} − {b} ({', '.join(task_title(s, task) for task in tasks)})" for (a, b), tasks in without.items() if tasks
    ]
    return f"{told}, but not where what was said of each was not kept: {', '.join(lacking)}." if lacking else f"{told}."


def trainings(s: Summary) -> list[str]:
    """What is wrong with the final trainings: failed, still to come, unlike their siblings, not of the plan."""
    runs = s["runs"]
    to_come: dict[tuple[str, str], list[int]] = {}
    for task, arm, seed in runs["missing"]:
        to_come.setdefault((task, arm), []).append(seed)
    mixed = [(task, arm) for task, cells in s["cells"].items() for arm in cells if len(cells[arm]["rates"]) > 1]
    return [
        *(
            f"Failed: {task_title(s, run['task'])}, {run['arm']}, seed {run['seed']}: {run['error']}"
            for run in runs["failed"]
        ),
        *(
            f"Still to come: {task_title(s, task)}, {arm}, seeds {_listed(seeds)}"
            for (task, arm), seeds in to_come.items()
        ),
        *(
            f"Warning: the seeds of {arm} on {task_title(s, task)} were trained with different rates"
            for task, arm in mixed
        ),
        *(f"In no number here, since the plan does not hold it: {path}" for path in runs["outside"]),
    ]


def claim(s: Summary, one: Mapping[str, Any]) -> dict[str, str]:
    """A hypothesis with its verdict, its differences, and why they lead there."""
    so_far = "So far " if one["verdict"] == "unfinished" else ""
    differences = "; ".join(versus(s, pair) + _where(s, pair) for pair in one["pairs"])
    text = f"{one['claim'][:1].upper()}{one['claim'][1:]}. {so_far}{differences}. {_reason(one)}"
    return {"name": one["name"], "word": VERDICTS.get(one["verdict"], one["verdict"]), "text": text}


def versus(s: Summary, pair: Mapping[str, Any]) -> str:
    """How much the first arm of a pair is above the second."""
    first, second = (f"{arm} ({s['arms'][arm]['title']})" for arm in (pair["a"], pair["b"]))
    pairs, difference = pair["pairs"], pair["difference"]
    count = f"{pairs} pairs" if pairs == pair["planned"] else f"{pairs} of {pair['planned']} pairs"
    if difference is None:
        return f"{first} and {second} cannot be compared: {count}"
    side = "above" if difference > 0 else "below"
    size = f"{points(abs(difference))} points {side}" if difference else "level with"
    width = "no interval" if pair["low"] is None else f"95 % interval {interval(pair)}"
    return f"{first} is {size} {second}: {width}, {count}"


def _where(s: Summary, pair: Mapping[str, Any]) -> str:
    """The tasks of a pair that is not planned for all of them."""
    tasks = pair["tasks"]
    return "" if len(tasks) == len(s["tasks"]) else f" (of {', '.join(task_title(s, task) for task in tasks)} only)"


def _reason(one: Mapping[str, Any]) -> str:
    bound = f"the margin of {points(one['null'])}" if one["null"] else "0"
    if one["verdict"] == "unfinished":
        return "Trainings of these arms are still to come, so there is no verdict."
    if one["verdict"] == "does not hold":
        return f"An interval lies below {bound}."
    p = f"p is {one['p_holm']:.2g} after correction"
    if one["verdict"] == "holds":
        return f"Every interval lies above {bound}, and {p}."
    unclear = [
        f"{pair['a']} − {pair['b']}" for pair in one["pairs"] if pair["low"] is None or pair["low"] <= one["null"]
    ]
    if unclear:
        return f"No interval above {bound}: {', '.join(unclear)}."
    return f"The intervals lie above {bound}, but that is not enough: {p}."


def cost(s: Summary, task: str) -> str:
    """The largest deviation of an arm from the baseline, and a warning above 1 %."""
    found, told = s["cost"][task], []
    for what in ("tokens", "steps"):
        if found[what]:
            arm = max(found[what], key=lambda name: found[what][name])
            told.append(f"in {what} {100 * found[what][arm]:.2f} % ({arm})")
    line = f"{task_title(s, task)}: largest deviation from {s['baseline']} "
    line += ", ".join(told) + "." if told else "is not known."
    if found["unlike"]:
        line += f" Without the same lessons, and so not compared: {', '.join(found['unlike'])}."
    if found["above"]:
        line += f" Warning: more than 1 % apart, so not at equal cost: {', '.join(found['above'])}."
    return line


def peak(s: Summary, name: str, found: Mapping[str, Any] | None) -> str:
    """Which share of a corpus is best, and what it gains over the largest."""
    if found is None:
        return f"{name}: which share is best is known when the first seed of each is done."
    if found["gain"]["a"] == found["gain"]["b"]:
        return f"{name}: best on held-out rows (first seed) is the largest share, {found['share']:g}."
    gain = versus(s, found["gain"])
    return f"{name}: best on held-out rows (first seed) is the share {found['share']:g}. On the reported rows {gain}."


def rows_of(s: Summary, task: str) -> str:
    """What a task is scored by, how many rows it has, and with which seeds."""
    settings = s["tasks"][task]
    names = {"train": "learned from", "holdout": "held out", "test": "reported"}
    rows = [f"{settings['rows'][split]:,} {name}" for split, name in names.items() if split in settings.get("rows", {})]
    return "; ".join(
        [metric_of(s, task), *([f"rows: {', '.join(rows)}"] if rows else []), f"seeds {_listed(settings['seeds'])}"]
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))
