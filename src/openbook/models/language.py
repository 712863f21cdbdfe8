"""An encoder that names hidden word-pieces: a head of its own, tied to its word embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbook.models.encoder import Encoder
from openbook.types import Batch


class MaskedLanguageModel(nn.Module):
    """BERT's head for masked words (Devlin et al., 2019): a fresh transform, then products with all word embeddings.

    The embeddings are the encoder's own, so that they learn from both sides. The seed draws the transform's weights,
    normal(0, 0.02); biases are 0.
    """

    def __init__(self, encoder: Encoder, seed: int = 0):
        super().__init__()
        self.encoder = encoder
        vocabulary, width = encoder.words().weight.shape
        self.transform = nn.Linear(encoder.width, width, device="meta").to_empty(device="cpu")  # no draw
        nn.init.normal_(self.transform.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.transform.bias)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (n, V) of the pieces that `batch.labels` (B, L) asks for, row by row; others are not computed."""
        assert batch.labels is not None
        states = self.encoder.last_states(batch)[batch.labels >= 0]  # (n, d)
        return F.linear(self.norm(F.gelu(self.transform(states))), self.encoder.words().weight, self.bias)
