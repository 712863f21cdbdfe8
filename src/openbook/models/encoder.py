"""A text encoder, with or without a head, that tells its pooled vector, hidden states and q, k, v."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.utils import logging

from openbook.config import UsageError
from openbook.models.attention import PLAIN, while_learning
from openbook.types import Batch, Outputs

SEVERAL = "multi_label_classification"  # the problem type of transformers for `multi_label`
COUNTS_AFTER_PADDING = {  # model types whose first position is the one after the padding's
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
FUSED = "Wqkv"  # one projection for all three, as in ModernBERT
QKV = ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj")
TAPPABLE = (  # architectures of transformers whose projections are found, among others
    "bert", "camembert", "distilbert", "electra", "ernie", "eurobert", "modernbert", "mpnet", "rembert", "roberta",
    "roformer", "xlm-roberta",
)  # fmt: skip
WHAT_WORKS = (
    f"use a teacher.model of {', '.join(TAPPABLE)}; in an architecture of your own, keep the blocks in one ModuleList"
    f" and name each block's linear layers {', or '.join('/'.join(names) for names in QKV)}, or one fused layer"
    f" {FUSED}; or set distill terms `attention` and `relations` to 0, where the recipe has them"
)


@dataclass(frozen=True)
class Head:
    """What the head tells: label names in index order, or none for one score."""

    labels: tuple[str, ...] | None
    several: bool = False  # whether any number of the labels may apply, each by itself

    def config(self) -> dict[str, Any]:
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression", "id2label": {0: "score"}, "label2id": {"score": 0}}
        return {
            "num_labels": len(self.labels),
            "problem_type": SEVERAL if self.several else "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: index for index, name in enumerate(self.labels)},
        }


class AllHeard(Exception):  # noqa: N818  no error: it ends a forward pass
    """Raised when a model has said all that was asked for."""


class Encoder(nn.Module):
    """Any `AutoModelForSequenceClassification`, as a function from Batch to Outputs.

    An `AutoModel` has no head: its logits are (B, 0), and its embedding is the mean of the last states of real tokens.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.attention = model.config._attn_implementation
        self.wants_hidden = False
        self._pooled: Tensor | None = None
        self._taps: dict[int, dict[int, Tensor]] = {}
        self._hooks: list[Any] = []
        self._last_tap = 0  # the layer after whose projections nothing more runs; 0 = all runs
        if self.has_head:
            self.watch_head()

    @property
    def has_head(self) -> bool:
        return self.body() is not self.model

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @property
    def embedding_width(self) -> int:
        """Numbers in the vector that the last linear layer of the head reads, or in a hidden state if there is none."""
        return int(self.last_linear().in_features) if self.has_head else self.width

    def train(self, mode: bool = True) -> Encoder:
        """On a CPU it learns with plain attention: the fused one's way back is many times slower in bf16.

        Long texts are an exception (see `while_learning`).
        """
        super().train(mode)
        self.model.set_attn_implementation(PLAIN if self.learns_on_cpu else self.attention)
        return self

    @property
    def learns_on_cpu(self) -> bool:
        return self.model.training and not torch.cuda.is_available()

    def body(self) -> nn.Module:
        return self.model.base_model  # type: ignore[no-any-return]

    def words(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def head_modules(self) -> list[nn.Module]:
        inside = set(self.body().modules())
        return [module for module in self.model.modules() if module not in inside and module is not self.model]

    def last_linear(self) -> nn.Linear:
        return [module for module in self.head_modules() if isinstance(module, nn.Linear)][-1]

    def watch_head(self) -> None:
        """The pooled vector is what the last linear layer reads, before dropout (ReAugKD's `head_input`)."""
        for module in self.head_modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_pre_hook(self.keep_pooled)
        self.last_linear().register_forward_pre_hook(self.keep_pooled_if_none)

    def keep_pooled(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._pooled = inputs[0]

    def keep_pooled_if_none(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._pooled is None:
            self._pooled = inputs[0]

    def listen(self, hidden: bool = False, layers: Sequence[int] = (), stop: bool = False) -> Encoder:
        """Ask for hidden states and for q, k, v of some layers (from 1); each call replaces the last.

        With `stop`, nothing runs after the projections of the last of these layers: the rest is left empty.
        """
        if stop and (hidden or not layers):
            raise ValueError(f"stop={stop} needs layers to stop at ({list(layers)}), and leaves no hidden states")
        for hook in self._hooks:
            hook.remove()
        self.wants_hidden = hidden
        self._last_tap = max(layers) if stop else 0
        self._hooks = [hook for layer in layers for hook in self.tap(layer)]
        return self

    def tap(self, layer: int) -> list[Any]:
        """Hooks on the three projections of one block; fused attention stays in use."""
        fused = find_linear(self.blocks()[layer - 1], FUSED)
        if fused is not None:
            return [fused.register_forward_hook(lambda module, inputs, output: self.keep_fused(layer, output))]
        projections = find_projections(self.blocks()[layer - 1])
        if projections is None:
            raise UsageError(
                f"layer {layer} of {type(self.model).__name__} has no query, key and value projections of a known"
                f" name; {WHAT_WORKS}"
            )
        return [
            projection.register_forward_hook(
                lambda module, inputs, output, place=place: self.keep(layer, place, output)
            )
            for place, projection in enumerate(projections)
        ]

    def keep(self, layer: int, place: int, output: Tensor) -> None:
        self._taps.setdefault(layer, {})[place] = output
        self.stop_if_heard(layer)

    def keep_fused(self, layer: int, output: Tensor) -> None:
        self._taps[layer] = dict(enumerate(output.chunk(3, dim=-1)))
        self.stop_if_heard(layer)

    def stop_if_heard(self, layer: int) -> None:
        if layer == self._last_tap and len(self._taps[layer]) == len(QKV[0]):
            raise AllHeard

    def blocks(self) -> nn.ModuleList:
        """The stack of transformer blocks: the longest module list as long as the configuration says."""
        stacks = [m for m in self.body().modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers]
        if not stacks:
            raise UsageError(f"{type(self.model).__name__} has no list of {self.layers} blocks; {WHAT_WORKS}")
        return stacks[0]

    def forward(self, batch: Batch) -> Outputs:
        self._pooled, self._taps = None, {}
        answer: Any = None
        with suppress(AllHeard):
            answer = self.run(self.model, batch, output_hidden_states=self.wants_hidden)
        pooled, taps = self._pooled, self._taps
        self._pooled, self._taps = None, {}
        relations = {layer: (kept[0], kept[1], kept[2]) for layer, kept in taps.items()}
        if answer is None:
            return Outputs(logits=torch.empty(0), embedding=torch.empty(0), relations=relations)
        if pooled is None:
            pooled = mean_of_real(answer.last_hidden_state, batch.attention_mask)
        return Outputs(
            logits=answer.logits if self.has_head else pooled.new_empty(len(pooled), 0),
            embedding=pooled,
            hidden=tuple(answer.hidden_states) if self.wants_hidden else (),
            relations=relations,
        )

    def last_states(self, batch: Batch) -> Tensor:
        """The last hidden states (B, L, d) alone, without keeping those of the layers below."""
        states: Tensor = self.run(self.body(), batch).last_hidden_state
        return states

    def run(self, module: nn.Module, batch: Batch, **how: Any) -> Any:
        if self.learns_on_cpu:
            self.model.set_attn_implementation(while_learning(self.model.config, batch.input_ids.shape[1]))
        inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "token_type_ids")}
        return module(**{name: value for name, value in inputs.items() if name in self.accepted}, **how)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """An ordinary Hugging Face folder: stock class, label names, tokenizer, nothing of ours."""
        with quiet():
            self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def positions_of(config: Any) -> int | None:
    """How many word-pieces a model reads at most, which for RoBERTa's kin are fewer than its positions; None: any."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in COUNTS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return positions


def mean_of_real(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of states (B, L, d) where the mask (B, L) is 1: (B, d)."""
    real = mask[..., None].to(states.dtype)
    return (states * real).sum(1) / real.sum(1)


def find_linear(block: nn.Module, name: str) -> nn.Linear | None:
    found = [m for path, m in block.named_modules() if path.rpartition(".")[2] == name and isinstance(m, nn.Linear)]
    return found[0] if found else None


def find_projections(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    for names in QKV:
        q, k, v = (find_linear(block, name) for name in names)
        if q is not None and k is not None and v is not None:
            return q, k, v
    return None


def projections_of(block: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear layers that make q, k and v of a block: three, or the fused one; none if they go by other names."""
    fused = find_linear(block, FUSED)
    return (fused,) if fused is not None else find_projections(block) or ()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and load reports off the console: what they warn of is checked here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(location: str, head: Head, revision: str | None = None, seed: int = 0) -> Encoder:
    """A pretrained encoder with a fresh head for the task. `location` is a folder or a Hub id."""
    torch.manual_seed(seed)  # the new head's weights
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            location, revision=revision, dtype=torch.float32, ignore_mismatched_sizes=True, **head.config()
        )
    return Encoder(model)


def load_finished(folder: str, revision: str | None = None) -> Encoder:
    """An encoder whose head is part of the checkpoint. Raises UsageError for missing weights: a fresh head guesses."""
    with quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"]:
        raise UsageError(f"{folder} has no weights for {sorted(info['missing_keys'])}; fine-tune it with a head")
    return Encoder(model.eval())


def load_headless(location: str, revision: str | None = None) -> Encoder:
    """A pretrained encoder as it is, without a head. Raises UsageError for missing weights.

    A pooler that the checkpoint lacks is left out: a random one would be taken for a learned one.
    """
    with quiet():
        model, info = AutoModel.from_pretrained(
            location, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if any(not name.startswith("pooler.") for name in missing):
        raise UsageError(f"{location} has no weights for {missing}; name the folder or Hub id of a whole encoder")
    if missing:
        model.pooler = None
    return Encoder(model.eval())


def refuse_untappable(config: Any, scores: bool = False) -> None:
    """Raise UsageError if a model of this configuration has no q, k and v that a term could read; weights stay unread.

    With `scores`, also if its attention scores are more than products of them (rotary positions).
    """
    with quiet(), torch.device("meta"):
        encoder = Encoder(AutoModelForSequenceClassification.from_config(config))
    encoder.listen(layers=range(1, encoder.layers + 1))
    if scores and getattr(config, "rope_parameters", None) is not None:
        raise UsageError(
            f"{type(encoder.model).__name__} turns queries and keys by their positions before it compares them, and"
            " distill term `attention` compares them as they are; use `relations`, or another teacher.model"
        )


def label_names(location: str, revision: str | None = None) -> tuple[str, ...]:
    """The class names in a checkpoint's configuration, in index order, without loading weights."""
    config = AutoConfig.from_pretrained(location, revision=revision)
    return tuple(config.id2label[index] for index in sorted(config.id2label))
