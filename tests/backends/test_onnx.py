"""ONNX Runtime answers like torch, and only from files that were exported from these very weights."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openbook.backends.onnx import EXPORT, FILES, RECORD, OnnxBackend
from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import digest_file, read_json, retired_folder, write_json
from openbook.config import StudentSettings, UsageError
from openbook.loading import usual_backend
from openbook.models.encoder import Head
from openbook.models.graph import graph_of, save_graph
from openbook.models.student import new_student
from openbook.predictor import OpenBook

TEXTS = ["the film was great", "", "my song seemed nice and the plot was poor " * 9, "dull"]
PAIRS = [("the film was great", "it was good"), ("dull", "a meal " * 40)]


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that was exported in fp32."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    settings = StudentSettings(architecture="bert", layers=1, hidden_size=16, heads=2)
    student = new_student(settings, Head(("bad", "fair", "good")), tokenizer, len(tokenizer), positions=24, seed=4)
    for place, weight in enumerate(student.parameters()):
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(place))
    student.model.config.key_space = "space"
    student.save(folder, tokenizer)
    (folder / EXPORT).mkdir()
    graph = folder / EXPORT / FILES["onnx"]
    save_graph(graph_of(TorchBackend.load(folder).encoder), graph)
    record = {
        "format": 1, "weights": digest_file(folder / "model.safetensors"), "recommended": "onnx-int8",
        "files": {graph.name: {"bytes": graph.stat().st_size, "sha256": digest_file(graph)}},
    }  # fmt: skip
    write_json(folder / EXPORT / RECORD, record)
    return folder


@pytest.fixture
def student(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "student"))


@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_it_answers_like_torch(made: Path, rows: list[Any]) -> None:
    ours, theirs = OnnxBackend(made, "onnx", 1), TorchBackend.load(made)
    assert (ours.about, ours.max_length, ours.weights) == (theirs.about, theirs.max_length, theirs.weights)
    assert ours.encode(rows) == theirs.encode(rows)
    said, meant = ours.run(ours.encode(rows)), theirs.run(theirs.encode(rows))
    np.testing.assert_allclose(said.logits, meant.logits, atol=1e-5)
    np.testing.assert_allclose(said.embedding, meant.embedding, atol=1e-5)


def cut_off(student: Path) -> None:
    graph = student / EXPORT / FILES["onnx"]
    graph.write_bytes(graph.read_bytes()[:-100])


def trained_further(student: Path) -> None:
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")


def no_graph_at_all(student: Path) -> None:
    """What `openbook export` never wrote, though its digest is right."""
    graph = student / EXPORT / FILES["onnx"]
    graph.write_bytes(b"nothing")
    record = read_json(student / EXPORT / RECORD)
    record["files"][graph.name]["sha256"] = digest_file(graph)
    write_json(student / EXPORT / RECORD, record)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "never exported": (lambda student: shutil.rmtree(student / EXPORT), "is not there; `openbook export --model"),
    "without its record": (lambda student: (student / EXPORT / RECORD).unlink(), "is not there"),
    "cut off": (cut_off, "absent, cut off or altered"),
    "of other weights": (trained_further, "exported from other weights than"),
    "no graph": (no_graph_at_all, "cannot be run"),
    "no configuration": (lambda student: (student / "config.json").write_text("["), "config.json cannot be read"),
    "a list for one": (lambda student: (student / "config.json").write_text("[]"), "holds no JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_was_not_exported_from_this_student_is_refused(student: Path, case: str) -> None:
    OnnxBackend(student, "onnx")
    breaks, message = BROKEN[case]
    breaks(student)
    with pytest.raises(UsageError, match=message):
        OnnxBackend(student, "onnx")


def test_the_other_form_is_not_taken_for_it(student: Path) -> None:
    with pytest.raises(UsageError, match="model_qint8.onnx is not there"):
        OnnxBackend(student, "onnx-int8")


def test_weights_may_stay_behind(student: Path) -> None:
    digest = digest_file(student / "model.safetensors")
    (student / "model.safetensors").unlink()
    assert OnnxBackend(student, "onnx").weights == digest


def test_an_export_that_was_killed_between_two_renamings_is_found(student: Path) -> None:
    os.rename(student / EXPORT, retired_folder(student / EXPORT))
    assert OnnxBackend(student, "onnx").run(OnnxBackend(student, "onnx").encode(TEXTS)).logits.shape == (4, 3)


def test_without_the_runtime_it_says_what_to_install(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'openbook\[onnx\]'"):
        OnnxBackend(student, "onnx")


def test_a_predictor_takes_torch_where_it_is_installed_and_else_what_is_recommended(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert usual_backend(student) == "torch"
    monkeypatch.setattr("openbook.loading.find_spec", lambda name: None)
    assert usual_backend(student) == "onnx-int8"
    write_json(student / EXPORT / RECORD, read_json(student / EXPORT / RECORD) | {"recommended": "torch"})
    assert usual_backend(student) == "onnx"
    assert OpenBook.from_pretrained(student.parent).backend.name == "onnx"
    shutil.rmtree(student / EXPORT)
    assert usual_backend(student) == "torch"


def test_a_predictor_that_is_saved_keeps_its_engine(student: Path, tmp_path: Path) -> None:
    book = OpenBook.from_pretrained(student.parent, "onnx", threads=1)
    book.save_pretrained(tmp_path / "saved")
    again = OpenBook.from_pretrained(tmp_path / "saved", "onnx")
    np.testing.assert_array_equal(again.predict_proba(TEXTS), book.predict_proba(TEXTS))
    with pytest.raises(UsageError, match="backend='tflite' is unknown"):
        OpenBook.from_pretrained(tmp_path / "saved", "tflite")  # type: ignore[arg-type]
