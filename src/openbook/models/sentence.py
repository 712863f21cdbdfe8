"""Any pretrained encoder as a function from sentences to unit vectors, pooled as its own files say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers.utils import cached_file

from openbook.config import UsageError
from openbook.models.encoder import positions_of, quiet
from openbook.models.student import load_tokenizer

BATCH_TOKENS = 4096  # padding included
AT_ONCE = 1024  # texts tokenised at once
PARTS = ("Transformer", "Pooling", "Normalize")  # of a sentence-transformers model; others would change the vectors
POOLINGS = {"mean": "mean", "mean_sqrt_len": "mean", "cls": "cls", "max": "max"}  # what they are at unit length


def sentence_encoder(
    location: str, revision: str | None = None, max_length: int = 128
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """A function from n texts, cut to `max_length` word-pieces, to unit vectors (n, d) of an encoder's last states.

    `location` is a folder or a Hub id. The order of the texts changes nothing; which texts come together may change
    the rounding (by a cosine of 2e-5 in bf16, which is used where the processor has it). Raises UsageError for what
    is no encoder with a tokenizer, all weights and a pooling known here.
    """
    try:
        tokenizer, model = _load(location, revision)
        pooling = _pooling_of(location, revision)
    except Exception as error:  # tokenizers and safetensors raise nothing more special
        raise UsageError(
            f"corpus.encoder={location!r} cannot be used: {str(error).partition(chr(10))[0]}; name an encoder with its"
            " tokenizer, such as a sentence-transformers model: a folder, or a Hub id this machine has or can fetch"
        ) from error
    device = Accelerator().device
    model.eval().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device))
    positions = positions_of(model.config) or max_length
    cut = {"truncation": True, "max_length": min(max_length, tokenizer.model_max_length, positions)}
    pad = tokenizer.pad_token_id or 0  # masked, whatever it is

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        chunks = (list(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE))
        rows = [torch.tensor(row or [pad]) for chunk in chunks for row in tokenizer(chunk, **cut)["input_ids"]]
        lengths = torch.tensor([len(row) for row in rows])  # (n,)
        order = sorted(range(len(texts)), key=lambda place: (-len(rows[place]), texts[place]))
        vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
        start = 0
        while start < len(order):
            places = order[start : start + max(1, BATCH_TOKENS // len(rows[order[start]]))]
            ids = pad_sequence([rows[place] for place in places], True, pad).to(device)  # (B, L)
            mask = (torch.arange(ids.shape[1]) < lengths[places, None]).to(device)  # (B, L)
            with torch.inference_mode(), autocast:
                states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            vectors[places] = normalize(_pooled(states.float(), mask, pooling), dim=1).cpu().numpy()
            start += len(places)
        return vectors

    return embed


def _load(location: str, revision: str | None) -> tuple[Any, Any]:
    """Tokenizer and model."""
    tokenizer: Any = load_tokenizer(location, revision)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up without its files
        raise UsageError("its tokenizer knows no word")
    with quiet():
        model, info = AutoModel.from_pretrained(
            location, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))  # which is not read
    if missing:
        raise UsageError(f"it has no weights for {missing[0]}")
    if model.config.is_encoder_decoder:
        raise UsageError(f"{type(model).__name__} has a decoder")
    return tokenizer, model


def _pooling_of(location: str, revision: str | None) -> str:
    """`mean`, `cls` or `max`, as `1_Pooling/config.json` says in its old form or its new one; `mean` without it."""
    said = _beside(location, "1_Pooling/config.json", revision) or {"pooling_mode": "mean"}
    flags = [name.removeprefix("pooling_mode_") for name, on in said.items() if on and "pooling_mode_" in name]
    given = said.get("pooling_mode", flags)
    names = [given] if isinstance(given, str) else given
    modes = {POOLINGS.get(name.removesuffix("_tokens").removesuffix("_token")) for name in names}
    parts = [part["type"].rpartition(".")[2] for part in _beside(location, "modules.json", revision) or ()]
    mode = modes.pop() if len(modes) == 1 and set(parts) <= set(PARTS) else None
    if mode is None:
        raise UsageError(f"its pooling {names} or one of its parts {parts} is unknown here (not of {PARTS})")
    return mode


def _beside(location: str, name: str, revision: str | None) -> Any:
    """A JSON file beside the weights, or None; also for a Hub id of which the cache has all but this, offline."""
    path = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 is native here: 2.5 times as fast as fp32 (MiniLM on a Zen 5); emulated, it is slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector (B, d) from the states (B, L, d) of the real tokens."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "max":
        return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
    return states.masked_fill(~mask[:, :, None], 0).sum(1) / mask.sum(1, keepdim=True)
