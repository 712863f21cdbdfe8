import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import openbook.knowledge_base.search as search_module
from openbook.config import UsageError
from openbook.knowledge_base.search import normalise, search

QUERY = np.array([(0.8, 0.6)])


def random_unit(seed: int, rows: int, dimensions: int) -> np.ndarray:
    return normalise(np.random.default_rng(seed).normal(size=(rows, dimensions))).astype(np.float32)


def by_definition(queries, keys, k, exclude):
    """Python's own sort of every entry by (-similarity, position)."""
    found = []
    for query, excluded in zip(normalise(queries), exclude, strict=True):
        similarities = [np.float32(sum(float(q) * float(x) for q, x in zip(query, key, strict=True))) for key in keys]
        order = sorted(set(range(len(keys))) - set(excluded), key=lambda i: (-similarities[i], i))[:k]
        found.append(order + [-1] * (min(k, len(keys)) - len(order)))
    return found


def test_the_worked_example(base):
    hits = search(QUERY, base.keys, k=4)
    assert hits.positions.tolist() == [[2, 0, 1, 3]]
    np.testing.assert_allclose(hits.similarities, [[0.96, 0.8, 0.6, -0.8]], atol=1e-6)
    assert hits.positions.dtype == np.int64
    assert hits.similarities.dtype == np.float32


def test_the_nearest_by_inner_product_are_the_nearest_by_distance(base):
    hits = search(QUERY, base.keys, k=4)
    distances = ((QUERY - base.keys) ** 2).sum(axis=1)
    np.testing.assert_allclose(distances, [0.4, 0.8, 0.08, 3.6], atol=1e-6)
    np.testing.assert_allclose(2 - 2 * hits.similarities[0], np.sort(distances), atol=1e-6)


def test_the_length_of_a_query_is_irrelevant_also_in_half_precision(base):
    expected = search(QUERY, base.keys, k=2)
    for query in (QUERY * 1e5, QUERY * 1e-5, (QUERY * 3e4).astype(np.float16)):
        hits = search(query, base.keys, k=2)
        assert hits.positions.tolist() == [[2, 0]]
        np.testing.assert_allclose(hits.similarities, expected.similarities, atol=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 14), st.booleans())
def test_every_order_is_the_one_by_definition(seed, entries, k, with_duplicates):
    random = np.random.default_rng(seed)
    keys = random_unit(seed, entries, 5)
    if with_duplicates:
        keys = keys[random.integers(entries, size=entries)]
    queries = random.normal(size=(3, 5))
    exclude = [random.choice(entries, size=random.integers(entries + 1), replace=False) for _ in queries]
    hits = search(queries, keys, k, exclude)
    assert hits.positions.tolist() == by_definition(queries, keys, k, exclude)
    assert (hits.similarities == -np.inf).tolist() == (hits.positions == -1).tolist()


def test_ties_go_to_the_first_position_also_at_the_cut():
    # a matrix product of 768 numbers rounds equal keys differently in different columns
    one, other = random_unit(0, 2, 768)
    keys = np.stack([other] * 3 + [one] * 61)
    queries = np.stack([one + 0.1 * noise for noise in random_unit(1, 7, 768)])
    hits = search(queries, keys, k=20)
    assert hits.positions.tolist() == [list(range(3, 23))] * 7
    assert all(len(set(row)) == 1 for row in hits.similarities.tolist())


def test_the_rounding_of_the_matrix_product_decides_nothing():
    rough = np.float32([[0.5, 0.5 + 2e-6, 0.2, 0.5 - 2e-6, -np.inf]])[:, None]  # groups of one
    for k, expected in ((1, [0, 1, 3]), (5, [0, 1, 2, 3])):
        rows, places = search_module._candidates(rough, k)
        assert (rows.tolist(), places.tolist()) == ([0] * len(places), expected)
    in_groups = np.float32([[[0.1, 0.5], [0.5 - 2e-6, 0.3], [0.2, 0.5 + 2e-6]], [[0.9, 0.1], [0.1, 0.1], [0.1, 0.1]]])
    rows, places = search_module._candidates(in_groups, 1)
    assert sorted(zip(rows.tolist(), places.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 5), (1, 0)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(300, 1500), st.integers(1, 9), st.integers(1, 3))
def test_looking_at_groups_first_misses_nothing(seed, entries, k, distinct):
    random = np.random.default_rng(seed)
    keys = random_unit(seed, 12 * distinct, 6)[random.integers(12 * distinct, size=entries)]
    queries, out = random.normal(size=(4, 6)), np.arange(0, entries, 3)
    hits = search(queries, keys, k, [out, (), out, ()])
    exact = (normalise(queries)[:, None] * keys[None].astype(np.float64)).sum(axis=2).astype(np.float32)
    exact[::2, out] = -np.inf
    assert hits.positions.tolist() == np.argsort(-exact, axis=1, kind="stable")[:, :k].tolist()


def test_keys_that_all_point_away_are_found_too():
    keys = -normalise(np.abs(np.random.default_rng(0).normal(size=(301, 4)))).astype(np.float32)  # in groups of 37
    query = np.ones((1, 4))
    assert search(query, keys, 1).positions[0, 0] == (keys @ query[0]).argmax()


def test_a_basis_is_applied_to_the_unit_query_which_then_keeps_its_length(base):
    basis = np.float32([[0.894427], [0.447214]])
    hits = search(QUERY * 7, base.keys @ basis, 4, basis=basis)
    np.testing.assert_allclose(hits.similarities, [[0.88, 0.88, 0.44, -0.88]], atol=1e-6)
    whole = np.float32([[0.6, -0.8], [0.8, 0.6]])
    assert search(QUERY, base.keys @ whole, 4, basis=whole).positions.tolist() == [[2, 0, 1, 3]]
    with pytest.raises(UsageError, match=r"\(1, 1\).*2 dimensions"):
        search(np.ones((1, 1)), base.keys @ basis, 1, basis=basis)


def test_returned_similarities_are_the_exact_inner_products():
    keys, queries = random_unit(2, 50, 768), random_unit(3, 4, 768)
    hits = search(queries, keys, k=9)
    exact = np.einsum("bd,bkd->bk", normalise(queries), keys[hits.positions].astype(np.float64))
    assert (hits.similarities == exact.astype(np.float32)).all()


def test_batching_and_blocks_change_no_bit(monkeypatch):
    keys, queries = random_unit(4, 40, 64), random_unit(5, 9, 64)
    exclude = [np.array([row]) for row in range(9)]
    together = search(queries, keys, 5, exclude)
    alone = [search(queries[[row]], keys, 5, [exclude[row]]) for row in range(9)]
    monkeypatch.setattr(search_module, "BLOCK", 80)  # two queries a block
    in_blocks = search(queries, keys, 5, exclude)
    for hits in (in_blocks, *alone):
        assert len(hits.positions) in (1, 9)
    assert np.concatenate([hits.positions for hits in alone]).tolist() == together.positions.tolist()
    assert np.concatenate([hits.similarities for hits in alone]).tobytes() == together.similarities.tobytes()
    assert in_blocks.positions.tolist() == together.positions.tolist()
    assert in_blocks.similarities.tobytes() == together.similarities.tobytes()


def test_what_is_excluded_is_never_found_wherever_it_ranks(base):
    assert search(base.keys[[2]], base.keys, 2).positions.tolist() == [[2, 1]]
    hits = search(base.keys, base.keys, 2, exclude=[{0}, {1}, {2}, {3}])
    assert hits.positions.tolist() == [[2, 1], [2, 0], [1, 0], [1, 2]]
    assert search(QUERY, base.keys, 4, [{0, 1, 2}]).positions.tolist() == [[3, -1, -1, -1]]


def test_more_neighbours_than_entries_are_clipped(base, empty_base):
    assert search(QUERY, base.keys, 9).positions.shape == (1, 4)
    assert search(QUERY, empty_base.keys, 9).positions.shape == (1, 0)


def test_the_first_k_of_more_hits_are_the_hits_for_k(base):
    more = search(QUERY, base.keys, 4)
    assert more.top(2).positions.tolist() == search(QUERY, base.keys, 2).positions.tolist()
    assert more.top(2).similarities.tolist() == search(QUERY, base.keys, 2).similarities.tolist()


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 3)), 2, r"\(1, 3\).*2 dimensions"),
        (np.ones(2), 2, r"\(2,\).*2 dimensions"),
        (np.array([(1, 1), (np.nan, 1)]), 2, "query 1 is not finite"),
        (QUERY, 0, "top_k is 0"),
    ],
)
def test_queries_that_cannot_be_compared_are_refused(base, queries, k, message):
    with pytest.raises(UsageError, match=message):
        search(queries, base.keys, k)


def test_there_must_be_an_exclusion_for_every_query(base):
    with pytest.raises(UsageError, match="1 sets.*2 queries"):
        search(base.keys[:2], base.keys, 2, exclude=[{0}])
