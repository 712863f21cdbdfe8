"""The bench of the book: arms take turns over the same texts, overheads are ratios, and forms are judged alike."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from openbook.answers import Answers
from openbook.bench import book, book_accuracy, book_edits, book_targets, measure, synthetic_book
from openbook.config import StudentSettings, UsageError
from openbook.knowledge_base.index import open_index, tie_aware_recall
from openbook.types import Example

TINY = {"tiny": StudentSettings(architecture="bert", layers=1, hidden_size=16, heads=2, intermediate_size=32)}
TEXTS = [f"the film was {word}" for word in ("good", "bad", "fine", "poor", "great", "dull")]


class Here:
    """A rival in this process: starting others costs seconds."""

    def __init__(self, name: str, open_: Callable[..., Callable[[Any], Any]], *args: Any) -> None:
        self.name, self.answer = name, open_(*args)

    def ask(self, request: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        return time.perf_counter() - started, self.answer(request)

    def close(self) -> int:
        return 1


def accuracy_of_few(k: int, entries: int = 300, width: int = 64, only: Sequence[str] = ()) -> dict[str, Any]:
    return book_accuracy.accuracy_of_synthetic(k, entries, width, only)


@pytest.fixture(scope="module")
def result(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "Rival", Here)
        patch.setattr(book_edits, "Rival", Here)
        patch.setattr(book, "WARM", 1)
        patch.setattr(book, "accuracy_of_synthetic", accuracy_of_few)
        for module in (book, book_edits):
            patch.setattr(module, "open_index", partial(open_index, exact_max_bytes=40_000))
        patch.setattr(book_accuracy, "QUERIES", 20)
        patch.setattr(book_targets, "LIMITS", {("tiny", 4): -2.0, ("tiny", 1): 1e9})
        folder, calls = tmp_path_factory.mktemp("bench"), {1: 3, 4: 3}
        yield book.run(str(pretrained), TEXTS, folder, (200, 1200), TINY, calls, k=2, edited=(900, 10))


def test_every_book_is_timed_with_the_arms_that_differ(result: dict[str, Any]) -> None:
    small, large = result["timings"]
    assert set(small["batches"]["1"]) == {"alone", "exact", "policy, skipping"}
    assert set(large["batches"]["4"]) == {"alone", "exact", "policy", "policy, skipping"}
    assert large["indexes"]["policy"]["kind"] == "hnsw"
    assert large["indexes"]["policy"]["recall"] >= 0.99
    assert large["indexes"]["policy"]["bytes"] == 1200 * (400 + 16)
    assert large["book_bytes"]["fp32"] == 1200 * (4 * 16 + 8 + 4 * 2)
    arm = large["batches"]["4"]["exact"]
    assert arm["overhead_p50"] == pytest.approx(arm["p50"] / large["batches"]["4"]["alone"]["p50"] - 1)
    assert all(arm["stages"][stage] > 0 for stage in book.STAGES)
    assert large["batches"]["4"]["alone"]["stages"]["search"] == 0
    assert arm["retrieved"] == 1
    assert 0 < large["batches"]["4"]["policy, skipping"]["retrieved"] < 1


def test_recall_is_of_the_queries_that_are_asked() -> None:
    base = synthetic_book.synthetic_book(4000, 16)
    queries = synthetic_book.near(base.keys, 50)
    careless = replace(open_index(base.keys, "ivf"), efforts={32: 1})
    arm = book.Arm(base, careless, book.Retrieval(top_k=4, temperature=0.1, beta=0.5), 0.0)
    found, exact = (index.search(queries, 4) for index in (careless, open_index(base.keys)))
    assert careless.recall >= 0.99
    assert 0 < book.recall_of(arm, queries) < 0.99
    assert book.recall_of(arm, queries) == tie_aware_recall(found, exact)


def test_new_entries_are_found_after_the_edit(result: dict[str, Any]) -> None:
    assert result["edit"]["index"] == "hnsw"
    assert result["edit"]["found"] == 1
    assert result["edit"]["embed_seconds"] > 0


def test_targets_are_met_or_missed_and_shown(result: dict[str, Any]) -> None:
    met = {aim["what"]: aim["met"] for aim in result["targets"]}
    assert met["tiny, 200 entries, batch 1: overhead"] is True
    assert met["tiny, 200 entries, batch 4: overhead"] is False
    assert met["tiny, 1,200 entries: missed neighbours"] is True
    counts = [table.row_count for table in book.tables(result)]
    assert counts == [2 * (3 + 4), 2, 7, 3, 1, len(result["targets"])]


def test_what_fits_in_a_quarter_of_the_student_is_judged_for_the_largest_book_and_aimed_at(
    result: dict[str, Any],
) -> None:
    small, large = result["timings"]
    sizes = {form: large["book_bytes"][form] for form in ("fp32", "fp16", "sq8")}
    for held, form in (
        (4 * sizes["fp32"], "fp32"),
        (4 * sizes["fp32"] - 1, "fp16"),
        (4 * sizes["sq8"], "sq8"),
        (9, "sq8"),
    ):
        assert book_targets.fitting({"book_bytes": sizes, "student_bytes": held}) == form
    form = book_targets.fitting(large)
    (judged,) = result["accuracy"][1:]
    assert (judged["entries"], judged["width"]) == (1200, 16)
    assert list(judged["forms"]) == list(dict.fromkeys(["fp32", form, "24 prototypes"]))
    aims = {aim["what"]: aim["found"] for aim in result["targets"]}
    assert aims[f"tiny, 1,200 entries: bytes of {form} / student"] == pytest.approx(
        large["book_bytes"][form] / large["student_bytes"], abs=1e-4
    )
    lost = judged["forms"][form]["with_student_points_lost"]
    assert aims[f"{form} of 1,200 synthetic keys, 16 wide: points lost"] == pytest.approx(lost, abs=1e-4)


def test_adding_is_aimed_at_the_time_of_embedding(result: dict[str, Any]) -> None:
    edit = result["edit"]
    (aim,) = (aim for aim in result["targets"] if aim["what"] == "10 entries added to 900: seconds / embedding them")
    seconds = edit["add_seconds"] + edit["load_seconds"] + edit["index_seconds"]
    assert aim["found"] == pytest.approx(seconds / edit["embed_seconds"], abs=1e-4)
    assert aim["at_most"] == 1


def test_overhead_is_the_ratio_of_medians_and_not_of_means() -> None:
    calls = {
        "alone": [{"total": seconds} for seconds in (1.0, 2.0, 9.0)],
        "exact": [{"total": seconds, "search": 0.5, "retrieved": 1.0} for seconds in (1.5, 3.0, 10.0)],
    }
    told = book.summary(calls)
    assert told["exact"]["overhead_p50"] == pytest.approx(0.5)
    assert told["exact"]["p50"] == pytest.approx(3000)
    assert told["exact"]["stages"]["search"] == 500


def test_what_a_form_costs_in_accuracy_is_told_against_whole_keys() -> None:
    base = synthetic_book.synthetic_book(600, 64)
    queries = synthetic_book.near(base.keys, 80)
    gold = synthetic_book.soft_labels(queries).argmax(axis=1)
    retrieval = book.Retrieval(top_k=4, temperature=0.1, beta=1.0)
    asked = book_accuracy.Asked(queries, np.eye(2)[gold], gold, "accuracy")
    told = book_accuracy.scores(base, asked, retrieval, synthetic_book.forms_of(64))
    assert list(told) == ["fp32", "fp16", "sq8", "pca-32", "pq-32", "opq-32", "12 prototypes"]
    assert told["12 prototypes"]["bytes"] == 12 * (4 * 64 + 8 + 4 * 2 + 4)
    assert told["12 prototypes"]["recall"] is None
    assert told["12 prototypes"]["neighbours_points_lost"] > 0
    assert told["fp32"]["recall"] == 1
    assert told["fp32"]["neighbours_points_lost"] == 0
    assert told["pca-32"]["recall"] < told["fp16"]["recall"]
    for one in told.values():
        assert one["with_student"] == 1, "beta 1 is the student, who is right here"
        lost = 100 * (told["fp32"]["neighbours"] - one["neighbours"])
        assert one["neighbours_points_lost"] == pytest.approx(lost)
    assert 0.5 < told["fp32"]["neighbours"] <= 1


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_book_that_tuning_closed_is_judged_as_if_it_were_opened(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed, every form would lose nothing."""
    base = synthetic_book.synthetic_book(600, 64)
    queries = synthetic_book.near(base.keys, 80)
    gold = synthetic_book.soft_labels(queries).argmax(axis=1)
    kept = {"retrieval": {"top_k": 1, "temperature": 0.02, "beta": beta}}
    rows = [Example(f"row/{place}", f"text {place}", label=int(label)) for place, label in enumerate(gold)]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]  # of a student with its own projection
    heard = Answers(np.zeros((80, 2), np.float32), queries @ turn, gold)
    opened = SimpleNamespace(
        base=replace(base, manifest=base.manifest | kept),
        kind="classification",
        read=lambda texts: heard,
        projection=(turn, np.zeros(64)),
    )
    task = SimpleNamespace(holdout=rows, kind="classification", metric="accuracy")
    monkeypatch.setattr(book_accuracy, "load_recipe", lambda path: None)
    monkeypatch.setattr(book_accuracy, "Run", lambda recipe, folder: SimpleNamespace(task=task))
    monkeypatch.setattr(book_accuracy, "OpenBook", SimpleNamespace(from_pretrained=lambda folder: opened))
    found = book_accuracy.accuracy_of_run(Path("runs/it"))
    assert found["closed"] == (beta == 1)
    assert found["retrieval"]["beta"] < 1
    assert (found["retrieval"]["top_k"] > 1) == (beta == 1), "not the one neighbour of a book that nobody opens"
    assert found["forms"]["fp32"]["neighbours"] > 0.7, "it asks by the projection"
    assert any(form["with_student_points_lost"] for form in found["forms"].values())
    table = book.quality_of(found)
    assert ("tuning had closed the book" in str(table.caption)) == (beta == 1)


def test_the_shapes_are_those_that_are_named() -> None:
    quickstart = yaml.safe_load(Path("recipes/quickstart.yaml").read_text(encoding="utf-8"))["student"]
    own = book.SHAPES["3 x 128"].model_dump()
    assert {name: own[name] for name in ("layers", "hidden_size", "heads")} == {
        name: quickstart[name] for name in ("layers", "hidden_size", "heads")
    }
    assert own["architecture"] == StudentSettings(**quickstart).architecture
    wide = book.SHAPES["6 x 768"]
    assert (wide.layers, wide.hidden_size, wide.heads) == (6, 768, 12)


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="6 texts.*batches of 32"):
        book.run("nowhere", TEXTS, tmp_path)


def test_children_take_the_threads_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with measure.threads_of_children(3):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
