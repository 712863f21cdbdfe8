"""Any encoder, with whatever head, as an ONNX graph with named inputs and outputs; and the same graph in int8."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from openbook.config import RunError, UsageError
from openbook.models.encoder import Encoder, quiet
from openbook.types import Batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
EXPORTABLE = (  # architectures of which a graph was compared with torch in the tests
    "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "eurobert", "modernbert", "mpnet", "rembert",
    "roberta", "roformer", "xlm-roberta",
)  # fmt: skip
SAMPLE = (2, 16)  # a batch or a length of 1 would be fixed in the graph
IN_INT8 = ["MatMul", "Gemm", "Gather"]  # a student is word embeddings, for the most part: they are looked up by Gather
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of a graph in one file


class Told(nn.Module):
    """An encoder from tensors to named tensors: logits (B, C) and embedding (B, d), as `Outputs` has them."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        said = self.encoder(Batch((), input_ids, attention_mask, types))
        return {"logits": said.logits, "embedding": said.embedding}


def graph_of(encoder: Encoder, opset: int | None = None) -> Any:
    """An encoder with its head as an `onnx_ir.Model` that tells logits and embedding. Raises UsageError: see `trace`.

    Its inputs are those of `INPUTS` that the encoder reads.
    """
    refuse_unexportable(encoder.model.config.model_type)
    return trace(Told(encoder), [name for name in INPUTS if name in encoder.accepted], opset)


def refuse_unexportable(architecture: str) -> None:
    if architecture not in EXPORTABLE:
        raise UsageError(f"model_type={architecture!r} is not exported; use a student of {', '.join(EXPORTABLE)}")


def trace(model: nn.Module, inputs: Sequence[str], opset: int | None = None) -> Any:
    """Any module from tensors of these names to a dict of named tensors, as an `onnx_ir.Model`; needs onnxscript.

    The inputs are int64 (B, L) with any B and L from 1. Raises UsageError where the module cannot be traced so.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, free), opset_version=opset)
    sample = {name: torch.ones(SAMPLE, dtype=torch.int64) for name in inputs}
    sample["attention_mask"][1, SAMPLE[1] // 2 :] = 0
    try:
        with silence(), plain_attention(model.eval()):
            graph = OnnxExporter().export(model, sample, config).program
    except Exception as error:  # every part of torch's exporter raises its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            f"opset={opset or 'default'}: this model cannot be exported ({reason}); leave the opset out, or serve the"
            " model with torch"
        ) from error
    keep_names_apart(graph)
    return graph


def keep_names_apart(graph: Any) -> None:
    """Rename what goes by an output's name inside a graph: two values of one name make a graph that loads nowhere."""
    outputs = {value.name: value for value in graph.graph.outputs}
    for node in graph.graph:
        for value in node.outputs:
            if value.name in outputs and value is not outputs[value.name]:
                value.name = f"inner {value.name}"


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as products and a softmax, which ONNX Runtime fuses by itself: a fused form in the graph is slower."""
    found = [(one, one.config._attn_implementation) for one in model.modules() if isinstance(one, PreTrainedModel)]
    for one, _ in found:
        one.set_attn_implementation("eager")
    try:
        yield
    finally:
        for one, kept in found:
            one.set_attn_implementation(kept)


def in_int8(graph: Any) -> Any:
    """A graph with int8 weights, and activations that are rounded as they come. The one given stays as it is.

    Weights have a scale for each output channel, and 7 bits: with 8, processors without VNNI instructions add up
    products beyond 16 bits and cut them off, so a file that is right here would be wrong there. Raises RunError where
    ONNX Runtime cannot do it.
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.configs import ExportFormat

    how = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=IN_INT8, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
    )
    try:
        with silence():
            return OnnxRuntimeQuantizer(how).quantize(graph, {}, ExportFormat.ONNX)
    except Exception as error:  # of onnx and of ONNX Runtime, which share no class
        raise RunError(f"the graph cannot be turned into int8 ({type(error).__name__}: {first_line(error)})") from error


def save_graph(graph: Any, path: Path) -> None:
    """One file, or beyond 2 GB a small one with its weights in `<name>.data` beside it."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    onnx_ir.save(graph, str(path), external_data=f"{path.name}.data" if weights > PROTOBUF_LIMIT else None)


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).partition("\n")[0]


@contextmanager
def silence() -> Iterator[None]:
    """Keep the exporter's progress and warnings off the console: what it makes is compared with torch."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
