"""`openbook export`: what it writes is proven, and what fails the proof is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import typer
from filelock import FileLock
from typer.testing import CliRunner

from openbook import checkpoint, export_commands
from openbook.answers import Answers, Encoded
from openbook.backends.onnx import OnnxBackend
from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import digest_file, digest_folder, read_json
from openbook.config import RunError, StudentSettings, UsageError
from openbook.knowledge_base import store
from openbook.knowledge_base.search import normalise
from openbook.models.encoder import Encoder, Head
from openbook.models.graph import graph_of, in_int8
from openbook.models.student import new_student
from openbook.predictor import OpenBook
from openbook.stages import export as stage
from openbook.stages.export import Wish, export
from openbook.types import KnowledgeBase

LABELS = ("bad", "fair", "good")
THINGS = ("film", "movie", "book", "play", "song", "meal")
WORDS = ("good", "great", "fine", "bad", "dull", "poor")
TEXTS = [f"the {thing} was {word} in {len(word)}" for thing in THINGS for word in WORDS]
PAIRS = [(text, f"a {text[4:8]}") for text in TEXTS]
LONGEST = 24
Graph = Any


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A run folder with a student and its book."""
    run = tmp_path_factory.mktemp("finished")
    write_student(run, tokenizer, Head(LABELS))
    random = np.random.default_rng(0)
    keys = normalise(random.normal(size=(len(TEXTS), 16))).astype(np.float32)
    values = random.dirichlet(np.ones(3), len(TEXTS)).astype(np.float32)
    names = tuple(f"t/train/{row}" for row in range(len(TEXTS)))
    about = {"kind": "classification", "labels": LABELS, "key_space": "space"}
    retrieval = {"retrieval": {"top_k": 5, "temperature": 0.2, "beta": 0.4}}
    store.save(KnowledgeBase(keys, values, names, tuple(TEXTS), {**about, **retrieval}), run / "knowledge_base")
    return run


def write_student(run: Path, tokenizer: Any, head: Head) -> None:
    settings = StudentSettings(architecture="bert", layers=1, hidden_size=16, heads=2)
    student = new_student(settings, head, tokenizer, len(tokenizer), positions=LONGEST, seed=4)
    for place, weight in enumerate(student.parameters()):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(place))
        with torch.no_grad():  # biases and norms stay near what they are, so that answers depend on the text
            weight += 0.1 * drawn if weight.ndim == 1 else 0.5 * drawn
    student.model.config.key_space = "space"
    (run / "student").mkdir()
    student.save(run / "student", tokenizer)


@pytest.fixture(scope="module")
def traced(finished: Path) -> Graph:
    return graph_of(TorchBackend.load(finished / "student").encoder)


@pytest.fixture
def run(finished: Path, traced: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run whose student is traced already: that takes seconds."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(stage, "graph_of", lambda encoder, opset: traced)
    return tmp_path / "run"


def broken(graph: Graph, damage: Callable[[Graph], None]) -> Graph:
    other = graph.clone()
    damage(other)
    return other


def change_weight(graph: Graph) -> None:
    """One number of the head's weights, a little."""
    value = next(one for one in graph.graph.initializers.values() if list(one.shape) in ([3, 16], [16, 3]))
    array = value.const_value.numpy().copy()
    array[0, 0] += 0.5
    value.const_value = onnx_ir.tensor(array)


def swap_outputs(graph: Graph) -> None:
    one, two = graph.graph.outputs
    one.name, two.name = "aside", "logits"
    one.name = "embedding"


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(finished: Path, traced: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "graph_of", lambda encoder, opset: traced)
        export(run, Wish())
    return run


def test_the_folder_has_the_graphs_and_a_record_of_them(exported: Path) -> None:
    onnx = exported / "student" / "onnx"
    assert files_of(onnx) == {"model.onnx", "model_qint8.onnx", "export.json"}
    record = read_json(onnx / "export.json")
    assert record["format"] == 1
    assert record["weights"] == digest_file(exported / "student" / "model.safetensors")
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert record["outputs"] == ["logits", "embedding"]
    assert (record["max_length"], record["pad"]) == (LONGEST, 0)
    assert record["files"] == {
        name: {"bytes": (onnx / name).stat().st_size, "sha256": digest_file(onnx / name)}
        for name in ("model.onnx", "model_qint8.onnx")
    }
    assert record["parity"]["rows"] == len(TEXTS)
    assert record["parity"]["longest"] == LONGEST
    assert record["parity"]["cases"] == 2 + 2 * LONGEST + 4  # whole rows in two batches, every length twice, four more
    assert 0 < record["parity"]["onnx"]["largest_difference"] < 1e-5
    assert record["parity"]["onnx-int8"]["agreement"] >= 0.98
    assert set(record["timing"]) == {"torch", "onnx", "onnx-int8"}
    assert record["recommended"] in record["timing"]
    beside = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(exported / "student") == {*beside, "onnx", ".onnx.lock"}


@pytest.mark.parametrize(("backend", "tolerance"), [("onnx", 1e-5), ("onnx-int8", 0.1)])
def test_a_predictor_with_its_book_reads_the_export(exported: Path, backend: Any, tolerance: float) -> None:
    texts = [*TEXTS[:5], "unheard words entirely", "good " * 100]
    wanted = OpenBook.from_pretrained(exported).predict_proba(texts)
    given = OpenBook.from_pretrained(exported, backend).predict_proba(texts)
    np.testing.assert_allclose(given, wanted, atol=tolerance)
    assert np.abs(given - wanted).max() > 0


def test_fp32_alone_where_int8_is_not_wanted(run: Path) -> None:
    record = export(run, Wish(int8=False))
    assert files_of(run / "student" / "onnx") == {"model.onnx", "export.json"}
    assert set(record["timing"]) == {"torch", "onnx"}
    assert "onnx-int8" not in record["parity"]


def test_pairs_are_rows_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Encoded] = []
    monkeypatch.setattr(stage, "in_cases", lambda rows, size: seen.extend(rows) or [])
    monkeypatch.setattr(stage, "prove_equal", lambda *_: {})
    export(run, Wish(int8=False), PAIRS)
    assert all(max(row.types) == 1 for row in seen)
    assert len(seen) == len(PAIRS)


def test_a_book_of_pairs_gives_pairs_and_many_rows_are_thinned_evenly(finished: Path, tmp_path: Path) -> None:
    base = store.load(finished / "knowledge_base")
    texts = tuple("\t".join(pair) for pair in PAIRS)
    store.save(KnowledgeBase(base.keys, base.values, base.ids, texts, base.manifest), tmp_path / "book")
    assert stage.texts_of_book(tmp_path / "book") == PAIRS
    many = stage.spread([str(number) for number in range(3_001)])
    assert (len(many), many[0], many[-1]) == (1_000, "0", "3000")
    assert {int(two) - int(one) for one, two in zip(many, many[1:], strict=False)} == {3, 4}


def test_the_fastest_of_those_that_passed_is_recommended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(**by_engine: tuple[float, float]) -> str:
        found = {name.replace("_", "-"): {"batch 1": one, "batch 32": two} for name, (one, two) in by_engine.items()}
        monkeypatch.setattr(stage, "timed", lambda engines, rows: {name: found[name] for name in engines})
        return str(export(run, Wish())["recommended"])

    assert times(torch=(5, 1), onnx=(2, 0.5), onnx_int8=(1, 0.4)) == "onnx-int8"
    assert times(torch=(5, 1), onnx=(1, 0.5), onnx_int8=(2, 0.6)) == "onnx"
    assert times(torch=(1, 0.1), onnx=(1, 0.5), onnx_int8=(2, 0.6)) == "torch"


def test_engines_take_turns_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    class Engine:
        def __init__(self, name: str):
            self.name = name

        def run(self, rows: Sequence[Encoded]) -> Any:
            asked.append((self.name, len(rows)))
            clock[0] += 3.0 if self.name == "slow" else 1.0

    clock = [0.0]
    monkeypatch.setattr(stage.time, "perf_counter", lambda: clock[0])
    engines: Any = {name: Engine(name) for name in ("slow", "fast")}
    found = stage.timed(engines, [Encoded([2, 3], [0, 0])] * 40)
    assert found == {
        "slow": {"batch 1": 3000, "batch 32": pytest.approx(3000 / 32, abs=1e-4)},
        "fast": {"batch 1": 1000, "batch 32": pytest.approx(1000 / 32, abs=1e-4)},
    }
    alone = [name for name, size in asked if size == 1]
    assert alone[:16] == ["slow"] * 8 + ["fast"] * 8 == alone[16:32]
    assert [name for name, size in asked if size == 32][:4] == ["slow", "fast", "slow", "fast"]


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change_weight, r"onnx does not say what torch says: rows 1 to 32, row \d+: logits differ by 0"),
        (swap_outputs, r"onnx does not say what torch says: rows 1 to 32: logits \(32, 16\)"),
        (lambda graph: setattr(next(iter(graph.graph)), "op_type", "NoSuchThing"), "ONNX Runtime cannot run it"),
    ],
    ids=["a weight", "outputs", "an operator"],
)
def test_a_broken_graph_is_refused_and_nothing_is_written(
    run: Path, traced: Graph, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Graph], None], told: str
) -> None:
    monkeypatch.setattr(stage, "graph_of", lambda encoder, opset: broken(traced, damage))
    before = files_of(run / "student")
    with pytest.raises(RunError, match=told):
        export(run, Wish())
    assert files_of(run / "student") - {".onnx.lock"} == before


def test_a_failed_export_leaves_the_one_before(run: Path, traced: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, Wish())
    before = digest_folder(run / "student" / "onnx")
    monkeypatch.setattr(stage, "graph_of", lambda encoder, opset: broken(traced, change_weight))
    with pytest.raises(RunError):
        export(run, Wish())
    assert digest_folder(run / "student" / "onnx") == before


def turn_classes(graph: Graph) -> Graph:
    return broken(in_int8(graph), lambda one: change_bias(one, np.array([9.0, -9.0, 0.0])))


def change_bias(graph: Graph, by: Any) -> None:
    value = next(one for one in graph.graph.initializers.values() if list(one.shape) == [3] and "bias" in one.name)
    value.const_value = onnx_ir.tensor((value.const_value.numpy() + by).astype(np.float32))


def fail_to_quantise(graph: Graph) -> Graph:
    raise RunError("the graph cannot be turned into int8 (no: reason)")


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        (turn_classes, r"onnx-int8 is too far from torch on 36 rows: agreement is 0\.\d+, and at least 0.98 is"),
        (fail_to_quantise, "cannot be turned into int8"),
    ],
    ids=["other classes", "no graph"],
)
def test_where_int8_alone_fails_fp32_is_written_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, instead: Any, told: str
) -> None:
    export(run, Wish())  # an older int8 must not stay beside a newer fp32
    monkeypatch.setattr(stage, "in_int8", instead)
    record = export(run, Wish())
    assert re.search(told, record["parity"]["onnx-int8"]["refused"])
    assert files_of(run / "student" / "onnx") == {"model.onnx", "export.json"}
    assert set(record["files"]) == {"model.onnx"}
    assert set(record["timing"]) == {"torch", "onnx"}
    assert record["recommended"] != "onnx-int8"
    assert read_json(run / "student" / "onnx" / "export.json") == record
    OnnxBackend(run / "student", "onnx", threads=1)


def test_the_agreement_asked_for_decides(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(stage, "prove_close", lambda *rest: asked.append(rest[-2:]) or {})
    export(run, Wish(agreement=0.75))
    assert asked == [("classification", 0.75)]


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_kill_leaves_the_old_export_or_the_new_one(
    run: Path, traced: Graph, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    class Killed(BaseException):
        pass

    renamed: list[Path] = []
    rename = checkpoint.os.rename

    def killing(source: Path, target: Path) -> None:
        renamed.append(source)
        if len(renamed) == fatal:
            raise Killed
        rename(source, target)

    export(run, Wish())
    onnx = run / "student" / "onnx"
    before = digest_folder(onnx)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", killing)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # no one cleans up after a kill
        with pytest.raises(Killed):
            export(run, Wish())
    assert (run / "student" / ".onnx.partial" / "onnx" / "export.json").exists()
    with monkeypatch.context() as patch:  # the next one finds the old export again, also if it fails
        patch.setattr(stage, "graph_of", lambda encoder, opset: broken(traced, change_weight))
        with pytest.raises(RunError):
            export(run, Wish())
    assert digest_folder(onnx) == before
    export(run, Wish(int8=False))
    assert files_of(onnx) == {"model.onnx", "export.json"}
    assert not [name for name in files_of(run / "student") if "partial" in name or "retired" in name]


def test_a_student_that_changes_meanwhile_is_not_exported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddle(engines: Any, encoded: Any) -> Any:
        weights = run / "student" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
        return {"torch": {"batch 1": 1.0}}

    monkeypatch.setattr(stage, "timed", meddle)
    with pytest.raises(RunError, match="changed while it was exported"):
        export(run, Wish())
    assert not (run / "student" / "onnx").exists()


def test_two_exports_at_once_are_one_too_many(run: Path) -> None:
    with FileLock(run / "student" / ".onnx.lock"), pytest.raises(UsageError, match="being exported by another process"):
        export(run, Wish())


# --- what to mend -----------------------------------------------------------------------------------------------------


def without_texts(run: Path) -> None:
    base = store.load(run / "knowledge_base")
    empty = ("",) * len(base.ids)
    store.save(KnowledgeBase(base.keys, base.values, base.ids, empty, base.manifest), run / "knowledge_base")


def of_another_kind(run: Path) -> None:
    config = run / "student" / "config.json"
    config.write_text(json.dumps({**read_json(config), "model_type": "funnel"}))


@pytest.mark.parametrize(
    ("prepare", "wish", "rows", "told"),
    [
        (lambda run: shutil.rmtree(run / "student"), Wish(), None, "--model .* holds no finished student/ folder"),
        (lambda run: (run / "student" / "model.safetensors").unlink(), Wish(), None, "holds no finished student/"),
        (of_another_kind, Wish(), None, "model_type='funnel' is not exported; use a student of bert"),
        (None, Wish(opset=11), None, "--opset 11 is too old .*; give 18 or more"),
        (None, Wish(agreement=0), None, "--agreement 0 is no share; give a number above 0, and at most 1"),
        (None, Wish(agreement=1.5), None, "--agreement 1.5 is no share"),
        (lambda run: shutil.rmtree(run / "knowledge_base"), Wish(), None, "holds no texts .*; give --rows FILE"),
        (without_texts, Wish(), None, "holds no texts .*; give --rows FILE"),
        (None, Wish(), TEXTS[:31], "there are 31 rows to prove parity on; give --rows FILE with 32 or more"),
    ],
)
def test_what_the_user_can_mend_is_told_before_a_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, prepare: Any, wish: Wish, rows: Any, told: str
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stage.TorchBackend, "load", refuse)
    if prepare is not None:
        prepare(run)
    with pytest.raises(UsageError, match=told):
        export(run, wish, rows)


def test_an_absent_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=r"^onnxscript is not installed.*pip install 'openbook\[export\]'"):
        export(run, Wish())


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(export_commands.export)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_shows_size_closeness_and_speed(run: Path) -> None:
    done = call("--model", str(run))
    assert done.exit_code == 0, done.output
    for told in ("onnx-int8", "within", "agreement 1.000", "ms a row, batch 32", "lengths 1 to 24", "fastest here:"):
        assert told in done.output


def test_a_refused_int8_is_an_exit_status(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "in_int8", turn_classes)
    done = call("--model", str(run))
    assert done.exit_code == 1
    assert "error: int8 was refused, and fp32 is written alone: onnx-int8 is too far from torch" in done.stderr
    assert (run / "student" / "onnx" / "model.onnx").is_file()


def test_options_reach_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(stage, "export", lambda *given: asked.append(given) or {"parity": {}})
    monkeypatch.setattr(export_commands, "show", lambda record: None)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"one": a, "two": b, "n": 1}) + "\n" for a, b in PAIRS))
    options = ["--no-int8", "--opset", "20", "--agreement", "0.9", "--rows", str(file), "--text", "one"]
    call("--model", "here", *options, "--text-pair", "two")
    call("--model", "here", *options)
    call()
    assert asked == [
        (Path("here"), Wish(False, 20, 0.9), PAIRS),
        (Path("here"), Wish(False, 20, 0.9), [one for one, _ in PAIRS]),
        (Path("runs/quickstart"), Wish(), None),
    ]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (("text", None), "--text text: .*rows.jsonl has the columns one, n; name one of them"),
        (("one", "two"), "--text-pair two: .* has the columns one, n"),
        (("n", None), "--text n: row 1 of .* has 1; give texts"),
    ],
)
def test_columns_are_checked(tmp_path: Path, columns: Any, told: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"one": "a", "n": 1}\n')
    with pytest.raises(UsageError, match=told):
        export_commands.read_rows(file, *columns)


# --- other students ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_a_student_of_scores_is_exported_from_the_start(tmp_path: Path, tokenizer: Any, rows: list[Any]) -> None:
    write_student(tmp_path, tokenizer, Head(None))
    record = export(tmp_path, Wish(), rows)
    assert record["parity"]["onnx-int8"]["agreement"] > 0.98
    wanted = OpenBook.from_pretrained(tmp_path).predict(rows)
    given = OpenBook.from_pretrained(tmp_path, "onnx").predict(rows)
    np.testing.assert_allclose(given, wanted, atol=1e-4)


def test_answers_are_what_the_proof_reads(exported: Path) -> None:
    engine = OnnxBackend(exported / "student", "onnx", threads=1)
    said = engine.run(engine.encode(TEXTS))
    assert isinstance(said, Answers)
    assert said.logits.shape == (len(TEXTS), 3)
    assert isinstance(TorchBackend.load(exported / "student").encoder, Encoder)
