"""The bench of the corpus: engines take turns over the same words, and the same hits are recognised."""

import json
import time
from pathlib import Path

import pytest

from openbook.bench.corpus import run, same_hits, tables
from openbook.bench.measure import measured
from openbook.config import CorpusSettings, FileSource, UsageError

TEXT = "the river rose and old bridge of stone fell into cold water while people watched from a hill"
WORDS = TEXT.split()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    task = tmp_path / "tasks" / "tiny"
    task.mkdir(parents=True)
    (task / "task.json").write_text(
        json.dumps({"kind": "classification", "metric": "accuracy", "labels": {"0": "no", "1": "yes"}})
    )
    for split, count in (("train", 40), ("dev", 8)):
        rows = [
            {"text_a": f"{split} {WORDS[i % len(WORDS)]} {WORDS[(3 * i) % len(WORDS)]} {i}", "label": i % 2}
            for i in range(count)
        ]
        (task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sentences = [" ".join(WORDS[(i * step) % len(WORDS)] for step in range(1, 9)) + f" {i}." for i in range(300)]
    (tmp_path / "general.txt").write_text("\n".join(sentences))
    monkeypatch.setenv("OPENBOOK_DATA", str(tmp_path))
    return tmp_path


def test_engines_take_turns_and_find_the_same(data: Path) -> None:
    settings = CorpusSettings(sources=(FileSource(path=str(data / "general.txt")),))
    result = run(settings, ["tiny"], ["bm25s"], k=5, anchors=20, rounds=2, folder=data / "bench")
    found = result["search"]["tasks"]["tiny"]
    assert result["bank"]["sentences"] == 300
    assert found["same_hits"]["bm25s"] == 1.0
    assert found["anchors"] == 20
    assert found["anchors_per_second"]["openbook"] > 0
    assert result["search"]["peak_bytes"]["bm25s"] > 1e7
    assert len(tables(result)) == 2


def test_a_rival_that_is_not_installed_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook.bench.corpus.importlib.util.find_spec", lambda name: None)
    settings = CorpusSettings(sources=(FileSource(path=str(data / "general.txt")),))
    with pytest.raises(UsageError, match=r"--rival tantivy is not installed; pip install 'openbook\[bench\]'"):
        run(settings, ["tiny"], ["tantivy"], 5, 20, 1, data / "bench")


def test_hits_are_the_same_if_ties_alone_fell_otherwise() -> None:
    ours = [[1, 2, 3]], [[2.0, 1.0, 1.0]]
    assert same_hits(ours, ([[1, 3, 2]], [[2.0, 1.0, 1.0]])) == 1.0
    assert same_hits(ours, ([[1, 7, 8]], [[2.0, 1.0, 1.0]])) == 1.0, "equal scores: other ties were cut"
    assert same_hits(ours, ([[1, 2, 9]], [[9.0, 8.0, 7.0]])) == pytest.approx(2 / 3)
    assert same_hits(([[]], [[]]), ([[]], [[]])) == 1.0


def test_memory_is_that_of_the_block() -> None:
    with measured() as before:
        pass
    with measured() as peak:
        held = bytearray(200_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.5)
    assert peak.bytes > before.bytes + 150_000_000
    assert peak.seconds >= 0.5
