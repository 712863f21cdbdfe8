"""A student of any shape, and how it starts: at random, with the teacher's word embeddings, or from its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PretrainedConfig,
)

from openbook.config import Shape, UsageError
from openbook.models.encoder import Encoder, Head, projections_of

PLAIN = PretrainedConfig()  # what a model is that was never given a head

LAYERS = "student.init=layer_copy copies whole layers", "init: random"
TAIL = "distill.tail=init copies all that follows the last projections", "tail: leave or aux"


def new_student(settings: Shape, head: Head, tokenizer: Any, vocabulary: int, positions: int, seed: int) -> Encoder:
    """A stock encoder with a head, every weight random: drawn by the seed as its architecture prescribes."""
    torch.manual_seed(seed)
    config = config_of(settings, head, tokenizer, vocabulary, positions)
    kinds = {"bert": BertForSequenceClassification, "modernbert": ModernBertForSequenceClassification}
    return Encoder(kinds[settings.architecture](config))


def config_of(settings: Shape, head: Head, tokenizer: Any, vocabulary: int, positions: int) -> Any:
    """The stock configuration of a shape."""
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": positions,
        "pad_token_id": tokenizer.pad_token_id,
        **head.config(),
    }
    return {"bert": bert, "modernbert": modernbert}[settings.architecture](settings, shape, tokenizer)


def bert(settings: Shape, shape: dict[str, Any], tokenizer: Any) -> BertConfig:
    return BertConfig(
        intermediate_size=settings.intermediate_size or 4 * settings.hidden_size,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        **shape,
    )


def modernbert(settings: Shape, shape: dict[str, Any], tokenizer: Any) -> ModernBertConfig:
    """Rotary positions, gated feed-forward, pre-norm; the head reads the mean of all tokens."""
    return ModernBertConfig(
        intermediate_size=settings.intermediate_size or 5 * settings.hidden_size // 2,
        embedding_dropout=settings.dropout,
        attention_dropout=settings.dropout,
        mlp_dropout=settings.dropout,
        classifier_dropout=settings.dropout,
        classifier_pooling="mean",
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **shape,
    )


def principal_components(words: Tensor, width: int) -> Tensor:
    """Word embeddings (V, d) on their first `width` principal axes: (V, width).

    The axes' signs are fixed (largest entry positive), so that equal weights give equal students on every machine.
    """
    refuse_widening(width, words.shape[1])
    centred = (words - words.mean(0)).double()
    values, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, values.argsort(descending=True)[:width]]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    projected: Tensor = (centred @ axes).to(words.dtype)
    return projected


def refuse_widening(width: int, teacher: int) -> None:
    if width > teacher:
        raise UsageError(
            f"student.embeddings takes the teacher's, but student.hidden_size={width} is above the teacher's"
            f" {teacher}; use embeddings: random, or a narrower student"
        )


def start_from_word_embeddings(student: Encoder, teacher: Encoder) -> None:
    """Give the student the teacher's word embeddings, projected to its width (needs the same vocabulary)."""
    taught, target = teacher.words().weight, student.words().weight
    with torch.no_grad():
        target.copy_(principal_components(taught.detach(), target.shape[1]))


def start_from_word_answers(student: Encoder, teacher: Encoder, answers: Tensor) -> None:
    """Give the student what the teacher made of every word alone (V, d), projected to its width.

    The result has the spread of the teacher's own word embeddings: its answers vary ten times as much.
    """
    target = student.words().weight
    components = principal_components(answers, target.shape[1])
    with torch.no_grad():
        target.copy_(components * (teacher.words().weight.std() / components.std()))


def start_from_layers(student: Encoder, teacher: Encoder, layers: tuple[int, ...]) -> None:
    """Copy embeddings, the given blocks (from 1) to the first of the student, pooler and head.

    A teacher without a head (or pooler) leaves the student's as it was drawn. Raises UsageError unless all widths are
    equal and the blocks are built alike.
    """
    compare_widths(student.model.config, teacher.model.config)
    blocks = student.blocks()[: len(layers)]  # one more is only there while it is distilled (`tail: aux`)
    for place, (block, layer) in enumerate(zip(blocks, layers, strict=True), start=1):
        given = teacher.blocks()[layer - 1].state_dict()
        if odd := sorted(given.keys() ^ block.state_dict().keys()):
            raise UsageError(
                f"student.init=layer_copy gives layer {layer} of the teacher to layer {place} of the student, but only"
                f" one of them has {odd}; use init: random"
            )
        block.load_state_dict(given)
    theirs = outside_blocks(teacher)
    with torch.no_grad():
        for name, weight in outside_blocks(student).items():
            if name in theirs:
                weight.copy_(theirs[name][: len(weight)] if "position" in name else theirs[name])


def headless(student: Encoder) -> Encoder:
    """The same weights without the head, and without its number of labels in the configuration."""
    body = student.body()
    body.config.problem_type, body.config.num_labels = None, PLAIN.num_labels  # type: ignore[union-attr]
    return Encoder(body)


def drop_last_block(student: Encoder) -> None:
    """Shorten a student by the block that it learned through (`distill.tail: aux`)."""
    del student.blocks()[-1]
    config = student.model.config
    config.num_hidden_layers -= 1
    if getattr(config, "layer_types", None):  # ModernBERT says what kind each block is
        config.layer_types = config.layer_types[:-1]


def start_tail(student: Encoder, teacher: Encoder, layer: int) -> None:
    """Give the last block all that follows its projections from a block of the teacher (from 1), and the pooler.

    Raises UsageError unless all widths are equal.
    """
    compare_widths(student.model.config, teacher.model.config, TAIL)
    block = student.blocks()[-1]
    taught = {id(p) for module in projections_of(block) for p in module.parameters()}
    given = teacher.blocks()[layer - 1].state_dict()
    with torch.no_grad():
        for name, own in block.named_parameters():
            if id(own) not in taught:
                own.copy_(given[name])
        theirs = outside_blocks(teacher)
        for name, weight in outside_blocks(student).items():
            if name.startswith("pooler.") and name in theirs:
                weight.copy_(theirs[name])


def outside_blocks(encoder: Encoder) -> dict[str, Tensor]:
    """The weights that are in no block, under the same names with and without a head."""
    inside = {id(weight) for weight in encoder.blocks().parameters()}
    body = f"{encoder.model.base_model_prefix}."
    named = encoder.model.named_parameters()
    return {name.removeprefix(body): weight for name, weight in named if id(weight) not in inside}


def compare_widths(student: Any, teacher: Any, taken: tuple[str, str] = LAYERS) -> None:
    """Of two configurations; `taken` says which setting takes the teacher's weights, and what to set instead."""
    for name in ("model_type", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        wanted, given = getattr(teacher, name), getattr(student, name)
        if wanted != given:
            raise UsageError(
                f"{taken[0]}, but {name} is {given!r} in the student and {wanted!r} in the teacher; make them equal"
                f" (student.architecture too), or use {taken[1]}"
            )


def load_tokenizer(location: str, revision: str | None = None) -> AutoTokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{location} has no tokenizer that transformers can read here ({str(error).splitlines()[0]});"
            " name a folder with a tokenizer.json, or a Hub id that this machine has or can fetch"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"{location} has no fast tokenizer (tokenizer.json); convert it with transformers first")
    return tokenizer
