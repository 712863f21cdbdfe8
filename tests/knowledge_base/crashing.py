"""Run as a program: a writer to be killed and readers that watch. Every generation holds what `expected` says."""

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from openbook.knowledge_base import editing
from openbook.knowledge_base.store import Reader, load, save
from openbook.types import KnowledgeBase

Entries = dict[str, int]  # id -> what its key and its value are computed from
MANIFEST = {"kind": "classification", "labels": ["no", "yes"], "key_space": "k"}


def base_of(entries: Entries) -> KnowledgeBase:
    numbers = np.array(list(entries.values()))
    angles = np.array([sum(map(ord, name)) for name in entries])
    share = (numbers % 97) / 97
    return KnowledgeBase(
        keys=np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
        values=np.stack([share, 1 - share], axis=1).astype(np.float32),
        ids=tuple(entries),
        texts=tuple(f"text of {name}" for name in entries),
        manifest=MANIFEST,
    )


def new(generation: int) -> Entries:
    return {f"{generation}/{number}": generation for number in range(3)}


@cache
def expected(generation: int) -> Entries:
    """What a generation holds: in turn three entries are added, the oldest re-labelled, two removed, all compacted."""
    if generation == 0:
        return new(0)
    before = expected(generation - 1)
    if generation % 4 == 1:
        return before | new(generation)
    if generation % 4 == 2:
        return before | {next(iter(before)): generation}
    if generation % 4 == 3:
        return {name: number for name, number in list(before.items())[2 + (len(before) > 20) :]}
    return before


def edit(folder: Path, generation: int) -> None:
    """Turn the generation before into this one."""
    before, after = expected(generation - 1), expected(generation)
    if generation % 4 == 1:
        editing.add(folder, base_of(new(generation)))
    elif generation % 4 == 2:
        name = next(iter(before))
        editing.relabel(folder, [name], base_of({name: generation}).values)
    elif generation % 4 == 3:
        editing.remove(folder, [name for name in before if name not in after])
    else:
        editing.compact(folder)


def check(found: KnowledgeBase) -> int:
    generation = int(found.manifest["generation"])
    wanted = base_of(expected(generation))
    assert (found.ids, found.texts) == (wanted.ids, wanted.texts), generation
    assert found.keys.tobytes() == wanted.keys.tobytes(), generation
    assert found.values.tobytes() == wanted.values.tobytes(), generation
    return generation


def write(folder: Path) -> None:
    generation = check(load(folder))
    while True:
        generation += 1
        edit(folder, generation)
        say(f"did {generation}")


def watch(folder: Path) -> None:
    reader, last, keeper = Reader(folder), 0, os.getppid()
    while os.getppid() == keeper:
        generation = check(reader.current())
        assert check(load(folder)) >= generation >= last
        last = generation
        time.sleep(0.001)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def start(role: Callable[[Path], None], folder: Path) -> int:
    """In a process of its own."""
    process = os.fork()
    if process == 0:
        try:
            role(folder)
        except BaseException as error:
            say(f"bad {role.__name__}: {error!r}")
        os._exit(1)
    say(f"{role.__name__} {process}")
    return process


def obey(folder: Path) -> None:
    save(base_of(expected(0)), folder)
    for line in sys.stdin:
        if line == "write\n":
            os.waitpid(start(write, folder), 0)
            say(f"found {check(load(folder))} logged {len(editing.changes(folder))}")
        else:
            start(watch, folder)


if __name__ == "__main__":
    obey(Path(sys.argv[1]))
