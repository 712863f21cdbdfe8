"""What a model says about many texts at once, in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.data.batches import Tokenised, ordered
from openbook.models.encoder import Encoder

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Answers:
    """Row i belongs to row i of the texts."""

    logits: NDArray[np.float32]  # (n, C)
    embedding: NDArray[np.float32]  # (n, d)
    labels: NDArray[Any]  # (n,) gold; empty if the texts have none


def answers_of(model: Encoder, texts: Tokenised) -> Answers:
    """Logits and pooled vectors in evaluation mode, in fp32."""
    model.eval().listen()
    device = next(model.parameters()).device
    rows = {name: row for row, name in enumerate(texts.ids.to_pylist())}
    logits: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    with torch.inference_mode():
        for batch in ordered(texts, BATCH_TOKENS):
            said = model(batch.to(device))
            if logits is None or embedding is None:
                logits = np.empty((len(rows), said.logits.shape[1]), np.float32)
                embedding = np.empty((len(rows), said.embedding.shape[1]), np.float32)
            here = [rows[name] for name in batch.ids]
            logits[here] = said.logits.float().cpu().numpy()
            embedding[here] = said.embedding.float().cpu().numpy()
    assert logits is not None
    assert embedding is not None
    return Answers(logits, embedding, np.empty(0) if texts.labels is None else texts.labels)


def outputs_of(answers: Answers, kind: str) -> NDArray[Any]:
    """Probabilities (n, C), or scores (n, 1) in regression."""
    return answers.logits if kind == "regression" else probabilities_of(answers.logits)


def probabilities_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Row-wise softmax in float64: (n, C) -> (n, C)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
