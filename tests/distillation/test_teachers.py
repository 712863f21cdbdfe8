"""Live and recorded teachers are interchangeable, and a recording may be interrupted anywhere."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openbook.config import UsageError
from openbook.distillation import teachers
from openbook.distillation.teachers import FirstThatKnows, LiveTeacher, RecordedTeacher, record, silent
from openbook.types import Batch, Outputs

LAYERS = (0, 2, 3)
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
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.asked: list[str] = []

    def forward(self, batch: Batch) -> Outputs:
        self.asked += batch.ids
        states = [self.words(batch.input_ids)]
        for layer in self.layers:
            states.append(self.dropout(torch.tanh(layer(states[-1]))))
        real = batch.attention_mask[..., None]
        pooled = (states[-1] * real).sum(1) / real.sum(1)
        return Outputs(self.head(self.norm(pooled)), pooled, tuple(states))


def batch_of(names: Sequence[str], more: int = 0) -> Batch:
    """These texts, padded to the longest of them and `more` beyond."""
    width = max(LENGTHS[name] for name in names) + more
    ids = torch.stack([nn.functional.pad(PIECES[name], (0, width - LENGTHS[name])) for name in names])
    mask = (torch.arange(width) < torch.tensor([LENGTHS[name] for name in names])[:, None]).long()
    return Batch(tuple(names), ids, mask, mask * 0)


NAMES = list(LENGTHS)
BATCHES = [batch_of(NAMES[start : start + 2]) for start in range(0, 12, 2)]


def recorded(folder: Path, model: nn.Module, layers: Sequence[int] = LAYERS, batches: Any = BATCHES) -> RecordedTeacher:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    record(LiveTeacher(model), batches, LENGTHS, layers, folder, folder / "scratch")
    return RecordedTeacher(folder)


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
            assert read.hidden[layer].shape == said.hidden[layer].shape
            torch.testing.assert_close(read.hidden[layer][real], said.hidden[layer][real], rtol=1e-3, atol=1e-3)
            assert (read.hidden[layer][~real] == 0).all()
        assert [layer for layer, state in enumerate(read.hidden) if state.numel()] == list(LAYERS)


def test_without_layers_nothing_but_answers_is_kept(tmp_path: Path) -> None:
    assert recorded(tmp_path, Toy(), layers=())(BATCHES[0]).hidden == ()
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["embedding.npy", "logits.npy", "offsets.npy"]


def test_states_are_kept_in_half_the_space_and_without_padding(tmp_path: Path) -> None:
    recorded(tmp_path, Toy())
    state = np.load(tmp_path / "hidden-2.npy", allow_pickle=False)
    assert (state.dtype, state.shape) == (np.float16, (sum(LENGTHS.values()), 8))
    assert np.load(tmp_path / "logits.npy", allow_pickle=False).dtype == np.float32


def test_the_teacher_reads_every_text_once_and_is_told_of(tmp_path: Path) -> None:
    model, told = Toy(), []
    (tmp_path / "scratch").mkdir()
    record(LiveTeacher(model), BATCHES, LENGTHS, LAYERS, tmp_path, tmp_path / "scratch", told.append)
    assert model.asked == NAMES
    assert told == [1, 2, 3, 4, 5, 6]


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
    for name in ("logits", "embedding", "hidden-0", "hidden-2", "hidden-3"):
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


def test_several_recordings_answer_as_one(tmp_path: Path) -> None:
    model = Toy()
    first = recorded(tmp_path / "1", model)
    lengths = {f"c/{name}": length for name, length in LENGTHS.items()}
    (tmp_path / "2" / "scratch").mkdir(parents=True)
    other = [
        replace(batch, ids=tuple(f"c/{name}" for name in batch.ids), input_ids=batch.input_ids.flip(1))
        for batch in BATCHES
    ]
    record(LiveTeacher(model), other, lengths, (), tmp_path / "2", tmp_path / "2" / "scratch")
    second = RecordedTeacher(tmp_path / "2")
    both = FirstThatKnows([first, second])
    assert torch.equal(both(BATCHES[1]).logits, first(BATCHES[1]).logits)
    assert torch.equal(both(other[1]).logits, second(other[1]).logits)
    assert not torch.equal(both(other[1]).logits, both(BATCHES[1]).logits)
    with pytest.raises(UsageError, match=r"no recording has an answer for 'x'"):
        both(replace(BATCHES[0], ids=("x", "y")))


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
