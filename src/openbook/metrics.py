"""How good an answer is: task metrics, agreement with the teacher, calibration, and whether a difference is real.

Outputs are what a model says: probabilities (n, C), of an absent option 0; or scores (n, 1) in regression; or an array
(n,) of objects, the answers of span extraction as strings and the tags of token classification as sequences of strings.
Gold is then an array (n,) of sequences too: all answers that count as right, or the tags; of several labels a text, it
is (n, C), 1 where a label applies, and labels above 0.5 are told. Scores are fractions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr
from scipy.stats import binomtest, rankdata

from openbook.config import THRESHOLD, Kind, UsageError

Array = NDArray[Any]
Rows = tuple[Array, ...]  # each (n, ...): what a metric needs to know of every example
SMALLEST = 1e-12  # probabilities below it count as this, so that no logarithm is infinite
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Metric:
    """`total` of the `rows` of outputs (n, ...) and gold (n,); larger is better. `check` refuses what has no score.

    What costs time is done once for every example, in `rows`: a bootstrap then draws examples and asks for totals.
    """

    check: Callable[[Array, Array], None]
    total: Callable[..., float]
    rows: Callable[[Array, Array], Rows] = lambda outputs, gold: (outputs, gold)

    def function(self, outputs: Array, gold: Array) -> float:
        return self.total(*self.rows(outputs, gold))


@dataclass(frozen=True)
class Difference:
    """How much better the first of two models is, with a 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(outputs: Array, gold: Array) -> float:
    """Share of examples whose most probable class is the gold one. Outputs (n, C), gold (n,)."""
    return float(np.mean(outputs.argmax(axis=1) == gold))


def f1(outputs: Array, gold: Array) -> float:
    """2 TP / (2 TP + FP + FN): of class 1 with two classes (as GLUE does), else the mean over classes that occur.

    Outputs (n, C), gold (n,). A class that is neither predicted nor gold scores 0 when it is class 1 of two.
    """
    counts = _confusion(outputs, gold)
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    scores = 2 * counts.diagonal() / np.maximum(occurrences, 1)
    return float(scores[1] if len(scores) == 2 else scores[occurrences > 0].mean())


def matthews_correlation(outputs: Array, gold: Array) -> float:
    """Matthews correlation for any number of classes (R_K, Gorodkin 2004). Outputs (n, C), gold (n,).

    Defined as 0 when all predictions, or all gold labels, are of one class.
    """
    counts = _confusion(outputs, gold).astype(np.float64)  # products of counts leave int64 behind
    predicted, true, total = counts.sum(axis=0), counts.sum(axis=1), counts.sum()
    covariance = counts.trace() * total - predicted @ true
    scale = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return float(covariance / scale) if scale > 0 else 0.0


def pearson(outputs: Array, gold: Array) -> float:
    """Pearson's correlation of scores (n, 1) with gold (n,). Defined as 0 when either is constant."""
    return _correlation(outputs[:, 0], gold)


def spearmanr(outputs: Array, gold: Array) -> float:
    """Spearman's rank correlation of scores (n, 1) with gold (n,). Defined as 0 when either is constant."""
    return _correlation(rankdata(outputs[:, 0]), rankdata(gold))


def exact_match(answers: Iterable[str], accepted: Iterable[Sequence[str]]) -> float:
    """Share of answers (n,) that equal one of those accepted, without case, punctuation, articles and white space.

    As SQuAD's evaluation (Rajpurkar et al., 2018): where nothing is accepted, no answer (an empty one) is right.
    """
    return float(_best(eq, answers, accepted).mean())


def span_f1(answers: Iterable[str], accepted: Iterable[Sequence[str]]) -> float:
    """Mean over answers (n,) of the best F1 of words they share with one of those accepted, normalised as above.

    As SQuAD's evaluation (Rajpurkar et al., 2018). Words are what white space separates.
    """
    return float(_best(_f1_of_words, answers, accepted).mean())


def entity_f1(tags: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> float:
    """2 TP / (predicted + gold) over the entities of all sentences (n,): type, beginning and end must be right.

    As CoNLL's evaluation (Tjong Kim Sang and De Meulder, 2003). Defined as 0 without any entity.
    """
    return _f1_of_counts(_entity_counts(tags, gold))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and the one after the last of every entity in IOB2 tags.

    As conlleval reads them: `I-x` after `O`, or after another type than x, begins an entity. So IOB1 is read as well.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        here = tag[2:] if tag[:2] in ("B-", "I-") else ""
        if kind and (here != kind or tag.startswith("B-")):
            found.add((kind, start, place))
            kind = ""
        if here and not kind:
            kind, start = here, place
    return found


def _check_classes(outputs: Array, gold: Array) -> None:
    _check_rows(outputs, gold)
    if outputs.shape[1] < 2:
        raise UsageError("a classification metric needs a probability per class, but the outputs have one column")
    if gold.dtype.kind not in "iu" or gold.min() < 0 or gold.max() >= outputs.shape[1]:
        raise UsageError(
            f"gold labels must be class indices 0..{outputs.shape[1] - 1}, "
            f"but are {gold.dtype} from {gold.min()} to {gold.max()}; check the label names of the task"
        )


def _check_scores(outputs: Array, gold: Array) -> None:
    _check_rows(outputs, gold)
    if outputs.shape[1] != 1:
        raise UsageError(f"a regression metric needs outputs of one column, but they have {outputs.shape[1]}")


def _check_sets(outputs: Array, gold: Array) -> None:
    _check_rows(outputs, gold)
    if outputs.shape != gold.shape or not np.isin(gold, (0, 1)).all():
        raise UsageError(
            f"a metric of several labels needs outputs and gold of 0 and 1 of one shape, but they are {outputs.shape}"
            f" and {gold.shape}; check task.kind and the label names"
        )


def _check_rows(outputs: Array, gold: Array) -> None:
    if outputs.ndim != 2 or len(gold) == 0 or len(outputs) != len(gold):
        raise UsageError(f"outputs of shape {outputs.shape} cannot be judged by gold of shape {gold.shape}")
    if not (np.isfinite(outputs).all() and np.isfinite(gold).all()):
        raise UsageError("outputs or gold labels are not finite; the model has overflowed, or a label is missing")


def _check_answers(answers: Array, gold: Array) -> None:
    if len(gold) == 0 or len(answers) != len(gold):
        raise UsageError(f"{len(answers)} answers cannot be judged by {len(gold)} gold ones")


def _check_tags(tags: Array, gold: Array) -> None:
    _check_answers(tags, gold)
    for row, (mine, true) in enumerate(zip(tags, gold, strict=True)):
        if len(mine) != len(true):
            raise UsageError(f"row {row + 1} has {len(mine)} tags where {len(true)} are gold; give one for every word")


def _best(
    same: Callable[[str, str], float], answers: Iterable[str], accepted: Iterable[Sequence[str]]
) -> NDArray[np.float64]:
    """How well every answer agrees with that of the accepted ones that is most like it (n,)."""
    pairs = zip(answers, accepted, strict=True)
    return np.array(
        [max(same(_plain(answer), text) for text in _accepted(texts)) for answer, texts in pairs], np.float64
    )


def _accepted(texts: Sequence[str]) -> list[str]:
    return [plain for text in texts if (plain := _plain(text))] or [""]


def _plain(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and needless white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def _f1_of_words(answer: str, accepted: str) -> float:
    words, gold = answer.split(), accepted.split()
    if not words or not gold:
        return float(words == gold)
    return 2 * (Counter(words) & Counter(gold)).total() / (len(words) + len(gold))


def _entity_counts(tags: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> NDArray[np.int64]:
    """Entities that are right, predicted and gold, of every sentence (n, 3)."""
    pairs = [(entities(mine), entities(true)) for mine, true in zip(tags, gold, strict=True)]
    return np.array([(len(mine & true), len(mine), len(true)) for mine, true in pairs], np.int64).reshape(-1, 3)


def _f1_of_counts(counts: Array) -> float:
    right, predicted, gold = counts.sum(axis=0)
    return float(2 * right / (predicted + gold)) if predicted + gold else 0.0


def _tag_counts(tags: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> NDArray[np.int64]:
    """Words whose tag is right, and all of them, of every sentence (n, 2)."""
    pairs = zip(tags, gold, strict=True)
    counts = [(sum(a == b for a, b in zip(mine, true, strict=True)), len(true)) for mine, true in pairs]
    return np.array(counts, np.int64).reshape(-1, 2)


def _share_of_counts(counts: Array) -> float:
    right, words = counts.sum(axis=0)
    return float(right / words)


def _mean(values: Array) -> float:
    return float(values.mean())


def _hits(outputs: Array, gold: Array) -> Rows:
    """Which labels are right, and which are told or gold, counted twice where both (n, C)."""
    told, true = outputs > THRESHOLD, gold > 0
    return told & true, told.astype(np.int64) + true


def _micro(right: Array, named: Array) -> float:
    """2 TP / (told + gold) over all labels of all texts, 0 without any."""
    return float(2 * right.sum() / max(1, named.sum()))


def _macro(right: Array, named: Array) -> float:
    """The mean of that over the labels that occur, told or gold."""
    occurrences = named.sum(axis=0)
    scores = 2 * right.sum(axis=0)[occurrences > 0] / occurrences[occurrences > 0]
    return float(scores.mean()) if len(scores) else 0.0


def _whole_sets(outputs: Array, gold: Array) -> Rows:
    """Whether all labels of a text are told, and no other."""
    return (((outputs > THRESHOLD) == (gold > 0)).all(axis=1),)


OF_KIND: dict[Kind, dict[str, Metric]] = {
    "classification": {
        "accuracy": Metric(_check_classes, accuracy),
        "f1": Metric(_check_classes, f1),
        "matthews_correlation": Metric(_check_classes, matthews_correlation),
    },
    "regression": {
        "pearson": Metric(_check_scores, pearson),
        "spearmanr": Metric(_check_scores, spearmanr),
    },
    "multi_label": {
        "micro_f1": Metric(_check_sets, _micro, _hits),
        "macro_f1": Metric(_check_sets, _macro, _hits),
        "subset_accuracy": Metric(_check_sets, _mean, _whole_sets),
    },
    "multiple_choice": {"accuracy": Metric(_check_classes, accuracy)},
    "span_extraction": {
        "f1": Metric(_check_answers, _mean, lambda answers, gold: (_best(_f1_of_words, answers, gold),)),
        "exact_match": Metric(_check_answers, _mean, lambda answers, gold: (_best(eq, answers, gold),)),
    },
    "token_classification": {
        "entity_f1": Metric(_check_tags, _f1_of_counts, lambda tags, gold: (_entity_counts(tags, gold),)),
        "accuracy": Metric(_check_tags, _share_of_counts, lambda tags, gold: (_tag_counts(tags, gold),)),
    },
}
METRICS = OF_KIND["classification"] | OF_KIND["regression"] | OF_KIND["multi_label"]  # of whole texts


def metric_of(name: str, kind: Kind | None = None) -> Metric:
    """The metric of that name for a kind of task; without one, for whole texts. Raises UsageError if unknown."""
    known = METRICS if kind is None else OF_KIND[kind]
    if name not in known:
        raise UsageError(f"metric {name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]


def score(name: str, outputs: Array, gold: Array, kind: Kind | None = None) -> float:
    """The named metric of outputs (n, ...) against gold (n,). Raises UsageError for what the metric cannot judge."""
    metric = metric_of(name, kind)
    metric.check(outputs, gold)
    return metric.function(outputs, gold)


def agreement(student: Array, teacher: Array, kind: Kind = "classification") -> float:
    """Share of examples for which student and teacher name the same class, or the same labels. Both (n, C)."""
    _check_pair(student, teacher)
    if kind == "multi_label":
        return float(((student > THRESHOLD) == (teacher > THRESHOLD)).all(axis=1).mean())
    return float(np.mean(student.argmax(axis=1) == teacher.argmax(axis=1)))


def kl_to_teacher(student: Array, teacher: Array) -> float:
    """Mean KL(teacher || student) = sum_c t_c log(t_c / s_c) in nats. Both probabilities (n, C)."""
    _check_pair(student, teacher)
    return float(rel_entr(teacher, np.maximum(student, SMALLEST)).sum(axis=1).mean())


def nll(outputs: Array, gold: Array) -> float:
    """Mean negative log-likelihood of the gold class in nats. Probabilities (n, C), gold (n,)."""
    _check_classes(outputs, gold)
    return float(-np.log(np.maximum(outputs[np.arange(len(gold)), gold], SMALLEST)).mean())


def ece(outputs: Array, gold: Array, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al., 2015) with bins of equal mass. Probabilities (n, C), gold (n,).

    sum_b (n_b / n) |accuracy_b - mean confidence_b|. Equal confidences share a bin: the order is irrelevant.
    """
    _check_classes(outputs, gold)
    confidence = outputs.max(axis=1)
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    surplus = (outputs.argmax(axis=1) == gold) - confidence
    by_bin = np.bincount(np.searchsorted(edges, confidence, side="right"), weights=surplus)
    return float(np.abs(by_bin).sum() / len(gold))


def mcnemar(outputs: Array, rival: Array, gold: Array) -> float:
    """Exact two-sided McNemar p: do two models differ, given those that only one gets right? Outputs (n, C)."""
    _check_classes(outputs, gold)
    _check_classes(rival, gold)
    right, rival_right = outputs.argmax(axis=1) == gold, rival.argmax(axis=1) == gold
    corrected, broken = int((right & ~rival_right).sum()), int((~right & rival_right).sum())
    return float(binomtest(corrected, corrected + broken).pvalue) if corrected + broken else 1.0


def paired_difference(
    name: str,
    a: Sequence[Array],
    b: Sequence[Array],
    gold: Array,
    draws: int = 2000,
    seed: int = 0,
    kind: Kind | None = None,
) -> Difference:
    """Mean over seeds of metric(a) - metric(b), with a 95 % interval: percentile bootstrap over seeds and examples.

    `a` and `b` hold outputs (n, ...) per seed. Seed i of one is paired with seed i of the other; a model with one seed
    meets every seed of its rival. Raises UsageError when the numbers of seeds cannot be paired.
    """
    if min(len(a), len(b)) == 0 or (len(a) != len(b) and min(len(a), len(b)) > 1):
        raise UsageError(f"{len(a)} seeds cannot be paired with {len(b)}; give equally many, or one")
    seeds = max(len(a), len(b))
    pairs = list(zip(_repeat(a, seeds), _repeat(b, seeds), strict=True))
    mean = float(np.mean([score(name, first, gold, kind) - score(name, second, gold, kind) for first, second in pairs]))

    metric, random = metric_of(name, kind), np.random.default_rng(seed)
    judged = [(metric.rows(first, gold), metric.rows(second, gold)) for first, second in pairs]
    differences = np.empty(draws)
    for draw in range(draws):
        rows = random.integers(len(gold), size=len(gold))
        drawn, times = np.unique(random.integers(seeds, size=seeds), return_counts=True)
        totals = [[metric.total(*(column[rows] for column in one)) for one in judged[i]] for i in drawn]
        gains = [mine - theirs for mine, theirs in totals]
        differences[draw] = np.average(gains, weights=times)
    low, high = np.quantile(differences, (0.025, 0.975))
    return Difference(mean, float(low), float(high))


def hierarchical_difference(
    groups: Sequence[Sequence[float]],
    null: float = 0.0,
    draws: int = 10_000,
    seed: int = 0,
    redrawn: Sequence[Array | None] = (),
) -> tuple[Difference, float]:
    """Mean over tasks of their mean paired difference, its 95 % interval, and the p of its being `null`.

    `groups` holds one difference a seed for every task. Percentile bootstrap in two steps (contextualized corpus,
    section 7.2): tasks are drawn with replacement, then seeds within each drawn task; with one task, seeds only. Where
    `redrawn` holds a task's differences (R, seeds) on R other draws of its rows, one of them is drawn beside the seeds.
    p is twice the smaller tail of these means, shifted so that `null` is true, beyond the observed one. It is at least
    1 / (draws + 1), and at least 2^(1 - n) with n differences, as in a test of their signs: a bootstrap of three equal
    signs would call anything certain. Raises UsageError for an empty group or fewer than two differences.
    """
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    count = sum(map(len, values))
    if count < 2 or not all(map(len, values)):
        raise UsageError(f"groups of {[len(group) for group in values]} differences have no interval; give two or more")
    if not np.isfinite(np.concatenate(values)).all():
        raise UsageError("a difference is not finite; leave out the runs that failed, in pairs")
    observed = float(np.mean([group.mean() for group in values]))
    random, means = np.random.default_rng(seed), np.zeros(draws)
    for drawn in random.integers(len(values), size=(len(values), draws)):
        for task, group in enumerate(values):
            here = np.flatnonzero(drawn == task)
            own = group[None] if not redrawn or redrawn[task] is None else np.asarray(redrawn[task])
            rows = random.integers(len(own), size=(len(here), 1)) if len(own) > 1 else np.zeros((1, 1), np.int64)
            means[here] += own[rows, random.integers(len(group), size=(len(here), len(group)))].mean(axis=1)
    means /= len(values)
    return with_p(observed, means, null, count)


def with_p(observed: float, means: Array, null: float, count: int) -> tuple[Difference, float]:
    """The 95 % interval of a bootstrap's means (draws,), and the two-sided p of the mean being `null`.

    p is at least 1 / (draws + 1), and 2^(1 - count) for `count` differences, as a sign test of them is.
    """
    low, high = np.quantile(means, (0.025, 0.975))
    surplus, chance = observed - null, means - observed
    tail = min(np.mean(chance >= surplus), np.mean(chance <= surplus))
    p = min(1.0, max(2 * float(tail), 1 / (len(means) + 1), 2.0 ** (1 - count)))
    return Difference(observed, float(low), float(high)), p


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given (Holm, 1979): the k-th smallest of m times m - k + 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in corrected]


def _confusion(outputs: Array, gold: Array) -> NDArray[np.int64]:
    """Counts (C, C) of gold class by predicted class."""
    classes = outputs.shape[1]
    return np.bincount(gold * classes + outputs.argmax(axis=1), minlength=classes**2).reshape(classes, classes)


def _correlation(x: Array, y: Array) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - np.mean(x, dtype=np.float64), y - np.mean(y, dtype=np.float64)
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def _repeat(outputs: Sequence[Array], seeds: int) -> list[Array]:
    return list(outputs) * (seeds if len(outputs) == 1 else 1)


def _check_pair(student: Array, teacher: Array) -> None:
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2 or len(student) == 0:
        raise UsageError(f"probabilities of shape {student.shape} cannot be compared with {teacher.shape}")
