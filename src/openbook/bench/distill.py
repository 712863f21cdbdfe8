"""Relation distillation beside other implementations: the same student, teacher, batches and precision, in turns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModel

from openbook.bench.measure import Rival
from openbook.bench.minilm_rivals import RIVALS, Steps, steps_of
from openbook.config import FileSource, Optim, StudentSettings
from openbook.console import console
from openbook.data.batches import WINDOW, BatchPlan, Tokenised
from openbook.data.blocks import Cut, Document, Part, write_blocks
from openbook.data.sources import documents
from openbook.distillation.mapping import relation_heads
from openbook.distillation.relations import RelationLesson, Relations
from openbook.distillation.teachers import AskedOnce, LiveTeacher
from openbook.models.encoder import Encoder, Head, load_headless
from openbook.models.student import headless, load_tokenizer, new_student
from openbook.training import uses_bf16
from openbook.types import Batch

OURS, TWO = "openbook", "openbook, two students"
WARM = 2  # updates before the first that counts
LEAST_BATCHES = 2 * WINDOW  # of text: with less, batches hold blocks of more different lengths than in a real run
PAIRS = ("qq", "kk", "vv")
HEAD_WIDTH = 64  # of a head of a teacher with random weights, as in BERT
CHARACTERS = 8  # read for a word-piece: more than any text needs


def run(
    teacher: str, student: StudentSettings, text: FileSource, optim: Optim, updates: int, rounds: int, folder: Path
) -> dict[str, Any]:
    """Tokens a second of every engine: medians over rounds in which they take turns; memory; padding."""
    shape = prepare(teacher, student, text, optim, updates * rounds + WARM, folder)
    plan = BatchPlan(Tokenised.load(folder / "text"), optim, 0)
    tokens = [int(plan[step].attention_mask.sum()) for step in range(len(plan))]
    places = sum(plan[step].attention_mask.numel() for step in range(len(plan)))
    heads = shape["relation_heads"]
    engines = [Rival(OURS, open_ours, teacher, folder, optim, heads, 1)]
    engines += [Rival(name, open_, teacher, folder, optim, heads) for name, open_ in RIVALS.items()]
    engines.append(Rival(TWO, open_ours, teacher, folder, optim, heads, 2))
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    first: dict[str, float] = {}
    for engine in engines:
        first[engine.name] = engine.ask(list(range(WARM)))[1][0]
    for number in range(rounds):
        steps = list(range(WARM + number * updates, WARM + (number + 1) * updates))
        for engine in engines:
            seconds, _ = engine.ask(steps)
            rates[engine.name].append(sum(tokens[step] for step in steps) / seconds)
        console.print(f"round {number + 1}: { {name: round(of[-1]) for name, of in rates.items()} }", markup=False)
    peaks = {engine.name: engine.close() for engine in engines}
    by_heads = {str(number): peak_with(teacher, folder, optim, number) for number in shape["heads_that_fit"]}
    return {
        "student": student.model_dump(mode="json"),
        "shape": shape,
        "batch_tokens": optim.batch_tokens,
        "precision": "bf16" if uses_bf16(optim, torch.device("cpu")) else "fp32",
        "padding": round(1 - sum(tokens) / places, 4),
        "tokens_per_second": {name: round(median(of), 1) for name, of in rates.items()},
        "ratio": {
            name: round(median([a / b for a, b in zip(rates[OURS], rates[name], strict=True)]), 2)
            for name in rates
            if name != OURS
        },
        "first_loss": first,
        "peak_bytes": peaks,
        "peak_bytes_by_relation_heads": by_heads,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def prepare(
    teacher: str, student: StudentSettings, text: FileSource, optim: Optim, updates: int, folder: Path
) -> dict[str, Any]:
    """Blocks to read and a student to start from, the same for every engine."""
    tokenizer, wide = load_tokenizer(teacher), load_headless(teacher)
    assert optim.batch_tokens is not None
    budget = max(2 * updates, LEAST_BATCHES) * optim.batch_tokens
    enough = first_documents(documents(text, "--source"), CHARACTERS * budget)
    write_blocks([Part("--source", enough, Cut(128, 0.5, 16, 0), budget)], tokenizer, folder / "text")
    vocabulary = int(wide.model.config.vocab_size)
    headless(new_student(student, Head(None), tokenizer, vocabulary, 512, 0)).save(folder / "student", tokenizer)
    fits = [n for n in range(1, student.hidden_size + 1) if wide.width % n == student.hidden_size % n == 0]
    chosen = relation_heads(wide.width, student.hidden_size, None)
    return {
        "relation_heads": chosen,
        "heads_that_fit": [fits[0], chosen],
        "teacher_layers": wide.layers,
        "teacher_width": wide.width,
    }


def random_teacher(tokenizer: str, layers: int, width: int, folder: Path) -> str:
    """A BERT of this shape that reads a model's word-pieces: random weights take as long as learned ones."""
    shape = StudentSettings(
        architecture="bert", layers=layers, hidden_size=width, heads=width // HEAD_WIDTH, intermediate_size=4 * width
    )
    pieces = load_tokenizer(tokenizer)
    headless(new_student(shape, Head(None), pieces, len(pieces), 512, 0)).save(folder / "teacher", pieces)
    return str(folder / "teacher")


def first_documents(every: Iterable[Document], characters: int) -> Iterator[Document]:
    """As many as have so many characters."""
    for name, text in every:
        yield name, text
        characters -= len(text)
        if characters <= 0:
            return


def open_ours(teacher: str, folder: Path, optim: Optim, heads: int, students: int) -> Steps:
    """Our lessons, for so many students of one teacher pass."""
    wide = load_headless(teacher)
    precision: Literal["bf16", "fp32"] = "bf16" if uses_bf16(optim, torch.device("cpu")) else "fp32"
    heard = AskedOnce(LiveTeacher(wide.listen(layers=[wide.layers], stop=True), "cpu", precision))
    lessons = [lesson_of(folder, wide.layers, heads) for _ in range(students)]
    return steps_of([(lesson, partial(loss_of, lesson, heard)) for lesson in lessons], folder, optim)


def lesson_of(folder: Path, layer: int, heads: int) -> RelationLesson:
    student = Encoder(AutoModel.from_pretrained(folder / "student"))
    relations = Relations(PAIRS, heads, "token", 0.0, layer, student.layers)
    return RelationLesson(student.listen(layers=[student.layers], stop=True).train(), relations)


def loss_of(lesson: RelationLesson, heard: AskedOnce, batch: Batch) -> Tensor:
    loss: Tensor = lesson(batch, heard(batch))[0]
    return loss


def peak_with(teacher: str, folder: Path, optim: Optim, heads: int) -> int:
    """Memory of a process that makes a few updates with so many relation heads, in bytes."""
    engine = Rival(f"{heads} relation heads", open_ours, teacher, folder, optim, heads, 1)
    engine.ask(list(range(WARM)))
    return engine.close()


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows."""
    shape = result["student"]
    title = (
        f"{shape['layers']} x {shape['hidden_size']} student, {result['shape']['relation_heads']} relation heads,"
        f" {result['precision']}, {result['machine']['threads']} threads, {100 * result['padding']:.1f} % padding"
    )
    made = Table("", "tokens a second", "we are", "first loss", "peak memory, GB", title=title)
    for name, rate in result["tokens_per_second"].items():
        ratio = f"{result['ratio'][name]:.1f} x" if name in result["ratio"] else ""
        peak = f"{result['peak_bytes'][name] / 1e9:.2f}"
        made.add_row(name, f"{rate:,.0f}", ratio, f"{result['first_loss'][name]:.5f}", peak)
    memory = Table("relation heads", "peak memory, GB")
    for heads, peak in result["peak_bytes_by_relation_heads"].items():
        memory.add_row(heads, f"{peak / 1e9:.2f}")
    return [made, memory]
