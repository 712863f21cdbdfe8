"""Words that a masked language model would put in the place of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Self

import torch
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from openbook.config import AugmentSettings, UsageError
from openbook.models.encoder import quiet
from openbook.models.student import load_tokenizer

AT_ONCE = 64  # masked texts in a batch
KEY = "corpus.augment.masked_model"

Place = tuple[Sequence[str], int]  # the words of a text, and a position in them
Candidates = Callable[[Sequence[Place]], Sequence[Sequence[str]]]


class MaskedWords:
    """Candidates from a masked language model (contextualized corpus, section 2.8; TinyBERT, algorithm 1).

    A word of one word-piece is masked, and the model's `settings.candidates` best pieces are taken, less those that
    continue a word and special tokens; with `context: pair` it reads the original sentence beside the masked one.
    Other words, and those beyond the model's length, are left to `otherwise`; without it they have no candidates.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: AugmentSettings, otherwise: Candidates | None = None
    ) -> None:
        self._model, self._tokenizer, self._settings = model.eval(), tokenizer, settings
        self._otherwise = otherwise or (lambda places: [()] * len(places))
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @classmethod
    def load(
        cls, location: str, settings: AugmentSettings, otherwise: Candidates | None = None, device: str = "cpu"
    ) -> Self:
        """From a folder or a Hub id. UsageError unless it has word-pieces, a mask and a trained masked-LM head."""
        tokenizer = load_tokenizer(location)
        if tokenizer.mask_token is None or not isinstance(tokenizer.backend_tokenizer.model, WordPiece):
            raise UsageError(f"{KEY}={location} has no word-piece tokenizer with a mask token; name a BERT-like model")
        try:
            with quiet():
                model, info = AutoModelForMaskedLM.from_pretrained(
                    location, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError) as error:
            raise UsageError(f"{KEY}={location} is no masked language model ({str(error).splitlines()[0]})") from error
        if info["missing_keys"]:
            raise UsageError(
                f"{KEY}={location} has no weights for {sorted(info['missing_keys'])}: it was saved without its head for"
                " masked words; name one that has it, or leave the key out for neighbours of the teacher's embeddings"
            )
        return cls(model.to(device), tokenizer, settings, otherwise)

    def __call__(self, places: Sequence[Place]) -> list[Sequence[str]]:
        """What may stand at each place, the likeliest first."""
        whole = self._whole({words[position] for words, position in places})
        asked = [number for number, (words, position) in enumerate(places) if words[position] in whole]
        blocks = [asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)]
        proposed = chain.from_iterable(self._propose([places[number] for number in block]) for block in blocks)
        answers: dict[int, Sequence[str]] = {
            number: words for number, words in zip(asked, proposed, strict=True) if words is not None
        }
        others = [number for number in range(len(places)) if number not in answers]
        answers |= dict(zip(others, self._otherwise([places[number] for number in others]), strict=True))
        return [answers[number] for number in range(len(places))]

    def _whole(self, words: set[str]) -> set[str]:
        """The words of one known word-piece."""
        ordered = sorted(words)
        pieces = self._tokenizer(ordered, add_special_tokens=False)["input_ids"] if ordered else []
        unknown = [self._tokenizer.unk_token_id]
        return {word for word, ids in zip(ordered, pieces, strict=True) if len(ids) == 1 and ids != unknown}

    @torch.inference_mode()
    def _propose(self, places: Sequence[Place]) -> list[list[str] | None]:
        """None where the text is too long for the mask to be read."""
        mask = self._tokenizer.mask_token
        masked = [[*words[:position], mask, *words[position + 1 :]] for words, position in places]
        encoded = self._tokenizer(
            masked,
            [list(words) for words, _ in places] if self._settings.context == "pair" else None,
            is_split_into_words=True,
            truncation=True,
            max_length=self._longest,
            padding=True,
            return_tensors="pt",
        ).to(self._model.device)
        is_mask = encoded["input_ids"] == self._tokenizer.mask_token_id  # (B, L)
        logits = self._logits(encoded, is_mask.int().argmax(1))
        best = logits.topk(min(self._settings.candidates, logits.shape[1])).indices.tolist()
        found = is_mask.any(1).tolist()
        return [self._words(ids) if there else None for ids, there in zip(best, found, strict=True)]

    def _logits(self, encoded: Any, columns: Tensor) -> Tensor:
        """Of one column of each row, (B, V): the head is spared the others, which would take most of the time."""

        def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
            rows = torch.arange(len(columns), device=columns.device)
            output.last_hidden_state = output.last_hidden_state[rows, columns][:, None]  # (B, 1, d)
            return output

        hook = self._model.base_model.register_forward_hook(keep)
        try:
            inputs = {name: value for name, value in encoded.items() if name in self._accepted}
            logits: Tensor = self._model(**inputs).logits
        finally:
            hook.remove()
        return logits[:, 0]

    def _words(self, ids: Sequence[int]) -> list[str]:
        special = self._tokenizer.all_special_tokens
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        return [piece for piece in pieces if piece and not piece.startswith("##") and piece not in special]
