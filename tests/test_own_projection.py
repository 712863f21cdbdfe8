"""A student with a projection of its own: learned with the relational loss, kept beside stock weights, asked by."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from openbook import cells
from openbook.answers import outputs_of
from openbook.batch_prediction import Job, made_from
from openbook.checkpoint import building, read_json
from openbook.config import Terms, UsageError
from openbook.courses import CORPUS, LABELS, OPEN_BOOK, outline
from openbook.inference import answers_of
from openbook.keys import QUERIES, queries_in
from openbook.knowledge_base import editing
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.search import search, search_of
from openbook.lessons import check_lessons
from openbook.models.encoder import load_finished
from openbook.packaging import Choices, put_student
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe
from openbook.stages import build_kb, distill, evaluate, record_answers, train_teacher
from openbook.stages.distill import Learner, follow
from openbook.stages.export import Wish, export
from openbook.starts import fresh_student
from openbook.workspace import Run

LINEAR = ("student.projection=linear", "knowledge_base.keys=teacher")
SMALL = (
    "teacher.optim.epochs=2", "distill.corpus.optim.epochs=0", "distill.labels.optim.epochs=1",
    "distill.task.optim.epochs=2", "seeds=[0]",
)  # fmt: skip
OPENED = {"top_k": 3, "temperature": 0.2, "beta": 0.3}
TEXTS = ["the film was good and the plot was great a 3", "my song seemed dull", "the meal was fine b 7", "poor"]


@pytest.fixture(scope="module")
def school(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to a book of the teacher's keys, found by a student's own projection."""
    folder = tmp_path_factory.mktemp("school")
    run = Run(load_recipe(world / "recipe.yaml", [*LINEAR, *SMALL]), folder)
    stages = {
        "teacher": train_teacher,
        "teacher_outputs": record_answers,
        "student": distill,
        "knowledge_base": build_kb,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "openbook.stages.distill.run_jobs", lambda work, jobs, *_: [work(*job, lambda done: None) for job in jobs]
        )
        for name, stage in stages.items():
            with building(folder / name, {"of": "the test"}, name == "knowledge_base") as to:
                stage.build(run, to)
    editing.settle(folder / "knowledge_base", OPENED)
    return folder


def mapped(student: Path, embedding: np.ndarray) -> Any:
    weights = load_file(student / QUERIES)
    return embedding @ weights["weight"].T + weights["bias"]


def test_it_is_learned_and_kept_beside_the_students_that_learn_it(school: Path) -> None:
    for student in (school / "student", school / "students" / CORPUS / "seed-0"):
        weights = load_file(student / QUERIES)
        assert weights["weight"].shape == (32, 32)
        assert 1e-3 < np.abs(weights["weight"] - np.eye(32)).max() < 1  # it began as the identity
        assert np.abs(weights["bias"]).max() > 0
    assert not (school / "students" / LABELS / "seed-0" / QUERIES).exists()


def test_transformers_loads_the_student_without_it(school: Path, tmp_path: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(school / "student", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = OpenBook.from_pretrained(school).backend.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = model.eval()(**tokens).logits
    told = OpenBook.from_pretrained(school).read(TEXTS).logits  # its classes do not read the projection
    np.testing.assert_allclose(told, logits.numpy(), atol=1e-5)


def test_a_book_of_the_teachers_keys_is_asked_by_it(school: Path, tmp_path: Path) -> None:
    book = OpenBook.from_pretrained(school)
    assert book.base is not None
    heard = book.read(TEXTS)
    hits = search(mapped(school / "student", heard.embedding), book.base.keys, 3)
    for row, explanation in enumerate(book.explain(TEXTS)):
        found = explanation.evidence.neighbours
        assert [one.id for one in found] == [book.base.ids[place] for place in hits.positions[row]]
        assert [one.similarity for one in found] == pytest.approx(hits.similarities[row].tolist(), abs=1e-6)
    plain = search(heard.embedding, book.base.keys, 3)
    assert np.abs(plain.similarities - hits.similarities).max() > 1e-3
    wanted = answer(outputs_of(heard, book.kind), mapped(school / "student", heard.embedding), book.base,
                    Retrieval(**OPENED), search_of(book.base))  # fmt: skip
    np.testing.assert_allclose(book.predict_proba(TEXTS), wanted.outputs, atol=1e-6)
    book.save_pretrained(tmp_path)
    np.testing.assert_array_equal(OpenBook.from_pretrained(tmp_path).predict_proba(TEXTS), book.predict_proba(TEXTS))
    (tmp_path / "student" / QUERIES).unlink()
    assert np.abs(OpenBook.from_pretrained(tmp_path).predict_proba(TEXTS) - book.predict_proba(TEXTS)).max() > 1e-4


def test_a_book_of_the_students_own_keys_is_not(school: Path, tmp_path: Path) -> None:
    OpenBook.from_pretrained(school).save_pretrained(tmp_path)
    OpenBook.from_pretrained(tmp_path).rekey()
    book = OpenBook.from_pretrained(tmp_path)
    assert book.base is not None
    for text in book.base.texts[:3]:
        assert book.explain(text).evidence.neighbours[0].similarity == pytest.approx(1)


def test_it_is_tuned_and_judged_by_what_it_is_asked_by(
    school: Path, attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attend(*LINEAR, *SMALL)
    asked: list[Any] = []
    collect = build_kb.collect

    def noted(held_out: Any, outputs: Any, queries: Any, *rest: Any) -> Any:
        asked.append(queries)
        return collect(held_out, outputs, queries, *rest)

    monkeypatch.setattr(build_kb, "collect", noted)
    build_kb.tuned_for(run, build_kb.filled(run)[0], 0)
    student = run.folder / "students" / CORPUS / "seed-0"
    heard = answers_of(load_finished(str(student)), run.tokens("holdout", run.task.holdout, run.tokenizer))
    np.testing.assert_allclose(asked[0], mapped(student, heard.embedding), atol=1e-5)
    monkeypatch.setattr(evaluate, "read_json", lambda path: {"0": {"retrieval": OPENED}})
    told = evaluate.all_outputs(run)[OPEN_BOOK][0]
    rows = [example.text for example in run.task.test]
    np.testing.assert_allclose(told, OpenBook.from_pretrained(run.folder).predict_proba(rows), atol=1e-5)


@pytest.mark.slow
def test_onnx_asks_by_it_too(school: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(school, Wish(int8=False))
    live, exported = (OpenBook.from_pretrained(school, name).predict_proba(TEXTS) for name in ("torch", "onnx"))
    np.testing.assert_allclose(exported, live, atol=1e-4)


def test_a_course_without_the_loss_keeps_what_was_learned(attend: Callable[..., Run]) -> None:
    run = attend(*LINEAR, *SMALL)
    (course,) = outline(run.recipe, CORPUS)
    kept = {"query.weight": torch.full((32, 32), 2.0), "query.bias": torch.ones(32)}
    learner = Learner(fresh_student(run, 0), dict(kept), [])
    optim = course.training.optim.model_copy(update={"epochs": 0.1})
    plain = course.training.model_copy(update={"terms": Terms(soft_labels=1), "optim": optim})
    after = follow(run, replace(course, training=plain), learner, 0, None, lambda done: None)
    assert all(torch.equal(after.projections[name], weight) for name, weight in kept.items())
    going_on = course.training.model_copy(update={"optim": optim})
    after = follow(run, replace(course, training=going_on), learner, 0, None, lambda done: None)
    assert 0 < (after.projections["query.weight"] - 2).abs().max() < 0.2  # it goes on from there


def test_recipes_without_it_keep_their_fingerprints(attend: Callable[..., Run]) -> None:
    plain, linear = attend(*SMALL), attend(*SMALL, *LINEAR)
    of_student, of_lesson = partial(distill.student_inputs, student=CORPUS), partial(distill.lesson_inputs, plan=[])
    for inputs in (distill.inputs, partial(of_student, seed=0), partial(of_lesson, seed=0)):
        found = inputs(plain)
        assert "projection" not in found.get("recipe", found)["student"]
        assert inputs(linear).get("recipe", inputs(linear))["student"]["projection"] == "linear"


def test_without_the_loss_there_is_nothing_to_learn_it_from(attend: Callable[..., Run]) -> None:
    run = attend(*LINEAR, *SMALL, "distill.task.terms={soft_labels: 1}")
    with pytest.raises(UsageError, match=r"student\.projection=linear is learned by terms\.neighbours, and no course"):
        check_lessons(run)
    check_lessons(attend(*LINEAR, *SMALL))


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"weight": np.eye(32, dtype=np.float32)}, r"queries\.safetensors is no projection \('bias'\)"),
        ({"weight": np.eye(32, dtype=np.float32), "bias": np.zeros(31, np.float32)}, r"holds \(32, 32\) and \(31,\)"),
        ({"weight": np.full((32, 32), np.nan, np.float32), "bias": np.zeros(32, np.float32)}, "or NaN"),
        (
            {"weight": np.eye(16, dtype=np.float32), "bias": np.zeros(16, np.float32)},
            "projection reads 16 numbers",
        ),
    ],
    ids=["a part", "sizes", "NaN", "another width"],
)
def test_a_damaged_projection_is_refused(school: Path, tmp_path: Path, weights: dict[str, Any], told: str) -> None:
    OpenBook.from_pretrained(school).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "student" / QUERIES)
    with pytest.raises(UsageError, match=told):
        OpenBook.from_pretrained(tmp_path).predict(TEXTS)
    (tmp_path / "student" / QUERIES).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UsageError, match="is no projection"):
        OpenBook.from_pretrained(tmp_path)


def test_a_student_without_one_has_none(school: Path) -> None:
    assert queries_in(None) is None
    assert queries_in(school / "teacher") is None
    assert read_json(school / "student" / "selection.json")["student"] == CORPUS


def test_it_travels_with_the_student_and_is_part_of_what_answers_come_from(school: Path, tmp_path: Path) -> None:
    put_student(school / "student", tmp_path / "student", Choices())
    assert (tmp_path / "student" / QUERIES).read_bytes() == (school / "student" / QUERIES).read_bytes()
    (tmp_path / "rows.csv").write_text("text\nthe film\n")
    job, book = Job(tmp_path / "rows.csv", tmp_path / "told.csv"), OpenBook.from_pretrained(school)
    before = made_from(book, tmp_path, job)["model"]
    save_file(
        {"weight": np.eye(32, dtype=np.float32), "bias": np.zeros(32, np.float32)}, tmp_path / "student" / QUERIES
    )
    assert made_from(book, tmp_path, job)["model"] != before


def test_arms_that_open_a_book_take_students_without_one(attend: Callable[..., Run]) -> None:
    run = attend(*LINEAR, *SMALL)
    one: Any = SimpleNamespace(recipe=run.recipe, task="reviews", arm="A1")
    grid = SimpleNamespace(readers_of=lambda one: ["R1"])
    experiment: Any = SimpleNamespace(run_of=lambda one: run, grid=grid)
    with pytest.raises(UsageError, match="A1: arms that open a book ask it by the pooled vector"):
        cells.prepare(experiment, one)
