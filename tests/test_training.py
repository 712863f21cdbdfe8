"""The one loop: resumes exactly, accumulates exactly, and trains all that a lesson holds."""

import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from openbook.checkpoint import read_json, write_json
from openbook.config import Optim, Terms, UsageError
from openbook.distillation.objective import Objective, Widths
from openbook.distillation.supervised import classification
from openbook.parallel import run_group
from openbook.training import (
    Judge,
    Learner,
    Lesson,
    count_updates,
    grouped,
    has_bf16,
    hear_update,
    load_checkpoint,
    precision_of,
    scale,
    seed_of,
    train,
    train_together,
)
from openbook.types import Batch, Outputs

CLASSES, WORDS = 3, 20
FP32 = {"precision": "fp32", "learning_rate": 0.01}


class Toy(nn.Module):
    """A student with dropout, a layer norm and an embedding: what makes resuming hard."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.norm = nn.Embedding(WORDS, 6), nn.LayerNorm(6)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(6, CLASSES)

    def forward(self, batch: Batch) -> Outputs:
        pooled = self.norm(self.words(batch.input_ids).mean(1))
        return Outputs(self.head(self.dropout(pooled)), pooled)


class Shuffled:
    """A plan of `size` rows a batch: other rows at every step, the same ones whenever a step is asked for."""

    def __init__(self, steps: int, size: int) -> None:
        self.steps, self.size = steps, size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rows = [torch.randint(0, WORDS, (5,), generator=torch.Generator().manual_seed(row)) for row in self.rows(step)]
        ids = torch.stack(rows)
        mask = torch.ones_like(ids)
        return Batch(tuple(map(str, self.rows(step))), ids, mask, mask * 0, ids.sum(1) % CLASSES)

    def rows(self, step: int) -> range:
        return range(step * self.size, (step + 1) * self.size)


def lesson_of(terms: Terms | None = None, dropout: float = 0.3) -> Lesson:
    own, aim = Widths(6, 1, 1, 6), Widths(8, 1, 1, 8)
    torch.manual_seed(2)
    return Lesson(Toy(dropout), Objective(terms or Terms(gold=1, embedding=1), own, aim, "classification"))


def teacher(batch: Batch) -> Outputs:
    generator = torch.Generator().manual_seed(int(batch.ids[0]))
    rows = len(batch.ids)
    return Outputs(torch.randn(rows, CLASSES, generator=generator), torch.randn(rows, 8, generator=generator))


def run(
    lesson: Lesson,
    plan: Shuffled,
    optim: Optim,
    scratch: Path | None = None,
    fail_at: int | None = None,
    told: list[int] | None = None,
) -> Any:
    calls = 0

    def loss_of(batch: Batch) -> Any:
        nonlocal calls
        if fail_at is not None and int(batch.ids[0]) == fail_at * plan.size:
            raise KeyboardInterrupt
        calls += 1
        return lesson(batch, teacher(batch))

    advance: Callable[[int], None] = (lambda done: None) if told is None else told.append
    history = train(loss_of, lesson, plan, optim, 5, Accelerator(cpu=True), scratch, advance)
    return history, calls


def weights(lesson: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lesson.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("fail_at", [1, 4, 7, 11, 19])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, fail_at: int, accumulation: int) -> None:
    optim = Optim(**FP32, checkpoint_every=3, accumulation=accumulation)
    plan = Shuffled(20, 4)
    straight = lesson_of()
    history, calls = run(straight, plan, optim)
    assert calls == 20
    with pytest.raises(KeyboardInterrupt):
        run(lesson_of(), plan, optim, tmp_path, fail_at)
    torch.manual_seed(99)  # whatever the next process did before
    resumed = lesson_of()
    with torch.no_grad():
        resumed.student.head.weight.zero_()
    told: list[int] = []
    again, remaining = run(resumed, plan, optim, tmp_path, told=told)
    updates = math.ceil(20 / accumulation)
    kept = fail_at // accumulation // 3 * 3
    assert remaining == 20 - kept * accumulation
    assert told == list(range(kept + 1, updates + 1))
    if kept:
        assert_equal(weights(resumed), weights(straight))
        assert again == history
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{updates}"]


def test_a_stretch_of_the_history_survives_a_crash_in_its_middle(tmp_path: Path) -> None:
    optim, plan = Optim(**FP32, checkpoint_every=5), Shuffled(200, 1)  # a stretch is two updates
    history, _ = run(lesson_of(), plan, optim)
    with pytest.raises(KeyboardInterrupt):
        run(lesson_of(), plan, optim, tmp_path, fail_at=108)
    again, remaining = run(lesson_of(), plan, optim, tmp_path)
    assert (again, remaining) == (history, 95)


def test_a_finished_training_is_put_back_without_a_step(tmp_path: Path) -> None:
    optim, plan, first = Optim(**FP32), Shuffled(4, 2), lesson_of()
    history, _ = run(first, plan, optim, tmp_path)
    second = lesson_of()
    assert run(second, plan, optim, tmp_path) == (history, 0)
    assert_equal(weights(second), weights(first))


def test_a_checkpoint_that_was_being_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim, plan = Optim(**FP32, checkpoint_every=2), Shuffled(6, 2)
    straight = lesson_of()
    run(straight, plan, optim)
    rename, names = os.rename, []

    def crash(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        if len(names) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("openbook.training.os.rename", crash)
        with pytest.raises(KeyboardInterrupt):
            run(lesson_of(), plan, optim, tmp_path)
    assert names == ["checkpoint-2", "checkpoint-4"]
    resumed = lesson_of()
    assert run(resumed, plan, optim, tmp_path)[1] == 4
    assert_equal(weights(resumed), weights(straight))


def test_four_batches_of_four_are_one_of_sixteen() -> None:
    terms = Terms(gold=1, embedding=0.5)
    one, four = lesson_of(terms, dropout=0), lesson_of(terms, dropout=0)

    def same_teacher(batch: Batch) -> Outputs:
        rows = [teacher(Batch((name,), *(torch.empty(0),) * 3)) for name in batch.ids]
        return Outputs(torch.cat([row.logits for row in rows]), torch.cat([row.embedding for row in rows]))

    for lesson, size, accumulation in ((one, 16, 1), (four, 4, 4)):
        optim = Optim(**FP32, accumulation=accumulation)
        history = train(
            lambda batch, lesson=lesson: lesson(batch, same_teacher(batch)),
            lesson, Shuffled(5 * accumulation, size), optim, 5, Accelerator(cpu=True),
        )  # fmt: skip
        assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    before = weights(lesson_of(terms, dropout=0))
    for name, value in weights(one).items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, weights(four)[name], rtol=0, atol=1e-6)


class Worked(nn.Module):
    """MITKD specification, F12: one shared weight, and a head of each task; the third is not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        heads = {"a": [1.0, 0], "b": [1.0, 2, 0], "c": [3.0, 1]}
        self.heads = nn.ParameterDict({name: torch.tensor(head, dtype=torch.float64) for name, head in heads.items()})

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        sign = 1 if batch.task == "a" else -1
        logits = sign * self.shared * self.heads[batch.task]
        loss = classification(logits[None], torch.tensor([int(batch.task == "b")]))
        return loss, {batch.task: loss}


class Tasks:
    """A plan of one batch of each task."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, step: int) -> Batch:
        return replace(Shuffled(1, 1)[0], task=self.names[step])


def test_an_update_of_two_tasks_as_worked_out() -> None:
    lesson = Worked()
    learner = Learner(lesson, lesson, Optim(precision="fp32", accumulation=4), 0)
    hear_update([learner], Tasks("a", "b"), 0, Accelerator(cpu=True))
    expected = {"shared": 0.328491, "heads.a": [-0.136169, 0.136169], "heads.b": [-0.069905, 0.185160, -0.115255]}
    gradients = {name: weight.grad for name, weight in lesson.named_parameters()}
    assert gradients.pop("heads.c") is None
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, torch.tensor(expected[name], dtype=torch.float64), rtol=0, atol=1e-6, msg=name
        )
    assert learner.sums == pytest.approx({"loss": (0.683949 + 1.529447) / 2, "a": 0.683949 / 2, "b": 1.529447 / 2})


@pytest.mark.parametrize(("scaled", "mean"), [(True, 0.797652), (False, 0.839186)])
def test_tasks_of_other_numbers_of_classes_weigh_the_same_in_an_update(scaled: bool, mean: float) -> None:
    """MITKD specification, F10: two classes and three; the history tells the mean of their losses."""
    logits = {"two": ([2.0, 0], 0), "three": ([1.0, 0, 0], 2)}

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        own, label = logits[batch.task]
        return classification(torch.tensor([own], requires_grad=True), torch.tensor([label]), scaled=scaled), {}

    optim = Optim(precision="fp32", accumulation=2)
    history = train(loss_of, nn.Linear(1, 1), Tasks("two", "three"), optim, 0, Accelerator(cpu=True))
    assert [row["loss"] for row in history] == [pytest.approx(mean, abs=1e-6)]


def test_the_last_batches_count_though_they_fill_no_update() -> None:
    history, calls = run(lesson_of(), Shuffled(7, 2), Optim(**FP32, accumulation=3))
    assert (calls, [row["step"] for row in history]) == (7, [1, 2, 3])


def test_the_learning_rate_rises_and_falls_linearly() -> None:
    # 20 updates, a quarter of them warm-up: 1/5, 2/5, .. 1, then (20 - update) / 15
    expected = {0: 0.2, 1: 0.4, 4: 1.0, 5: 1.0, 6: 14 / 15, 12: 8 / 15, 19: 1 / 15, 20: 0.0}
    assert {update: scale(update, 20, 0.25) for update in expected} == pytest.approx(expected)
    assert [scale(update, 4, 0.0) for update in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert scale(0, 1, 0.1) == 1


@pytest.mark.parametrize("updates", [1, 2, 3, 7, 10, 15, 33])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_learning_rate_never_exceeds_its_peak(updates: int, warmup: float) -> None:
    rates = [scale(update, updates, warmup) for update in range(updates)]
    assert max(rates) <= 1
    assert min(rates) > 0
    assert rates == [*sorted(rates[: rates.index(max(rates))]), *sorted(rates[rates.index(max(rates)) :], reverse=True)]


def test_the_published_schedule() -> None:
    """MITKD specification, F18: 4,000 of 400,000 updates warm up; what gets no gradient still decays."""
    rates = {1: 1.5e-7, 2_000: 3e-4, 4_000: 6e-4, 103_000: 4.5e-4, 202_000: 3e-4, 301_000: 1.5e-4, 400_000: 0.0}
    for step, rate in rates.items():
        assert 6e-4 * scale(step - 1, 400_000, 0.01) == pytest.approx(rate, abs=1e-8)
    decayed = math.prod(1 - 0.01 * 6e-4 * scale(update, 400_000, 0.01) for update in range(400_000))
    assert decayed == pytest.approx(0.301193, abs=1e-5)


def test_the_loop_follows_the_schedule_and_the_history_tells_it() -> None:
    history, _ = run(lesson_of(), Shuffled(8, 2), Optim(precision="fp32", learning_rate=0.02, warmup=0.25))
    rates = [row["learning_rate"] for row in history]
    assert rates == pytest.approx([0.01, 0.02, 0.02, *(0.02 * left / 6 for left in (5, 4, 3, 2, 1))])


def test_the_rate_of_an_update_is_the_one_it_is_made_with() -> None:
    """AdamW's first step moves every weight by the learning rate, whatever its gradient."""
    lesson = lesson_of(Terms(gold=1), dropout=0)
    before = weights(lesson)["student.head.bias"]
    run(lesson, Shuffled(1, 8), Optim(precision="fp32", learning_rate=0.03, warmup=0.0, weight_decay=0))
    moved = (weights(lesson)["student.head.bias"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.03), rtol=1e-3, atol=0)


def test_the_history_is_the_mean_of_a_stretch() -> None:
    values = iter(range(1, 301))
    parameter = nn.Linear(1, 1)

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = next(values)
        return parameter.weight.sum() * 0 + value, {"twice": torch.tensor(2.0 * value)}

    history = train(loss_of, parameter, Shuffled(300, 1), Optim(**FP32), 0, Accelerator(cpu=True))
    assert [row["step"] for row in history] == list(range(3, 301, 3))
    assert [row["loss"] for row in history] == [3.0 * stretch + 2 for stretch in range(100)]
    assert [row["twice"] for row in history] == [2 * row["loss"] for row in history]


def test_a_loss_that_is_not_finite_stops_naming_step_and_parts(tmp_path: Path) -> None:
    lesson = lesson_of()

    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = lesson(batch, teacher(batch))
        return (
            (loss * float("nan"), {**parts, "hidden": torch.tensor(math.inf)}) if batch.ids[0] == "6" else (loss, parts)
        )

    with pytest.raises(FloatingPointError, match=r"nan at step 3 \(gold \d.*, embedding \d.*, hidden inf\)"):
        train(loss_of, lesson, Shuffled(9, 2), Optim(**FP32), 5, Accelerator(cpu=True), tmp_path)


def test_weight_decay_is_for_matrices_only() -> None:
    lesson = lesson_of()
    lesson.student.head.weight.requires_grad_(False)
    matrices, vectors = grouped(lesson, 0.3)
    names = {id(p): name for name, p in lesson.named_parameters()}
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0
    assert {names[id(p)] for p in matrices["params"]} == {
        "student.words.weight",
        "objective.projections.embedding.weight",
    }
    assert {names[id(p)] for p in vectors["params"]} == {
        "student.norm.weight",
        "student.norm.bias",
        "student.head.bias",
        "objective.projections.embedding.bias",
    }


def test_weight_decay_is_in_force() -> None:
    with_decay, without = lesson_of(), lesson_of()
    run(with_decay, Shuffled(3, 2), Optim(**FP32, weight_decay=1.0))
    run(without, Shuffled(3, 2), Optim(**FP32, weight_decay=0.0))
    assert with_decay.student.words.weight.norm() < without.student.words.weight.norm()


def test_one_step_trains_student_and_projection_alike() -> None:
    lesson = lesson_of()
    before = weights(lesson)
    run(lesson, Shuffled(1, 8), Optim(**FP32))
    unmoved = [name for name, value in weights(lesson).items() if torch.equal(value, before[name])]
    assert unmoved == []
    assert {"objective.projections.embedding.weight", "objective.projections.embedding.bias"} <= before.keys()
    assert not lesson.training


def test_the_gradient_is_clipped() -> None:
    """AdamW's first moment after one step is 0.1 times the clipped gradient."""
    lesson = lesson_of(dropout=0)
    moments: dict[str, Tensor] = {}

    class Spy(Accelerator):
        def clip_grad_norm_(self, parameters: Any, limit: float) -> Any:
            found = super().clip_grad_norm_(parameters := list(parameters), limit)
            moments["norm"] = torch.stack([p.grad.norm() for p in parameters]).norm()
            return found

    train(
        lambda batch: lesson(batch, teacher(batch)),
        lesson, Shuffled(1, 8), Optim(**FP32, clip=0.01), 5, Spy(cpu=True),
    )  # fmt: skip
    assert moments["norm"].item() == pytest.approx(0.01, rel=1e-3)


def test_precision_is_what_the_recipe_says() -> None:
    cpu = torch.device("cpu")
    product = torch.ones(2, 2)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with precision_of(Optim(precision=precision), cpu):
            assert (product @ product).dtype == expected
    with precision_of(Optim(precision="auto"), cpu):
        assert (product @ product).dtype == (torch.bfloat16 if has_bf16(cpu) else torch.float32)


SCORES = (0.2, 0.7, 0.5, 0.7, 0.6)  # after each of five epochs of four steps


class Critic:
    """Scores by the list, and remembers the weights that it saw."""

    def __init__(self, lesson: Lesson, scores: tuple[float, ...] = SCORES, done: int = 0) -> None:
        self.lesson, self.scores, self.done, self.seen = lesson, scores, done, []

    def __call__(self) -> dict[str, float]:
        self.lesson.eval()  # as a judge does
        self.seen.append(weights(self.lesson))
        looks = self.done + len(self.seen)
        return {"holdout": self.scores[looks - 1], "looks": looks}


def judged_run(
    optim: Optim, scratch: Path | None = None, fail_at: int | None = None, done: int = 0, steps: int = 20
) -> tuple[Lesson, Any, Critic]:
    lesson, plan = lesson_of(), Shuffled(steps, 4)
    critic = Critic(lesson, done=done)

    def loss_of(batch: Batch) -> Any:
        assert lesson.training
        if fail_at is not None and int(batch.ids[0]) == fail_at * plan.size:
            raise KeyboardInterrupt
        return lesson(batch, teacher(batch))

    judge = Judge(critic, [4, 8, 12, 16, 20])
    return lesson, train(loss_of, lesson, plan, optim, 5, Accelerator(cpu=True), scratch, judge=judge), critic


def test_the_best_weights_stay_the_earlier_of_two() -> None:
    lesson, history, critic = judged_run(Optim(**FP32, keep="best"))
    assert_equal(weights(lesson), critic.seen[1])
    assert not torch.equal(critic.seen[1]["student.head.weight"], critic.seen[3]["student.head.weight"])
    assert {row["step"]: row["holdout"] for row in history if "holdout" in row} == dict(
        zip((4, 8, 12, 16, 20), SCORES, strict=True)
    )
    assert [row["looks"] for row in history if "looks" in row] == [1, 2, 3, 4, 5]
    assert not lesson.training


def test_the_last_weights_stay_and_no_judge_is_asked_by_default() -> None:
    lesson, history, critic = judged_run(Optim(**FP32))
    assert (critic.seen, [row for row in history if "holdout" in row]) == ([], [])
    unjudged = lesson_of()
    run(unjudged, Shuffled(20, 4), Optim(**FP32))
    assert_equal(weights(lesson), weights(unjudged))


def test_being_judged_changes_no_step() -> None:
    _, _, critic = judged_run(Optim(**FP32, keep="best"))
    last = lesson_of()
    run(last, Shuffled(20, 4), Optim(**FP32))
    assert_equal(critic.seen[-1], weights(last))


@pytest.mark.parametrize("fail_at", [3, 7, 9, 13, 17, 19])
def test_a_resumed_training_keeps_the_same_best_weights(tmp_path: Path, fail_at: int) -> None:
    optim = Optim(**FP32, checkpoint_every=3, keep="best")
    straight, history, _ = judged_run(optim)
    with pytest.raises(KeyboardInterrupt):
        judged_run(optim, tmp_path, fail_at)
    kept = fail_at // 3 * 3
    resumed, again, _ = judged_run(optim, tmp_path, done=kept // 4)
    assert_equal(weights(resumed), weights(straight))
    assert again == history
    finished, once_more, critic = judged_run(optim, tmp_path)  # all is done: the best is put back again
    assert_equal(weights(finished), weights(straight))
    assert (once_more, critic.seen) == (history, [])


def test_the_judge_is_asked_at_the_end_and_between_updates_only() -> None:
    """Epochs of 4 steps, updates of 3: after the updates in which an epoch ends, and after the last."""
    optim = Optim(**FP32, keep="best", accumulation=3)
    _, history, _ = judged_run(optim, steps=10)
    assert [row["step"] for row in history if "holdout" in row] == [2, 3, 4]
    assert count_updates(Shuffled(10, 4), optim) == 4


def test_the_mean_of_a_stretch_is_right_where_a_judge_cuts_it() -> None:
    optim, plan = Optim(**FP32, keep="best"), Shuffled(200, 1)  # a stretch is two updates
    lesson = nn.Linear(1, 1)
    history = train(
        lambda batch: (lesson.weight.sum() * 0 + int(batch.ids[0]), {}),
        lesson, plan, optim, 5, Accelerator(cpu=True), judge=Judge(lambda: {"holdout": 0.5}, [3]),
    )  # fmt: skip
    assert [(row["step"], row["loss"]) for row in history[:4]] == [(2, 0.5), (3, 2), (4, 3), (6, 4.5)]


def test_the_best_weights_need_a_judge() -> None:
    with pytest.raises(UsageError, match=r"optim\.keep=best needs held-out rows .* set it to last"):
        run(lesson_of(), Shuffled(4, 4), Optim(**FP32, keep="best"))


class Malice:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


FILES = ("weights.safetensors", "best.safetensors", "optimizer.safetensors", "progress.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path, name: str, save: Any) -> None:
    scratch, trace = tmp_path / "scratch", tmp_path / "trace"
    judged_run(Optim(**FP32, keep="best"), scratch, steps=2)
    folder = scratch / "checkpoint-2" / "0"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    if save is None:
        torch.save(Malice(trace), folder / name)
    else:
        (folder / name).write_bytes(save(Malice(trace)))
    lesson = lesson_of()
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever the format's reader raises
        load_checkpoint([Learner(lambda batch: lesson(batch, teacher(batch)), lesson, Optim(**FP32), 5)], scratch)
    assert not trace.exists()
    if save is not None:
        pickle.loads(save(Malice(trace)))  # noqa: S301  the trap itself works
        assert trace.exists()


def learner_of(seed: int, rate: float, clip: float = 1.0) -> Learner:
    lesson = lesson_of()
    with torch.no_grad():
        lesson.student.head.weight.mul_(1 + seed)
    optim = Optim(precision="fp32", learning_rate=rate, clip=clip, checkpoint_every=3, accumulation=2)
    return Learner(lambda batch: lesson(batch, teacher(batch)), lesson, optim, seed)


def test_learners_that_train_together_end_as_each_would_alone() -> None:
    together = [learner_of(1, 0.01), learner_of(2, 0.03, clip=0.05)]
    histories = train_together(together, Shuffled(14, 4), Accelerator(cpu=True))
    for learner, history, shape in zip(together, histories, [(1, 0.01, 1.0), (2, 0.03, 0.05)], strict=True):
        alone = learner_of(*shape)
        assert train_together([alone], Shuffled(14, 4), Accelerator(cpu=True)) == [history]
        assert_equal(weights(learner.lesson), weights(alone.lesson))
    assert histories[0] != histories[1]


def test_learners_are_clipped_apart() -> None:
    """MITKD specification, F9: gradients of norm 3 and 4 become 1 and 1; AdamW's first moment is a tenth of them."""
    learners = []
    for slopes in ((1.0, 2.0, 2.0), (4.0, 0.0, 0.0)):
        lesson = nn.ParameterList([torch.zeros(3)])
        optim = Optim(precision="fp32", learning_rate=0.1, clip=1.0)
        told = lambda batch, lesson=lesson, slopes=slopes: ((lesson[0] * torch.tensor(slopes)).sum(), {})  # noqa: E731
        learners.append(Learner(told, lesson, optim, 0))
    train_together(learners, Shuffled(1, 4), Accelerator(cpu=True))
    moments = [10 * learner.moments()["0.exp_avg"] for learner in learners]
    torch.testing.assert_close(moments[0], torch.tensor([1 / 3, 2 / 3, 2 / 3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(moments[1], torch.tensor([1.0, 0, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fail_at", [5, 9, 13])
def test_learners_resume_together(tmp_path: Path, fail_at: int) -> None:
    straight = [learner_of(1, 0.01), learner_of(2, 0.03)]
    histories = train_together(straight, Shuffled(14, 4), Accelerator(cpu=True))

    def fail(batch: Batch) -> Any:
        if int(batch.ids[0]) == 4 * fail_at:
            raise KeyboardInterrupt
        return second.lesson(batch, teacher(batch))

    second = learner_of(2, 0.03)
    second.loss_of = fail
    with pytest.raises(KeyboardInterrupt):
        train_together([learner_of(1, 0.01), second], Shuffled(14, 4), Accelerator(cpu=True), tmp_path)
    again = [learner_of(1, 0.01), learner_of(2, 0.03)]
    told: list[int] = []
    assert train_together(again, Shuffled(14, 4), Accelerator(cpu=True), tmp_path, told.append) == histories
    assert told == list(range(fail_at // 6 * 3 + 1, 8))
    for one, other in zip(again, straight, strict=True):
        assert_equal(weights(one.lesson), weights(other.lesson))


def test_the_dropout_of_a_step_depends_on_seed_and_step_alone() -> None:
    seeds = {seed_of(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert seed_of(3, 4) == seed_of(3, 4)


class TwoHeads(nn.Module):
    """Every batch is for one head; a third head is for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.dropout = nn.Embedding(WORDS, 6), nn.Dropout(0.3)
        self.heads = nn.ModuleList([nn.Linear(6, CLASSES) for _ in range(3)])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        place = int(batch.ids[0]) // len(batch.ids) % 2
        logits = self.heads[place](self.dropout(self.words(batch.input_ids).mean(1)))
        loss = nn.functional.cross_entropy(logits, batch.labels)
        return loss, {f"head {place}": loss.detach()}


class Watching(Accelerator):
    """It keeps the gradients of every update as they are before they are clipped."""

    seen: list[dict[str, Tensor]]

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Any:
        parameters = list(parameters)
        own = {str(place): p.grad.clone() for place, p in enumerate(parameters) if p.grad is not None}
        self.seen = [*getattr(self, "seen", []), own]
        return super().clip_grad_norm_(parameters, limit)


def train_two_heads(folder: Path, progress: Callable[[int], None]) -> None:
    """What each process of a group runs."""
    model = TwoHeads()
    accelerator = Watching(cpu=True)
    optim = Optim(**FP32, accumulation=4, checkpoint_every=2)
    history = train(model, model, Shuffled(18, 4), optim, 7, accelerator, folder / "scratch", progress)
    torch.save(model.state_dict(), folder / f"weights-{accelerator.process_index}-of-{accelerator.num_processes}.pt")
    torch.save(accelerator.seen, folder / f"gradients-{accelerator.process_index}-of-{accelerator.num_processes}.pt")
    write_json(folder / f"history-{accelerator.process_index}-of-{accelerator.num_processes}.json", history)
    (folder / f"threads-{accelerator.process_index}-of-{accelerator.num_processes}").write_text(
        str(torch.get_num_threads())
    )


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    train_two_heads(tmp_path, lambda done: None)
    shutil.rmtree(tmp_path / "scratch")
    told: list[int] = []
    run_group(train_two_heads, (tmp_path,), 2, told.append)
    one = torch.load(tmp_path / "weights-0-of-1.pt")
    for rank in range(2):
        gradients = [torch.load(tmp_path / f"gradients-{place}.pt") for place in (f"{rank}-of-2", "0-of-1")]
        assert len(gradients[0]) == len(gradients[1]) == 5  # AdamW's steps hide their size
        for own, same in zip(*gradients, strict=True):
            assert own.keys() == same.keys() == {"0", "1", "2", "3", "4"}  # none of the head that is never drawn
            for place in own:
                torch.testing.assert_close(own[place], same[place], rtol=1e-4, atol=1e-7)
        other = torch.load(tmp_path / f"weights-{rank}-of-2.pt")
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
        rows = zip(read_json(tmp_path / f"history-{rank}-of-2.json"), read_json(tmp_path / "history-0-of-1.json"))  # noqa: B905
        assert all(row == pytest.approx(same, abs=2e-6) for row, same in rows)
    before = TwoHeads().state_dict()
    assert torch.equal(one["heads.2.weight"], before["heads.2.weight"])  # never drawn: not even decayed
    assert not torch.equal(one["heads.1.weight"], before["heads.1.weight"])
    assert told == [1, 2, 3, 4, 5]
    for rank in range(2):  # its share of this process's threads, of which tests have one
        assert (tmp_path / f"threads-{rank}-of-2").read_text() == "1"


def test_more_processes_than_batches_an_update_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1 batches for 2 processes; raise optim\.accumulation, or use fewer"):
        run_group(train_alone, (tmp_path,), 2, lambda done: None)


def train_alone(folder: Path, progress: Callable[[int], None]) -> None:
    model = TwoHeads()
    train(model, model, Shuffled(4, 4), Optim(**FP32), 7, Accelerator(cpu=True))
