import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base import tuning
from openbook.knowledge_base.answering import Retrieval, answer
from openbook.knowledge_base.interpolate import scaled
from openbook.knowledge_base.search import Hits, normalise, search
from openbook.knowledge_base.tuning import (
    Choices,
    HeldOut,
    HitCache,
    cached,
    check_disjoint,
    collect,
    digest,
    pooled,
    standard_error,
    sweep,
    tune,
)
from openbook.types import KnowledgeBase


def accuracy(outputs, gold):
    return float((outputs.argmax(axis=1) == gold).mean())


def correlation(outputs, gold):
    return float(np.corrcoef(outputs[:, 0], gold)[0, 1])


def search_of(base):
    return lambda queries, k, exclude: search(queries, base.keys, k, exclude)


def held_out(gold):
    return HeldOut(
        tuple(f"h/{row}" for row in range(len(gold))), tuple(f"held out {row}" for row in range(len(gold))), gold
    )


def holding(keys, values, **more):
    names = tuple(f"t/{row}" for row in range(len(keys)))
    return KnowledgeBase(keys=keys, values=values, ids=names, texts=names, manifest={}, **more)


def random_case(seed, queries=12, entries=7, classes=2):
    random = np.random.default_rng(seed)
    keys = normalise(random.normal(size=(entries, 4))).astype(np.float32)
    values = random.dirichlet(np.ones(classes), size=entries).astype(np.float32)
    vectors = random.normal(size=(queries, 4))
    probabilities, gold = random.dirichlet(np.ones(classes), size=queries), random.integers(classes, size=queries)
    return vectors, probabilities, gold, holding(keys, values)


def asked(seed, **sizes):
    vectors, probabilities, gold, base = random_case(seed, **sizes)
    return collect(held_out(gold), probabilities, vectors, base, search_of)


def finding(student, positions, values, gold):
    """A cache of one neighbour each, as similar as can be."""
    hits = Hits(positions[:, None], np.ones((len(positions), 1), np.float32))
    keys = np.ones((len(values), 1), np.float32)
    return {1.0: cached(held_out(gold), student, hits, holding(keys, values))}


def corrected_and_broken(corrected, broken, count=100):
    """`count` items of gold class 1; the student misses the first ones, the book misses the last ones."""
    gold = np.ones(count, dtype=int)
    student = np.tile([0.4, 0.6], (count, 1))
    student[:corrected] = (0.6, 0.4)
    positions = np.zeros(count, dtype=np.int64)
    positions[count - broken :] = 1
    return finding(student, positions, np.float32([(0, 1), (1, 0)]), gold)


def test_a_gain_above_one_standard_error_is_kept():
    tuned = tune(corrected_and_broken(9, 4), accuracy, "classification", ())
    assert tuned.gain == pytest.approx(0.05)
    assert tuned.standard_error == pytest.approx(0.035887, abs=1e-6)
    assert (tuned.kept, tuned.baseline_score, tuned.score) == (True, pytest.approx(0.91), pytest.approx(0.96))
    assert tuned.beta < 1


def test_a_gain_within_one_standard_error_is_not_kept():
    tuned = tune(corrected_and_broken(6, 4), accuracy, "classification", ())
    assert tuned.gain == pytest.approx(0.02)
    assert tuned.standard_error == pytest.approx(0.1 * np.sqrt((10 - 100 * 0.02**2) / 9.9 / 10), abs=1e-6)
    assert (tuned.kept, tuned.retrieval.opens_book, tuned.score) == (False, False, pytest.approx(0.96))
    assert tuned.table[tuned.rank - 1].beta == 1
    assert {cell.beta for cell in tuned.table[: tuned.rank - 1]} == {step / 10 for step in range(10)}
    anyway = tune(corrected_and_broken(6, 4), accuracy, "classification", (), Choices(one_se=False))
    assert (anyway.kept, anyway.beta < 1, anyway.rank) == (True, True, 1)


def test_no_gain_is_no_retrieval():
    tuned = tune(corrected_and_broken(0, 4), accuracy, "classification", ())
    assert (tuned.kept, tuned.beta, tuned.gain, tuned.standard_error) == (False, 1.0, 0.0, 0.0)


def test_the_standard_error_of_a_mean_is_the_textbook_one(monkeypatch):
    numbers = np.random.default_rng(0).normal(size=40)
    expected = numbers.std(ddof=1) / np.sqrt(40)
    assert standard_error(lambda rows: float(numbers[rows].mean()), 40) == pytest.approx(expected)
    monkeypatch.setattr(tuning, "GROUPS", 8)  # five rows a group, taken in turn: the group means are the sample
    means = np.array([numbers[start::8].mean() for start in range(8)])
    grouped = standard_error(lambda rows: float(numbers[rows].mean()), 40)
    assert grouped == pytest.approx(means.std(ddof=1) / np.sqrt(8))


def test_the_standard_error_of_a_correlation_is_near_the_bootstraps():
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    jackknife = standard_error(lambda rows: float(np.corrcoef(x[rows], y[rows])[0, 1]), 200)
    draws = [np.corrcoef(x[rows], y[rows])[0, 1] for rows in random.integers(200, size=(1000, 200))]
    assert jackknife == pytest.approx(np.std(draws), rel=0.15)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_every_cell_scores_as_answering_with_it(seed):
    vectors, probabilities, gold, base = random_case(seed)
    base = replace(base, weights=np.random.default_rng(seed).choice(np.float32([0.5, 1, 4]), size=7))
    caches = collect(held_out(gold), probabilities, vectors, base, search_of)
    tuned = tune(caches, accuracy, "classification", ())
    assert len(tuned.table) == 4 * 5 * 11  # top_k 1, 2, 4 and, clipped to the base, 7
    for cell in tuned.table[::9]:
        one = Retrieval(cell.top_k, cell.temperature, cell.beta)
        outputs = answer(probabilities, vectors, base, one, search_of(base)).outputs
        assert cell.score == accuracy(outputs, gold)
        assert cell.loss == pytest.approx(-np.log(outputs[np.arange(len(gold)), gold]).mean())
    assert tuned.score >= tuned.baseline_score == accuracy(probabilities, gold)
    assert tuned.gain == tuned.score - tuned.baseline_score


def test_the_grid_is_the_published_one_clipped_to_the_base():
    cells = sweep(asked(0, entries=40)[1.0], lambda outputs: (0.0, 0.0))
    assert {cell.top_k for cell in cells} == {1, 2, 4, 8, 12, 16, 20, 32}
    assert {cell.temperature for cell in cells} == {0.02, 0.05, 0.1, 0.2, 0.5}
    assert {round(cell.beta, 9) for cell in cells} == {0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1}
    assert len(set(cells)) == len(cells) == 8 * 5 * 11


def test_the_score_decides_before_the_loss():
    tuned = tune(asked(3), accuracy, "classification", ())
    merits = [(-cell.score, cell.loss) for cell in tuned.table]
    assert merits == sorted(merits)
    assert merits[0][0] < merits[-1][0]
    assert [loss for _, loss in merits] != sorted(loss for _, loss in merits)
    assert (tuned.top_k, tuned.temperature, tuned.score) == (
        tuned.table[0].top_k,
        tuned.table[0].temperature,
        tuned.table[0].score,
    )


def test_full_ties_go_to_the_larger_beta_then_the_smaller_k_then_the_smaller_temperature():
    """Student and book both give the gold class exactly 0, so every mixture scores and loses the same."""
    vectors, *_, base = random_case(3)
    wrong, gold = np.tile([1.0, 0.0], (12, 1)), np.ones(12, dtype=int)
    base = replace(base, values=wrong[:7].astype(np.float32))
    tuned = tune(collect(held_out(gold), wrong, vectors, base, search_of), accuracy, "classification", ())
    order = [(-cell.beta, cell.top_k, cell.temperature) for cell in tuned.table]
    assert order == sorted(order)
    assert (tuned.top_k, tuned.temperature, tuned.beta, tuned.kept) == (1, 0.02, 1.0, False)


def test_regression_is_tuned_by_its_correlation_and_ties_by_squared_error():
    random = np.random.default_rng(4)
    gold = random.uniform(0, 5, size=30)
    probabilities = (gold + random.normal(size=30))[:, None]
    values = gold[:, None].astype(np.float32)  # a book that knows every answer
    caches = finding(probabilities, np.arange(30), values, gold)
    tuned = tune(caches, correlation, "regression", ())
    assert (tuned.kept, tuned.beta, tuned.top_k) == (True, 0.0, 1)
    assert tuned.score == pytest.approx(1)
    students = [cell for cell in tuned.table if cell.beta == 1]
    assert {cell.loss for cell in students} == {np.mean((probabilities[:, 0] - gold) ** 2)}


def test_an_empty_base_leaves_the_student_alone():
    vectors, probabilities, gold, base = random_case(5)
    empty = replace(base, keys=base.keys[:0], values=base.values[:0], ids=(), texts=())
    caches = collect(held_out(gold), probabilities, vectors, empty, search_of)
    tuned = tune(caches, accuracy, "classification", (), Choices(modes=("constant", "gate", "bucket")))
    assert (tuned.kept, tuned.beta, tuned.top_k) == (False, 1.0, 1)


def test_held_out_examples_must_not_be_in_the_base(base):
    check_disjoint(base, ("h/0", "h/1"), ("south", "west"))
    with pytest.raises(UsageError, match="1 of 2.*'h/1'"):
        check_disjoint(base, ("h/0", "h/1"), ("south", " North "))
    with pytest.raises(UsageError, match="1 of 1.*'t/3'"):
        check_disjoint(replace(base, texts=("",) * 4), ("t/3",), ("south",))


def test_held_out_examples_must_not_have_retrieved_what_the_base_holds(base):
    check_disjoint(base, ("h/0",), ("south",), {"t/1": ("q/1",), "gone": ("h/0",)})
    with pytest.raises(UsageError, match="1 of 2.*'h/1'.*retrieve the corpus without"):
        check_disjoint(base, ("h/0", "h/1"), ("south", "west"), {"t/1": ("q/1", "h/1")})


def test_what_the_base_holds_is_not_asked_of_it(base):
    known = HeldOut(("h/0", "h/1"), ("north", "west"), np.array([0, 1]))
    with pytest.raises(UsageError, match="in the knowledge base too"):
        collect(known, np.ones((2, 2)) / 2, base.keys[:2], base, search_of)


def test_the_reported_split_is_refused_unless_it_is_asked_for_and_then_it_is_written_down():
    caches = corrected_and_broken(9, 4)
    with pytest.raises(UsageError, match="2 of 100.*reported split.*'h/3'"):
        tune(caches, accuracy, "classification", {"h/3", "h/7", "other"})
    allowed = Choices(reported_split=True)
    assert tune(caches, accuracy, "classification", {"h/3"}, allowed).on_reported_split is True
    assert tune(caches, accuracy, "classification", {"other"}, allowed).on_reported_split is False


def test_inputs_of_different_length_are_refused():
    caches = asked(6)
    short = {1.0: replace(caches[1.0], held_out=replace(held_out(np.ones(12, int)), gold=np.ones(11, int)))}
    with pytest.raises(UsageError, match="12 predictions, 12 rows of hits, 11 labels and 12 ids"):
        tune(short, accuracy, "classification", ())
    with pytest.raises(UsageError, match="at least 2"):
        tune(asked(6, queries=1), accuracy, "classification", ())


def test_a_regression_has_no_skip_to_choose():
    gold = np.arange(30.0)
    caches = finding(gold[:, None], np.arange(30), gold[:, None].astype(np.float32), gold)
    with pytest.raises(UsageError, match="skip none, confident: a regression"):
        tune(caches, correlation, "regression", (), Choices(skips=("none", "confident")))


def test_the_report_is_json_and_holds_the_settings_of_the_manifest():
    tuned = tune(corrected_and_broken(9, 4), accuracy, "classification", ())
    report = json.loads(json.dumps(tuned.report()))
    assert Retrieval.from_manifest(report["retrieval"]) == tuned.retrieval
    assert (report["top_k"], report["temperature"], report["beta"]) == (1, 0.02, tuned.beta)
    assert (report["held_out"], report["rank"], len(report["table"])) == (100, 1, 55)
    assert report["held_out_digest"] == digest(held_out(np.ones(100, int)))


def test_the_digest_knows_the_examples_but_not_their_order():
    examples = HeldOut(("a", "b"), ("one", "two"), np.array([0, 1]))
    assert digest(examples) == digest(HeldOut(("b", "a"), ("two", "one"), np.array([1, 0])))
    others = [HeldOut(("a", "c"), ("one", "two"), examples.gold), HeldOut(("a", "b"), ("one", "too"), examples.gold)]
    assert len({digest(one) for one in (examples, *others)}) == 3


def test_folds_are_pooled_with_the_values_each_found_in_its_own_base():
    (one, other) = (asked(7, queries=5, entries=4), asked(8, queries=6, entries=7))
    other = {1.0: replace(other[1.0], held_out=HeldOut(tuple("abcdef"), tuple("abcdef"), other[1.0].held_out.gold))}
    (together,) = pooled([one, other]).values()
    assert together.held_out.ids == (*(f"h/{row}" for row in range(5)), *"abcdef")
    assert (together.values.shape, together.similarities.shape) == ((11, 7, 2), (11, 7))
    np.testing.assert_array_equal(together.values[:5, :4], one[1.0].values)
    np.testing.assert_array_equal(together.values[5:], other[1.0].values)
    assert np.isneginf(together.similarities[:5, 4:]).all()
    assert set(together.found[:5, 4:].ravel()) == {""}

    def scores(caches):
        (cache,) = caches.values()
        return [cell.loss for cell in sweep(cache, lambda outputs: (0.0, float(outputs[:, 0].sum())), (1, 2, 4))]

    np.testing.assert_allclose(scores({1.0: together}), np.add(scores(one), scores(other)))


def test_an_example_of_two_folds_is_refused():
    with pytest.raises(UsageError, match="5 examples are held out in more than one fold"):
        pooled([asked(7, queries=5), asked(8, queries=6)])


def test_the_cache_holds_what_was_found():
    vectors, probabilities, gold, base = random_case(9, entries=3)
    base = replace(base, weights=np.float32([1, 2, 3]))
    cache = collect(held_out(gold), probabilities, vectors, base, search_of)[1.0]
    hits = search(vectors, base.keys, 3)
    assert cache.found.tolist() == [[base.ids[place] for place in row] for row in hits.positions]
    np.testing.assert_array_equal(cache.values, base.values[hits.positions])
    np.testing.assert_array_equal(cache.counts, base.weights[hits.positions])
    padded = cached(held_out(gold[:1]), probabilities[:1], Hits(np.array([[2, -1]]), np.float32([[1, -np.inf]])), base)
    assert padded.found.tolist() == [["t/2", ""]]


def with_misleading_corpus(seed=10, count=60):
    """Every second entry is of a corpus whose values are wrong; the student knows nothing."""
    random = np.random.default_rng(seed)
    gold = random.integers(2, size=count)
    vectors = np.stack([np.where(gold == 1, 1.0, -1.0), random.normal(size=count) * 0.2], axis=1)
    classes = np.arange(40) % 2
    keys = normalise(np.stack([np.where(classes == 1, 1.0, -1.0), random.normal(size=40) * 0.2], axis=1))
    origins = tuple("corpus" if row % 4 > 1 else "train" for row in range(40))
    stated = np.where(np.array(origins) == "corpus", 1 - classes, classes)
    values = np.eye(2, dtype=np.float32)[stated]
    student = random.dirichlet((5, 5), size=count)
    return held_out(gold), student, vectors, holding(keys.astype(np.float32), values, origins=origins)


def test_a_corpus_that_misleads_is_left_out():
    examples, student, vectors, base = with_misleading_corpus()
    caches = collect(examples, student, vectors, base, search_of)
    assert sorted(caches) == [0, 0.25, 0.5, 1]
    tuned = tune(caches, accuracy, "classification", ())
    assert (tuned.omega, tuned.kept, tuned.score) == (0.0, True, 1.0)
    assert {cell.omega for cell in tuned.table} == {0, 0.25, 0.5, 1}
    ready = scaled(base, "corpus", tuned.omega)
    told = answer(student, vectors, ready, tuned.retrieval, search_of(ready))
    assert accuracy(told.outputs, examples.gold) == tuned.score


def test_every_omega_scores_as_answering_from_the_base_so_weighed():
    examples, student, vectors, base = with_misleading_corpus(11, count=20)
    weights = np.ones(40, np.float32)
    weights[:3] = (0, 2, 0)  # nothing counts in the first and third
    base = replace(base, weights=weights)
    for omega, cache in collect(examples, student, vectors, base, search_of).items():
        ready = scaled(base, "corpus", omega)
        for cell in sweep(cache, lambda outputs: (float(outputs[:, 0].sum()), 0.0), omega=omega)[::37]:
            one = Retrieval(cell.top_k, cell.temperature, cell.beta)
            told = answer(student, vectors, ready, one, search_of(ready)).outputs
            assert cell.score == pytest.approx(told[:, 0].sum(), abs=1e-9)
            assert cell.omega == omega


def test_without_a_corpus_there_is_one_omega():
    assert list(asked(12)) == [1.0]


def near_is_right(seed=0, count=600):
    """What lies near is told rightly, what lies far wrongly; the student is a little better than chance."""
    random = np.random.default_rng(seed)
    gold = random.integers(2, size=count)
    near = random.uniform(size=count) > 0.5
    similarities = np.where(near, 0.95, 0.4)[:, None] + random.normal(size=(count, 1)) * 0.01
    values = np.eye(2, dtype=np.float32)[np.where(near, gold, 1 - gold)][:, None] * np.float32(0.8) + np.float32(0.1)
    right = random.uniform(size=count) > 0.35
    student = np.where((right == (gold == 1))[:, None], (0.35, 0.65), (0.65, 0.35))
    ones, names = np.ones((count, 1), np.float32), np.full((count, 1), "t")
    return HitCache(held_out(gold), student, similarities.astype(np.float32), values, ones, names)


def test_a_gate_is_chosen_where_the_neighbours_are_right_only_when_near():
    caches = {1.0: near_is_right()}
    plain = tune(caches, accuracy, "classification", ())
    tuned = tune(caches, accuracy, "classification", (), Choices(modes=("constant", "gate")))
    assert (plain.retrieval.mode, tuned.retrieval.mode, tuned.kept) == ("constant", "gate", True)
    assert tuned.score > 0.75 > 0.7 > plain.score
    assert tuned.table == plain.table
    assert tuned.table[tuned.rank - 1].beta == tuned.retrieval.beta < 1


def test_a_mode_must_beat_the_constant_of_least_loss_not_the_one_that_scores_best(monkeypatch):
    caches = asked(3)
    heard = []
    monkeypatch.setattr(tuning, "adapted", lambda constant, sample, modes, rival: heard.append(rival.mean()))
    tuned = tune(caches, accuracy, "classification", (), Choices(modes=("gate",)))
    assert heard == [pytest.approx(min(cell.loss for cell in tuned.table))]
    assert heard[0] < tuned.table[0].loss


def test_a_fitted_mode_too_must_gain_more_than_its_standard_error(monkeypatch):
    """The gate turns out to be the student alone: better than the constant by loss, no gain at all."""
    gate = Retrieval(1, 0.02, 0.5, mode="gate", gate=(9, 0, 0, 0))
    monkeypatch.setattr(tuning, "adapted", lambda constant, sample, modes, rival: (gate, np.ones(len(rival))))
    tuned = tune(corrected_and_broken(9, 4), accuracy, "classification", (), Choices(modes=("gate",)))
    assert (tuned.kept, tuned.retrieval.opens_book, tuned.gain) == (False, False, 0)


def test_the_skip_that_saves_most_is_chosen_among_those_allowed():
    caches = corrected_and_broken(9, 4)
    chosen = {}
    for skips in (("none",), ("none", "safe"), ("none", "safe", "confident")):
        tuned = tune(caches, accuracy, "classification", (), Choices(skips=skips))
        chosen[skips[-1]] = (tuned.retrieval.skip, tuned.skip_rate)
    assert chosen == {"none": ("none", 0.0), "safe": ("none", 0.0), "confident": ("none", 0.0)}
    student = np.array(caches[1.0].outputs)
    student[50:80] = (0.01, 0.99)
    sure = {1.0: replace(caches[1.0], outputs=student)}
    tuned = tune(sure, accuracy, "classification", (), Choices(skips=("none", "confident")))
    assert (tuned.retrieval.skip, tuned.retrieval.theta, tuned.skip_rate) == ("confident", 0.99, 0.3)
    assert tuned.score == tune(sure, accuracy, "classification", ()).score
