"""An index finds what exact search finds, says so with exact similarities, and lives through edits of the book."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openbook.config import UsageError
from openbook.knowledge_base import index as index_module
from openbook.knowledge_base.graph import LINKS, is_graph
from openbook.knowledge_base.index import FILE, Index, exact_index, open_index, previous_rows, tie_aware_recall
from openbook.knowledge_base.search import Hits, normalise, search

K = 4


def clustered(entries: int, dimensions: int, seed: int = 0, duplicates: float = 0.3) -> np.ndarray:
    """Unit keys around a few centres, some of them the same as others."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(6, dimensions))[random.integers(6, size=entries)]
    keys = normalise(centres + 0.5 * random.normal(size=(entries, dimensions))).astype(np.float32)
    copies = random.permutation(entries)[: int(duplicates * entries)]
    keys[copies] = keys[random.integers(entries, size=len(copies))]
    return keys


KEYS = clustered(1200, 16)
QUERIES = clustered(40, 16, seed=0) + 0.05 * np.random.default_rng(1).normal(size=(40, 16))


@pytest.fixture(scope="module", params=["hnsw", "ivf"])
def built(request: pytest.FixtureRequest) -> Index:
    return open_index(KEYS, request.param, k=K)


def is_exactly_scored(hits: Hits, keys: np.ndarray, queries: np.ndarray) -> bool:
    found = hits.positions >= 0
    exact = np.einsum("bd,bkd->bk", normalise(queries), keys[hits.positions].astype(np.float64)).astype(np.float32)
    return bool((hits.similarities[found] == exact[found]).all())


def test_the_worked_example_of_tie_aware_recall() -> None:
    keys = np.array([(1, 0), (0, 1), (0.6, 0.8), (-1, 0), (1, 0)], dtype=np.float32)
    exact = search(np.array([(0.8, 0.6)]), keys, 2)
    assert exact.positions.tolist() == [[2, 0]]
    other = Hits(np.array([[2, 4]]), np.float32([[0.96, 0.8]]))
    assert len({2, 0} & {2, 4}) / 2 == 0.5
    assert tie_aware_recall(other, exact) == 1
    assert tie_aware_recall(Hits(np.array([[2, 1]]), np.float32([[0.96, 0.6]])), exact) == 0.5
    assert tie_aware_recall(Hits(np.array([[2, -1]]), np.float32([[0.96, -np.inf]])), exact) == 0.5


def test_recall_is_high_with_duplicates_and_similarities_are_exact(built: Index) -> None:
    assert built.kind in ("hnsw", "ivf")
    assert built.recall >= 0.99
    hits, exact = built.search(QUERIES, K), search(QUERIES, KEYS, K)
    assert tie_aware_recall(hits, exact) >= 0.99
    assert is_exactly_scored(hits, KEYS, QUERIES)
    assert (np.diff(hits.similarities, axis=1) <= 0).all()
    same = (hits.positions == exact.positions).all(axis=1)
    assert same.mean() > 0.9, "ties go to the first position here too"


def test_a_query_finds_the_same_alone_and_among_others(built: Index) -> None:
    together = built.search(QUERIES, K)
    for row in range(5):
        alone = built.search(QUERIES[[row]], K)
        assert alone.positions.tolist() == together.positions[[row]].tolist()
        assert alone.similarities.tobytes() == together.similarities[[row]].tobytes()


def test_what_is_excluded_is_never_found_and_makes_room(built: Index) -> None:
    best = search(QUERIES, KEYS, 30).positions
    hits = built.search(QUERIES, K, list(best[:, :26]))
    assert not (hits.positions[:, :, None] == best[:, None, :26]).any()
    assert (hits.positions >= 0).all()
    assert tie_aware_recall(hits, search(QUERIES, KEYS, K, list(best[:, :26]))) >= 0.99
    few = [set(range(1198)), *[()] * 39]
    assert built.search(QUERIES, K, few).positions[0].tolist() == search(QUERIES, KEYS, K, few).positions[0].tolist()


def test_new_entries_are_found_exactly_and_removed_ones_never(built: Index) -> None:
    new = clustered(30, 16, seed=5, duplicates=0)
    longer = built.extended(np.concatenate([KEYS, new]))
    assert longer.search(new, 1).positions[:, 0].tolist() == list(range(1200, 1230))
    assert longer.search(new, 2, [{1200 + row} for row in range(30)]).positions.max() < 1230
    best = np.unique(search(QUERIES, KEYS, 2).positions)
    kept = np.setdiff1d(np.arange(1230), best)
    shorter = longer.edited(longer.keys[kept], kept)
    hits, exact = shorter.search(QUERIES, K), search(QUERIES, longer.keys[kept], K)
    assert len(shorter.keys) == 1230 - len(best)
    assert tie_aware_recall(hits, exact) >= 0.99
    assert is_exactly_scored(hits, shorter.keys, QUERIES)
    assert shorter.search(new, 1).positions[:, 0].tolist() == list(range(1200 - len(best), 1230 - len(best)))


def test_where_all_near_entries_were_removed_the_index_still_answers(
    built: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = np.sort(search(QUERIES[:1], KEYS, 1200).positions[0, 100:])
    index, exact = built.edited(KEYS[kept], kept), search(QUERIES[:1], KEYS[kept], K)
    monkeypatch.delattr(index_module, "nearest")  # nothing is searched exactly
    assert tie_aware_recall(index.search(QUERIES[:1], K), exact) == 1


def test_adding_and_removing_again_restores_every_bit(built: Index) -> None:
    before = built.search(QUERIES, K)
    new = np.concatenate([KEYS, normalise(QUERIES).astype(np.float32)])
    longer = built.edited(new, np.append(np.arange(1200), np.full(40, -1)))
    assert longer.search(QUERIES, 1).positions[:, 0].tolist() == list(range(1200, 1240))
    after = longer.edited(KEYS, np.arange(1200)).search(QUERIES, K)
    assert after.positions.tobytes() == before.positions.tobytes()
    assert after.similarities.tobytes() == before.similarities.tobytes()


def test_rows_may_change_their_places(built: Index) -> None:
    order = np.random.default_rng(3).permutation(1200)
    hits = built.edited(KEYS[order], order).search(QUERIES, K)
    assert is_exactly_scored(hits, KEYS[order], QUERIES)
    assert hits.similarities.tobytes() == built.search(QUERIES, K).similarities.tobytes()


def test_an_entry_with_another_key_is_found_by_it_and_not_by_the_old_one(built: Index) -> None:
    keys = KEYS.copy()
    keys[7] = keys[3] = clustered(1, 16, seed=8, duplicates=0)[0]
    changed = built.edited(keys, np.arange(1200))
    assert changed.search(keys[[3]], 3).positions[0, :2].tolist() == [3, 7]
    assert is_exactly_scored(changed.search(KEYS[[7]], K), keys, KEYS[[7]])


def test_rows_are_followed_by_id() -> None:
    assert previous_rows(["a", "b", "c"], ["c", "new", "a"]).tolist() == [2, -1, 0]


def test_an_index_most_of_whose_rows_are_gone_searches_exactly(built: Index) -> None:
    kept = np.arange(0, 1200, 3)
    left = built.edited(KEYS[kept], kept)
    assert left.kind == "exact"
    assert "gone" in left.reason
    assert left.search(QUERIES, K).positions.tolist() == search(QUERIES, KEYS[kept], K).positions.tolist()


def test_exact_up_to_the_limit_and_hnsw_above_it() -> None:
    assert open_index(KEYS).kind == "exact"
    assert open_index(KEYS, exact_max_bytes=KEYS.nbytes).kind == "exact"
    above = open_index(KEYS, exact_max_bytes=KEYS.nbytes - 1, k=K)
    assert (above.kind, above.efforts) == ("hnsw", {1: 32, 2: 32, 4: 32})
    assert open_index(KEYS[:0], "hnsw").search(QUERIES, K).positions.shape == (40, 0)


def test_effort_is_raised_until_the_recall_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    monkeypatch.setattr(index_module, "PROBES", 1)
    index = open_index(keys, "ivf", k=K)
    assert index.recall >= 0.99
    assert index.parameters["lists"] == 102
    assert list(index.efforts) == [1, 2, 4]
    assert 1 < index.efforts[1] <= index.efforts[2] <= index.efforts[4] < 102
    monkeypatch.setattr(index_module, "MOST_EFFORT", 2)
    index = open_index(keys, "ivf", k=K)
    assert index.kind == "exact"
    assert index.reason.startswith("the recall of ivf is 0.")
    assert index.search(QUERIES, K).positions.tolist() == search(QUERIES, keys, K).positions.tolist()


def test_recall_holds_for_fewer_neighbours_than_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    near = keys[::4] + 0.2 * np.random.default_rng(1).normal(size=(1000, 16))
    monkeypatch.setattr(index_module, "EF_SEARCH", 1)
    index = open_index(keys, "hnsw", k=32)
    for k in (1, 4, 32):
        assert tie_aware_recall(index.search(near, k), search(near, keys, k)) > 0.98


def test_the_least_effort_is_found_to_an_eighth() -> None:
    def recall_of(effort: int) -> float:
        return 1 - 0.7299 / effort  # .99 at 73

    least, recall = index_module._least_effort(recall_of, 8, 2048)
    assert 73 <= least <= 73 * 9 / 8
    assert recall == recall_of(least)
    assert index_module._least_effort(recall_of, 90, 2048) == (90, recall_of(90))
    assert index_module._least_effort(recall_of, 8, 40) == (40, recall_of(40))
    assert index_module._least_effort(lambda effort: 0.99 * (effort > 1), 1, 2048) == (2, 0.99)


def test_each_number_of_neighbours_has_an_effort_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    near = keys[::4] + 0.2 * np.random.default_rng(1).normal(size=(1000, 16))
    monkeypatch.setattr(index_module, "PROBES", 1)
    index = open_index(keys, "ivf", queries=near, k=32)
    assert index.efforts[1] < index.efforts[32]
    recalls = [tie_aware_recall(index.search(near, k), search(near, keys, k)) for k in (1, 2, 4, 8, 16, 32)]
    assert index.recall == pytest.approx(min(recalls), abs=1e-12)
    assert min(recalls) >= 0.99


def test_identical_keys_break_nothing() -> None:
    keys = np.repeat(KEYS[:1], 900, axis=0)
    index = open_index(keys, "hnsw", k=K)
    assert index.recall >= 0.99
    assert set(index.search(QUERIES, K).similarities[0].tolist()) == {search(QUERIES, keys, 1).similarities[0, 0]}


def test_a_basis_is_applied_to_unit_queries_and_keys_need_not_be_units() -> None:
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 8)))[0].astype(np.float32)
    keys = KEYS @ basis
    index = open_index(keys, "hnsw", basis=basis, k=K)
    hits, exact = index.search(7 * QUERIES, K), search(QUERIES, keys, K, basis=basis)
    assert tie_aware_recall(hits, exact) >= 0.99
    expected = (normalise(QUERIES) @ basis) @ keys.T
    np.testing.assert_allclose(exact.similarities[:, 0], expected.max(axis=1), atol=1e-6)
    with pytest.raises(UsageError, match=r"\(1, 8\).*16 dimensions"):
        index.search(np.ones((1, 8)), K)


def test_keys_of_another_basis_are_compared_in_it() -> None:
    first, second = (np.linalg.qr(np.random.default_rng(n).normal(size=(16, 8)))[0].astype(np.float32) for n in (2, 3))
    index = open_index(KEYS @ first, "hnsw", basis=first, k=K)
    assert index.edited(KEYS @ first, np.arange(1200), first).kind == "hnsw"
    swapped = index.edited(KEYS @ second, np.arange(1200), second)
    assert swapped.kind == "exact"
    expected = search(QUERIES, KEYS @ second, K, basis=second)
    assert swapped.search(QUERIES, K).positions.tolist() == expected.positions.tolist()


def test_exact_search_with_a_basis_of_rank_one() -> None:
    keys = np.array([(1, 0), (0, 1), (0.6, 0.8), (-1, 0)], dtype=np.float32)
    basis = np.array([[0.894427], [0.447214]], dtype=np.float32)
    index = exact_index(keys @ basis, basis, "")
    hits = index.search(np.array([(0.8, 0.6)]), 4)
    assert sorted(hits.positions[0, :2]) == [0, 2], "equal but for rounding"
    np.testing.assert_allclose(hits.similarities, [[0.88, 0.88, 0.44, -0.88]], atol=1e-6)


def test_a_kept_graph_finds_the_same_and_is_used_for_its_own_keys_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    build, built = index_module._build, []
    monkeypatch.setattr(index_module, "_build", lambda *args: (built.append(1), build(*args))[1])
    again = open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    assert not built
    assert (again.kind, again.recall, again.efforts) == (first.kind, first.recall, first.efforts)
    for name in ("positions", "similarities"):
        assert getattr(again.search(QUERIES, K), name).tobytes() == getattr(first.search(QUERIES, K), name).tobytes()
    other = KEYS[::-1]
    assert open_index(other, "hnsw", folder=tmp_path, k=K).search(other[:1], 1).similarities[0, 0] > 0.999
    assert len(built) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_is_not_to_be_built_is_read_or_searched_exactly(tmp_path: Path) -> None:
    waiting = open_index(KEYS, "hnsw", folder=tmp_path, k=K, build=False)
    assert (waiting.kind, list(tmp_path.iterdir())) == ("exact", [])
    open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    assert open_index(KEYS, "hnsw", folder=tmp_path, k=K, build=False).kind == "hnsw"


def test_a_folder_that_cannot_be_written_to_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert open_index(KEYS, "hnsw", folder=tmp_path / "file", k=K).kind == "hnsw"


def test_the_finding_that_no_graph_will_do_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "LEAST_RECALL", 1.1)
    monkeypatch.setattr(index_module, "MOST_EFFORT", 128)
    assert open_index(KEYS, "hnsw", folder=tmp_path, k=K).kind == "exact"
    monkeypatch.delattr(index_module, "_build")
    again = open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    assert again.kind == "exact"
    assert "recall of hnsw" in again.reason


def test_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    for content in (b"", b"PK not a zip", b"\x93NUMPY", json.dumps({}).encode()):
        (tmp_path / FILE).write_bytes(content)
        assert open_index(KEYS, "hnsw", folder=tmp_path, k=K).kind == "hnsw"
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    assert open_index(KEYS, "hnsw", folder=tmp_path, k=K).kind == "hnsw"
    assert (tmp_path / FILE).read_bytes() == whole, "one thread builds the same graph every time"


@pytest.mark.parametrize("efforts", [[], [[4, 0]], [[4, 99999]], [[4, 32], [2, 32]], None])
def test_efforts_that_cannot_be_meant_are_measured_again(tmp_path: Path, efforts: list[list[int]] | None) -> None:
    index = open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    with np.load(tmp_path / FILE, allow_pickle=False) as arrays:
        held = dict(arrays)
    told = json.loads(str(held["told"]))
    assert told["efforts"] == [list(pair) for pair in index.efforts.items()]
    np.savez(tmp_path / FILE, **(held | {"told": np.array(json.dumps(told | {"efforts": efforts}))}))
    assert open_index(KEYS, "hnsw", folder=tmp_path, k=K, build=False).kind == "exact"
    assert open_index(KEYS, "hnsw", folder=tmp_path, k=K).efforts == index.efforts


def beyond(levels: np.ndarray, links: np.ndarray) -> None:
    links[3] = len(levels)


def negative(levels: np.ndarray, links: np.ndarray) -> None:
    links[3] = -2


def too_high(levels: np.ndarray, links: np.ndarray) -> None:
    low, high = int(np.flatnonzero(levels == 1)[0]), int(np.flatnonzero(levels > 1)[0])
    own = LINKS * (levels[:high].astype(int) + 1).sum()  # the lowest level has twice as many links
    links[own + 2 * LINKS] = low  # a link of level 1 to a node without that level


def raised(levels: np.ndarray, links: np.ndarray) -> None:
    levels[0] += 1


def none(levels: np.ndarray, links: np.ndarray) -> None:
    levels[0] = 0


@pytest.mark.parametrize("harm", [beyond, negative, too_high, raised, none], ids=lambda harm: harm.__name__)
def test_arrays_that_would_lead_out_of_the_graph_are_refused(
    tmp_path: Path, harm: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    open_index(KEYS, "hnsw", folder=tmp_path, k=K)
    with np.load(tmp_path / FILE, allow_pickle=False) as arrays:
        levels, links, entry = arrays["levels"], arrays["links"], json.loads(str(arrays["told"]))["entry"]
    assert is_graph(levels, links, entry, 1200)
    assert not is_graph(levels, links, 1200, 1200)
    assert not is_graph(levels, links, int(np.flatnonzero(levels == 1)[0]), 1200)
    assert not is_graph(levels, links[:-1], entry, 1200)
    assert not is_graph(levels.astype(np.int64), links, entry, 1200)
    harm(levels, links)
    assert not is_graph(levels, links, entry, 1200)


def test_queries_that_cannot_be_compared_are_refused(built: Index) -> None:
    with pytest.raises(UsageError, match="query 0 is not finite"):
        built.search(np.full((1, 16), np.nan), K)
    with pytest.raises(UsageError, match="top_k is 0"):
        built.search(QUERIES, 0)
