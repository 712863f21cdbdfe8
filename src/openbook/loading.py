"""Which engine runs a student's, or a teacher's, folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from openbook.backends.base import Backend, BackendName
from openbook.backends.onnx import EXPORT, RECORD, OnnxBackend
from openbook.checkpoint import read_json
from openbook.config import UsageError


def student_in(run: Path) -> Path:
    """The student's folder inside a run's. Raises UsageError where none is finished."""
    if not (run / "student" / "config.json").is_file():
        raise UsageError(f"{run} holds no finished student/ folder; name a run folder such as runs/quickstart")
    return run / "student"


def usual_backend(student: Path) -> BackendName:
    """Torch where it is installed; else the faster of the two exports, as it was timed when they were written."""
    record = student / EXPORT / RECORD
    if find_spec("torch") is not None or not record.is_file():
        return "torch"
    return "onnx-int8" if read_json(record).get("recommended") == "onnx-int8" else "onnx"


def load(folder: Path, backend: BackendName, threads: int | None = None) -> Backend:
    """The engine of this name over a student's, or a teacher's, folder."""
    if backend != "torch":
        return OnnxBackend(folder, backend, threads)
    try:
        from openbook.backends.pytorch import TorchBackend
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{folder} is run by torch, and {error.name} is not installed: pip install 'openbook[train]', or choose"
            " backend onnx or onnx-int8"
        ) from error
    return TorchBackend.load(folder, threads)
