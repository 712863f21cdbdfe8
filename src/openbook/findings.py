"""What a run found, in words and rounded numbers: the comparison of its models, the verdicts, the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEACHER, BASELINE, STUDENT, OPEN_BOOK = "teacher", "student-labels", "student-corpus", "student-open-book"
STEPS = {
    ("student-kd", BASELINE): "imitating the teacher on the task's own text",
    (STUDENT, "student-kd"): "the retrieved corpus",
    (STUDENT, BASELINE): "the teacher together with the retrieved corpus",
    (OPEN_BOOK, STUDENT): "looking up neighbours in the book",
    (OPEN_BOOK, BASELINE): "all steps together",
}
METRICS = {
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "subset_accuracy": "accuracy of whole sets",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}
NOTHING = "–"


@dataclass(frozen=True)
class Report:
    """All that is shown, as read from the JSON of the stages. Scores are fractions, shown as points (x 100)."""

    run: str
    teacher_model: str
    results: Mapping[str, Any]  # task, kind, metric, split, rows, seeds, models, comparisons, timing
    histories: Mapping[str, Sequence[Mapping[str, Any]]]  # model -> rows of its trainings with the first seed
    corpus: Mapping[str, Any]  # the statistics of the contextualized corpus; empty without one
    tuning: Sequence[Mapping[str, Any]]  # one row a seed: how the book was set on held-out rows
    examples: Sequence[Mapping[str, Any]]  # predictions with the neighbours behind them
    stages: Mapping[str, float]  # seconds
    environment: Mapping[str, Any]  # versions
    recipe: str  # resolved, as YAML
    data_notes: Sequence[str] = ()

    @property
    def models(self) -> dict[str, Mapping[str, Any]]:
        return {model["name"]: model for model in self.results["models"]}

    @property
    def teacher(self) -> Mapping[str, Any]:
        return self.models[TEACHER]

    @property
    def student(self) -> Mapping[str, Any]:
        """The model the run is about: the best taught student, its book closed."""
        closed = [m for m in self.results["models"] if m["name"] != TEACHER and m.get("book_bytes") is None]
        return self.models.get(STUDENT) or closed[-1]

    @property
    def metric(self) -> str:
        name: str = self.results["metric"]
        return METRICS.get(name, name)


def title(report: Report) -> str:
    small, large = millions(report.student["parameters"]), millions(report.teacher["parameters"])
    return f"{report.teacher_model}, compressed for {report.results['task']}: {large} to {small} parameters"


def comparison(report: Report) -> dict[str, list[str]]:
    """Header -> a cell for each model, without columns in which nothing is known."""
    models, baseline = report.results["models"], report.models.get(BASELINE)
    columns = {
        "model": [model["name"] for model in models],
        f"{report.metric}, points": [_score(model) for model in models],
        f"gain over {BASELINE}": [_gain(model, baseline) for model in models],
        "parameters": [millions(model["parameters"]) for model in models],
        "size, MB": [_size(model) for model in models],
        "ms a text, p50 / p95": [_latency(model) for model in models],
        "throughput / teacher's": [_throughput(model, report.teacher) for model in models],
        "agrees with teacher": [percent(model.get("agreement")) for model in models],
    }
    return {header: cells for header, cells in columns.items() if set(cells) != {NOTHING}}


def verdicts(report: Report) -> list[str]:
    """What the run shows, in plain sentences: what the student keeps, what each step bought, what the book did."""
    return [_kept(report), *map(_step, report.results.get("comparisons", ())), *_book(report)]


def limits(report: Report) -> list[str]:
    """What the numbers do not say."""
    results, timing = report.results, report.results.get("timing", {})
    threads = timing.get("threads", "unknown")
    place = f"{timing.get('processor') or 'one processor'} with {threads} thread{'' if threads == 1 else 's'}"
    grain = f", so one row is worth {100 / results['rows']:.2f} points" if results["metric"] == "accuracy" else ""
    lines = [
        f"The scores come from one split ({results['split']}) of {results['rows']:,} rows{grain}.",
        f"± is the standard deviation over {len(results['seeds'])} seeds of the student. The teacher and the corpus "
        "were made once, so what they would vary by is not in it.",
        "The intervals come from resampling test rows and seeds in pairs. They promise nothing for other data.",
        f"Times were measured on {place}, in short runs. Measure again on the machine that will serve the model.",
        "The student learns from the teacher's answers, and so inherits its mistakes and biases.",
    ]
    if report.examples:
        lines.append("Neighbours show what was looked up and what it did, not how the student found its own answer.")
    return lines


def points(fraction: float, sign: str = "") -> str:
    """A fraction x 100 with one decimal, or with two where one would hide that it is not 0."""
    value = 100 * fraction
    digits = 2 if 0.005 <= abs(value) < 0.05 else 1
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1_000_000 else f"{count / 1e6:.2f} M"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1_000_000 else f"{count / 1e6:.2g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _score(model: Mapping[str, Any]) -> str:
    several = len(model["scores"]) > 1
    return points(model["mean"]) + (f" ± {points(model['sd'])}" if several else "")


def _gain(model: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    if baseline is None or model is baseline:
        return NOTHING
    return points(model["mean"] - baseline["mean"], "+")


def _size(model: Mapping[str, Any]) -> str:
    book = model.get("book_bytes")
    return megabytes(model["bytes"]) + (f" + {megabytes(book)} book" if book is not None else "")


def _latency(model: Mapping[str, Any]) -> str:
    latency = model.get("latency_ms")
    return f"{latency['p50']:.1f} / {latency['p95']:.1f}" if latency else NOTHING


def _throughput(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    if not (model.get("throughput") and teacher.get("throughput")):
        return NOTHING
    return f"{model['throughput'] / teacher['throughput']:.1f} x"


def _kept(report: Report) -> str:
    student, teacher = report.student, report.teacher
    scores = f"{points(student['mean'])} against {points(teacher['mean'])} points"
    keeps = f"has {scores} of {report.metric}"
    if teacher["mean"] > 0 and student["mean"] >= 0:
        keeps = f"keeps {percent(student['mean'] / teacher['mean'])} of the teacher's {report.metric} ({scores})"
    small, large = millions(student["parameters"]), millions(teacher["parameters"])
    sentence = (
        f"The student ({student['name']}) {keeps} with {small} parameters instead of {large}{_speed(student, teacher)}."
    )
    if student.get("agreement") is not None:
        sentence += f" It gives the teacher's answer to {percent(student['agreement'])} of the texts."
    return sentence


def _speed(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    if not (student.get("latency_ms") and teacher.get("latency_ms")):
        return ""
    own, other = student["latency_ms"]["p50"], teacher["latency_ms"]["p50"]
    ratio = f"{other / own:.1f} times faster" if own <= other else f"{own / other:.1f} times slower"
    return f", and answers a single text {ratio} (median {own:.1f} ms instead of {other:.1f} ms)"


def _step(row: Mapping[str, Any]) -> str:
    """A difference with its 95 % interval; it counts only when the interval leaves out 0."""
    first, second, difference, low, high = (row[key] for key in ("a", "b", "difference", "low", "high"))
    step = STEPS.get((first, second))
    rival = "the teacher" if second == TEACHER else second
    side = "above" if difference > 0 else "below"
    size = f"{points(abs(difference))} points {side} {rival}" if points(difference) != "0.0" else f"level with {rival}"
    if low > 0:
        bought = f" That is what {step} bought." if step else ""
        return f"{first} is {size} (95 % interval {points(low)} to {points(high)}).{bought}"
    if high < 0:
        lost = f" Here {step} did harm." if step else ""
        return f"{first} is {size} (95 % interval {points(-high)} to {points(-low)} below).{lost}"
    start, shown = ("No gain", f": {step} has not been shown to help") if step else ("No difference shown", "")
    though = "but" if difference > 0 else "and"
    interval = f"{points(low)} to {points(high)}"
    return f"{start}: {first} is {size}, {though} the 95 % interval ({interval}) includes 0{shown}."


def _book(report: Report) -> list[str]:
    """Whether tuning on held-out rows let the student open the book, and what the book costs."""
    rows = report.tuning
    if not rows:
        return []
    opened = sum(row["kept"] for row in rows)
    gain = points(sum(row["gain"] for row in rows) / len(rows))
    held_out = f"on rows held out of training it gained {gain} points on average"
    if not opened:
        return [
            f"No gain: the book stays closed with every seed, since it did not clearly help ({held_out}). "
            f"{OPEN_BOOK} then answers as the student without a book does; ship the student alone."
        ]
    rest = "" if opened == len(rows) else "; with the others it did not clearly help, and the student answers alone"
    return [f"The book is open with {opened} of {len(rows)} seeds: {held_out}{rest}.{_cost(report)}"]


def _cost(report: Report) -> str:
    book, student = report.models.get(OPEN_BOOK), report.student
    if book is None or not book.get("book_bytes"):
        return ""
    time = ""
    if book.get("latency_ms") and student.get("latency_ms"):
        time = f" and {book['latency_ms']['p50'] - student['latency_ms']['p50']:+.1f} ms a text (median)"
    return f" It costs {megabytes(book['book_bytes'])} MB{time}."
