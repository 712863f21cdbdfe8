"""A book that is edited while its student is in service: each edit counts from the next prediction on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax
from torch import nn

from openbook import keys
from openbook.backends.pytorch import TorchBackend
from openbook.book_teacher import OUTPUTS, BookTeacher
from openbook.checkpoint import read_json, write_json
from openbook.config import StudentSettings, UsageError
from openbook.keys import projection_part
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.rules import Rules
from openbook.knowledge_base.search import normalise
from openbook.metrics import score
from openbook.models.encoder import Encoder, Head
from openbook.models.student import new_student
from openbook.predictor import OpenBook
from openbook.student_keys import rekeyed, rows_of
from openbook.types import KnowledgeBase

LABELS = ("bad", "good")
NEW = ["the film was quite new", "a thing nobody saw", "it seemed so"]


def encoder(tokenizer: Any, width: int, seed: int) -> Encoder:
    settings = StudentSettings(architecture="bert", layers=1, hidden_size=width, heads=2)
    model = new_student(settings, Head(LABELS), tokenizer, len(tokenizer), positions=24, seed=seed)
    for place, weight in enumerate(model.parameters()):
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(100 * seed + place))
    model.model.config.key_space = "space"
    return model


@pytest.fixture
def run(tokenizer: Any, tmp_path: Path) -> Path:
    """The folder of a finished run, the teacher's map to keys being a part of it."""
    random = np.random.default_rng(0)
    keys = normalise(random.normal(size=(20, 16))).astype(np.float32)
    values = np.eye(2, dtype=np.float32)[random.integers(0, 2, 20)]
    names = tuple(f"t/train/{row}" for row in range(20))
    retrieval = {"top_k": 1, "temperature": 0.1, "beta": 0.0}
    about = {"kind": "classification", "labels": LABELS, "key_space": "space", "retrieval": retrieval}
    base = KnowledgeBase(keys, values, names, tuple(f"text of {name}" for name in names), about)
    OpenBook(TorchBackend(encoder(tokenizer, 16, 1), tokenizer), base).save_pretrained(tmp_path)
    encoder(tokenizer, 32, 2).save(tmp_path / "teacher", tokenizer)
    (tmp_path / OUTPUTS).mkdir()
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    save_file({"weight": weight, "bias": torch.zeros(16)}, tmp_path / OUTPUTS / "projection.safetensors")
    return tmp_path


@pytest.fixture
def without_teacher(run: Path) -> Path:
    """The folder of a student that has no teacher any more, and finds every entry itself."""
    OpenBook.from_pretrained(run).rekey()
    (run / "teacher" / "config.json").unlink()
    return run


def test_what_is_remembered_is_found_by_the_next_prediction(without_teacher: Path) -> None:
    """By the student's own embedding, a remembered text is its own nearest neighbour."""
    book, other = OpenBook.from_pretrained(without_teacher), OpenBook.from_pretrained(without_teacher)
    for label in LABELS:
        edit = book.remember(NEW[0], label, ids=[f"my/{label}"])
        assert (edit.added, edit.entries) == (1, 21)
        for one in (book, other):
            assert one.predict(NEW[0]) == label
            nearest = one.explain(NEW[0]).evidence.neighbours[0]
            assert (nearest.id, nearest.text, nearest.origin) == (f"my/{label}", NEW[0], "remembered")
        book.forget(f"my/{label}")
    assert other.explain(NEW[0]).evidence.neighbours[0].id.startswith("t/train/")


def test_a_text_of_the_book_can_be_asked_without_its_own_entry(without_teacher: Path) -> None:
    """As if it had never been kept; whatever its case and spacing, and whatever else says the same."""
    book = OpenBook.from_pretrained(without_teacher)
    texts = [*NEW, "nothing of the book"]
    before = book.predict_proba(texts)
    book.remember(NEW, ["good", "bad", "good"], ids=list("abc"))
    book.remember(NEW[0].upper().replace(" ", "  "), "bad", ids=["d"])
    book.remember(("one", "other"), "good", ids=["e"])
    assert np.abs(book.predict_proba(NEW) - before[:3]).max() > 0.1
    one_out = book.predict_proba(texts, leave_out=True)
    for place, ids in enumerate((["a", "d"], ["b"], ["c"], [])):
        np.testing.assert_allclose(one_out[place], book.predict_proba(texts[place], leave_out=ids), atol=1e-6)
        found = {one.id for one in book.explain(texts[place], leave_out=True).evidence.neighbours}
        assert not found & set(ids)
    np.testing.assert_array_equal(book.predict_proba(texts, leave_out=list("abcde")), before)
    assert [book.predict(NEW[0]), book.predict(NEW[0], leave_out="a")] == ["good", "bad"]
    assert book.explain(("one", "other"), leave_out=True).evidence.neighbours[0].id != "e"
    with pytest.raises(UsageError, match="leave_out: 'nowhere' is no entry of the book"):
        book.predict(texts, leave_out=["a", "nowhere"])
    assert OpenBook(book.backend).predict(texts, leave_out=True) == OpenBook(book.backend).predict(texts)


def test_of_a_closed_book_an_explanation_leaves_out_as_well(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    book.remember(NEW[0], "good", ids=["a"])
    editing.settle(without_teacher / "knowledge_base", {"top_k": 1, "temperature": 0.1, "beta": 1.0})
    assert book.explain(NEW[0]).evidence.neighbours[0].id == "a"
    assert book.explain(NEW[0], leave_out=True).evidence.neighbours[0].id != "a"


def another(folder: Path, tokenizer: Any, seed: int = 7, labels: tuple[str, ...] = LABELS) -> Path:
    """The run of another domain: two texts, found by a student of its own."""
    about = {"kind": "classification", "labels": labels, "key_space": "elsewhere", "keyed_by": "student"}
    keys, values = np.eye(2, 16, dtype=np.float32), np.eye(2, dtype=np.float32)
    base = KnowledgeBase(keys, values, ("x/0", "x/1"), tuple(NEW[:2]), about, origins=("other", "other"))
    store.save(base, folder / "knowledge_base")
    return folder


def test_another_domain_is_merged_and_swapped_where_the_student_finds_it(without_teacher: Path, tokenizer: Any) -> None:
    """Its keys are another student's; this one finds its texts itself."""
    book, other = OpenBook.from_pretrained(without_teacher), another(without_teacher / "other", tokenizer)
    assert book.base is not None
    before = book.base
    assert {*book.diff(other).added} == {"x/0", "x/1"}
    merged = book.merge(other)
    assert (merged.added, merged.entries) == (2, 22)
    assert book.predict(NEW[:2]) == ["bad", "good"]
    assert book.explain(NEW[0]).evidence.neighbours[0].similarity == pytest.approx(1, abs=1e-6)
    with pytest.raises(UsageError, match="2 of 2 are taken"):
        book.merge(str(other / "knowledge_base"))
    swapped = book.swap(other)
    assert (swapped.entries, swapped.stale) == (2, True)
    assert book.base.ids == ("x/0", "x/1")
    assert book.predict(NEW[:2]) == ["bad", "good"]
    assert OpenBook.from_pretrained(without_teacher).predict(NEW[:2]) == ["bad", "good"]
    book.swap(before)
    assert book.base.ids == before.ids
    assert not any((book.diff(before).added, book.diff(before).removed, book.diff(before).rewritten))


def test_what_does_not_fit_is_neither_merged_nor_swapped(run: Path, tokenizer: Any) -> None:
    book = OpenBook.from_pretrained(run)
    for edit in (book.merge, book.swap):
        with pytest.raises(UsageError, match="key_space of the entries is 'elsewhere'"):
            edit(another(run / "other", tokenizer))
    book.rekey()
    for edit in (book.merge, book.swap):
        with pytest.raises(UsageError, match=r"labels of the entries is \['good', 'bad'\]"):
            edit(another(run / "other", tokenizer, labels=LABELS[::-1]))
        with pytest.raises(UsageError, match=r"manifest.json is missing"):
            edit(run / "nowhere")
    assert book.base is not None
    assert len(book.base.ids) == 20


def test_a_book_is_searched_by_words_and_compacted(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    book.remember([NEW[0], "quite another"], ["good", "bad"], ids=["a", "b"], weight=2)
    found = book.find("QUITE")
    assert [(one.id, one.told, one.origin, one.weight) for one in found] == [
        ("a", "good 1.00", "remembered", 2), ("b", "bad 1.00", "remembered", 2),
    ]  # fmt: skip
    assert (found[0].text, max(found[0].value.values())) == (NEW[0], 1)
    assert book.find("t/train/7")[0].origin == "train"
    book.forget(["a"])
    edit = book.compact("fp16")
    assert (edit.what, edit.entries) == ("compact", 21)
    assert book.base is not None
    assert book.base.manifest["form"] == "fp16"
    assert [one.id for one in book.find("quite")] == ["b"]


def test_an_index_is_built_anew_where_keys_are(without_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    monkeypatch.setattr("openbook.predictor.build_index", built.append)
    book = OpenBook.from_pretrained(without_teacher)
    assert book.base is not None
    for edit in (book.compact, book.rekey, lambda: book.swap(book.base)):
        edit()
    assert built == [without_teacher / "knowledge_base"] * 3


def test_a_label_is_corrected_without_a_training(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    book.remember(NEW, ["good", "bad", "good"])
    ids = [one.evidence.neighbours[0].id for one in book.explain(NEW)]
    assert book.predict(NEW) == ["good", "bad", "good"]
    book.relabel(ids, ["bad", "bad", "bad"])
    assert book.predict(NEW) == ["bad", "bad", "bad"]


def test_the_teacher_finds_the_place_and_names_the_label_where_it_is_at_hand(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    teacher = book.teacher()
    assert teacher is not None
    book.remember(NEW)
    assert book.base is not None
    np.testing.assert_allclose(book.base.values[-3:], teacher.predict_proba(NEW), atol=1e-6)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)).numpy()
    np.testing.assert_allclose(book.base.keys[-3:], normalise(teacher.read(NEW).embedding @ weight.T), atol=1e-5)


def test_what_the_teacher_says_is_as_soft_as_the_books_other_values(run: Path) -> None:
    base = store.load(run / "knowledge_base")
    store.save(replace(base, manifest={**base.manifest, "value_temperature": 2.0}), run / "knowledge_base")
    book = OpenBook.from_pretrained(run)
    teacher = book.teacher()
    assert teacher is not None
    book.remember(NEW)
    assert book.base is not None
    np.testing.assert_allclose(book.base.values[-3:], softmax(teacher.read(NEW).logits / 2, axis=1), atol=1e-6)


@pytest.fixture
def known(run: Path) -> Path:
    """A run whose book says what it was made from."""
    teacher = BookTeacher.beside(run)
    assert teacher is not None
    base = store.load(run / "knowledge_base")
    parts = {**teacher.parts, **projection_part(run / OUTPUTS)}
    store.save(replace(base, manifest={**base.manifest, "made_from": parts}), run / "knowledge_base")
    return run


def other_projection(run: Path, tokenizer: Any, other: Any) -> None:
    save_file({"weight": torch.ones(16, 32), "bias": torch.zeros(16)}, run / OUTPUTS / "projection.safetensors")


def other_weights(run: Path, tokenizer: Any, other: Any) -> None:
    encoder(tokenizer, 32, 9).save(run / "teacher", tokenizer)


def other_words(run: Path, tokenizer: Any, other: Any) -> None:
    other.save_pretrained(run / "teacher")


def shorter_texts(run: Path, tokenizer: Any, other: Any) -> None:
    path = run / "teacher" / "tokenizer_config.json"
    write_json(path, read_json(path) | {"model_max_length": 7})


def other_labels(run: Path, tokenizer: Any, other: Any) -> None:
    path = run / "teacher" / "config.json"
    write_json(path, read_json(path) | {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_projection, r"projection: what lies beside the book is .{12}\.\.\., but the book was made with"),
        (other_weights, "teacher: what lies beside the book is"),
        (other_words, "tokenizer: what lies beside the book is"),
        (shorter_texts, "max_length: what lies beside the book is '7', but the book was made with '24'"),
        (other_labels, r"labels: what lies beside the book is \['good', 'bad'\], but .* with \['bad', 'good'\]"),
    ],
)
def test_another_teacher_than_the_books_finds_and_labels_nothing(
    known: Path, tokenizer: Any, other_tokenizer: Any, change: Any, told: str
) -> None:
    """Its keys would lie in another space, where queries find them by chance."""
    change(known, tokenizer, other_tokenizer)
    book = OpenBook.from_pretrained(known)
    with pytest.raises(UsageError, match=f"{told}.*nothing was changed"):
        book.remember(NEW, ["good", "bad", "good"])
    assert book.base is not None
    assert len(book.base.ids) == 20


def test_a_projection_that_changes_while_the_teacher_is_loaded_is_seen(known: Path, tokenizer: Any) -> None:
    book = OpenBook.from_pretrained(known)
    assert book.remember(NEW[:1]).entries == 21
    other_projection(known, tokenizer, None)
    with pytest.raises(UsageError, match="projection: what lies beside the book"):
        book.remember(NEW[1:])


def test_where_the_student_finds_another_projection_does_not_matter_and_another_teacher_does(
    known: Path, tokenizer: Any
) -> None:
    OpenBook.from_pretrained(known).rekey()
    other_projection(known, tokenizer, None)
    assert OpenBook.from_pretrained(known).remember(NEW[:1]).entries == 21
    other_weights(known, tokenizer, None)
    book = OpenBook.from_pretrained(known)
    assert book.remember(NEW[1], "good").entries == 22
    with pytest.raises(UsageError, match="teacher: what lies beside the book"):
        book.remember(NEW[2])


def test_a_teacher_is_digested_once(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = keys.digest_file
    monkeypatch.setattr(keys, "digest_file", lambda path: read.append(path.name) or digest(path))
    book = OpenBook.from_pretrained(known)
    for text in NEW:
        book.remember(text)
    assert read == ["model.safetensors", *["projection.safetensors"] * 3]


def test_a_book_of_the_teachers_keys_takes_nothing_without_the_teacher(run: Path) -> None:
    """The student's own embeddings would lie nearer to every query than any key of the teacher's."""
    (run / "teacher" / "config.json").unlink()
    book = OpenBook.from_pretrained(run)
    before = book.predict_proba(NEW)
    with pytest.raises(UsageError, match="has no teacher/ to find these texts.*--keys student"):
        book.remember(NEW, ["good", "bad", "good"])
    np.testing.assert_array_equal(book.predict_proba(NEW), before)


def test_after_rekeying_every_text_finds_its_own_entry(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    edit = book.rekey()
    assert (edit.entries, edit.added, edit.stale) == (20, 0, True)
    assert book.base is not None
    for text, id in zip(book.base.texts, book.base.ids, strict=True):
        nearest = book.explain(text).evidence.neighbours[0]
        assert nearest.similarity == pytest.approx(1, abs=1e-6)
        assert nearest.text == text, id


def test_a_compact_book_is_rekeyed_in_full(run: Path) -> None:
    """Its keys were projected; the student's own are not."""
    editing.compact(run / "knowledge_base", "pca-8")
    book = OpenBook.from_pretrained(run)
    book.rekey()
    assert book.base is not None
    assert book.base.keys.shape == (20, 16)
    assert book.explain(book.base.texts[3]).evidence.neighbours[0].similarity == pytest.approx(1, abs=1e-6)


def test_a_book_of_pairs_is_read_as_pairs() -> None:
    base = KnowledgeBase(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), ("a", "b"), ("one\ttwo", "x\ty"), {})
    assert rows_of(base) == [("one", "two"), ("x", "y")]
    assert rows_of(replace(base, manifest={"pair": False})) == ["one\ttwo", "x\ty"]


def test_keys_of_entries_that_changed_meanwhile_are_refused(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    assert book.base is not None
    made = rekeyed(book.base, book.backend)
    book.forget("t/train/7")
    with pytest.raises(UsageError, match="was edited while its keys were made; nothing was changed"):
        editing.rekey(run / "knowledge_base", made)


def test_a_book_without_texts_cannot_be_rekeyed(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    assert book.base is not None
    with pytest.raises(UsageError, match="keeps no texts that the student could read"):
        rekeyed(replace(book.base, texts=("",) * 20), book.backend)


def test_a_book_of_one_students_keys_is_refused_by_another(run: Path, tokenizer: Any) -> None:
    OpenBook.from_pretrained(run).rekey()
    OpenBook.from_pretrained(run)
    encoder(tokenizer, 16, 5).save(run / "student", tokenizer)
    with pytest.raises(UsageError, match="weights are others now; let these"):
        OpenBook.from_pretrained(run)


def test_a_book_of_another_teacher_or_tokenizer_is_refused_by_name(known: Path, tokenizer: Any) -> None:
    """Also where the entries were found by the student that was taught by it."""
    parts = store.load(known / "knowledge_base").manifest["made_from"]
    student = encoder(tokenizer, 16, 1)
    student.model.config.made_from = {**parts, "tokenizer": "f" * 32}
    student.model.config.key_space = "elsewhere"
    student.save(known / "student", tokenizer)
    with pytest.raises(UsageError, match="^tokenizer of the knowledge base is .* the student's is 'ffff"):
        OpenBook.from_pretrained(known)
    rekey = rekeyed(store.load(known / "knowledge_base"), TorchBackend.load(known / "student"))
    editing.rekey(known / "knowledge_base", rekey)
    assert OpenBook.from_pretrained(known).base is not None  # whatever it was made from, this student found it
    student = encoder(tokenizer, 16, 5)
    student.model.config.made_from = {**parts, "tokenizer": "f" * 32, "teacher": "e" * 32}
    student.save(known / "student", tokenizer)
    with pytest.raises(UsageError, match=r"others now \(and they were made from another teacher, another tokenizer\)"):
        OpenBook.from_pretrained(known)


def test_the_teacher_labels_what_the_student_finds(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    teacher = book.teacher()
    book.rekey()
    book.remember(NEW)
    assert teacher is not None
    assert book.base is not None
    np.testing.assert_allclose(book.base.values[-3:], teacher.predict_proba(NEW), atol=1e-6)
    np.testing.assert_allclose(book.base.keys[-3:], normalise(book.read(NEW).embedding), atol=1e-6)


def test_a_weighty_entry_counts_as_much_as_several(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    book.remember(NEW[0], "good", ids=["light"])
    book.remember(NEW[0], "bad", ids=["heavy"], weight=3)
    assert book.base is not None
    assert book.base.weights is not None
    assert book.base.weights[-2:].tolist() == [1, 3]
    editing.settle(without_teacher / "knowledge_base", {"top_k": 2, "temperature": 0.1, "beta": 0.0})
    np.testing.assert_allclose(book.predict_proba(NEW[0]), [0.75, 0.25], atol=1e-6)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="weight=.*a number above 0"):
            book.remember("another", "bad", weight=weight)


def test_pairs_are_remembered_as_pairs(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    book.remember([("one text", "its other"), ("one text", "another")], ["good", "bad"])
    assert book.predict([("one text", "its other"), ("one text", "another")]) == ["good", "bad"]
    assert book.explain(("one text", "another")).evidence.neighbours[0].text == "one text\tanother"


def test_tuning_opens_a_book_that_helps_and_closes_one_that_does_not(without_teacher: Path) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    texts = [f"{word} {number}" for number in range(20) for word in ("fine", "poor")]
    alone = OpenBook(book.backend).predict(texts)
    wrong = ["good" if label == "bad" else "bad" for label in alone]
    book.remember(texts, wrong)
    again = [f"{text} once" for text in texts]
    tuned = book.tune(again, wrong)
    assert tuned.kept
    assert tuned.score > tuned.baseline_score
    assert book.book is not None
    assert book.book.retrieval == tuned.retrieval
    assert not book.tune(again, OpenBook(book.backend).predict(again)).kept
    assert book.predict(texts) == alone


@pytest.fixture
def outnumbered(without_teacher: Path) -> tuple[OpenBook, list[str], list[str]]:
    """A book whose training entries are nearer to some texts than what was remembered, and wrong; texts and labels."""
    book = OpenBook.from_pretrained(without_teacher)
    texts = [f"{word} {number}" for number in range(20) for word in ("fine", "poor")]
    alone = OpenBook(book.backend).predict(texts)
    labels = ["good" if label == "bad" else "bad" for label in alone]
    again = [f"{text} once" for text in texts]
    keys = normalise(book.read(again).embedding).astype(np.float32)
    base = book.base
    assert base is not None
    ids = tuple(f"near/{place}" for place in range(40))
    wrong = KnowledgeBase(keys, book.values(alone, 40), ids, tuple(f"{text} so" for text in again), base.manifest)
    editing.add(without_teacher / "knowledge_base", wrong)
    book.remember(texts, labels, weight=2)
    return book, again, labels


def test_tuning_chooses_how_much_counts_what_was_remembered(
    outnumbered: tuple[OpenBook, list[str], list[str]], without_teacher: Path
) -> None:
    book, texts, labels = outnumbered
    plain = book.tune(texts, labels)
    assert plain.weight is None
    assert set(book.base.weights[-40:]) == {2}
    tuned = book.tune(texts, labels, weights=[0.5, 1000, 1])
    assert (tuned.weight, tuned.kept) == (1000, True)
    assert tuned.score > plain.score
    assert set(book.base.weights[-40:]) == {1000}
    assert set(book.base.weights[:-40]) == {1}
    assert score("accuracy", book.predict_proba(texts), book.values(labels, 40).argmax(1)) == tuned.score
    settled = editing.changes(without_teacher / "knowledge_base")[-1]
    assert (settled["what"], settled["weights"]) == ("settle", {"remembered": 1000})
    assert store.load(without_teacher / "knowledge_base").weights.tolist() == book.base.weights.tolist()
    alone = OpenBook(book.backend).predict(texts)
    closed = book.tune(texts, alone, weights=[4, 1000])
    assert (closed.kept, closed.weight, closed.reached) == (False, 4, 1.0), "of equals the first"


def test_a_weight_that_opens_the_book_is_preferred_to_one_with_a_higher_score_that_may_be_chance(
    outnumbered: tuple[OpenBook, list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    book, texts, labels = outnumbered
    one = replace(book.tune(texts, labels), baseline_score=0.5)
    trials = {4: replace(one, kept=False, score=0.9), 8: replace(one, kept=True, score=0.6)}
    monkeypatch.setattr(Rules, "tuned", lambda rules, *given: trials[given[4].weights[-1]])
    assert book.tune(texts, labels, weights=[4, 8]).weight == 8


def test_weights_that_cannot_be_chosen_from_change_nothing(
    outnumbered: tuple[OpenBook, list[str], list[str]], without_teacher: Path
) -> None:
    book, texts, labels = outnumbered
    before = book.base.manifest
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="weight=.*a number above 0"):
            book.tune(texts, labels, weights=[1, weight])
    assert book.base.manifest is before
    book.forget(book.base.ids[-40:])
    with pytest.raises(UsageError, match=r"weight=8: no entry of the book is remembered, so there is nothing to weigh"):
        book.tune(texts, labels, weights=[8])


def test_tuning_takes_the_entries_as_often_as_they_are_there(without_teacher: Path) -> None:
    """How often entries of the corpus count was settled when the book was built: tuning does not choose it again."""
    book = OpenBook.from_pretrained(without_teacher)
    assert book.base is not None
    store.save(replace(book.base, origins=("corpus",) * 20), without_teacher / "knowledge_base")
    tuned = book.tune(NEW, ["good", "bad", "good"])
    assert {cell.omega for cell in tuned.table} == {1.0}
    for metric in ("accurracy", "pearson"):
        with pytest.raises(
            UsageError, match=f"metric='{metric}' is unknown in classification; choose from accuracy, f1"
        ):
            book.tune(NEW, ["good", "bad", "good"], metric=metric)


def ruled(run: Path, rules: Rules) -> OpenBook:
    """The book of a run that was told how it was tuned."""
    base = store.load(run / "knowledge_base")
    store.save(replace(base, manifest={**base.manifest, "tuning": rules.to_manifest()}), run / "knowledge_base")
    return OpenBook.from_pretrained(run)


def test_tuning_goes_by_the_metric_of_the_recipe(without_teacher: Path) -> None:
    labels = ["good", "bad", "good"]
    for metric in ("accuracy", "matthews_correlation"):
        book = ruled(without_teacher, Rules.of(metric, "constant", "none", ()))
        said = OpenBook(book.backend).predict_proba(NEW)
        gold = np.array([LABELS.index(label) for label in labels])
        assert book.tune(NEW, labels).baseline_score == pytest.approx(score(metric, said, gold))
        assert book.tune(NEW, labels, "f1").baseline_score == pytest.approx(score("f1", said, gold))


def test_tuning_keeps_the_mode_and_the_skip_of_the_recipe(without_teacher: Path) -> None:
    book = ruled(without_teacher, Rules.of("accuracy", "constant", "safe", ()))
    texts = [f"{word} {number}" for number in range(20) for word in ("fine", "poor")]
    wrong = ["good" if label == "bad" else "bad" for label in OpenBook(book.backend).predict(texts)]
    book.remember(texts, wrong)
    assert book.tune([f"{text} once" for text in texts], wrong).kept
    assert book.book is not None
    assert book.book.retrieval.skip == "safe"


def test_tuning_on_what_is_reported_is_refused_or_written_down(without_teacher: Path) -> None:
    book = ruled(without_teacher, Rules.of("accuracy", "constant", "none", [NEW[1].upper()]))
    assert book.base is not None
    before = book.base.manifest
    with pytest.raises(UsageError, match="1 of 3 examples to tune on are in the reported split"):
        book.tune(NEW, ["good", "bad", "good"])
    assert book.base.manifest is before
    assert not book.tune(NEW[::2], ["good", "bad"]).on_reported_split
    assert book.base.manifest["tuned_on"] == "2 texts of one's own"
    assert book.tune(NEW, ["good", "bad", "good"], reported_split=True).on_reported_split
    assert book.base.manifest["tuned_on"] == "3 texts of one's own, some of the reported split"


def test_another_domain_does_not_change_how_a_book_is_tuned(without_teacher: Path) -> None:
    rules = Rules.of("f1", "constant", "safe", NEW)
    base = ruled(without_teacher, rules).base
    assert base is not None
    other = replace(base, manifest={**base.manifest, "tuning": Rules.of("accuracy", "gate", "none", ()).to_manifest()})
    editing.swap(without_teacher / "knowledge_base", other)
    assert Rules.from_manifest(store.load(without_teacher / "knowledge_base").manifest) == rules


@pytest.mark.parametrize(
    ("labels", "ids", "told"),
    [
        (["good", "fine", "bad"], None, "label 1 is 'fine'; the student knows bad, good"),
        (["good"], None, "3 texts or ids; give as many labels"),
        ("good", None, "3 texts or ids; give as many labels"),
        (None, None, "has no teacher/ to label these texts with; give labels"),
        (["good"] * 3, ["a", "b", "a"], "'a'"),
        (["good"] * 3, ["a", "b", "t/train/3"], "taken .*t/train/3"),
    ],
)
def test_what_cannot_be_remembered_changes_nothing(without_teacher: Path, labels: Any, ids: Any, told: str) -> None:
    book = OpenBook.from_pretrained(without_teacher)
    before = book.predict_proba(NEW)
    with pytest.raises(UsageError, match=told):
        book.remember(NEW, labels, ids)
    assert book.base is not None
    assert len(book.base.ids) == 20
    np.testing.assert_array_equal(book.predict_proba(NEW), before)


def test_what_is_not_there_cannot_be_forgotten(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    with pytest.raises(UsageError, match="nowhere"):
        book.forget(["t/train/1", "nowhere"])
    assert book.base is not None
    assert len(book.base.ids) == 20


def test_a_book_in_memory_or_none_at_all_is_not_edited(run: Path) -> None:
    book = OpenBook.from_pretrained(run)
    assert book.base is not None
    for one, told in ((OpenBook(book.backend, book.base), "in memory only"),
                      (OpenBook(book.backend), "no knowledge base")):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            one.remember(NEW, ["good"] * 3)
