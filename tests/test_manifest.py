"""A manifest lists tasks; every mistake in it is told at once, by entry and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from openbook.agnostic import AgnosticRecipe
from openbook.config import UsageError
from openbook.manifest import load_manifest, resolved

GOOD = """\
- name: sst2
- name: mails
  family: intent
  group: helpdesk
  text: subject
  label: queue
  train: {path: mails.csv}
  test_share: 0.2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as error:
        load_manifest(write(folder, text))
    return str(error.value)


def test_tasks_are_found_by_name_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = load_manifest(write(tmp_path, GOOD))
    assert list(found) == ["sst2", "mails"]
    assert (found["mails"].family, found["mails"].group, found["mails"].test_share) == ("intent", "helpdesk", 0.2)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = GOOD + "- {name: trec, famly: x}\n- {name: sst2}\n- {name: sst22}\n- {family: x}\n- mnli\n"
    message = refused(tmp_path, text)
    lines = message.splitlines()
    assert lines[0] == f"{tmp_path / 'tasks.yaml'}:"
    assert lines[1] == "  entry 3 (trec): task.famly: unknown key; did you mean 'family'?"
    assert lines[2].startswith("  entry 4 (sst2): task.name='sst2' is used before")
    assert lines[3].startswith("  entry 5 (sst22): task.name='sst22' is no built-in task; did you mean 'sst2'?")
    assert lines[4] == "  entry 6: task.name: missing; add it to the recipe"
    assert lines[5] == "  entry 7: 'mnli' is a str, not a task; write `- name: mnli`"
    assert len(lines) == 6


def test_columns_are_asked_for_before_a_row_is_read(tmp_path: Path) -> None:
    message = refused(tmp_path, "- {name: mails, train: {path: nowhere.csv}, text: subject}")
    assert "entry 1 (mails): task.label is absent" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing, not a list of tasks"),
        ("[]", "holds an empty list"),
        ("name: sst2", "holds a dict, not a list of tasks"),
        ("- name: [", "is not valid YAML"),
        ("- {name: sst2, name: trec}", "'name' is set twice"),
        ("- !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_what_is_no_list_of_tasks_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tasks\.yaml cannot be read .* name a YAML file"):
        load_manifest(tmp_path / "tasks.yaml")
    (tmp_path / "tasks.yaml").write_bytes(b"- name: \xff")
    with pytest.raises(UsageError, match=r"tasks\.yaml cannot be read"):
        load_manifest(tmp_path / "tasks.yaml")


def test_a_name_is_enough_wherever_a_recipe_lists_tasks(tmp_path: Path) -> None:
    named = [{"name": "mails"}]
    raw = {
        "name": "run",
        "manifest": str(write(tmp_path, GOOD)),
        "teacher": {"model": "m", "tasks": named},
        "text": {"sources": [{"path": "a.txt"}], "budget_tokens": 9_000, "task_share": 0.1, "task_text": named},
        "students": [{"name": "s"}],
        "students_learn": {"tasks": named},
        "fine_tune": {"tasks": named, "teacher_tasks": named, "known": named, "few": {"tasks": named}},
    }
    recipe = resolved(AgnosticRecipe.model_validate(raw)).model_dump(mode="json")
    tuned, text = recipe["fine_tune"], recipe["text"]["task_text"]
    lists = [recipe["teacher"]["tasks"], recipe["students_learn"]["tasks"], text, tuned["few"]["tasks"]]
    lists += [tuned[key] for key in ("tasks", "teacher_tasks", "known")]
    assert [[task["group"] for task in tasks] for tasks in lists] == [["helpdesk"]] * 7
