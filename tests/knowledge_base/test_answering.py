import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base.answering import ALONE, Retrieval, answer, betas_of, features_of, mix, skipped
from openbook.knowledge_base.interpolate import evidence, interpolate, neighbour_average, scaled, weights
from openbook.knowledge_base.search import normalise, search
from openbook.types import KnowledgeBase

QUERY = np.array([(0.8, 0.6)])
STUDENT = np.array([(0.3, 0.7)])
PLAIN = Retrieval(top_k=2, temperature=0.5, beta=0.3)
GATE = replace(PLAIN, mode="gate", gate=(0.5, -2.0, -1.0, 3.0))
BUCKETS = replace(PLAIN, mode="bucket", edges=(0.5, 0.9), betas=(0.9, 0.6, 0.2))


def looking_in(base, asked=None):
    """The exact search of a base; `asked` collects the queries it gets."""

    def look_up(queries, k, exclude):
        if asked is not None:
            asked.append(queries)
        return search(queries, base.keys, k, exclude)

    return look_up


def unsearchable(queries, k, exclude):
    raise AssertionError("nothing was to be searched")


def random_case(seed, queries=6, entries=9, classes=3):
    random = np.random.default_rng(seed)
    names = tuple(f"t/{row}" for row in range(entries))
    base = KnowledgeBase(
        keys=normalise(random.normal(size=(entries, 4))).astype(np.float32),
        values=random.dirichlet(np.full(classes, 0.3), size=entries).astype(np.float32),
        ids=names,
        texts=names,
        manifest={},
    )
    return base, random.normal(size=(queries, 4)), random.dirichlet(np.full(classes, 0.3), size=queries)


def test_the_answer_of_the_worked_example(base):
    told = answer(STUDENT, QUERY, base, PLAIN, looking_in(base))
    np.testing.assert_allclose(told.outputs, [(0.598342, 0.401658)], atol=1e-6)
    assert (told.retrieved.tolist(), told.betas.tolist(), told.hits.positions.tolist()) == ([True], [0.3], [[2, 0]])


def test_the_answer_of_the_worked_example_with_weights(base):
    weighted = replace(base, weights=np.float32([1, 1, 2, 1]))
    told = answer(STUDENT, QUERY, weighted, Retrieval(4, 0.5, 0.0), looking_in(base))
    np.testing.assert_allclose(told.outputs, [(0.606225, 0.393775)], atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "beta", "expected"),
    [
        ((0.5, -2, -1, 3), 0.488451, (0.518023, 0.481977)),
        ((0, -1, -1, 2), 0.428934, (0.543390, 0.456610)),
    ],
)
def test_the_gate_of_the_worked_example(base, gate, beta, expected):
    told = answer(STUDENT, QUERY, base, replace(GATE, gate=gate), looking_in(base))
    assert told.betas[0] == pytest.approx(beta, abs=1e-6)
    np.testing.assert_allclose(told.outputs, [expected], atol=1e-6)


def test_the_features_of_a_gate(base):
    hits = search(QUERY, base.keys, 2)
    shares, values = weights(hits.similarities, 0.5), base.values[hits.positions]
    average = neighbour_average(hits, base.values, 0.5)
    found = features_of(STUDENT, hits.similarities, shares, values, average)
    np.testing.assert_allclose(found, [(0.96, 0.726203, 0.7)], atol=1e-6)
    scores = np.float32([[4.5], [1.0], [3.2], [0.0]])
    average = neighbour_average(hits, scores, 0.5)
    found = features_of(np.array([[2.0]]), hits.similarities, shares, scores[hits.positions], average)
    np.testing.assert_allclose(found, [(0.96, 0.411866, 1.746878)], atol=1e-6)


def test_a_gate_never_falls_below_its_lower_bound(base):
    low = replace(GATE, gate=(-5, 0, 0, 0))
    assert answer(STUDENT, QUERY, base, low, looking_in(base)).betas[0] < 0.01
    assert answer(STUDENT, QUERY, base, replace(low, beta_min=0.25), looking_in(base)).betas[0] == 0.25


def test_a_bucket_takes_its_beta_by_the_largest_similarity():
    nearest = np.array([-0.3, 0.5, 0.7, 0.9, 1.0])
    features = np.stack([nearest, np.zeros(5), np.zeros(5)], axis=1)
    assert betas_of(BUCKETS, features).tolist() == [0.9, 0.6, 0.6, 0.2, 0.2]


def test_no_gate_overflows_however_far_its_features_are():
    with np.errstate(all="raise"):
        betas = betas_of(replace(GATE, gate=(0, 1e4, 0, 0)), np.array([(-1.0, 0, 0), (1.0, 0, 0)]))
    assert betas.tolist() == [0, 1]


@pytest.mark.parametrize(("beta", "threshold"), [(0.6, 0.666667), (0.7, 0.428571), (0.8, 0.25), (0.9, 0.111111)])
def test_the_leads_that_may_be_skipped_of_the_worked_example(beta, threshold):
    leads = np.array([threshold - 1e-3, threshold + 1e-3])
    students = np.stack([(1 + leads) / 2, (1 - leads) / 2], axis=1)
    assert skipped(students, replace(PLAIN, beta=beta, skip="safe")).tolist() == [False, True]


def test_the_safe_skip_of_the_worked_example():
    safe = replace(PLAIN, beta=0.7, skip="safe")
    assert skipped(np.array([(0.72, 0.28), (0.71, 0.29)]), safe).tolist() == [True, False]
    worst = interpolate(np.array([(0.72, 0.28)]), np.array([(0.0, 1.0)]), 0.7)
    np.testing.assert_allclose(worst, [(0.504, 0.496)])


def test_a_safe_skip_under_a_gate_or_buckets_goes_by_their_lowest_beta():
    sure = np.array([(0.99, 0.01)])
    for one, skips in ((GATE, False), (replace(GATE, beta_min=0.6), True), (BUCKETS, False)):
        assert skipped(sure, replace(one, skip="safe")).tolist() == [skips]
    assert skipped(sure, replace(BUCKETS, betas=(0.9, 0.6, 0.6), skip="safe")).tolist() == [True]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.6, 0.75, 0.9]), st.sampled_from(["constant", "gate", "bucket"]))
def test_a_safe_skip_never_changes_a_class(seed, beta, mode):
    base, queries, student = random_case(seed, queries=40)
    always = replace(PLAIN, beta=beta, mode=mode, gate=(0, 2, -3, 1), beta_min=beta, edges=(0.5,), betas=(beta, 0.95))
    safe = replace(always, skip="safe")
    told = [answer(student, queries, base, one, looking_in(base)) for one in (always, safe)]
    assert told[0].outputs.argmax(1).tolist() == told[1].outputs.argmax(1).tolist()
    if beta > 0.5:
        assert not told[1].retrieved.all()


def test_only_what_is_not_skipped_is_searched_and_the_rest_is_the_students_own():
    base, queries, _ = random_case(1, queries=3)
    student = np.array([(0.98, 0.01, 0.01), (0.4, 0.3, 0.3), (0.1, 0.9, 0.0)])
    asked = []
    confident = replace(PLAIN, skip="confident", theta=0.9)
    told = answer(student, queries, base, confident, looking_in(base, asked))
    assert [one.tolist() for one in asked] == [queries[[1]].tolist()]
    assert (told.retrieved.tolist(), told.betas.tolist()) == ([False, True, False], [1, 0.3, 1])
    assert told.outputs[[0, 2]].tolist() == student[[0, 2]].tolist()
    always = answer(student, queries, base, PLAIN, looking_in(base))
    np.testing.assert_array_equal(told.outputs[1], always.outputs[1])
    np.testing.assert_array_equal(told.hits.positions[1], always.hits.positions[1])
    assert told.hits.positions[[0, 2]].tolist() == [[-1, -1], [-1, -1]]
    assert np.isneginf(told.hits.similarities[[0, 2]]).all()
    without = answer(student, queries, base, replace(confident, theta=0.1), unsearchable)
    assert (without.outputs is student, without.retrieved.any()) == (True, False)


def test_a_confidence_above_one_never_skips():
    student = np.array([(1.0, 0.0), (0.5, 0.5)])
    assert not skipped(student, replace(PLAIN, skip="confident", theta=1.001)).any()
    assert skipped(student, replace(PLAIN, skip="confident", theta=1.0)).tolist() == [True, False]


@pytest.mark.parametrize("skip", ["safe", "confident"])
def test_a_regression_is_not_skipped_by_confidence(base, skip):
    scores = replace(base, values=base.values[:, :1])
    with pytest.raises(UsageError, match=f"retrieval.skip is '{skip}'.*none"):
        answer(np.array([[2.0]]), QUERY, scores, replace(PLAIN, skip=skip, theta=0.9), unsearchable)


def test_trusting_the_student_alone_is_the_very_array_without_a_search(base, empty_base):
    for held, one in ((base, ALONE), (base, replace(PLAIN, beta=1.0, skip="safe")), (empty_base, GATE)):
        told = answer(STUDENT, QUERY, held, one, unsearchable)
        assert told.outputs is STUDENT
        assert (told.retrieved.tolist(), told.betas.tolist(), told.hits.positions.shape) == ([False], [1], (1, 0))


@pytest.mark.parametrize("retrieval", [PLAIN, GATE, BUCKETS], ids=lambda one: one.mode)
def test_where_nothing_is_found_the_student_answers(base, retrieval):
    queries, student = np.vstack([QUERY, QUERY]), np.vstack([STUDENT, STUDENT])
    with np.errstate(all="raise"):
        told = answer(student, queries, base, retrieval, looking_in(base), exclude=[range(4), ()])
    assert (told.outputs[0].tolist(), told.retrieved.tolist(), told.betas[0]) == ([0.3, 0.7], [False, True], 1)
    assert told.outputs[1].tolist() != [0.3, 0.7]


def test_what_is_excluded_belongs_to_its_query_though_others_are_skipped(base):
    student = np.array([(0.99, 0.01), (0.3, 0.7)])
    confident = replace(PLAIN, beta=0.0, top_k=1, skip="confident", theta=0.9)
    told = answer(student, np.vstack([QUERY, QUERY]), base, confident, looking_in(base), exclude=[(0,), (2,)])
    assert told.hits.positions.tolist() == [[-1], [0]]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([PLAIN, GATE, BUCKETS]), st.sampled_from(["none", "safe", "confident"]))
def test_a_batch_is_answered_as_its_rows_are_and_evidence_adds_up_to_the_answers(seed, retrieval, skip):
    base, queries, student = random_case(seed)
    retrieval = replace(retrieval, skip=skip, theta=0.8, beta_min=0.55)
    told = answer(student, queries, base, retrieval, looking_in(base))
    for row, shown in enumerate(evidence(base, told.hits, student, retrieval.temperature, told.betas)):
        one = answer(student[[row]], queries[[row]], base, retrieval, looking_in(base))
        np.testing.assert_allclose(one.outputs[0], told.outputs[row], atol=1e-12)
        np.testing.assert_allclose(shown.result, told.outputs[row], atol=1e-12)
        total = shown.student_contribution + sum(near.contribution for near in shown.neighbours)
        assert total == pytest.approx(told.outputs[row, shown.predicted], abs=1e-6)
        assert bool(shown.neighbours) == told.retrieved[row]


def test_a_corpus_that_counts_nothing_answers_as_if_it_were_not_there():
    base, queries, student = random_case(4)
    both = replace(base, origins=("train", "corpus", "train") * 3)
    kept = [row for row, origin in enumerate(both.origins) if origin == "train"]
    alone = replace(base, keys=base.keys[kept], values=base.values[kept], ids=tuple(base.ids[row] for row in kept))
    none = scaled(both, "corpus", 0)
    told = [answer(student, queries, one, PLAIN, looking_in(one)).outputs for one in (none, alone, both)]
    assert told[0].tobytes() == told[1].tobytes()
    assert told[0].tobytes() != told[2].tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_coarse_outputs_change_an_answer_little(base, dtype):
    told = answer(STUDENT.astype(dtype), QUERY, base, PLAIN, looking_in(base))
    np.testing.assert_allclose(told.outputs, [(0.598342, 0.401658)], atol=1e-3)


@pytest.mark.parametrize("retrieval", [ALONE, PLAIN, GATE, BUCKETS, replace(PLAIN, skip="confident", theta=0.9)])
def test_settings_survive_their_way_through_a_manifest(retrieval):
    assert Retrieval.from_manifest(json.loads(json.dumps(retrieval.to_manifest()))) == retrieval


def test_three_numbers_are_settings_and_a_constant_is_written_as_such():
    three = {"top_k": 2, "temperature": 0.5, "beta": 0.3}
    assert Retrieval.from_manifest(three) == PLAIN
    assert PLAIN.to_manifest() == three


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"beta": 1.1}, "beta"),
        ({"beta_min": -1}, "beta_min"),
        ({"mode": "gated"}, "mode"),
        ({"mode": "gate"}, "gate"),
        ({"mode": "gate", "gate": [0, 1, float("inf"), 1]}, "gate"),
        ({"mode": "bucket", "edges": [0.5], "betas": [0.5]}, "betas"),
        ({"mode": "bucket", "edges": [0.5], "betas": [0.5, 2]}, "betas"),
        ({"mode": "bucket", "edges": [0.5, 0.4], "betas": [0, 0, 0]}, "edges"),
        ({"skip": "sure"}, "skip"),
        ({"skip": "confident"}, "theta"),
        ({"tau": 0.1}, "tau"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(written, named):
    with pytest.raises(UsageError, match=rf"{named}\b.*tune it again"):
        Retrieval.from_manifest({"top_k": 2, "temperature": 0.5, "beta": 0.3, **written})


def test_a_manifest_without_the_three_numbers_is_refused():
    with pytest.raises(UsageError, match="temperature"):
        Retrieval.from_manifest({"top_k": 2, "beta": 0.3})


def test_an_unknown_mode_is_refused_in_code_too():
    with pytest.raises(UsageError, match=r"retrieval.mode is 'gates'; it must be one of constant, gate, bucket"):
        replace(PLAIN, mode="gates")


def test_mixing_gathered_hits_is_answering(base):
    hits = search(QUERY, base.keys, 2)
    mixed = mix(STUDENT, hits.similarities, base.values[hits.positions], None, GATE)
    told = answer(STUDENT, QUERY, base, GATE, looking_in(base))
    assert (mixed.outputs.tolist(), mixed.betas.tolist()) == (told.outputs.tolist(), told.betas.tolist())


@pytest.mark.parametrize("skip", ["safe", "confident"])
def test_several_labels_are_not_skipped_by_confidence(base, skip):
    sets = replace(base, manifest={**base.manifest, "kind": "multi_label"})
    with pytest.raises(UsageError, match=f"retrieval.skip is '{skip}'; a task of several labels has no class"):
        answer(np.array([[0.9, 0.8]]), QUERY, sets, replace(PLAIN, skip=skip, theta=0.9), unsearchable)
