"""Whether a folder that travelled is whole, harmless, and answers as it did when it was packed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

from openbook.answers import Text
from openbook.backends.base import BackendName
from openbook.backends.onnx import WEIGHTS
from openbook.checkpoint import digest_file, write_json
from openbook.config import UsageError
from openbook.predictor import OpenBook

FORMAT = 1
DIGESTS, EXAMPLES = "digests.json", "examples.json"
OTHERS = {".git", ".gitattributes", ".cache"}  # what a repository or its download adds at the top
KINDS = (".json", ".md", ".txt", ".npy", ".onnx", ".onnx.data", ".safetensors", ".whl", "Dockerfile", "/LICENSE")
CODE = "auto_map"  # of a configuration: names Python files that a careless loader would run
NEEDS: dict[BackendName, tuple[str, ...]] = {
    "torch": ("torch", "transformers"),
    "onnx": ("onnxruntime",),
    "onnx-int8": ("onnxruntime",),
}
TOLERANCE: dict[BackendName, float] = {"torch": 1e-3, "onnx": 1e-3, "onnx-int8": 0.1}


@dataclass(frozen=True)
class Verified:
    """What was found wrong, and which engines answered."""

    problems: tuple[str, ...]
    answered: tuple[BackendName, ...] = ()
    skipped: tuple[BackendName, ...] = ()  # in the folder, but not installed here
    digest: str = ""  # of all digests: to be compared with what the packer was told


def verify(folder: Path) -> Verified:
    """Compare a packed folder with what it says of itself, read every file, and ask every engine that is installed.

    Nothing is loaded from a folder whose files are not as promised. This shows damage and mistakes; who altered files
    and wrote new digests is only found by `digest`. Raises UsageError for a folder that is no package.
    """
    if not (folder / DIGESTS).is_file():
        raise UsageError(f"{folder} holds no {DIGESTS}; name a folder that `openbook package` wrote")
    problems = [*differences(folder), *unreadable(folder)]
    if problems:
        return Verified(tuple(dict.fromkeys(problems)))
    there = engines_of(folder)
    answered = [name for name in there if is_installed(name)]
    for name in answered:
        problems += wrong_answers(folder, name)
    if not answered:
        problems.append(f"no engine of this folder is installed ({', '.join(there) or 'it has none'}): no answer was"
                        " compared; pip install 'openbook[onnx]' or 'openbook[train]'")  # fmt: skip
    skipped = tuple(name for name in there if name not in answered)
    return Verified(tuple(problems), tuple(answered), skipped, digest_file(folder / DIGESTS))


def write_digests(folder: Path) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)}
        for name in sorted(found_in(folder))
        if name != DIGESTS
    }
    version = importlib.metadata.version("openbook")
    write_json(folder / DIGESTS, {"format": FORMAT, "openbook": version, "files": files})


def found_in(folder: Path) -> dict[str, os.stat_result]:
    """Every file, link and other thing in a folder but its folders. Links are not followed."""
    found = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if here == folder:
            folders[:], files = [name for name in folders if name not in OTHERS], [f for f in files if f not in OTHERS]
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            found[(here / name).relative_to(folder).as_posix()] = (here / name).lstat()
    return found


def differences(folder: Path) -> list[str]:
    """What is missing, altered or not promised; links; and files of kinds that have no place here."""
    try:
        content = json.loads((folder / DIGESTS).read_bytes())
        promised = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in content["files"].items()}
        version = int(content["format"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{DIGESTS} cannot be read ({type(error).__name__}: {error}); copy it again"]
    if version != FORMAT:
        return [f"{DIGESTS} has format {version}, this openbook reads {FORMAT}; install the other version"]
    found = found_in(folder)
    problems = [f"{name} is missing; copy it again" for name in sorted(promised) if name not in found]
    for name, status in sorted(found.items()):
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{name} is a link or no file at all; put the file itself there")
        elif not f"/{name}".endswith(KINDS):
            problems.append(f"{name} is of a kind that has no place here; it is not loaded, remove it")
        elif name in promised:
            problems += altered(folder / name, name, status.st_size, *promised[name])
        elif name != DIGESTS:
            problems.append(f"{name} was not there when the folder was packed; remove it")
    return problems


def altered(path: Path, name: str, size: int, promised_size: int, promised_digest: str) -> list[str]:
    if size != promised_size:
        return [f"{name} has {size:,} bytes instead of {promised_size:,}; copy it again"]
    if digest_file(path) != promised_digest:
        return [f"{name} is not the file that was packed (its sha256 differs); copy it again"]
    return []


def unreadable(folder: Path) -> Iterator[str]:
    """Files that are not what their names say. What is a pickle at heart is refused by every one of these readers."""
    for name, status in sorted(found_in(folder).items()):
        reader = READERS.get(Path(name).suffix)
        if reader is None or not stat.S_ISREG(status.st_mode):
            continue
        try:
            reader(folder / name)
        except Exception as error:  # each reader has its own kinds
            yield f"{name} cannot be read ({str(error).strip() or type(error).__name__})"


def read_safetensors(path: Path) -> None:
    with safe_open(path, framework="numpy") as tensors:
        if not list(tensors.keys()):
            raise ValueError("it holds no tensors")


def read_array(path: Path) -> None:
    np.load(path, mmap_mode="r", allow_pickle=False)


def read_configuration(path: Path) -> None:
    content = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    if isinstance(content, dict) and CODE in content:
        raise ValueError(f"its {CODE} names code that loaders could be made to run")
    if path.name == "tokenizer.json":
        Tokenizer.from_file(str(path))


READERS: Mapping[str, Callable[[Path], None]] = {
    ".safetensors": read_safetensors,
    ".npy": read_array,
    ".json": read_configuration,
}


def engines_of(folder: Path) -> list[BackendName]:
    """What the files of a folder can be run by."""
    return [name for name, file in WEIGHTS.items() if (folder / "student" / file).is_file()]


def is_installed(name: BackendName) -> bool:
    return all(find_spec(module) is not None for module in NEEDS[name])


def wrong_answers(folder: Path, name: BackendName) -> list[str]:
    """How an engine's answers differ from those that were recorded."""
    try:
        recorded = json.loads((folder / EXAMPLES).read_bytes())
        tolerance = recorded["tolerance"].get(name)
        book = OpenBook.from_pretrained(folder, name, threads=1)
        if (entries := None if book.base is None else len(book.base.ids)) != recorded["book"]:
            return [f"{name}: the book has {entries} entries instead of {recorded['book']}"]
        answers = answers_to([as_text(row["text"]) for row in recorded["rows"]], book)
        wanted = np.array([row["answer"] for row in recorded["rows"]])
    except Exception as error:  # whatever an engine says to files that are not what they should be
        return [f"{name}: {str(error).strip() or type(error).__name__}"]
    if answers.shape != wanted.shape or not np.isfinite(answers).all():
        return [f"{name}: its answers are no {wanted.shape[1]} finite numbers a text"]
    if tolerance is None or agree(answers, wanted, tolerance).all():
        return []
    wrong = np.flatnonzero(~agree(answers, wanted, tolerance))
    worst, first = np.abs(answers - wanted).max(), recorded["rows"][wrong[0]]["text"]
    return [
        f"{name}: {len(wrong)} of {len(wanted)} recorded answers differ, by up to {worst:.3g}, which is more than"
        f" {tolerance:g}; the first is to {first!r}"
    ]


def agree(answers: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> NDArray[np.bool_]:
    """Which rows (n,) are equal within a tolerance, of scores above 1 relative to their size."""
    return np.asarray(np.isclose(answers, wanted, rtol=tolerance, atol=tolerance).all(axis=1))


def answers_to(texts: list[Text], book: OpenBook) -> NDArray[np.float64]:
    """Probabilities or scores, one row a text; texts and pairs may be mixed."""
    return np.concatenate([np.asarray(book.answer(book.encode([text]))) for text in texts])


def as_text(given: Any) -> Text:
    return given if isinstance(given, str) else (str(given[0]), str(given[1]))
