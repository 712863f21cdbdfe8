"""The commands around the book, as a shell calls them: what they show, and what they refuse."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openbook import cli
from openbook.backends.pytorch import TorchBackend
from openbook.config import StudentSettings, UsageError
from openbook.knowledge_base import store
from openbook.knowledge_base.interpolate import EMPTY
from openbook.models.encoder import Head
from openbook.models.student import new_student
from openbook.predictor import OpenBook
from openbook.types import KnowledgeBase

LABELS = ("bad", "good")
TEXTS = ("the film was great", "a dull song", "a poor plot [/INST]", "nice [red] book")

Ask = Callable[..., tuple[str, str]]


def made(folder: Path, tokenizer: Any, labels: tuple[str, ...] | None = LABELS) -> Path:
    """A run folder with a student and a book of four texts that the student finds."""
    settings = StudentSettings(architecture="bert", layers=1, hidden_size=16, heads=2)
    student = new_student(settings, Head(labels), tokenizer, len(tokenizer), positions=24, seed=1)
    for place, weight in enumerate(student.parameters()):
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(place))
    values = np.eye(2, dtype=np.float32)[[1, 0, 0, 1]] if labels else np.array([[3], [1], [0], [4]], np.float32)
    about = {
        "kind": "classification" if labels else "regression",
        "labels": labels,
        "key_space": "space",
        "retrieval": {"top_k": 2, "temperature": 0.1, "beta": 0.5},
    }
    base = KnowledgeBase(np.eye(4, 16, dtype=np.float32), values, tuple("abcd"), TEXTS, about)
    OpenBook(TorchBackend(student, tokenizer), base).save_pretrained(folder)
    OpenBook.from_pretrained(folder).rekey()
    return folder


@pytest.fixture
def run(tokenizer: Any, tmp_path: Path) -> Path:
    return made(tmp_path / "run", tokenizer)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Standard output and standard error of a command that succeeds."""

    def told(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["openbook", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert not caught.value.code, said.err
        return said.out, said.err

    return told


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says that ends for something to mend."""

    def told(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["openbook", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        return capsys.readouterr().err

    return told


def test_brackets_of_a_text_are_shown_as_they_are(run: Path, ask: Ask) -> None:
    """They would be taken for styles, of which one ends what never began."""
    found = ask("book", "--model", run, "--find", "[")[0]
    assert "a poor plot [/INST]" in found
    assert "nice [red] book" in found
    assert "dull" not in found
    assert "[/INST]" in ask("predict", "a poor plot [/INST]", "--explain", "--model", run)[0]


def test_a_text_of_the_book_is_asked_without_its_own_entry(run: Path, ask: Ask, refused: Callable[..., str]) -> None:
    asked = ("predict", TEXTS[1], "--explain", "--json", "--model", run)
    assert json.loads(ask(*asked)[0])["neighbours"][0]["id"] == "b"
    told = json.loads(ask(*asked, "--leave-out")[0])
    assert "b" not in [one["id"] for one in told["neighbours"]]
    chances = OpenBook.from_pretrained(run).predict_proba(TEXTS[1], leave_out=True)
    assert told["probability"] == pytest.approx(chances.max(), abs=1e-6)
    given = ("predict", "--input", run / "rows.csv", "--output", run / "told.csv", "--leave-out", "--model", run)
    assert "leave out texts" in refused(*given)


def test_books_are_merged_swapped_and_compared(run: Path, ask: Ask, tokenizer: Any, tmp_path: Path) -> None:
    other = made(tmp_path / "other", tokenizer)
    ask("remember", "a plot", "--label", "good", "--model", other)
    ask("forget", "a", "b", "c", "d", "--model", other)
    assert "added: 1 remembered/" in ask("book", "--diff", other, "--model", run)[0]
    assert "merged 1; 5 entries" in ask("book", "--merge", other, "--model", run)[0]
    assert f"swapped for {other}; 1 entries" in ask("book", "--swap", other, "--model", run)[0]
    assert "entries    1 (remembered 1)" in ask("book", "--model", run)[0]


def test_how_much_counts_what_was_remembered_is_chosen(run: Path, ask: Ask, refused: Callable[..., str]) -> None:
    file = run / "rows.csv"
    file.write_text("text,label\na play,good\na song,bad\n")
    tune = ("book", "--tune", file, "--label", "label", "--model", run)
    assert "weight=3: no entry of the book is remembered" in refused(*tune, "--weight", 3)
    ask("remember", "a plot", "--label", "good", "--model", run)
    assert "what was remembered counts" not in ask(*tune)[0]
    told = " ".join(ask(*tune, "--weight", 3, "--weight", 5)[0].split())
    assert "what was remembered counts 3 times" in told, "of equals the first"
    assert OpenBook.from_pretrained(run).find("a plot")[0].weight == 3
    assert "--weight is for --tune" in refused("book", "--weight", 3, "--model", run)


def test_an_empty_book_says_so(run: Path, ask: Ask) -> None:
    alone = OpenBook(OpenBook.from_pretrained(run).backend).predict("a text")
    assert ask("predict", "a text", "--model", run)[1] == ""
    assert ask("predict", "a text", "--model", run, "--explain", "--json")[0].strip().endswith('"reason": null}')
    assert EMPTY in ask("forget", *"abcd", "--model", run)[0]
    for more in ((), ("--explain",)):
        output, error = ask("predict", "a text", "--model", run, *more)
        assert output.startswith(f"{alone}\t")
        assert error == f"note: {EMPTY}\n"
    output, error = ask("predict", "a text", "--model", run, "--explain", "--json")
    assert json.loads(output)["reason"] == EMPTY
    assert error == f"note: {EMPTY}\n"
    rows = run / "rows.csv"
    rows.write_text("text\na text\n")
    assert EMPTY in ask("predict", "--input", rows, "--output", run / "told.csv", "--model", run)[1]
    told = OpenBook.from_pretrained(run).explain("a text")
    assert (told.prediction, told.evidence.neighbours, told.evidence.reason) == (alone, (), EMPTY)
    assert "remembered 1; 1 entries" in ask("remember", "a text", "--label", "good", "--model", run)[0]
    assert ask("predict", "a text", "--model", run)[1] == ""


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("text,label\na film,good\n  ,bad\n", "row 2 of {file} has '  ' for 'text'; give a text, or leave the row out"),
        ("text,label\na film,fine\n", "the label in row 1 of {file} is 'fine'; the student knows bad, good"),
        ("text,label\na film,good\na song,\n", "the label in row 2 of {file} is "),
    ],
)
def test_a_row_that_cannot_be_remembered_is_named(run: Path, refused: Callable[..., str], rows: str, told: str) -> None:
    file = run / "rows.csv"
    file.write_text(rows)
    assert told.format(file=file) in refused("remember", "--file", file, "--label", "label", "--model", run)
    assert len(store.load(run / "knowledge_base").ids) == 4


def test_second_texts_and_texts_that_are_no_strings_are_looked_at(run: Path, refused: Callable[..., str]) -> None:
    file = run / "rows.jsonl"
    file.write_text('{"text": "one", "other": "two"}\n{"text": "one", "other": ""}\n')
    given = ("remember", "--file", file, "--text-pair", "other", "--model", run)
    assert f"row 2 of {file} has '' for 'other'" in refused(*given)
    file.write_text('{"text": "one"}\n{"text": 5}\n{"no": "text"}\n')
    assert f"row 2 of {file} has 5 for 'text'" in refused("remember", "--file", file, "--model", run)
    file.write_text('{"text": "one"}\n{"no": "text"}\n')
    assert f"row 2 of {file} has None for 'text'" in refused("remember", "--file", file, "--model", run)


@pytest.mark.parametrize("label", ['"high"', "null", "NaN", "[1]"])
@pytest.mark.parametrize("command", [("remember", "--file"), ("book", "--tune")])
def test_a_label_that_is_no_score_is_named(
    tokenizer: Any, tmp_path: Path, refused: Callable[..., str], command: tuple[str, str], label: str
) -> None:
    run = made(tmp_path / "run", tokenizer, labels=None)
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "a film", "label": 2}}\n{{"text": "a song", "label": {label}}}\n')
    told = refused(*command, file, "--label", "label", "--model", run)
    assert re.search(f"the label in row 2 of {file} is .*; the student gives scores, so a number is needed", told)
    with pytest.raises(UsageError, match="label 1 is 'high'; the student gives scores"):
        OpenBook.from_pretrained(run).remember(["a film", "a song"], [2, "high"])


def test_a_folder_without_a_student_is_named_before_its_keys_are_made(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    for keys in (("--keys", "student"), ()):
        told = refused("book", "--model", tmp_path / "nowhere", *keys)
        assert "nowhere" in told
    assert "holds no finished student/ folder" in refused("book", "--model", tmp_path / "nowhere", "--keys", "student")
