"""The bench of distillation compares like with like: the engines agree on the loss before they are timed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openbook.bench import distill
from openbook.bench.minilm_rivals import open_plain
from openbook.bench_commands import shape_of
from openbook.config import FileSource, Optim, StudentSettings, UsageError
from openbook.models.encoder import load_headless
from openbook.models.student import load_tokenizer

SHAPE = StudentSettings(architecture="bert", layers=2, hidden_size=16, heads=2, intermediate_size=32)


class Here:
    """A rival in this process: starting others costs seconds."""

    def __init__(self, name: str, open_: Callable[..., Callable[[Any], Any]], *args: Any) -> None:
        self.name, self.answer = name, open_(*args)

    def ask(self, request: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        return time.perf_counter() - started + 1e-3, self.answer(request)

    def close(self) -> int:
        return 1


@pytest.fixture
def result(world: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(distill, "Rival", Here)
    monkeypatch.setattr(distill, "RIVALS", {"plain": open_plain})
    monkeypatch.setattr(distill, "Cut", lambda length, *rest: distill_cut(12, 0.5, 4, 0))
    text = FileSource(path=str(world / "general.txt"))
    optim = Optim(learning_rate=1e-3, batch_tokens=128, precision="fp32")
    return distill.run(str(pretrained), SHAPE, text, optim, updates=2, rounds=2, folder=tmp_path)


distill_cut = distill.Cut


def test_the_engines_agree_on_the_loss(result: dict[str, Any]) -> None:
    first = result["first_loss"]
    assert first["plain"] == pytest.approx(first["openbook"], rel=1e-4)
    assert first["openbook, two students"] == pytest.approx(first["openbook"], rel=1e-6)
    assert first["openbook"] > 0


def test_figures_and_tables(result: dict[str, Any]) -> None:
    assert set(result["ratio"]) == {"plain", "openbook, two students"}
    assert 0 <= result["padding"] < 0.3
    assert list(result["peak_bytes_by_relation_heads"]) == ["1", "16"]
    speed, memory = distill.tables(result)
    assert (speed.row_count, memory.row_count) == (3, 2)


def test_a_teacher_of_random_weights_has_the_shape_and_the_words(pretrained: Path, tmp_path: Path) -> None:
    location = distill.random_teacher(str(pretrained), *shape_of("2x128"), tmp_path)
    wide = load_headless(location)
    assert (wide.layers, wide.width, wide.heads) == (2, 128, 2)
    assert load_tokenizer(location).get_vocab() == load_tokenizer(str(pretrained)).get_vocab()
    assert wide.model.config.vocab_size == len(load_tokenizer(location))


@pytest.mark.parametrize("told", ["12", "0 x 64", "2 x 70", "2 x 0", "2 x 64 x 2", "two x 64"])
def test_what_is_no_shape_is_refused(told: str) -> None:
    with pytest.raises(UsageError, match=r"--teacher-shape .* is no shape; write layers x width, a multiple of 64"):
        shape_of(told)


def test_a_shape_may_have_spaces() -> None:
    assert shape_of("12 x 768") == shape_of("12x768") == (12, 768)
