"""Live and recorded teachers are interchangeable, and a recording may be interrupted anywhere."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openbook.config import UsageError
from openbook.distillation import losses, teachers
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, record, silent
from openbook.types import Batch, Outputs

LAYERS, TAPS = (0, 2, 3), (1, 3)
ARRAYS = ("logits", "embedding", "hidden-0", "hidden-2", "hidden-3", "query-1", "key-1", "query-3", "key-3")
LENGTHS = {f"t/{row}": 3 + (row * 5) % 7 for row in range(12)}
PIECES = {
    name: torch.randint(1, 30, (length,), generator=torch.Generator().manual_seed(length))
    for name, length in LENGTHS.items()
}


class Toy(nn.Module):
    """Three layers with dropout and a batch norm, so that being asked in training mode would be noticed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.dropout = nn.Embedding(30, 8), nn.Dropout(0.5)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.queries, self.keys = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.asked: list[str] = []

    def forward(self, batch: Batch) -> Outputs:
        self.asked += batch.ids
        states, taps = [self.words(batch.input_ids)], {}
        for place, layer in enumerate(self.layers):
            taps[place + 1] = self.queries[place](states[-1]), self.keys[place](states[-1]), states[-1]
            states.append(self.dropout(torch.tanh(layer(states[-1]))))
        real = batch.attention_mask[..., None]
        pooled = (states[-1] * real).sum(1) / real.sum(1)
        return Outputs(self.head(self.norm(pooled)), pooled, tuple(states), taps)


class Interrupted(BaseException):
    pass


class Interrupting(Toy):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forward(self, batch: Batch) -> Outputs:
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        return super().forward(batch)


def batch_of(names: Sequence[str], more: int = 0) -> Batch:
    """These texts, padded to the longest of them and `more` beyond."""
    width = max(LENGTHS[name] for name in names) + more
    ids = torch.stack([nn.functional.pad(PIECES[name], (0, width - LENGTHS[name])) for name in names])
    mask = (torch.arange(width) < torch.tensor([LENGTHS[name] for name in names])[:, None]).long()
    return Batch(tuple(names), ids, mask, mask * 0)


NAMES = list(LENGTHS)
BATCHES = [batch_of(NAMES[start : start + 2]) for start in range(0, 12, 2)]


def recorded(
    folder: Path, model: nn.Module, layers: Sequence[int] = LAYERS, taps: Sequence[int] = TAPS
) -> RecordedTeacher:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    record(LiveTeacher(model), BATCHES, LENGTHS, layers, folder, folder / "scratch", taps=taps)
    return RecordedTeacher(folder)


def agree(read: Tensor, said: Tensor, real: Tensor) -> None:
    """On disk in half precision, and zero where the batch is padded."""
    assert (read.dtype, read.shape) == (torch.float16, said.shape)
    torch.testing.assert_close(read[real].float(), said[real], rtol=1e-3, atol=1e-3)
    assert (read[~real] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_live_and_recorded_answers_agree(tmp_path: Path, seed: int) -> None:
    model = Toy()
    live, from_disk = LiveTeacher(model), recorded(tmp_path, model)
    order = np.random.default_rng(seed).permutation(NAMES).tolist()
    for start in range(0, 12, 4):
        batch = batch_of(order[start : start + 4], more=seed)
        said, read = live(batch), from_disk(batch)
        torch.testing.assert_close(read.logits, said.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(read.embedding, said.embedding, rtol=1e-3, atol=1e-3)
        assert (read.logits.dtype, read.embedding.dtype) == (torch.float32, torch.float32)
        real = batch.attention_mask.bool()
        for layer in LAYERS:
            agree(read.hidden[layer], said.hidden[layer], real)
        assert [layer for layer, state in enumerate(read.hidden) if state.numel()] == list(LAYERS)
        for layer in TAPS:
            for place in range(2):
                agree(read.relations[layer][place], said.relations[layer][place], real)
            assert read.relations[layer][2].numel() == 0  # values are not kept
        assert list(read.relations) == list(TAPS)


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_cannot_tell_a_live_from_a_recorded_teacher(tmp_path: Path, seed: int) -> None:
    model = Toy()
    live, from_disk = LiveTeacher(model), recorded(tmp_path, model)
    batch = batch_of(np.random.default_rng(seed).permutation(NAMES).tolist()[:5], more=seed)
    generator = torch.Generator().manual_seed(seed)
    width = batch.input_ids.shape[1]
    student = [torch.randn(5, width, 4, generator=generator).requires_grad_() for _ in range(3)]
    weight = torch.randn(8, 4, generator=generator)

    def heard(answers: Outputs) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        attention = losses.attention_of_taps(student[:2], answers.relations[3], batch.attention_mask, 2)
        hidden = losses.hidden_states(student[2], answers.hidden[2], batch.attention_mask, weight=weight)
        return attention, hidden, torch.autograd.grad(attention + hidden, student)

    torch.testing.assert_close(heard(from_disk(batch)), heard(live(batch)), rtol=2e-3, atol=2e-4)


def test_without_layers_nothing_but_answers_is_kept(tmp_path: Path) -> None:
    said = recorded(tmp_path, Toy(), layers=(), taps=())(BATCHES[0])
    assert (said.hidden, dict(said.relations)) == ((), {})
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["embedding.npy", "logits.npy", "offsets.npy"]


def test_only_the_layers_asked_for_are_read(tmp_path: Path) -> None:
    recorded(tmp_path, Toy())
    said = RecordedTeacher(tmp_path, hidden=(2,), taps=())(BATCHES[0])
    assert [state.numel() > 0 for state in said.hidden] == [False, False, True]
    assert dict(said.relations) == {}
    assert RecordedTeacher(tmp_path, hidden=())(BATCHES[0]).hidden == ()
    with pytest.raises(UsageError, match=r"no hidden of layers \[1\], only of \[0, 2, 3\]: record anew"):
        RecordedTeacher(tmp_path, hidden=(1, 2))
    with pytest.raises(UsageError, match=r"no query of layers \[2\]"):
        RecordedTeacher(tmp_path, taps=(2,))


def test_a_teacher_without_a_head_is_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Headless(Interrupting):
        def forward(self, batch: Batch) -> Outputs:
            said = super().forward(batch)
            return replace(said, logits=said.logits[:, :0])

    monkeypatch.setattr(teachers, "FLUSH_EVERY", 1)
    with pytest.raises(Interrupted):
        recorded(tmp_path, Headless(after=3))
    read, live = recorded(tmp_path, Headless(after=6))(BATCHES[1]), LiveTeacher(Toy())(BATCHES[1])
    assert read.logits.shape == (2, 0)
    agree(read.hidden[3], live.hidden[3], BATCHES[1].attention_mask.bool())
    torch.testing.assert_close(read.embedding, live.embedding, rtol=1e-3, atol=1e-3)


def test_states_are_kept_in_half_the_space_and_without_padding(tmp_path: Path) -> None:
    recorded(tmp_path, Toy())
    for name in ARRAYS[2:]:
        state = np.load(tmp_path / f"{name}.npy", allow_pickle=False)
        assert (state.dtype, state.shape) == (np.float16, (sum(LENGTHS.values()), 8))
    assert np.load(tmp_path / "logits.npy", allow_pickle=False).dtype == np.float32


def test_the_teacher_reads_every_text_once_and_is_told_of(tmp_path: Path) -> None:
    model, told = Toy(), []
    (tmp_path / "scratch").mkdir()
    record(LiveTeacher(model), BATCHES, LENGTHS, LAYERS, tmp_path, tmp_path / "scratch", told.append)
    assert model.asked == NAMES
    assert told == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("after", range(6))
def test_an_interrupted_recording_goes_on_where_it_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(teachers, "FLUSH_EVERY", 2)
    whole = recorded(tmp_path / "whole", Toy())
    with pytest.raises(Interrupted):
        recorded(tmp_path / "broken", Interrupting(after))
    assert not (tmp_path / "broken" / "ids.json").exists()  # nobody takes it for a whole one
    again = Toy()
    resumed = recorded(tmp_path / "broken", again)
    kept = after // 2 * 2
    assert again.asked == NAMES[2 * kept :]
    for name in ARRAYS:
        assert np.array_equal(resumed.open(name), whole.open(name))


def test_an_unknown_text_is_refused(tmp_path: Path) -> None:
    teacher = recorded(tmp_path, Toy())
    with pytest.raises(UsageError, match=r"has no answer for 'other/1'.*record anew"):
        teacher(replace(BATCHES[0], ids=("t/0", "other/1")))


def test_another_tokenizer_or_length_is_refused(tmp_path: Path) -> None:
    teacher = recorded(tmp_path, Toy())
    shorter = replace(BATCHES[1], attention_mask=BATCHES[1].attention_mask.clone())
    shorter.attention_mask[0, 1] = 0
    with pytest.raises(UsageError, match=r"was recorded with another tokenizer or length: record anew"):
        teacher(shorter)


def test_a_live_teacher_is_asked_without_being_taught() -> None:
    model = Toy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = LiveTeacher(model)
    first, second = teacher(BATCHES[0]), teacher(BATCHES[0])
    assert torch.equal(first.logits, second.logits)  # no dropout
    assert not first.logits.requires_grad
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the batch norm's averages too


def test_a_teacher_in_bf16_answers_in_float32_and_nearly_the_same() -> None:
    said, short = LiveTeacher(Toy())(BATCHES[0]), LiveTeacher(Toy(), precision="bf16")(BATCHES[0])
    for exact, rough in zip(tensors_of(said), tensors_of(short), strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(short.hidden[3], said.hidden[3])


def test_the_precision_of_training_is_not_the_teachers() -> None:
    teacher = LiveTeacher(Toy())
    said = teacher(BATCHES[0])
    with torch.autocast("cpu", torch.bfloat16):
        again = teacher(BATCHES[0])
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(said), tensors_of(again), strict=True))


def tensors_of(answers: Outputs) -> list[Tensor]:
    taps = [part for parts in answers.relations.values() for part in parts]
    return [answers.logits, answers.embedding, *answers.hidden, *taps]


def test_a_live_answer_may_enter_a_loss_with_gradients() -> None:
    student = nn.Linear(8, 8)
    said = LiveTeacher(Toy())(BATCHES[0])
    (student(torch.ones(2, 8)) * said.embedding).sum().backward()  # keeps the teacher's tensor for the way back
    assert student.weight.grad is not None


def test_a_recording_holds_nothing_that_runs_on_load(tmp_path: Path) -> None:
    recorded(tmp_path, Toy())
    trap = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "logits.npy", trap, allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        RecordedTeacher(tmp_path)
    assert json.loads((tmp_path / "ids.json").read_text()) == NAMES


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory map over blocks the disk does not have would end the process by a signal."""

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teachers.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        recorded(tmp_path, Toy())


def test_the_silent_teacher_says_nothing() -> None:
    said = silent(BATCHES[0])
    assert (said.logits.numel(), said.embedding.numel(), said.hidden, dict(said.relations)) == (0, 0, (), {})
