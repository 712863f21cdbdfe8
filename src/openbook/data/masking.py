"""Masked language modelling: which word-pieces of a batch are hidden, and behind what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.config import UsageError
from openbook.data.sequences import IGNORED
from openbook.types import Batch

CHOSEN = 0.15  # of the word-pieces
MASKED, REPLACED = 0.8, 0.1  # of those; the others stay as they are, and are asked for too


class Batches(Protocol):
    """Batches by step."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Masking:
    """What pieces are hidden behind. Special tokens are never hidden, and nothing is hidden behind one but the mask."""

    mask_id: int
    special: NDArray[np.int64]
    ordinary: NDArray[np.int64]  # the rest of the vocabulary

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        """Raises UsageError for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UsageError(
                f"mixture.masked_text=true: the tokenizer {tokenizer.name_or_path!r} has no mask token; choose a"
                " teacher.model that has one, or set it to false"
            )
        special = np.unique(tokenizer.all_special_ids)
        return cls(tokenizer.mask_token_id, special, np.setdiff1d([*tokenizer.get_vocab().values()], special))


def masked(batch: Batch, how: Masking, seed: Sequence[int]) -> Batch:
    """The batch with pieces hidden, which are its labels (B, L), -100 elsewhere (BERT, section 3.1 and appendix A.1).

    15 % of the pieces of the whole batch are chosen, at least one where there is any. Of these 80 % become the mask,
    10 % a piece drawn from the vocabulary, 10 % stay.
    """
    dice = np.random.default_rng(seed)
    ids = batch.input_ids.numpy().copy()  # (B, L)
    labels = np.full(ids.shape, IGNORED, np.int64)
    places = np.flatnonzero(batch.attention_mask.numpy().astype(bool) & ~np.isin(ids, how.special))
    count = max(1, round(CHOSEN * len(places))) if len(places) else 0
    chosen = dice.choice(places, count, replace=False)
    labels.flat[chosen] = ids.flat[chosen]
    fate, others = dice.random(count), dice.choice(how.ordinary, count)
    behind = np.where(fate < MASKED, how.mask_id, np.where(fate < MASKED + REPLACED, others, ids.flat[chosen]))
    ids.flat[chosen] = behind
    return replace(batch, input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels))


@dataclass(frozen=True)
class MaskedBatches:
    """Other batches with pieces hidden: a pure function of seed and step, as they are."""

    plan: Batches
    how: Masking
    seed: int

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Batch:
        return masked(self.plan[step], self.how, [self.seed, step])
