from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base.interpolate import (
    evidence,
    interpolate,
    neighbour_average,
    own_positions,
    scaled,
    training_targets,
    weighed,
    weights,
)
from openbook.knowledge_base.search import Hits, normalise, search
from openbook.types import KnowledgeBase

QUERY = np.array([(0.8, 0.6)])
STUDENT = np.array([(0.3, 0.7)])


def average(base, k, temperature=0.5, query=QUERY, exclude=None):
    return neighbour_average(search(query, base.keys, k, exclude), base.values, temperature, base.weights)


def random_case(seed, classes=3):
    """Five queries, six hits each, out of nine entries; values and student answers that sum to one."""
    random = np.random.default_rng(seed)
    keys = normalise(random.normal(size=(9, 4))).astype(np.float32)
    values = random.dirichlet(np.ones(classes), size=9).astype(np.float32)
    return search(random.normal(size=(5, 4)), keys, 6), values, random.dirichlet(np.ones(classes), size=5)


@pytest.mark.parametrize(
    ("k", "temperature", "expected"),
    [
        (1, 0.5, (0.6, 0.4)),
        (2, 0.5, (0.726203, 0.273797)),
        (4, 0.5, (0.609001, 0.390999)),
        (9, 0.5, (0.609001, 0.390999)),
        (2, 0.05, (0.611750, 0.388250)),
        (2, 0.1, (0.650394, 0.349606)),
        (2, 1.0, (0.738026, 0.261974)),
    ],
)
def test_the_average_of_the_worked_example(base, k, temperature, expected):
    np.testing.assert_allclose(average(base, k, temperature), [expected], atol=1e-6)


def test_the_weights_of_the_worked_example(base):
    similarities = search(QUERY, base.keys, 4).similarities
    np.testing.assert_allclose(weights(similarities[:, :2], 0.5), [[0.579324, 0.420676]], atol=1e-6)
    np.testing.assert_allclose(weights(similarities, 0.5), [[0.445931, 0.323812, 0.217058, 0.013199]], atol=1e-6)


def test_nearer_entries_weigh_as_much_as_squared_distances_say(base):
    hits = search(QUERY, base.keys, 4)
    distances = ((QUERY - base.keys[hits.positions[0]]) ** 2).sum(axis=1)
    expected = np.exp(-distances / (2 * 0.5))
    np.testing.assert_allclose(weights(hits.similarities, 0.5)[0], expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.3, (0.598342, 0.401658)),
        (0.5, (0.513101, 0.486899)),
        (0.7, (0.427861, 0.572139)),
        (0, (0.726203, 0.273797)),
    ],
)
def test_the_mixture_of_the_worked_example(base, beta, expected):
    np.testing.assert_allclose(interpolate(STUDENT, average(base, 2), beta), [expected], atol=1e-6)


def test_mixing_is_of_probabilities_not_of_logarithms():
    mixed = interpolate(STUDENT, np.array([(0.726203, 0.273797)]), 0.8)
    np.testing.assert_allclose(mixed, [(0.385241, 0.614759)], atol=1e-6)


def test_beta_one_is_the_very_array_of_the_student(base):
    assert interpolate(STUDENT, average(base, 2), 1) is STUDENT


def test_leave_one_out_of_the_worked_example(base):
    own = own_positions(base, base.ids, base.texts)
    expected = [(0.507410, 0.492590), (0.650394, 0.349606), (0.480919, 0.519081), (0.292590, 0.707410)]
    np.testing.assert_allclose(average(base, 2, query=base.keys, exclude=own), expected, atol=1e-6)
    np.testing.assert_allclose(average(base, 2, query=base.keys[[2]]), [(0.439475, 0.560525)], atol=1e-6)


def test_ones_own_value_never_changes_what_is_averaged_without_it(base):
    own = own_positions(base, base.ids, base.texts)
    changed = replace(base, values=np.array(base.values))
    changed.values[2] = (0, 1)
    without = [average(some, 3, query=base.keys[[2]], exclude=[own[2]]) for some in (base, changed)]
    assert without[0].tobytes() == without[1].tobytes()


def test_ones_own_positions_are_found_by_id_and_by_text(base):
    base = replace(base, ids=("a", "b", "c", "d"), texts=("One  TWO", "two", "one two", "one\ttwo"))
    found = own_positions(base, ("x", "b", "x", "x"), ("one two", "one two", "one\t two", "other"))
    assert [positions.tolist() for positions in found] == [[0, 2], [0, 1, 2], [3], []]
    assert [positions.dtype for positions in found] == [np.int64] * 4


def test_an_entry_without_a_text_is_the_same_text_as_none(base):
    base = replace(base, texts=("ABC", "", "", ""))
    assert [positions.tolist() for positions in own_positions(base, ("x", "y"), ("abc", ""))] == [[0], []]


def test_updates_of_the_worked_example(base):
    values = np.array(base.values)
    values[2] = (0, 1)
    np.testing.assert_allclose(average(replace(base, values=values), 2), [(0.378608, 0.621392)], atol=1e-6)
    rest = [0, 1, 3]
    removed = replace(base, keys=base.keys[rest], values=base.values[rest])
    np.testing.assert_allclose(average(removed, 2), [(0.619081, 0.380919)], atol=1e-6)
    added = replace(
        base,
        keys=np.vstack([base.keys, np.float32([(0.8, 0.6)])]),
        values=np.vstack([base.values, np.float32([(0.1, 0.9)])]),
    )
    np.testing.assert_allclose(average(added, 2), [(0.340005, 0.659995)], atol=1e-6)
    back = replace(added, keys=added.keys[:4], values=added.values[:4])
    assert average(back, 2).tobytes() == average(base, 2).tobytes()


def test_an_entry_stored_twice_counts_twice(base):
    rows = [0, 1, 2, 3, 2]
    twice = replace(base, keys=base.keys[rows], values=base.values[rows])
    np.testing.assert_allclose(average(twice, 5), [(0.606225, 0.393775)], atol=1e-6)


def test_an_entry_that_counts_twice_is_as_good_as_two(base):
    weighted = replace(base, weights=np.float32([1, 1, 2, 1]))
    np.testing.assert_allclose(average(weighted, 4), [(0.606225, 0.393775)], atol=1e-6)


def test_a_corpus_that_counts_half_of_the_worked_example(base):
    base = scaled(replace(base, origins=("train", "corpus", "train", "corpus")), "corpus", 0.5)
    hits = search(QUERY, base.keys, 4)
    shares = weights(hits.similarities, 0.5, base.weights[hits.positions])
    assert hits.positions.tolist() == [[2, 0, 1, 3]]
    np.testing.assert_allclose(shares, [[0.503950, 0.365943, 0.122649, 0.007458]], atol=1e-6)
    np.testing.assert_allclose(average(base, 4), [(0.659977, 0.340023)], atol=1e-6)


@pytest.mark.parametrize(
    ("key", "expected"), [((0.8, 0.4), (0.626111, 0.373889)), ((0.894427, 0.447214), (0.644760, 0.355240))]
)
def test_the_prototype_of_the_worked_example(base, key, expected):
    shortened = replace(
        base,
        keys=np.float32([key, (0, 1), (-1, 0)]),
        values=np.float32([(0.75, 0.25), (0.2, 0.8), (0.5, 0.5)]),
        weights=np.float32([2, 1, 1]),
    )
    np.testing.assert_allclose(average(shortened, 3), [expected], atol=1e-6)


def test_a_corpus_that_counts_nothing_is_not_there(base):
    both = replace(base, origins=("train", "corpus", "train", "corpus"))
    alone = scaled(both, "corpus", 0)
    assert (alone.ids, alone.texts, alone.origins) == (("t/0", "t/2"), ("east", "between"), ("train", "train"))
    assert alone.weights is None
    kept = [0, 2]
    never = replace(base, keys=base.keys[kept], values=base.values[kept])
    assert average(alone, 4).tobytes() == average(never, 4).tobytes()
    assert alone.manifest == base.manifest


def test_what_counts_is_multiplied_and_what_counts_nothing_goes(base):
    base = replace(base, origins=("train", "corpus", "corpus", "train"), weights=np.float32([1, 3, 0, 0]))
    halved = scaled(base, "corpus", 0.5)
    assert (halved.ids, halved.weights.tolist(), halved.weights.dtype) == (("t/0", "t/1"), [1, 1.5], np.float32)
    assert scaled(replace(base, origins=(), weights=None), "corpus", 0).ids == base.ids
    assert scaled(replace(base, origins=(), weights=None), "train", 0).ids == ()


@pytest.mark.parametrize("omega", [-0.5, np.nan, np.inf])
def test_an_omega_that_is_no_number_of_times_is_refused(base, omega):
    with pytest.raises(UsageError, match="omega"):
        scaled(base, "corpus", omega)


def test_entries_of_an_origin_are_weighed_whatever_they_weighed_before(base):
    mixed = replace(base, origins=("train", "remembered") * 2, weights=np.array([2, 3, 1, 1], np.float32))
    assert weighed(mixed, "remembered", 8).weights.tolist() == [2, 8, 1, 8]
    assert weighed(replace(mixed, weights=None), "train", 0.5).weights.tolist() == [0.5, 1, 0.5, 1]


def test_training_targets_of_the_worked_example(base):
    def look_up(queries, k, exclude):
        return search(queries, base.keys, k, exclude)

    half, most = (training_targets(base, base.keys, share, 2, 0.5, look_up) for share in (0.5, 0.8))
    np.testing.assert_allclose(half[2], (0.540459, 0.459541), atol=1e-6)
    np.testing.assert_allclose(most[2], (0.576184, 0.423816), atol=1e-6)
    others = [(0.507410, 0.492590), (0.650394, 0.349606), (0.292590, 0.707410)]
    np.testing.assert_allclose(half[[0, 1, 3]], (base.values[[0, 1, 3]] + np.array(others)) / 2, atol=1e-6)
    assert training_targets(base, base.keys, 1, 2, 0.5, look_up) is base.values
    with pytest.raises(UsageError, match="3 queries for 4 entries"):
        training_targets(base, base.keys[:3], 0.5, 2, 0.5, look_up)


def test_a_training_target_does_not_know_what_only_its_text_brought_in_and_stands_alone_if_nothing_is_left(base):
    def look_up(queries, k, exclude):
        return search(queries, base.keys, k, exclude)

    anchors = {"t/0": ["t/2"], "t/1": ["t/2", "t/3"]}
    target = training_targets(base, base.keys, 0.5, 1, 0.5, look_up, anchors)[2]
    np.testing.assert_allclose(target, (base.values[2] + base.values[1]) / 2, atol=1e-6)
    alone = training_targets(base, base.keys, 0.5, 1, 0.5, look_up, {f"t/{row}": ["t/2"] for row in range(4)})[2]
    assert alone.tolist() == base.values[2].tolist()


def test_entries_only_the_query_retrieved_are_its_own(base):
    anchors = {"t/0": ("q/0",), "t/1": ("q/0", "q/1"), "t/3": ("q/1", "q/1")}
    found = own_positions(base, ("q/0", "q/1", "q/2"), ("a", "between", "c"), anchors)
    assert [positions.tolist() for positions in found] == [[0], [2, 3], []]


def test_regression_of_the_worked_example(base):
    base = replace(base, values=np.float32([[4.5], [1.0], [3.2], [0.0]]))
    hits = search(QUERY, base.keys, 2)
    mean = neighbour_average(hits, base.values, 0.5)
    np.testing.assert_allclose(mean, [[3.746878]], atol=1e-6)
    np.testing.assert_allclose(interpolate(np.array([[2.0]]), mean, 0.5), [[2.873439]], atol=1e-6)
    (shown,) = evidence(base, hits, np.array([[2.0]]), 0.5, 0.3)
    np.testing.assert_allclose(shown.result, [3.222815], atol=1e-6)
    assert shown.variance == pytest.approx(0.411866, abs=1e-6)
    assert (shown.predicted, shown.decisive) == (0, False)


def test_a_query_that_finds_nothing_keeps_the_students_answer(base, empty_base):
    queries, student = np.vstack([QUERY, QUERY]), np.vstack([STUDENT, STUDENT])
    hits = search(queries, base.keys, 2, exclude=[{0, 1, 2, 3}, {0}])
    assert weights(hits.similarities, 0.5)[0].tolist() == [0, 0]
    mixed = interpolate(student, neighbour_average(hits, base.values, 0.5), 0.3)
    assert mixed[0].tolist() == STUDENT[0].tolist()
    assert mixed[1].tolist() != STUDENT[0].tolist()
    assert interpolate(STUDENT, average(empty_base, 2), 0.3).tolist() == STUDENT.tolist()
    (shown,) = evidence(empty_base, search(QUERY, empty_base.keys, 2), STUDENT, 0.5, 0.3)
    assert (shown.student_contribution, shown.neighbours, shown.decisive) == (0.7, (), False)


def test_padding_weighs_nothing_at_any_temperature():
    similarities = np.float32([[0.9, 0.1, -np.inf]])
    for temperature in (1e-6, 0.5, 1e9):
        found = weights(similarities, temperature)
        assert found[0, 2] == 0
        np.testing.assert_allclose(found[:, :2], weights(similarities[:, :2], temperature))


def test_a_tiny_temperature_gives_the_nearest_and_a_huge_one_the_plain_mean(base):
    np.testing.assert_allclose(average(base, 3, 1e-6), base.values[[2]], atol=1e-9)
    np.testing.assert_allclose(average(base, 3, 1e9), [base.values[:3].mean(axis=0)], atol=1e-7)
    tied = average(replace(base, keys=base.keys[[0, 1, 2, 2]]), 3, 1e-6)
    np.testing.assert_allclose(tied, [base.values[2:].mean(axis=0)], atol=1e-7)


def test_the_order_of_entries_and_a_rotation_are_irrelevant(base):
    angle = 0.7
    rotation = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    turned = replace(base, keys=(base.keys @ rotation).astype(np.float32))
    order = [2, 0, 3, 1]
    shuffled = replace(base, keys=base.keys[order], values=base.values[order])
    np.testing.assert_allclose(average(turned, 3, query=QUERY @ rotation), average(base, 3), atol=1e-6)
    assert average(shuffled, 3).tobytes() == average(base, 3).tobytes()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 1.0]), st.floats(0, 1))
def test_results_are_probabilities_between_the_student_and_the_hits(seed, temperature, beta):
    hits, values, student = random_case(seed)
    mixed = interpolate(student, neighbour_average(hits, values, temperature), beta)
    candidates = np.concatenate([values[hits.positions], student[:, None]], axis=1)  # (B, K + 1, C)
    np.testing.assert_allclose(weights(hits.similarities, temperature).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-6)
    assert (mixed >= candidates.min(axis=1) - 1e-12).all()
    assert (mixed <= candidates.max(axis=1) + 1e-12).all()


def test_the_evidence_of_the_worked_example(base):
    (shown,) = evidence(base, search(QUERY, base.keys, 2), STUDENT, 0.5, 0.3)
    between, east = shown.neighbours
    np.testing.assert_allclose(shown.result, (0.598342, 0.401658), atol=1e-6)
    assert (shown.predicted, shown.decisive, shown.student.tolist()) == (0, True, [0.3, 0.7])
    assert shown.student_contribution == pytest.approx(0.09)
    assert (between.id, between.text, east.id, east.text) == ("t/2", "between", "t/0", "east")
    assert between.contribution == pytest.approx(0.243316, abs=1e-6)
    assert east.contribution == pytest.approx(0.265026, abs=1e-6)
    assert (between.similarity, east.weight) == (pytest.approx(0.96), pytest.approx(0.420676, abs=1e-6))
    np.testing.assert_allclose(between.value, (0.6, 0.4), atol=1e-6)
    np.testing.assert_allclose(between.result_without, (0.72, 0.28), atol=1e-6)
    np.testing.assert_allclose(east.result_without, 0.3 * STUDENT[0] + 0.7 * np.array((0.6, 0.4)), atol=1e-6)


def test_evidence_says_where_each_neighbour_comes_from_and_what_it_is(base):
    hits = search(QUERY, base.keys, 2)
    (plain,) = evidence(base, hits, STUDENT, 0.5, 0.3)
    assert [(near.rank, near.origin, near.label) for near in plain.neighbours] == [
        (0, "train", None),
        (1, "train", None),
    ]
    base = replace(base, origins=("train", "train", "corpus", "train"))
    (shown,) = evidence(base, hits, STUDENT, 0.5, 0.3, {"t/0": "yes"})
    assert [(near.origin, near.label) for near in shown.neighbours] == [("corpus", None), ("train", "yes")]


def test_every_row_is_explained_by_its_own_beta_and_a_skipped_row_by_the_student(base):
    hits = search(np.vstack([QUERY, QUERY, QUERY]), base.keys, 2)
    hits.positions[2], hits.similarities[2] = -1, -np.inf
    student = np.vstack([STUDENT, STUDENT, STUDENT])
    first, second, skipped = evidence(base, hits, student, 0.5, np.array([0.3, 0.7, 1.0]))
    np.testing.assert_allclose(first.result, (0.598342, 0.401658), atol=1e-6)
    np.testing.assert_allclose(second.result, (0.427861, 0.572139), atol=1e-6)
    assert second.neighbours[0].contribution == pytest.approx(0.3 * 0.579324 * 0.4, abs=1e-6)
    assert (skipped.result.tolist(), skipped.neighbours, skipped.student_contribution) == ([0.3, 0.7], (), 0.7)
    assert [one.decisive for one in (first, second, skipped)] == [True, False, False]


def test_without_its_only_neighbour_the_result_is_the_students(base):
    (shown,) = evidence(base, search(QUERY, base.keys, 1), STUDENT, 0.5, 0.3)
    assert shown.neighbours[0].result_without.tolist() == [0.3, 0.7]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 1.0]), st.floats(0, 1))
def test_contributions_sum_to_the_result_and_leaving_one_out_is_exact(seed, temperature, beta):
    hits, values, student = random_case(seed)
    hits.positions[0, 4:], hits.similarities[0, 4:] = -1, -np.inf
    names = tuple(f"t/{row}" for row in range(9))
    counts = np.random.default_rng(seed).choice(np.float32([0.25, 1, 3]), size=9) if seed % 2 else None
    keys = np.empty((9, 4), np.float32)
    base = KnowledgeBase(keys=keys, values=values, ids=names, texts=names, manifest={}, weights=counts)
    mean = neighbour_average(hits, values, temperature, counts)
    explained = evidence(base, hits, student, temperature, beta)
    assert [len(shown.neighbours) for shown in explained] == [4, 6, 6, 6, 6]
    for row, shown in enumerate(explained):
        contributions = shown.student_contribution + sum(near.contribution for near in shown.neighbours)
        assert contributions == pytest.approx(shown.result[shown.predicted], abs=1e-6)
        assert shown.predicted == interpolate(student, mean, beta)[row].argmax()
        for near in shown.neighbours:
            if near.weight < 0.99:  # the formula cancels above
                others = (mean[row] - near.weight * near.value.astype(float)) / (1 - near.weight)
                expected = beta * student[row] + (1 - beta) * others
                np.testing.assert_allclose(near.result_without, expected, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1, np.nan])
def test_a_beta_outside_its_range_is_refused(beta):
    with pytest.raises(UsageError, match="beta"):
        interpolate(STUDENT, STUDENT, beta)


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(UsageError, match="temperature"):
        weights(np.ones((1, 2)), temperature)


def test_a_beta_for_every_row_mixes_each_its_own_way():
    near = np.array([(0.8, 0.2), (0.8, 0.2)])
    mixed = interpolate(np.vstack([STUDENT, STUDENT]), near, np.array([1.0, 0.5]))
    np.testing.assert_allclose(mixed, [(0.3, 0.7), (0.55, 0.45)])
    with pytest.raises(UsageError, match="beta"):
        interpolate(near, near, np.array([0.5, 1.5]))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(UsageError, match=r"\(1, 2\).*\(3, 2\)"):
        interpolate(STUDENT, np.ones((3, 2)), 0.5)


def test_nothing_found_is_no_average():
    hits = Hits(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.float32))
    assert np.isnan(neighbour_average(hits, np.ones((3, 2), np.float32), 0.5)).all()


def test_evidence_of_several_labels_by_hand(base):
    """Entries 0 and 1 at equal similarity: Avg = ((.9 + .2)/2, (.1 + .8)/2); beta 1/2."""
    sets = replace(base, manifest={**base.manifest, "kind": "multi_label"})
    hits = Hits(np.array([[0, 1]]), np.float32([[0.5, 0.5]]))
    (found,) = evidence(sets, hits, np.array([[0.4, 0.65]]), 1.0, 0.5)
    np.testing.assert_allclose(found.result, [0.475, 0.55], rtol=1e-6)
    np.testing.assert_allclose(found.contributions(0), [0.2, 0.225, 0.05], rtol=1e-6)
    np.testing.assert_allclose(found.contributions(1), [0.325, 0.025, 0.2], rtol=1e-6)
    assert not found.decisive  # the second label is told, and the first is not, either way
    (found,) = evidence(sets, hits, np.array([[0.48, 0.65]]), 1.0, 0.5)
    assert found.decisive  # the first label is told now; the most probable one is the same
    assert found.predicted == 1
    (alone,) = evidence(sets, Hits(np.array([[-1]]), np.float32([[-np.inf]])), np.array([[0.4, 0.65]]), 1.0, 0.5)
    assert alone.contributions(1) == [0.65]
