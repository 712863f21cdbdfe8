"""Dense search against its definition: every score exact, every order (-score, position), whatever the batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import openbook.retrieval.dense as dense
from openbook.config import UsageError
from openbook.models.sentence import sentence_encoder
from openbook.retrieval.dense import DenseIndex, Embed
from openbook.retrieval.hits import HitTable

NAME = "an encoder"


def looked_up(vectors: dict[str, Sequence[float]]) -> Embed:
    return lambda texts: np.array([vectors[text] for text in texts], dtype=np.float32)


def made_up(width: int) -> Embed:
    """The same vector for the same text, at random otherwise."""
    return lambda texts: np.array(
        [np.random.default_rng(crc32(text.encode())).normal(size=width) for text in texts], dtype=np.float32
    )


def write(folder: Path, *shards: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.parquet" for number in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "words": [1] * len(texts)}), path)
    return paths


def build(folder: Path, embed: Embed, *shards: Sequence[str]) -> DenseIndex:
    return DenseIndex.build(write(folder / "bank", *shards), folder / "index", embed, folder / "scratch", NAME)


def by_definition(
    bank: NDArray[np.float32], queries: NDArray[np.float32], k: int, excluded: Sequence[int]
) -> list[list[int]]:
    """Python's own sort of exact sums; a bank vector is rounded to fp16 once it has length one."""

    def unit(row: NDArray[np.float32]) -> NDArray[np.float32]:
        wide = row.astype(np.float64)
        return (wide / np.sqrt(wide @ wide)).astype(np.float32)

    found = []
    stored = [unit(row).astype(np.float16).tolist() for row in bank]
    for query in queries:
        wanted = unit(query).tolist()
        scores = [sum(a * b for a, b in zip(wanted, row, strict=True)) for row in stored]
        visible = set(range(len(bank))) - set(excluded)
        found.append(sorted(visible, key=lambda position: (-round(scores[position], 13), position))[:k])
    return found


def rows_of(table: HitTable) -> list[list[int]]:
    return [table.row(query).tolist() for query in range(len(table))]


def test_the_worked_example(tmp_path: Path) -> None:
    bank = {"east": (1, 0), "north": (0, 3), "between": (0.6, 0.8), "west": (-1, 0)}
    index = build(tmp_path, looked_up({**bank, "query": (8, 6)}), list(bank)[:3], list(bank)[3:])
    table = index.search(["query"], k=4)
    assert rows_of(table) == [[2, 0, 1, 3]]
    np.testing.assert_allclose(table.scores, [0.96, 0.8, 0.6, -0.8], atol=5e-4)
    assert (table.offsets.dtype, table.positions.dtype, table.scores.dtype) == (np.int64, np.int64, np.float64)
    assert len(index) == 4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 70), st.integers(1, 9), st.integers(1, 300))
def test_every_order_is_the_one_by_definition(seed: int, size: int, k: int, at_once: int, cells: int) -> None:
    random = np.random.default_rng(seed)
    bank = random.choice([-1, 0, 2], size=(size, 5)).astype(np.float32)  # many ties
    bank[~bank.any(axis=1)] = 1
    queries = random.normal(size=(3, 5)).astype(np.float32)
    vectors = {f"b{place}": row for place, row in enumerate(bank)} | {f"q{place}": q for place, q in enumerate(queries)}
    texts = [f"b{place}" for place in range(size)]
    cut = int(random.integers(size + 1))
    excluded = random.choice(size, size=random.integers(size + 1), replace=False).tolist()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        index = build(Path(folder), looked_up(vectors), texts[:cut], texts[cut:])
        patch.setattr(dense, "AT_ONCE", at_once)
        patch.setattr(dense, "CELLS", cells)
        patch.setattr(dense, "SPARE", 2)
        table = index.search(["q0", "q1", "q2"], k, excluded)
    assert rows_of(table) == by_definition(bank, queries, k, excluded)


def test_blocks_batches_and_shards_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {place % 250}" for place in range(300)]  # fifty of them twice
    embed, queries = made_up(384), [f"query {place}" for place in range(7)]
    whole = build(tmp_path / "one", embed, texts)
    expected = whole.search(queries, 40, [3, 5])
    shards = build(tmp_path / "many", embed, texts[:1], texts[1:130], [], texts[130:])
    for at_once, cells in [(8192, 1 << 23), (64, 1), (7, 400), (300, 2000)]:
        monkeypatch.setattr(dense, "AT_ONCE", at_once)
        monkeypatch.setattr(dense, "CELLS", cells)
        for index in (whole, shards):
            table = index.search(queries, 40, [3, 5])
            assert table.positions.tobytes() == expected.positions.tobytes()
            assert table.scores.tobytes() == expected.scores.tobytes()
    alone = HitTable.joined([whole.search([query], 40, [3, 5]) for query in queries])
    assert alone.scores.tobytes() == expected.scores.tobytes()


def test_scores_are_the_exact_products_of_what_is_stored(tmp_path: Path) -> None:
    embed = made_up(96)
    index = build(tmp_path, embed, [f"text {place}" for place in range(50)])
    table = index.search(["query"], 9)
    query = embed(["query"])[0].astype(np.float64)
    query = (query / np.sqrt(query @ query)).astype(np.float32).astype(np.float64)
    stored = index.shards[0][table.positions].astype(np.float64)
    np.testing.assert_allclose(table.scores, stored @ query, atol=1e-15)


def test_ties_go_to_the_lower_position_however_many_there_are(tmp_path: Path) -> None:
    vectors = {f"b{place}": (3.0, 4.0) if place % 2 else (4.0, 3.0) for place in range(400)}
    index = build(tmp_path, looked_up({**vectors, "q": (1.0, 2.0)}), list(vectors))
    assert rows_of(index.search(["q"], 5)) == [[1, 3, 5, 7, 9]]
    assert rows_of(index.search(["q"], 203)) == [[*range(1, 400, 2), 0, 2, 4]]


def test_what_float32_cannot_tell_apart_is_still_ordered_by_its_score(tmp_path: Path) -> None:
    """All scores are 0.6 and a billionth; the best lie last, where a pool of k + 16 would have been full of others."""
    bank = {f"b{place}": (0.6, 0.8 * np.cos(angle), 0.8 * np.sin(angle)) for place, angle in enumerate(ANGLES)}
    bank["far"] = (-1, 0, 0)
    index = build(tmp_path, looked_up({**bank, "q": (1, 1e-9, 0)}), list(bank))
    assert rows_of(index.search(["q"], 3)) == [[199, 198, 197]]
    assert rows_of(index.search(["far", "q"], 1)) == [[200], [199]]  # of two in a batch, only one needs a second look


ANGLES = np.linspace(3, 0.1, 200)


def test_excluded_sentences_are_passed_over_and_a_small_bank_gives_fewer(tmp_path: Path) -> None:
    embed = made_up(8)
    index = build(tmp_path, embed, [f"text {place}" for place in range(30)])
    (every,) = rows_of(index.search(["query"], 100))
    assert sorted(every) == list(range(30))
    excluded = every[:2] + every[10:20]
    for given_as in (excluded, np.array(excluded), excluded * 2):
        table = index.search(["query", "other"], 100, given_as)
        assert rows_of(table)[0] == [position for position in every if position not in excluded]
    assert rows_of(index.search(["query"], 3, excluded)) == [every[2:5]]
    nothing = index.search(["query", "other"], 5, range(30))
    assert (rows_of(nothing), len(nothing)) == ([[], []], 2)
    assert len(index.search([], 5)) == 0


def test_every_query_gets_its_own_row_whatever_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder rounds texts together; so which are embedded together does not depend on the order of the queries."""
    calls: list[list[str]] = []
    embed = made_up(8)

    def spy(texts: Sequence[str]) -> NDArray[np.float32]:
        calls.append(list(texts))
        return embed(texts)

    index = build(tmp_path, spy, [f"text {place}" for place in range(30)])
    calls.clear()
    monkeypatch.setattr(dense, "CELLS", 150)  # three queries at a time
    queries = ["d", "a", "c", "b", "a"]
    found, turned = index.search(queries, 4), index.search(queries[::-1], 4)
    assert rows_of(turned) == rows_of(found)[::-1]
    assert calls == [["a", "a", "b"], ["c", "d"]] * 2
    assert rows_of(found) == [rows_of(index.search([query], 4))[0] for query in queries]


@pytest.mark.parametrize("broken", [(0, 0), (np.nan, 1), (np.inf, 1)])
def test_a_vector_without_direction_is_refused_naming_its_text(tmp_path: Path, broken: tuple[float, float]) -> None:
    embed = looked_up({"good": (1, 2), "the bad one": broken})
    with pytest.raises(UsageError, match=r"corpus\.encoder.*'the bad one'"):
        build(tmp_path / "bank", embed, ["good", "the bad one"])
    index = build(tmp_path / "query", embed, ["good"])
    with pytest.raises(UsageError, match=r"corpus\.encoder.*'the bad one'"):
        index.search(["good", "the bad one"], 1)


def test_vectors_too_large_to_square_in_float32_are_scaled_too(tmp_path: Path) -> None:
    index = build(tmp_path, looked_up({"large": (3e30, 4e30), "small": (3e-30, 4e-30)}), ["large", "small"])
    np.testing.assert_allclose(index.shards[0], [(0.6, 0.8)] * 2, atol=5e-4)


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "AT_ONCE", 2)
    shards = [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    embed, embedded, heard = made_up(8), list[str](), list[int]()

    def interrupted(texts: Sequence[str]) -> NDArray[np.float32]:
        if "f" in texts:
            raise KeyboardInterrupt
        return embed(texts)

    def counting(texts: Sequence[str]) -> NDArray[np.float32]:
        embedded.extend(texts)
        return embed(texts)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, interrupted, *shards)
    with pytest.raises(UsageError, match="no whole dense index"):
        DenseIndex.load(tmp_path / "index", embed, NAME)
    paths = write(tmp_path / "bank", *shards)
    resumed = DenseIndex.build(paths, tmp_path / "index", counting, tmp_path / "scratch", NAME, heard.append)
    assert embedded == ["d", "e", "f", "g"]
    assert heard == [3, 5, 6, 6, 7, 7]
    whole = build(tmp_path / "whole", embed, *shards)
    assert [part.tobytes() for part in resumed.shards] == [part.tobytes() for part in whole.shards]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_vectors_of_other_texts_or_another_encoder_are_not_kept(tmp_path: Path) -> None:
    first, second = made_up(8), looked_up({"a": (1, 2), "b": (2, 1)})
    build(tmp_path, first, ["x"], ["a"])
    paths = write(tmp_path / "bank", ["b"], ["a"])
    index = DenseIndex.build(paths, tmp_path / "index", second, tmp_path / "scratch", "another")
    np.testing.assert_allclose(np.concatenate(index.shards) @ [0, 5**0.5], [1, 2], atol=2e-3)


def test_a_loaded_index_is_mapped_from_disk_and_finds_the_same(tmp_path: Path) -> None:
    embed = made_up(8)
    built = build(tmp_path, embed, ["a", "b", "c"], ["d"])
    loaded = DenseIndex.load(tmp_path / "index", embed, NAME)
    assert all(isinstance(part, np.memmap) and part.dtype == np.float16 for part in loaded.shards)
    assert not any(part.flags.writeable for part in loaded.shards)
    assert loaded.search(["b", "z"], 3).scores.tobytes() == built.search(["b", "z"], 3).scores.tobytes()


def test_the_vectors_of_another_encoder_are_refused_naming_both(tmp_path: Path) -> None:
    build(tmp_path, made_up(8), ["a"])
    with pytest.raises(UsageError, match=r"corpus\.encoder='its rival'.*'an encoder'"):
        DenseIndex.load(tmp_path / "index", made_up(8), "its rival")
    index = DenseIndex.load(tmp_path / "index", made_up(9), NAME)  # of the same name, and yet another
    with pytest.raises(UsageError, match="9 numbers.* 8"):
        index.search(["a"], 1)


def damaged(folder: Path, how: str) -> None:
    (vectors,) = folder.glob("*.npy")
    description = folder / "index.json"
    if how == "cut":
        vectors.write_bytes(vectors.read_bytes()[:-1])
    elif how == "missing":
        vectors.unlink()
    elif how == "pickle":
        np.save(vectors, np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    elif how == "precise":
        np.save(vectors, np.ones((2, 8)))
    elif how == "narrow":
        np.save(vectors, np.ones((2, 7), np.float16))
    else:
        description.write_text(description.read_text()[:-1])


@pytest.mark.parametrize("how", ["cut", "missing", "pickle", "precise", "narrow", "half a description"])
def test_a_damaged_index_is_refused(tmp_path: Path, how: str) -> None:
    build(tmp_path, made_up(8), ["a", "b"])
    damaged(tmp_path / "index", how)
    with pytest.raises(UsageError, match="no whole dense index.*build it again"):
        DenseIndex.load(tmp_path / "index", made_up(8), NAME)


def test_a_bank_without_sentences_finds_nothing(tmp_path: Path) -> None:
    index = build(tmp_path, made_up(8), [])
    assert (len(index), rows_of(index.search(["a"], 3))) == (0, [[]])
    assert json.loads((tmp_path / "index" / "index.json").read_text())["encoder"] == NAME


def test_progress_hears_the_queries_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, heard = build(tmp_path, made_up(8), ["a", "b"]), list[int]()
    monkeypatch.setattr(dense, "CELLS", 1)
    index.search(["x", "y", "z"], 1, progress=heard.append)
    assert heard == [1, 2, 3]


def test_a_real_encoder_finds_every_sentence_by_itself(tmp_path: Path, pretrained: Path) -> None:
    texts = ["a great film", "the plot was dull and the actor was weak", "my song seemed lovely to me", "you and me"]
    index = build(tmp_path, sentence_encoder(str(pretrained)), texts[:3], texts[3:])
    assert [row[0] for row in rows_of(index.search(texts, 2))] == [0, 1, 2, 3]
