"""Reciprocal-rank fusion against exact fractions, and engines that search as one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.retrieval.fusion import Hybrid, fuse
from openbook.retrieval.hits import HitTable, Progress


def table(*rows: Sequence[int]) -> HitTable:
    return HitTable.of([[(position, 9.0 - rank) for rank, position in enumerate(row)] for row in rows])


def rows_of(found: HitTable) -> list[list[int]]:
    return [found.row(query).tolist() for query in range(len(found))]


def by_definition(rows: Sequence[Sequence[int]], k: int, constant: int) -> list[tuple[int, Fraction]]:
    """Python's own sort of exact sums by (-score, position)."""
    sums: dict[int, Fraction] = {}
    for row in rows:
        for rank, position in enumerate(row, start=1):
            sums[position] = sums.get(position, Fraction()) + Fraction(1, constant + rank)
    return sorted(sums.items(), key=lambda hit: (-hit[1], hit[0]))[:k]


def test_the_worked_example() -> None:
    """Ranks 2 and 1 beat 1 alone; equal ranks of one table each tie, and go by position."""
    fused = fuse([table([7, 3, 5]), table([3, 9])], k=10)
    assert rows_of(fused) == [[3, 7, 9, 5]]
    np.testing.assert_allclose(fused.scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], atol=1e-12)
    assert rows_of(fuse([table([8]), table([2])], 10)) == [[2, 8]]
    assert (fused.offsets.dtype, fused.positions.dtype, fused.scores.dtype) == (np.int64, np.int64, np.float64)


row = st.lists(st.integers(0, 40), unique=True, max_size=41)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[row] * n), max_size=4)),
    st.integers(0, 50),
    st.integers(0, 90),
)
def test_every_order_is_the_one_by_definition(queries: list[Any], k: int, constant: int) -> None:
    tables = [table(*rows) for rows in zip(*queries, strict=True)] or [table()]
    fused = fuse(tables, k, constant)
    expected = [by_definition(rows, k, constant) for rows in queries]
    assert rows_of(fused) == [[position for position, _ in hits] for hits in expected]
    np.testing.assert_allclose(fused.scores, [float(score) for hits in expected for _, score in hits], atol=1e-12)


@pytest.mark.parametrize(("high", "low", "middle"), [(3, 24, 12), (9, 78, 32), (10, 45, 24)])
@pytest.mark.parametrize("apart", [1, 2])
def test_sums_that_are_equal_as_fractions_tie(high: int, low: int, middle: int, apart: int) -> None:
    """1/63 + 1/84 = 1/72 + 1/72, which rounded shares do not see; so position 1 goes first, whichever sum it has."""
    first, second = list(range(100, 200)), list(range(200, 300))
    first[high - 1] = second[low - 1] = apart
    first[middle - 1] = second[middle - 1] = 3 - apart
    assert rows_of(fuse([table(first), table(second)], 2)) == [[1, 2]]


@settings(deadline=None, derandomize=True)
@given(row, st.integers(0, 50))
def test_one_table_keeps_its_order(hits: list[int], k: int) -> None:
    assert rows_of(fuse([table(hits)], k)) == [hits[:k]]


def test_one_deep_table_keeps_its_order() -> None:
    hits = np.random.default_rng(0).permutation(200_000)
    deep = HitTable(np.array([0, len(hits)]), hits, np.zeros(len(hits)))
    assert (fuse([deep], len(hits)).positions == hits).all()


@settings(deadline=None, derandomize=True)
@given(st.tuples(row, row, row), st.permutations(range(3)))
def test_the_order_of_the_tables_changes_no_bit(rows: tuple[list[int], ...], order: list[int]) -> None:
    tables = [table(hits) for hits in rows]
    one, other = fuse(tables, 99), fuse([tables[place] for place in order], 99)
    assert one.positions.tobytes() == other.positions.tobytes()
    assert one.scores.tobytes() == other.scores.tobytes()


@settings(deadline=None, derandomize=True)
@given(row, row)
def test_what_both_found_outranks_what_one_found_no_higher(first: list[int], second: list[int]) -> None:
    (fused,) = rows_of(fuse([table(first), table(second)], 99))
    for both in set(first) & set(second):
        lower = max(first.index(both), second.index(both))
        alone = [hit for one, other in ((first, second), (second, first)) for hit in one[lower:] if hit not in other]
        assert all(fused.index(both) < fused.index(hit) for hit in alone)


def test_queries_without_hits_keep_their_place() -> None:
    fused = fuse([table([], [4], []), table([], [4, 2], [6])], 1)
    assert rows_of(fused) == [[], [4], [6]]
    assert rows_of(fuse([table(), table()], 3)) == []


def test_tables_of_other_queries_are_refused() -> None:
    for tables in ([table([1]), table([1], [2])], []):
        with pytest.raises(ValueError, match="queries"):
            fuse(tables, 3)


@dataclass
class Fixed:
    """An engine that finds the same for every query, and remembers what it was asked."""

    hits: Sequence[int]
    size: int = 1000
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def search(
        self, queries: Sequence[str], k: int, excluded: Sequence[int] = (), progress: Progress | None = None
    ) -> HitTable:
        self.asked.append((k, list(excluded)))
        for done in range(1, len(queries) + 1):
            if progress:
                progress(done)
        return table(*[[hit for hit in self.hits if hit not in excluded][:k]] * len(queries))


def test_a_hybrid_fuses_what_its_engines_find_below_the_cut() -> None:
    """Both have 999 on rank 90: below what either alone would give, yet together worth as much as rank 15."""
    words, vectors = Fixed([*range(89), 999]), Fixed([*range(200, 289), 999])
    hybrid = Hybrid((words, vectors))
    found = rows_of(hybrid.search(["a", "b"], 80))
    assert found == rows_of(fuse([table(words.hits), table(vectors.hits)], 80)) * 2
    assert found[0].index(999) == 30  # after fifteen of each; 1/75 = 2/150, and the lower position goes first
    assert len(hybrid) == 1000


def test_a_hybrid_asks_for_more_than_it_gives_and_hands_on_what_is_excluded() -> None:
    words, vectors = Fixed(range(300)), Fixed(range(300))
    hybrid = Hybrid((words, vectors))
    assert rows_of(hybrid.search(["a"], 2, [0, 3])) == [[1, 2]]
    hybrid.search(["a"], 70)
    assert words.asked == vectors.asked == [(100, [0, 3]), (140, [])]


def test_a_hybrid_tells_its_progress_in_queries() -> None:
    heard: list[int] = []
    Hybrid((Fixed([1]), Fixed([2]))).search(["a", "b", "c", "d"], 1, progress=heard.append)
    assert heard == [0, 1, 1, 2, 2, 3, 3, 4]


def test_engines_over_different_banks_are_refused() -> None:
    for engines in ((Fixed([1]), Fixed([1], size=3)), ()):
        with pytest.raises(ValueError, match="one bank"):
            Hybrid(engines)
