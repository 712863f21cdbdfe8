"""A student may start from what the teacher makes of every word alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from openbook import starts
from openbook.config import StudentSettings
from openbook.models.encoder import Head, load_pretrained
from openbook.models.student import new_student, principal_components, start_from_word_answers
from openbook.starts import word_answers

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
