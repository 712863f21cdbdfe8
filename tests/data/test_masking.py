"""Which pieces are hidden and behind what: BERT's shares, never a special token, the same for the same seed."""

from typing import Any

import numpy as np
import pytest
import torch

from openbook.config import UsageError
from openbook.data.masking import MaskedBatches, Masking, masked
from openbook.types import Batch

PIECES, SPECIAL, MASK = 1000, (0, 1, 2, 3, 4), 4
HOW = Masking(MASK, np.array(SPECIAL), np.arange(5, PIECES))


def batch_of(rows: int, length: int, real: int | None = None) -> Batch:
    """[CLS] pieces [SEP], padded; the third piece is unknown."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, PIECES, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if real is not None:
        mask[:, real:] = 0
    ids[:, 0], ids[:, 3], ids[:, -1] = 2, 1, 3
    names = tuple(map(str, range(rows)))
    return Batch(
        names, ids, mask, (torch.arange(length) > 4).long().expand_as(ids), torch.zeros(rows, dtype=torch.long)
    )


def test_fifteen_percent_are_asked_for_and_shares_of_them_are_masked_replaced_and_kept() -> None:
    before, after = (batch := batch_of(400, 103)).input_ids, masked(batch, HOW, [0, 0])
    assert after.labels is not None
    chosen = after.labels != -100
    assert int(chosen.sum()) == round(0.15 * 400 * 100)
    assert torch.equal(after.labels[chosen], before[chosen])
    now = after.input_ids[chosen]
    shares = [float((fate).float().mean()) for fate in (now == MASK, now == before[chosen])]
    assert shares[0] == pytest.approx(0.8, abs=0.02)  # five standard errors
    assert shares[1] == pytest.approx(0.1, abs=0.02)
    others = now[(now != MASK) & (now != before[chosen])]
    assert len(others.unique()) > 300, "replacements come from the whole vocabulary"
    assert int(others.min()) > 4, "none is a special token"
    assert torch.equal(after.input_ids[~chosen], before[~chosen])
    assert torch.equal(after.token_type_ids, batch.token_type_ids)


def test_special_tokens_and_padding_are_never_chosen() -> None:
    batch = batch_of(50, 20, real=12)
    seen = torch.zeros(50, 20, dtype=torch.bool)
    for step in range(60):
        labels = masked(batch, HOW, [0, step]).labels
        assert labels is not None
        seen |= labels != -100
    assert not seen[:, [0, 3]].any()
    assert not seen[:, 12:].any()
    assert seen[:, [1, 2, *range(4, 12)]].all(), "all others are, sooner or later"


def test_every_place_is_as_likely_as_any_other() -> None:
    batch, counts = batch_of(20, 13), np.zeros((20, 13))
    for step in range(200):
        counts += masked(batch, HOW, [3, step]).labels.numpy() != -100  # type: ignore[union-attr]
    by_column = counts.sum(0)[[1, 2, *range(4, 12)]]
    assert by_column.sum() == 200 * 30
    assert abs(by_column / 600 - 1).max() < 0.15


def test_the_same_seed_and_step_hide_the_same() -> None:
    batch = batch_of(8, 30)
    plan = MaskedBatches([batch, batch], HOW, seed=5)
    assert len(plan) == 2
    first, again, second = plan[0], plan[0], plan[1]
    other = MaskedBatches([batch], HOW, seed=6)[0]
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, second.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert int((batch.input_ids == MASK).sum()) == 0, "the batch itself stays as it was"


def test_short_texts_have_a_hidden_piece_and_empty_ones_none() -> None:
    ids = torch.tensor([[2, 7, 3]])
    one = Batch(("a",), ids, torch.ones_like(ids), torch.zeros_like(ids))
    assert masked(one, HOW, [0]).labels.tolist() == [[-100, 7, -100]]  # type: ignore[union-attr]
    ids = torch.tensor([[2, 3, 0]])
    none = masked(Batch(("a",), ids, torch.tensor([[1, 1, 0]]), torch.zeros_like(ids)), HOW, [0])
    assert none.labels.tolist() == [[-100] * 3]  # type: ignore[union-attr]
    assert none.input_ids.tolist() == ids.tolist()


def test_what_may_be_hidden_comes_from_the_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"mixture\.masked_text=true: the tokenizer .* has no mask token; choose"):
        Masking.of(tokenizer)
