"""A student may start from the teacher's layers, or from what the teacher makes of every word alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from openbook import starts
from openbook.checkpoint import building
from openbook.config import StudentSettings
from openbook.models.encoder import Encoder, Head, load_pretrained
from openbook.models.student import new_student, principal_components, start_from_word_answers
from openbook.recipe import load_recipe
from openbook.starts import fresh_student, record_word_answers, word_answers, words_folder
from openbook.workspace import Run

HEAD = Head(("no", "yes"))


@pytest.mark.parametrize("at_once", [512, 7])
def test_the_answer_to_a_word_is_the_mean_of_its_last_states(
    pretrained: Path, tokenizer: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "AT_ONCE", at_once)
    teacher = load_pretrained(str(pretrained), HEAD)
    answers = word_answers(teacher, tokenizer)
    assert answers.shape == (len(tokenizer), 32)
    for word in ("film", "great", "a"):
        inputs = tokenizer(word, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 3)
        with torch.no_grad():
            states = teacher.model.bert(**inputs).last_hidden_state  # (1, 3, 32)
        found = answers[tokenizer.convert_tokens_to_ids(word)]
        torch.testing.assert_close(found, states[0].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_student_starts_from_them_with_the_spread_of_the_teachers_words(
    pretrained: Path, tokenizer: Any, architecture: Any
) -> None:
    teacher = load_pretrained(str(pretrained), HEAD)
    settings = StudentSettings(architecture=architecture, layers=1, hidden_size=16, heads=2)
    student = new_student(settings, HEAD, tokenizer, len(tokenizer), positions=24, seed=0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    answers = word_answers(teacher, tokenizer)
    start_from_word_answers(student, teacher, answers)
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1
    words = student.words().weight.detach()
    assert words.std().item() == pytest.approx(teacher.words().weight.std().item(), rel=1e-5)
    components = principal_components(answers, 16)
    torch.testing.assert_close(words / words.norm(), components / components.norm())


def fine_tuned(run: Run, pretrained: Path, seed: int) -> Encoder:
    """A teacher whose every weight differs from the pretrained one's, where a run keeps it."""
    teacher = load_pretrained(str(pretrained), run.head)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.05 * torch.randn_like(weight)
    with building(run.folder / "teacher", {"seed": seed}) as folder:
        teacher.save(folder, run.teacher_tokenizer)
    return teacher


def copied(student: Encoder, teacher: Encoder, block: int, layer: int) -> bool:
    left, right = student.blocks()[block].state_dict(), teacher.blocks()[layer - 1].state_dict()
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("origin", ["fine_tuned", "pretrained"])
def test_layers_are_the_teachers_after_or_before_its_fine_tuning(
    world: Path, pretrained: Path, tmp_path: Path, origin: str
) -> None:
    student = (
        f"student={{architecture: bert, layers: 2, hidden_size: 32, heads: 4, intermediate_size: 64,"
        f" init: layer_copy, copy_from: {origin}}}"
    )
    run = Run(load_recipe(world / "recipe.yaml", [student]), tmp_path)
    teachers = {"fine_tuned": fine_tuned(run, pretrained, 0), "pretrained": load_pretrained(str(pretrained), run.head)}
    start = fresh_student(run, 0)
    for name, teacher in teachers.items():
        assert copied(start, teacher, 0, 2) == copied(start, teacher, 1, 4) == (name == origin)
        assert torch.equal(start.words().weight, teacher.words().weight) == (name == origin)
    assert torch.equal(start.last_linear().weight, teachers["fine_tuned"].last_linear().weight) == (
        origin == "fine_tuned"
    )
    again = fresh_student(run, 0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in start.state_dict().items())


def test_what_a_teacher_makes_of_words_is_kept_for_each_teacher(world: Path, pretrained: Path, tmp_path: Path) -> None:
    run = Run(load_recipe(world / "recipe.yaml", ["student.embeddings=distilled"]), tmp_path)
    starting = []
    for seed in (0, 1, 0):
        fine_tuned(run, pretrained, seed)
        record_word_answers(run)
        starting.append((words_folder(run), fresh_student(run, 0).words().weight.detach().clone()))
    folders = sorted(path.name for path in (tmp_path / "words").iterdir())
    assert folders == sorted({folder.name for folder, _ in starting})
    assert len(folders) == 2
    assert starting[0][0] == starting[2][0] != starting[1][0]
    assert torch.equal(starting[0][1], starting[2][1])
    assert not torch.equal(starting[0][1], starting[1][1])
