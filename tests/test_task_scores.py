"""What heads score on every kind of task, and what a guess would: numbers worked out by hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openbook.data.batches import tokenise
from openbook.data.tasks import METRICS, TaskData
from openbook.distillation.supervised import Standard
from openbook.models.encoder import load_headless
from openbook.models.heads import HeadTask, MultiTask
from openbook.task_scores import guess_of, predict, score_of
from openbook.types import Batch, Example, Span

NAMES = ("a", "b", "c")
TAGS = ("O", "B-x", "I-x")


def task_of(kind: Any, holdout: Sequence[Example], train: Sequence[Example] = (), **about: Any) -> TaskData:
    labels = {"classification": NAMES, "token_classification": TAGS}.get(kind)
    given = {"labels": labels, "metrics": METRICS[kind], "null_allowed": False} | about
    return TaskData("t", kind, pair=False, train=[*train], holdout=[*holdout], test=[], warnings=[], **given)


@pytest.fixture
def judged(pretrained: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function of a task and of what its head says about a batch, to what `judge` makes of the rows set aside."""

    def judge_with(
        judge: Any, task: TaskData, said: Callable[[Batch], Tensor], standard: Standard | None = None
    ) -> Any:
        units = standard or Standard()
        head = HeadTask(task.kind, task.labels or (), units.mean, units.deviation)
        model = MultiTask(load_headless(str(pretrained)), {"other": head, "t": head}).train()

        def forward(batch: Batch) -> Tensor:
            assert batch.task == "t"
            assert not model.training
            return said(batch)

        monkeypatch.setattr(model, "forward", forward)
        texts = tokenise(task.holdout, tokenizer, 12, tmp_path, task.kind, stride=2, training=False)
        return judge(model, "t", task, task.holdout, texts)

    return judge_with


def by_name(logits: dict[str, Any]) -> Callable[[Batch], Tensor]:
    """The same logits for a row whatever batch it is in."""
    return lambda batch: torch.tensor([logits[name] for name in batch.ids])


def at_places(peaks: Mapping[str, Sequence[int | None]], width: int) -> Callable[[Batch], Tensor]:
    """Logits (B, L, C): of each token, one column stands out, or none."""

    def said(batch: Batch) -> Tensor:
        logits = torch.zeros(*batch.input_ids.shape, width)
        for row, name in enumerate(batch.ids):
            for place, column in enumerate(peaks[name]):
                if column is not None:
                    logits[row, place, column] = 5
        return logits

    return said


def texts_of(labels: Sequence[Any]) -> list[Example]:
    """Longer ones first, so that batches are not in their order."""
    return [Example(f"x/{n}", "the film " * (len(labels) - n), label=label) for n, label in enumerate(labels)]


def test_classes_are_scored_by_every_metric_of_the_task(judged: Callable[..., Any]) -> None:
    """Gold a b b c, told a b c c."""
    logits = {"x/0": [3.0, 0, 0], "x/1": [0, 1.0, 0], "x/2": [0, 0, 0.5], "x/3": [-2.0, -3, -1]}
    told = judged(score_of, task_of("classification", texts_of([0, 1, 1, 2])), by_name(logits))
    assert list(told) == ["accuracy", "f1", "matthews_correlation"]
    assert told["accuracy"] == 3 / 4
    assert told["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert told["matthews_correlation"] == pytest.approx(7 / 10)  # (3*4 - 5) / sqrt((16 - 6) (16 - 6))


def test_scores_of_a_regression_are_told_in_the_units_of_its_targets(judged: Callable[..., Any]) -> None:
    """Specification, F16; the order of two is wrong, so ranks correlate by 1 - 6 * 2 / (3 * 8)."""
    standard = Standard.of([1.0, 2.0, 4.0])
    logits = {"x/0": [-0.267261], "x/1": [-0.668153], "x/2": [0.534522]}
    task = task_of("regression", texts_of([1.0, 2.0, 4.0]))
    said = judged(predict, task, by_name(logits), standard)
    assert said.outputs == pytest.approx(np.array([[2.0], [1.5], [3.0]]), abs=1e-5)
    assert said.gold.tolist() == [1, 2, 4]
    told = judged(score_of, task, by_name(logits), standard)
    assert list(told) == ["spearmanr", "pearson"]
    assert told["spearmanr"] == pytest.approx(0.5)
    assert told["pearson"] == pytest.approx(np.corrcoef([2, 1.5, 3], [1, 2, 4])[0, 1])


def test_the_option_that_scores_highest_is_told(judged: Callable[..., Any]) -> None:
    """Two of three. An option that the last question lacks cannot be told, though both it has are below 0."""
    rows = [
        Example("x/0", "the film " * 4, label=1, options=("good", "bad", "a b")),
        Example("x/1", "my", label=0, options=("us", "them", "we")),
        Example("x/2", "the plot", label=1, options=("fine", "poor")),
    ]
    scores = {"x/0": [0.0, 2, 1], "x/1": [0.0, 2, 3], "x/2": [-7.0, -5]}
    logits = {f"{name}#{n}": [score] for name, own in scores.items() for n, score in enumerate(own)}
    assert judged(score_of, task_of("multiple_choice", rows), by_name(logits)) == {"accuracy": 2 / 3}


@pytest.mark.parametrize("null_allowed", [True, False])
def test_answers_are_scored_by_their_words(judged: Callable[..., Any], null_allowed: bool) -> None:
    """Told: an accepted answer; nothing where there is none, if that may be told; one of two words."""
    rows = [
        Example("x/0", "us", "my book was fine", Span(3, 7), answers=("book", "my book")),
        Example("x/1", "us", "my plot was bad"),
        Example("x/2", "us", "we seemed dull", Span(3, 14), answers=("we seemed dull to", "seemed dull")),
    ]
    places = {"x/0#0": 4, "x/1#0": 0, "x/2#0": 4}  # [CLS] us [SEP] my book ...

    def said(batch: Batch) -> Tensor:
        logits = torch.zeros(*batch.input_ids.shape, 2)
        for row, name in enumerate(batch.ids):
            logits[row, places[name]] = 5
        return logits

    told = judged(score_of, task_of("span_extraction", rows, null_allowed=null_allowed), said)
    assert list(told) == ["f1", "exact_match"]
    assert told["exact_match"] == pytest.approx((1 + null_allowed + 0) / 3)
    assert told["f1"] == pytest.approx((1 + null_allowed + 2 / 3) / 3)


def test_tags_are_scored_by_entities_and_by_words(judged: Callable[..., Any]) -> None:
    """Two entities told of two, the second one too long. A piece within a word has no say."""
    words = ("the", "film", "was", "zz"), ("my", "book", "fine")
    tags = (1, 2, 0, 0), (0, 1, 0)
    rows = [Example(f"x/{n}", " ".join(words[n]), label=tags[n], words=words[n]) for n in (0, 1)]
    peaks = {"x/0": [None, 1, 2, 0, 0, 1], "x/1": [None, 0, 1, 2]}
    told = judged(score_of, task_of("token_classification", rows), at_places(peaks, 3))
    assert list(told) == ["entity_f1", "accuracy"]
    assert told["entity_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert told["accuracy"] == pytest.approx(6 / 7)


def test_a_guess_is_the_most_frequent_class_of_the_training_rows() -> None:
    """Class b, which is rare among the rows set aside."""
    rows = task_of("classification", texts_of([0, 0, 0, 1, 2]), texts_of([0, 1, 1, 2]))
    assert guess_of(rows) == pytest.approx(1 / 5)
    about = {"f1": (2 * 1 / (5 + 1)) / 3, "matthews_correlation": 0.0}
    for metric, expected in about.items():
        guessed = guess_of(task_of("classification", rows.holdout, rows.train, metrics=(metric,)))
        assert guessed == pytest.approx(expected)


def test_a_guess_of_a_regression_correlates_with_nothing() -> None:
    assert guess_of(task_of("regression", texts_of([0.5, 2.5]), texts_of([1.0, 2.0]))) == 0


def test_a_guess_of_an_option_is_chance_question_by_question() -> None:
    rows = [Example(f"x/{n}", "a", label=0, options=("a",) * count) for n, count in enumerate((2, 4, 5))]
    assert guess_of(task_of("multiple_choice", rows, rows[:1])) == pytest.approx((1 / 2 + 1 / 4 + 1 / 5) / 3)


def test_a_guess_of_an_answer_is_that_there_is_none() -> None:
    answered = [Example(f"x/{n}", "a", "b", Span(0, 1), answers=("b",)) for n in range(3)]
    unanswered = Example("x/3", "a", "b")
    assert guess_of(task_of("span_extraction", [*answered, unanswered], answered)) == 1 / 4
    assert guess_of(task_of("span_extraction", answered, [unanswered])) == 0


def test_a_guess_of_tags_is_the_most_frequent_one_for_every_word() -> None:
    def tagged(*rows: tuple[int, ...]) -> list[Example]:
        return [Example(f"x/{n}", "", label=tags, words=("a",) * len(tags)) for n, tags in enumerate(rows)]

    often_none, holdout = tagged((0, 0, 0, 1)), tagged((1, 0), (1, 2, 0), (0,))
    assert guess_of(task_of("token_classification", holdout, often_none)) == 0
    words = {"metrics": ("accuracy",)}
    assert guess_of(task_of("token_classification", holdout, often_none, **words)) == pytest.approx(3 / 6)
    often_begins = tagged((1,), (1, 2, 0), (1,))
    assert guess_of(task_of("token_classification", holdout, often_begins, **words)) == pytest.approx(2 / 6)
    assert guess_of(task_of("token_classification", holdout, often_begins)) == pytest.approx(2 * 1 / (6 + 2))
