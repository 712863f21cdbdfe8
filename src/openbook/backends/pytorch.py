"""A student run by torch, as it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from openbook.answers import Answers, Encoded, Text
from openbook.backends.base import BackendName, Pieces, about, in_batches, longest_input
from openbook.checkpoint import digest_file
from openbook.models.encoder import Encoder, load_finished
from openbook.models.student import load_tokenizer
from openbook.types import Batch

BATCH_SIZE = 32


class TorchBackend:
    """An encoder with its tokenizer; `encoder` and `tokenizer` are open to those who train it further."""

    name: BackendName = "torch"

    def __init__(self, encoder: Encoder, tokenizer: Any, folder: Path | None = None):
        self.encoder, self.tokenizer = encoder.eval(), tokenizer
        self.folder = folder
        config = encoder.model.config.to_dict()
        self.about = about(config)
        self.max_length = longest_input(tokenizer.model_max_length, config)
        self.pieces = Pieces(tokenizer.backend_tokenizer, self.max_length, tokenizer.pad_token_id or 0)

    @classmethod
    def load(cls, folder: Path, threads: int | None = None) -> Self:
        """`threads`, if given, are those of all torch in this process."""
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(load_finished(str(folder)), load_tokenizer(str(folder)), folder)

    @cached_property
    def weights(self) -> str | None:
        file = None if self.folder is None else self.folder / "model.safetensors"
        return digest_file(file) if file is not None and file.is_file() else None

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        return self.pieces.encode(rows)

    def run(self, rows: Sequence[Encoded]) -> Answers:
        with torch.inference_mode():
            return in_batches(rows, self.answer, BATCH_SIZE)

    def answer(self, rows: Sequence[Encoded]) -> tuple[Any, Any]:
        said = self.encoder(self.batch(rows))
        return said.logits.numpy(), said.embedding.numpy()

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        ids, mask, types = map(torch.from_numpy, self.pieces.padded(rows).values())
        return Batch(tuple(map(str, range(len(rows)))), ids, mask, types)

    def save(self, folder: Path) -> None:
        self.encoder.save(folder, self.tokenizer)
