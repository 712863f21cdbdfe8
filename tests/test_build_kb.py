"""The training side of the open book: keys, what is kept and from where, teachers that never saw a row, targets."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openbook import cross_fit, keys
from openbook.answers import probabilities_of
from openbook.backends.pytorch import TorchBackend
from openbook.book_teacher import BookTeacher
from openbook.checkpoint import building, read_json, write_json
from openbook.config import KnowledgeBaseSettings, ProjectionSettings, Terms, UsageError
from openbook.courses import CORPUS, Course, outline, reads_corpus, retrieves
from openbook.distillation import losses
from openbook.distillation.teachers import RecordedTeacher
from openbook.inference import answers_of
from openbook.knowledge_base import store
from openbook.knowledge_base.rules import Rules
from openbook.knowledge_base.search import normalise
from openbook.lessons import (
    blank_student,
    check_lessons,
    gold_values,
    joined,
    key_parts,
    key_space,
    objective_for,
    teacher_for,
    training_base,
)
from openbook.models.encoder import load_finished
from openbook.predictor import OpenBook
from openbook.readings import tokens_of
from openbook.recipe import load_recipe
from openbook.recordings import recordings
from openbook.stages import build_kb, distill, record_answers, train_teacher
from openbook.stages.distill import folder_of
from openbook.types import Batch, Example, Passage
from openbook.workspace import Run

BOTH, TEACHERS = "knowledge_base.texts=both", "knowledge_base.keys=teacher"
WORDS = ("film", "song", "plot", "meal", "play")


def passages(run: Run) -> list[Passage]:
    """Sentences of their own, and one each that repeats a held-out, a reported and a training text."""
    own = [f"we seemed to {word} {letter} the book of great {word}" for word in WORDS for letter in "abcd"]
    same = [run.task.holdout[0].text.upper() + "!", run.task.test[3].text, run.task.train[5].text]
    return [Passage(f"bank/{number}", text, "d") for number, text in enumerate([*own, *same])]


@pytest.fixture(scope="module")
def school(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a teacher, a corpus, and what the teacher says of both texts."""
    folder = tmp_path_factory.mktemp("school")
    run = Run(load_recipe(world / "recipe.yaml", ["teacher.optim.epochs=2", BOTH]), folder)
    with building(folder / "teacher", {"of": "the test"}) as to:
        train_teacher.build(run, to)
    with building(folder / "corpus", {"of": "the test"}) as to:
        pq.write_table(pa.Table.from_pylist([asdict(one) for one in passages(run)]), to / "passages.parquet")
    with building(folder / "teacher_outputs", {"of": "the test"}) as to:
        record_answers.build(run, to)
    return folder


def outputs(run: Run) -> Path:
    return run.folder / "teacher_outputs"


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Keys


def projected(run: Run) -> tuple[Any, Any]:
    record_answers.make_projection(run, outputs(run))
    weights = load_file(outputs(run) / "projection.safetensors")
    return weights["weight"].double().numpy(), weights["bias"].double().numpy()


def test_every_kind_of_projection_is_another_map(attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "BLOCK_ROWS", 50)
    run = attend("knowledge_base.projection.kind=identity")
    embeddings = RecordedTeacher(outputs(run) / "task", (), ()).embedding[:].astype(np.float64)
    maps = {
        kind: projected(attend(f"knowledge_base.projection.kind={kind}"))
        for kind in ("supcon", "random", "pca", "identity")
    }
    assert np.array_equal(maps["identity"][0], np.eye(32))
    assert not maps["identity"][1].any()
    np.testing.assert_allclose(training_base(run, outputs(run)).keys, unit(embeddings), atol=1e-6)
    weight, bias = maps["pca"]
    components = embeddings @ weight.T + bias
    np.testing.assert_allclose(components.mean(0), 0, atol=1e-5)
    covariance = components.T @ components / len(components)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-5)
    assert (np.diff(np.diag(covariance)) < 1e-7).all()
    assert (weight[np.arange(32), np.abs(weight).argmax(1)] > 0).all()
    torch.manual_seed(0)
    drawn = torch.nn.Linear(32, 32)
    np.testing.assert_allclose(maps["random"][0], drawn.weight.detach().numpy(), atol=1e-7)
    assert np.abs(maps["supcon"][0] - maps["random"][0]).max() > 1e-3  # it starts there, and learns
    assert read_json(outputs(run) / "projection.json") == []  # of the last kind, which learns nothing


def test_fewer_components_are_the_leading_ones(attend: Callable[..., Run]) -> None:
    embeddings = np.random.default_rng(0).normal(size=(50, 6)) * [1, 5, 2, 9, 3, 4] + 7
    weight, bias = record_answers.principal_components(embeddings, 2)
    assert np.abs(weight.numpy()).argmax(1).tolist() == [3, 1]
    np.testing.assert_allclose(weight @ torch.tensor(embeddings.mean(0)).float() + bias, [0, 0], atol=1e-5)


def test_contrast_is_the_one_asked_for() -> None:
    """F4: the regression forms, and singletons."""
    keys = torch.tensor([(1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6)], dtype=torch.float64)
    scores, classes = torch.tensor([0, 2.5, 3, 5], dtype=torch.float64), torch.tensor([0, 1, 1, 2])

    def found(kind: str, labels: torch.Tensor, **settings: Any) -> float:
        asked = ProjectionSettings.model_validate({"temperature": 0.5, **settings})
        return record_answers.contrast(asked, kind, keys, labels).item()

    assert found("regression", scores) == pytest.approx(1.187459, abs=1e-6)
    assert found("regression", scores, regression="rnc") == pytest.approx(0.726004, abs=1e-6)
    assert found("regression", scores, regression="bins") == pytest.approx(
        losses.supervised_contrastive(keys, torch.tensor([0, 3, 3, 5]), 0.5).item()
    )
    assert found("classification", classes) == pytest.approx(0.870714, abs=1e-6)
    assert found("classification", classes, singletons="zero") == pytest.approx(0.435357, abs=1e-6)


def test_keys_are_judged_by_the_labels_of_the_nearest(attend: Callable[..., Run]) -> None:
    run = attend()
    told = read_json(outputs(run) / "scores.json")
    assert (told["metric"], told["neighbours"]) == ("accuracy", record_answers.NEAREST)
    assert told["holdout"]["teacher"] == pytest.approx(read_json(run.folder / "teacher" / "scores.json")["holdout"])
    base = training_base(run, outputs(run))
    teacher = load_finished(str(run.folder / "teacher"))
    heard = answers_of(teacher, run.tokens("holdout", run.task.holdout, run.teacher_tokenizer))
    weights = load_file(outputs(run) / "projection.safetensors")
    queries = F.normalize(torch.tensor(heard.embedding) @ weights["weight"].T + weights["bias"])
    gold = torch.tensor(gold_values(run))
    right = 0
    for query, label in zip(queries, heard.labels, strict=True):
        near = (torch.tensor(base.keys) @ query).topk(record_answers.NEAREST)
        right += int((near.values / 0.07).softmax(0) @ gold[near.indices].argmax(1).float() > 0.5) == label
    assert told["holdout"]["nearest_keys"] == pytest.approx(right / len(queries))


def test_a_key_space_is_what_decides_where_keys_lie_and_nothing_else(attend: Callable[..., Run]) -> None:
    run = attend()
    before, parts = key_space(run), key_parts(run)
    assert {*parts} == {"teacher", "projection", "tokenizer", "max_length"}
    assert key_space(attend(BOTH, "knowledge_base.value_temperature=2", "seeds=[5]")) == before
    assert key_space(attend("task.max_length=23")) != before
    projected(attend("knowledge_base.projection.kind=identity"))
    assert {name for name, part in key_parts(run).items() if parts[name] != part} == {"projection"}
    assert key_space(run) != before


# What is kept


def test_training_rows_with_the_teachers_answers_are_the_book(attend: Callable[..., Run]) -> None:
    run = attend("knowledge_base.value_temperature=2")
    base, left_out = build_kb.filled(run)
    recorded = RecordedTeacher(outputs(run) / "task", (), ())
    logits = recorded.logits[recorded.rows_of([row.id for row in run.task.train])]
    np.testing.assert_allclose(base.values, probabilities_of(logits / 2), atol=1e-6)
    assert base.ids == tuple(row.id for row in run.task.train)
    assert base.texts == tuple(row.text for row in run.task.train)
    assert (base.origins, left_out) == (("train",) * len(base.ids), {})
    assert not {*base.ids} & {row.id for row in run.task.holdout}


def test_gold_values_are_the_labels(attend: Callable[..., Run]) -> None:
    run = attend("knowledge_base.values=gold")
    base = build_kb.filled(run)[0]
    assert base.values.argmax(1).tolist() == [row.label for row in run.task.train]
    assert sorted({*base.values.ravel()}) == [0, 1]
    assert np.array_equal(base.keys, build_kb.filled(attend())[0].keys)


@pytest.mark.parametrize("texts", ["corpus", "both"])
def test_texts_of_the_corpus_are_kept_but_those_it_must_not_hold(attend: Callable[..., Run], texts: str) -> None:
    run = attend(f"knowledge_base.texts={texts}")
    base, left_out = build_kb.filled(run)
    rows = 0 if texts == "corpus" else len(run.task.train)
    assert left_out == {"evaluation_text": 2, "training_text": 1}
    assert base.origins == ("train",) * rows + ("corpus",) * 20
    assert base.ids[rows:] == tuple(f"bank/{number}" for number in range(20))
    recorded = RecordedTeacher(outputs(run) / "corpus", (), ())
    here = recorded.rows_of(base.ids[rows:])
    np.testing.assert_allclose(base.values[rows:], probabilities_of(recorded.logits[here]), atol=1e-6)
    weights = load_file(outputs(run) / "projection.safetensors")
    keys = recorded.embedding[here].astype(np.float32) @ weights["weight"].numpy().T + weights["bias"].numpy()
    np.testing.assert_allclose(base.keys[rows:], unit(keys), atol=1e-5)
    if rows:
        assert base.ids[:rows] == tuple(row.id for row in run.task.train)


def test_no_entry_shares_a_run_of_words_with_an_evaluation_text(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attend(BOTH)
    assert build_kb.LEAK_NGRAM == 13
    alike = Example("x", "we say: " + " ".join(run.task.test[0].text.split()[:6]))
    answers = np.array([[0.5, 0.5]])
    assert build_kb.reasons_against(run, [alike], answers) == [""]
    monkeypatch.setattr(build_kb, "LEAK_NGRAM", 6)
    assert build_kb.reasons_against(run, [alike], answers) == ["evaluation_text"]


def test_texts_the_teacher_is_unsure_of_can_be_left_out(attend: Callable[..., Run]) -> None:
    run = attend(BOTH)
    sure = build_kb.filled(run)[0].values[len(run.task.train) :].max(1)
    least = float(np.median(sure))
    few = attend("knowledge_base.texts=corpus", f"knowledge_base.corpus_min_confidence={least}")
    base, left_out = build_kb.filled(few)
    assert len(base.ids) == int((sure >= least).sum())
    assert left_out["unsure"] == 20 - len(base.ids)
    soft = attend(
        "knowledge_base.texts=corpus",
        f"knowledge_base.corpus_min_confidence={least}",
        "knowledge_base.value_temperature=50",
    )
    assert build_kb.filled(soft)[0].ids == base.ids  # however soft the values are
    none = attend("knowledge_base.texts=corpus", "knowledge_base.corpus_min_confidence=0.9999999")
    with pytest.raises(UsageError, match=r"none of the corpus's 23 texts may be kept .*'unsure': 20"):
        build_kb.filled(none)


def test_a_task_of_pairs_keeps_pairs_alone(attend: Callable[..., Run]) -> None:
    run = attend(BOTH)
    run.__dict__["task"] = replace(run.task, pair=True)
    examples = [Example("x", "one of my own"), Example("y", "one of my own", "and another")]
    assert build_kb.reasons_against(run, examples, np.full((2, 2), 0.5)) == ["no_pair", ""]
    assert joined(examples[1]) == "one of my own\tand another"


def test_a_book_of_the_corpus_makes_the_corpus_and_its_answers_needed(attend: Callable[..., Run]) -> None:
    alone = ("distill.corpus.optim.epochs=0",)
    assert not reads_corpus(attend(*alone).recipe)
    assert reads_corpus(attend(*alone, BOTH).recipe)
    assert [(one.texts, one.exact) for one in recordings(attend(*alone))] == [("task", True)]
    assert [(one.texts, one.exact) for one in recordings(attend(*alone, BOTH))] == [("corpus", True), ("task", True)]


@pytest.mark.parametrize(
    "overrides", [(TEACHERS,), (BOTH, TEACHERS, "knowledge_base.mode=bucket", "knowledge_base.skip=safe")]
)
def test_the_book_that_is_built_says_what_it_is(attend: Callable[..., Run], overrides: tuple[str, ...]) -> None:
    run = attend(*overrides)
    for seed in run.recipe.seeds:
        blank_student(run, seed).save(folder_of(run, CORPUS, seed), run.tokenizer)
    (run.folder / "student").mkdir()
    write_json(run.folder / "student" / "selection.json", {"seed": 1})
    with building(run.folder / "knowledge_base", build_kb.inputs(run)) as folder:
        build_kb.build(run, folder)
    base = store.load(run.folder / "knowledge_base")
    tuned = read_json(run.folder / "knowledge_base" / "tuning.json")
    assert {*tuned} == {"0", "1"}
    manifest = base.manifest
    assert manifest["retrieval"] == tuned["1"]["retrieval"]
    assert manifest["omega"] == tuned["1"]["omega"]
    rules = Rules.from_manifest(manifest)
    settings = run.recipe.knowledge_base
    assert (rules.metric, rules.mode, rules.skip) == ("accuracy", settings.mode, settings.skip)
    assert rules == Rules.of("accuracy", settings.mode, settings.skip, [row.text for row in run.task.test])
    assert manifest["made_from"] == key_parts(run)
    teacher = BookTeacher.beside(run.folder)
    assert teacher is not None
    teacher.check(base, finds=True)
    assert {**teacher.parts, **keys.projection_part(run.folder / "teacher_outputs")} == manifest["made_from"]
    assert manifest["key_space"] == key_space(run)
    assert (manifest["value_source"], manifest["tuned_on"]) == ("teacher", "held-out training rows")
    counted = {name: base.origins.count(name) for name in {*base.origins}} or {"train": len(base.ids)}
    assert manifest["origins"] == counted
    assert counted["train"] == len(run.task.train)
    assert {*manifest["left_out"]} == ({"evaluation_text", "training_text"} if BOTH in overrides else set())
    omegas = {cell["omega"] for cell in tuned["1"]["table"]}
    assert omegas == ({0, 0.25, 0.5, 1} if BOTH in overrides else {1})
    assert {cell["omega"] for cell in tuned["0"]["table"]} == {1}  # the book is settled by the student that ships


def test_a_book_by_student_is_found_by_the_student_that_ships(attend: Callable[..., Run]) -> None:
    run = attend("knowledge_base.keys=student")
    for seed in run.recipe.seeds:
        blank_student(run, seed).save(folder_of(run, CORPUS, seed), run.tokenizer)
    shutil.copytree(folder_of(run, CORPUS, 1), run.folder / "student")
    write_json(run.folder / "student" / "selection.json", {"seed": 1})
    with building(run.folder / "knowledge_base", build_kb.inputs(run)) as folder:
        build_kb.build(run, folder)
    book = OpenBook.from_pretrained(run.folder)
    assert book.base is not None
    assert book.base.manifest["key_space"] != key_space(run)
    for text in book.base.texts[:3]:
        assert book.explain(text).evidence.neighbours[0].text == text
    base = build_kb.filled(run)[0]
    other = build_kb.base_for(run, base, 0)
    own = OpenBook(TorchBackend.load(folder_of(run, CORPUS, 0)))
    np.testing.assert_allclose(other.keys, normalise(own.read(list(base.texts)).embedding), atol=1e-6)
    assert np.abs(other.keys - book.base.keys).max() > 0.1
    tuned = read_json(run.folder / "knowledge_base" / "tuning.json")
    for seed in run.recipe.seeds:  # each student is tuned with the keys that are its own
        own_table = build_kb.tuned_for(run, build_kb.base_for(run, base, seed), seed).report()["table"]
        assert [cell["loss"] for cell in tuned[str(seed)]["table"]] == [cell["loss"] for cell in own_table]


# Teachers that never saw a row


def test_folds_are_even_and_equal_texts_share_one() -> None:
    rows = [Example(str(n), f"text {n % 37}", label=n % 37 % 3) for n in range(74)]  # every text twice
    fold_of = cross_fit.folds(rows, 5)
    assert np.array_equal(fold_of[:37], fold_of[37:])
    assert {int(count) for count in np.bincount(fold_of)} == {14, 16}
    for label in range(3):
        counts = np.bincount(fold_of[[row.label == label for row in rows]], minlength=5)
        assert counts.max() - counts.min() <= 2
    assert np.array_equal(cross_fit.folds(rows[::-1], 5)[::-1], fold_of)  # whatever the order


def test_a_teacher_of_a_fold_reads_the_other_rows_alone(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attend("knowledge_base.values=out_of_fold", "knowledge_base.folds=3", "teacher.optim.epochs=0.5")
    read: dict[str, list[set[str]]] = {"fold-train": [], "fold": []}
    tokens = Run.tokens

    def noted(self: Run, name: str, examples: Any, tokenizer: Any) -> Any:
        read[name].append({example.id for example in examples})
        return tokens(self, name, examples, tokenizer)

    monkeypatch.setattr(Run, "tokens", noted)
    base = build_kb.of_task(run)
    ids = {row.id for row in run.task.train}
    assert len(read["fold"]) == 3
    assert set.union(*read["fold"]) == ids
    for learned, asked in zip(read["fold-train"], read["fold"], strict=True):
        assert learned == ids - asked
    taught = training_base(run, outputs(run))
    assert base.ids == taught.ids
    assert np.array_equal(base.keys, taught.keys)  # the keys are the teacher's own
    assert np.abs(base.values - taught.values).max() > 0.01
    np.testing.assert_allclose(base.values.sum(1), 1, atol=1e-6)
    read["fold"].clear()
    again = build_kb.of_task(run)
    assert np.array_equal(again.values, base.values)
    assert read["fold"] == []  # they are trained once


def test_a_killed_run_goes_on_with_the_fold_it_was_at(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attend("knowledge_base.folds=3")
    asked: list[int] = []

    def logits_of_fold(run: Run, fold_of: Any, fold: int, scratch: Path) -> Any:
        asked.append(fold)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return np.flatnonzero(fold_of == fold)[:, None].astype(np.float32)

    monkeypatch.setattr(cross_fit, "logits_of_fold", logits_of_fold)
    with pytest.raises(KeyboardInterrupt):
        cross_fit.out_of_fold_logits(run)
    found = cross_fit.out_of_fold_logits(run)
    assert asked == [0, 1, 1, 2]
    assert found[:, 0].tolist() == list(range(len(run.task.train)))  # every row has its own answer


# Targets from neighbours


def test_soft_labels_are_mixed_with_those_of_other_rows(attend: Callable[..., Run]) -> None:
    settings = "{soft_labels: 1, retrieved_share: 0.4, retrieved_k: 3, retrieved_temperature: 0.2}"
    run = attend(f"distill.task.terms={settings}")
    assert retrieves(run.recipe)
    assert record_answers.inputs(run)["neighbours"]
    logits = np.random.default_rng(0).normal(size=(len(run.task.train), 2)).astype(np.float32)
    np.save(outputs(run) / "task" / "logits.npy", logits)  # unlike those of its neighbours
    record_answers.record_neighbours(run, outputs(run))
    course = outline(run.recipe, CORPUS)[-1]
    batch = tokens_of(run, "task", run.tokenizer).batch([5, 0, 17])
    told = teacher_for(run, course)(batch)
    base = training_base(run, outputs(run))
    plain = teacher_for(run, replace(course, training=attend().recipe.distill.task))(batch)
    assert torch.equal(told.embedding, plain.embedding)
    for row, name in enumerate(batch.ids):
        place = base.ids.index(name)
        similarities = torch.tensor(base.keys @ base.keys[place])
        similarities[place] = -torch.inf
        near = similarities.topk(3)
        average = (near.values / 0.2).softmax(0) @ torch.tensor(base.values)[near.indices]
        expected = 0.6 * torch.tensor(base.values[place]) + 0.4 * average
        torch.testing.assert_close(told.logits[row].softmax(0), expected, rtol=1e-4, atol=1e-5)


def test_a_row_never_finds_itself_nor_its_text_again(attend: Callable[..., Run]) -> None:
    run = attend()
    rows = [*run.task.train[:-1], replace(run.task.train[-1], text=run.task.train[0].text.upper())]
    run.__dict__["task"] = replace(run.task, train=rows)
    record_answers.record_neighbours(run, outputs(run))
    found = load_file(outputs(run) / "neighbours.safetensors")
    positions = found["positions"].numpy()
    assert positions.shape == (len(rows), 32)
    assert not (positions == np.arange(len(rows))[:, None]).any()
    assert len(rows) - 1 not in positions[0]
    assert 0 not in positions[-1]


def test_all_keys_of_the_training_rows_are_compared_with(attend: Callable[..., Run]) -> None:
    run = attend()
    terms = Terms(neighbours=1, neighbours_scope="knowledge_base")
    weights = load_file(outputs(run) / "projection.safetensors")
    objective = objective_for(run, terms, (weights["weight"], weights["bias"]))
    assert torch.equal(objective.neighbours.keys, torch.tensor(training_base(run, outputs(run)).keys))
    assert len({*objective.neighbours.names.tolist()}) == len(run.task.train)


def test_a_student_killed_with_a_queue_and_targets_ends_as_one_that_was_not(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = "{soft_labels: 1, neighbours: 1, neighbours_scope: queue, neighbours_queue: 100, retrieved_share: 0.5}"
    run = attend(
        "distill.corpus.optim.epochs=0",
        f"distill.task={{terms: {terms}, optim: {{epochs: 1, batch_size: 16, checkpoint_every: 4}}}}",
    )
    record_answers.record_neighbours(run, outputs(run))
    hear, left = teacher_for, [5]

    def dying(run: Run, course: Course) -> Any:
        teacher = hear(run, course)

        def heard(batch: Batch) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return teacher(batch)

        return heard

    with monkeypatch.context() as patch:
        patch.setattr(distill, "teacher_for", dying)
        with pytest.raises(KeyboardInterrupt):
            distill.teach(run.recipe, run.folder, CORPUS, 0, lambda done: None)
    told: list[int] = []
    distill.teach(run.recipe, run.folder, CORPUS, 0, told.append)
    assert told[0] == 5
    resumed = load_file(folder_of(run, CORPUS, 0) / "model.safetensors")
    shutil.rmtree(run.folder / "students")
    distill.teach(run.recipe, run.folder, CORPUS, 0, lambda done: None)
    whole = load_file(folder_of(run, CORPUS, 0) / "model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


# What is refused before a model is loaded

SOFT = "distill.task.terms={soft_labels: 1, neighbours: 1, "
REFUSED = {
    "knowledge_base.projection.kind=identity": "kind=identity needs a student as wide",
    "knowledge_base.projection.kind=pca": "kind=pca needs a student that is no wider",
    f"{SOFT}neighbours_scope: queue, neighbours_queue: 15}}": r"task.terms.neighbours_queue=15 must hold a batch \(16",
    f"{SOFT}neighbours_scope: queue, neighbours_queue: 145}}": r"neighbours_queue=145 .* no text twice \(there are 144",
    "distill.task.terms={hidden: 1, retrieved_share: 0.5}": r"distill\.task\.terms\.retrieved_share=0\.5 .*no soft lab",
    "distill.corpus.terms={soft_labels: 1, retrieved_share: 0.5}": r"distill\.corpus\.terms\.retr.* reads other text",
    "knowledge_base.values=out_of_fold": "teacher.fine_tuned says",
}


def check_all(run: Run) -> None:
    check_lessons(run)
    build_kb.check(run)


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_had_is_refused_by_its_key(attend: Callable[..., Run], override: str) -> None:
    wide = ["student.hidden_size=64"] if "projection" in override else ["teacher.fine_tuned=true"]
    run = attend(override, *wide)
    with pytest.raises(UsageError, match=REFUSED[override]):
        check_all(run)


@pytest.mark.parametrize(
    "override",
    [
        "knowledge_base.projection.kind=random",
        f"{SOFT}neighbours_scope: queue, neighbours_queue: 16}}",
        f"{SOFT}neighbours_scope: queue, neighbours_queue: 144}}",
        f"{SOFT}neighbours_scope: knowledge_base, neighbours_own: false}}",
        "distill.task.terms={soft_labels: 1, retrieved_share: 0.5}",
    ],
)
def test_what_can_be_had_passes(attend: Callable[..., Run], override: str) -> None:
    check_all(attend(override))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": "gold", "texts": "both"}, "the corpus has no gold labels"),
        ({"values": "out_of_fold", "texts": "corpus"}, "is about training rows"),
        ({"corpus_min_confidence": 0.5}, "is about texts of the corpus"),
        ({"folds": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_of_a_book_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeBaseSettings.model_validate(settings)


def test_a_score_has_no_confidence(attend: Callable[..., Run]) -> None:
    for override in (BOTH, "knowledge_base.corpus_min_confidence=0.5"), ("knowledge_base.skip=safe",):
        run = attend(*override)
        run.__dict__["task"] = replace(run.task, kind="regression", labels=None)
        with pytest.raises(UsageError, match="is a regression, whose"):
            build_kb.check(run)


def test_lone_sentences_are_no_book_for_pairs(attend: Callable[..., Run]) -> None:
    run = attend(BOTH, "corpus.form=single")
    run.__dict__["task"] = replace(run.task, pair=True)
    with pytest.raises(UsageError, match=r"knowledge_base\.texts=both: .* corpus\.form=single makes none"):
        build_kb.check(run)
