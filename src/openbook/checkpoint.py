"""Artefacts: folders that appear whole or not at all, each with a manifest of what went into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openbook.types import Artifact

FORMAT = 1  # raised when an artefact of an older openbook can no longer be read
MANIFEST = "artifact.json"
MARK = "inputs.json"  # what is under construction is made from, beside the checkpoints
SCRATCH = "scratch"  # inside a folder under construction: checkpoints to resume from, gone when it is finished


def fingerprint(value: Any) -> str:
    """Digest of anything JSON can say; equal for equal content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """Digest of a folder's files by name and content; hidden files are left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return fingerprint({str(p.relative_to(folder)): digest_file(p) for p in files})


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader sees the old content or the new."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def link(place: Path, target: Path) -> None:
    """Make `place` lead to `target`, which need not exist yet."""
    if place.is_symlink() and place.readlink() == target.absolute():
        return
    place.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target.absolute())


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def retired_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.retired")


def open_artifact(folder: Path) -> Artifact | None:
    """The artefact in a folder, or None if there is none that is whole."""
    folder = folder.resolve()
    finish_renaming(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    sizes_match = all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in manifest["files"].items()
    )
    return Artifact(folder, manifest) if sizes_match else None


def is_fresh(folder: Path, inputs: Mapping[str, Any]) -> bool:
    artifact = open_artifact(folder)
    return artifact is not None and artifact.manifest["fingerprint"] == fingerprint(inputs)


def finish_renaming(folder: Path) -> None:
    """Complete an exchange of folders that a crash interrupted: a partial folder with a manifest is whole."""
    partial, retired = partial_folder(folder), retired_folder(folder)
    if (partial / MANIFEST).exists():
        exchange(partial, folder)
    elif retired.exists() and not folder.exists():
        os.rename(retired, folder)


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The inputs of what an interrupted run left under construction; None if there is nothing."""
    try:
        found = read_json(partial_folder(folder.resolve()) / SCRATCH / MARK)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def building(folder: Path, inputs: Mapping[str, Any], editable: bool = False) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` when the block ends without an error.

    What an interrupted run of the same inputs left under construction is handed out again, so a stage may resume
    from its `scratch` folder; what other inputs left is thrown away. A link is followed, and stays. What is `editable`
    may change afterwards, and vouches for its own files.
    """
    folder = folder.resolve()
    finish_renaming(folder)
    started = time.monotonic()
    partial = partial_folder(folder)
    wanted = fingerprint(inputs)
    begun = begun_with(folder)
    if partial.exists() and (begun is None or fingerprint(begun) != wanted):
        shutil.rmtree(partial)
    (partial / SCRATCH).mkdir(parents=True, exist_ok=True)
    write_json(partial / SCRATCH / MARK, inputs)
    (partial / MANIFEST).unlink(missing_ok=True)
    yield partial
    shutil.rmtree(partial / SCRATCH)
    whole = [] if editable else sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): path.stat().st_size for path in whole}
    sync(partial)
    seconds = round(time.monotonic() - started, 1)
    manifest = {"format": FORMAT, "fingerprint": wanted, "inputs": inputs, "files": files, "seconds": seconds}
    write_json(partial / MANIFEST, manifest)
    exchange(partial, folder)


def exchange(partial: Path, folder: Path) -> None:
    retired = retired_folder(folder)
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        os.rename(folder, retired)
    os.rename(partial, folder)
    shutil.rmtree(retired, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flush a folder's files to the disk, so that a power cut after the rename finds them whole.

    Whoever may read the folder may read them: safetensors writes for its owner alone, and models are shared.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
