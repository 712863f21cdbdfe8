"""Attention of long texts while an encoder learns on a CPU: fused, in fp32 also under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAIN = "eager"
FUSED_FP32 = "fused_fp32"
FUSED_FROM = 128  # word-pieces: measured, forward and back; twice as fast as plain bf16 at 256, equal at 128


def fused_fp32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """What transformers calls `sdpa`, of (B, H, L, d) -> (B, L, H, d): its way back is slow in bf16, not in fp32."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        said, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **how)
    return said.to(query.dtype), None


def while_learning(config: Any, length: int) -> str:
    """The implementation to learn with on a CPU. Where attention itself drops out, the fused one is not fused."""
    dropout = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", None))
    return FUSED_FP32 if dropout == 0 and length >= FUSED_FROM else PLAIN


AttentionInterface.register(FUSED_FP32, fused_fp32)
AttentionMaskInterface.register(FUSED_FP32, sdpa_mask)
