"""A student run by ONNX Runtime, from the files of `openbook export`; needs neither torch nor transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from openbook.answers import Answers, Encoded, Text
from openbook.backends.base import BackendName, Pieces, about, in_batches, longest_input
from openbook.checkpoint import digest_file, finish_renaming
from openbook.config import UsageError

BATCH_SIZE = 8  # a call costs little, so less padding pays
EXPORT, RECORD = "onnx", "export.json"  # folder inside a student's, and what is known of its files
FILES: dict[BackendName, str] = {"onnx": "model.onnx", "onnx-int8": "model_qint8.onnx"}
TORCH_WEIGHTS = "model.safetensors"
WEIGHTS = {"torch": TORCH_WEIGHTS, **{name: f"{EXPORT}/{file}" for name, file in FILES.items()}}  # inside a student's


class OnnxBackend:
    """An exported student. The graph takes input_ids, attention_mask, token_type_ids and tells logits, embedding."""

    def __init__(self, folder: Path, name: BackendName, threads: int | None = None):
        """Raises UsageError for an export that is absent, damaged, or of other weights than the student's."""
        runtime = load_runtime()
        self.folder: Path | None = folder
        self.name = name
        config, tokens = read(folder / "config.json"), read(folder / "tokenizer_config.json")
        self.about = about(config)
        self.max_length = longest_input(tokens.get("model_max_length"), config)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pieces = Pieces(tokenizer, self.max_length, pad_of(tokenizer, tokens, config))
        graph = checked(folder, name)
        self.weights: str | None = read(folder / EXPORT / RECORD).get("weights")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: the runtime's own choice
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UsageError(f"{graph} cannot be run ({str(error).splitlines()[0]}); export it again") from error
        self.inputs = [one.name for one in self.session.get_inputs()]

    def encode(self, rows: Sequence[Text]) -> list[Encoded]:
        return self.pieces.encode(rows)

    def run(self, rows: Sequence[Encoded]) -> Answers:
        return in_batches(rows, self.answer, BATCH_SIZE)

    def answer(self, rows: Sequence[Encoded]) -> tuple[Any, Any]:
        padded = self.pieces.padded(rows)
        logits, embedding = self.session.run(["logits", "embedding"], {name: padded[name] for name in self.inputs})
        return logits, embedding

    def save(self, folder: Path) -> None:
        assert self.folder is not None
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def load_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("backend='onnx' needs ONNX Runtime: pip install 'openbook[onnx]'") from error
    return onnxruntime


def checked(folder: Path, name: BackendName) -> Path:
    """The graph of this name. Raises UsageError where it cannot be what was exported from these weights."""
    exported, weights = folder / EXPORT, folder / TORCH_WEIGHTS
    graph = exported / FILES[name]
    with suppress(OSError):  # a folder that cannot be written to
        finish_renaming(exported)
    if not graph.is_file() or not (exported / RECORD).is_file():
        raise UsageError(f"{graph} is not there; `openbook export --model {folder.parent}` writes it")
    record = read(exported / RECORD)
    if weights.is_file() and digest_file(weights) != record.get("weights"):
        raise UsageError(f"{graph} was exported from other weights than {weights}; run `openbook export` again")
    for file in (exported / name for name in record["files"] if name.startswith(graph.name)):
        if not file.is_file() or digest_file(file) != record["files"][file.name]["sha256"]:
            raise UsageError(f"{file} is not what was exported: it is absent, cut off or altered; export again")
    return graph


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); name the folder of a whole student") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object; name the folder of a whole student")
    return found


def pad_of(tokenizer: Tokenizer, tokens: dict[str, Any], config: dict[str, Any]) -> int:
    """The index of padding, by the tokenizer's configuration or the model's."""
    pad = tokens.get("pad_token")
    found = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
    return int(config.get("pad_token_id") or 0 if found is None else found)
