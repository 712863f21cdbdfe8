"""Blocks hold the text of one document each, all but short ends, within the budget, framed as the tokenizer does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.data.batches import Tokenised
from openbook.data.blocks import Cut, Frame, Part, cut, draw_documents, pieces_per_character, write_blocks

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def documents(count: int, words: int) -> list[tuple[str, str]]:
    """Single letters are single word-pieces of the tests' tokenizer."""
    return [(f"doc/{n}", " ".join(LETTERS[(n + i) % 26] for i in range(words))) for n in range(count)]


def text_of(tokenizer: Any, ids: Any, special: bool = True) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=special))


@pytest.mark.parametrize("pair_share", [0.0, 0.5, 1.0])
def test_the_blocks_of_a_document_read_one_after_the_other_are_the_document(tokenizer: Any, pair_share: float) -> None:
    docs = documents(6, 53)
    blocks = list(cut(docs, tokenizer, Cut(12, pair_share, 1, seed=0)))
    for name, text in docs:
        own = [block for block in blocks if block[0].startswith(f"{name}/")]
        assert " ".join(text_of(tokenizer, ids) for _, ids, _, _ in own) == text
    assert max(len(ids) for _, ids, _, _ in blocks) == 12
    pairs = [types.any() for _, _, types, _ in blocks]
    assert {0.0: not any(pairs), 0.5: 0 < sum(pairs) < len(pairs), 1.0: all(pairs)}[pair_share]


@pytest.mark.parametrize(("is_pair", "words"), [(False, "a b c d e"), (True, "a b c d e")])
def test_a_block_is_what_the_tokenizer_makes_of_the_same_text(tokenizer: Any, is_pair: bool, words: str) -> None:
    pieces = np.array(tokenizer(words, add_special_tokens=False)["input_ids"], np.int32)
    ids, types = Frame.of(tokenizer).block(pieces, is_pair)
    texts = ("a b c", "d e") if is_pair else (words,)
    expected = tokenizer(*texts, return_token_type_ids=True)
    assert (ids.tolist(), types.tolist()) == (expected["input_ids"], expected["token_type_ids"])


def test_ends_shorter_than_asked_for_are_dropped(tokenizer: Any) -> None:
    blocks = list(cut(documents(3, 25), tokenizer, Cut(12, 0.0, 6, seed=0)))  # 10, 10, and 5 that are too few
    assert [len(ids) for _, ids, _, _ in blocks] == [12, 12] * 3


def test_the_budget_is_kept_and_the_blocks_can_be_read(tokenizer: Any, tmp_path: Path) -> None:
    told = write_blocks([Part("text", documents(20, 40), Cut(12, 0.5, 4, seed=0), 300)], tokenizer, tmp_path)
    texts = Tokenised.load(tmp_path)
    assert told == {
        "blocks": len(texts),
        "tokens": int(texts.tokens.sum()),
        "with_special_tokens": int(texts.lengths.sum()),
    }
    assert 290 <= texts.tokens.sum() <= 300
    batch = texts.batch([0, 1])
    assert batch.input_ids.shape[1] <= 12
    assert batch.labels is None


def test_no_block_at_all_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"text\.sources holds no document of 16 word-pieces within 300"):
        write_blocks([Part("text.sources", documents(9, 15), Cut(24, 0.5, 16, 0), 300)], tokenizer, tmp_path)


def test_what_is_beyond_the_budget_goes_by_chance_and_every_part_has_its_own(tokenizer: Any, tmp_path: Path) -> None:
    how = Cut(12, 0.0, 1, seed=0)
    few = [(f"few/{name}", text) for name, text in documents(100, 3)]
    told = write_blocks([Part("a", documents(200, 40), how, 1000), Part("b", few, how, 90)], tokenizer, tmp_path)
    texts = Tokenised.load(tmp_path)
    places = [int(name.split("/")[1]) for name in texts.ids.to_pylist() if name.startswith("doc/")]
    assert places == sorted(places)
    assert 0.35 < np.mean(np.array(places) < 100) < 0.65
    of_few = np.array([name.startswith("few/") for name in texts.ids.to_pylist()])
    assert texts.tokens[of_few].sum() == 90
    assert 990 <= texts.tokens[~of_few].sum() <= 1000
    assert told["tokens"] == texts.tokens.sum()


def test_documents_are_drawn_from_everywhere_and_about_as_many_as_asked_for(tokenizer: Any) -> None:
    docs = documents(4000, 20)

    def read() -> Iterator[tuple[str, str]]:
        return iter(docs)

    density = pieces_per_character(read(), tokenizer)
    drawn = list(draw_documents(read, 8_000, density, "0"))
    assert 8_800 < 20 * len(drawn) < 10_400  # a fifth more than asked for: the budget cuts it off
    places = [int(name.removeprefix("doc/")) for name, _ in drawn]
    assert places == sorted(places)
    assert 0.35 < np.mean(np.array(places) < 2000) < 0.65
    assert drawn == list(draw_documents(read, 8_000, density, "0"))
    assert drawn != list(draw_documents(read, 8_000, density, "1"))
    assert list(draw_documents(read, 10**9, density, "0")) == docs


@settings(deadline=None, max_examples=25)
@given(words=st.integers(0, 60), length=st.integers(8, 20), least=st.integers(1, 4), seed=st.integers(0, 5))
def test_no_block_is_longer_than_asked_for_and_none_too_short(
    tokenizer: Any, words: int, length: int, least: int, seed: int
) -> None:
    for _, ids, types, special in cut(documents(2, words), tokenizer, Cut(length, 0.5, least, seed)):
        assert least <= len(ids) - special <= len(ids) == len(types) <= length
