"""How far training moved a teacher's relations, in the unit of its students' loss."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from openbook.agnostic_run import AgnosticRun
from openbook.data.batches import Tokenised
from openbook.distillation.relations import RelationLesson, Relations
from openbook.distillation.teachers import LiveTeacher
from openbook.models.encoder import load_headless
from openbook.stages.distill_agnostic import relations_of, teacher_layer
from openbook.types import Batch

BLOCKS = 64


def drift(run: AgnosticRun, text: Path) -> dict[str, Any]:
    """The relation loss of the pretrained encoder against the run's teacher, as each student would have it.

    That is KL(teacher || pretrained) at the layer that is taught, in all and by relation (specification, 7.1): what
    is left to learn for a student that imitates the plain teacher to perfection. `layers` has the same of every layer,
    with the relation heads of the first student. Of the blocks in `text`, as many as `BLOCKS` are read, evenly spread.
    """
    batch = blocks_of(text).to(Accelerator().device)
    teacher = load_headless(str(run.folder / "teacher"))
    plain = load_headless(run.teacher_location, run.recipe.teacher.revision).to(batch.input_ids.device).eval()

    @cache
    def moved(how: Relations) -> dict[str, float]:
        layers = [how.teacher_layer]
        answers = LiveTeacher(teacher.listen(layers=layers, stop=True), batch.input_ids.device)(batch)
        with torch.no_grad():
            loss, parts = RelationLesson(plain.listen(layers=layers, stop=True), how).eval()(batch, answers)
        return {name: round(part.item(), 6) for name, part in {"loss": loss, **parts}.items()}

    asked = {student.name: relations_of(run, student) for student in run.recipe.students}
    first = next(iter(asked.values()))
    return {
        "blocks": len(batch.ids),
        "layer": teacher_layer(run),
        "students": {name: moved(replace(how, student_layer=how.teacher_layer)) for name, how in asked.items()},
        "layers": {
            str(layer): moved(replace(first, teacher_layer=layer, student_layer=layer))
            for layer in range(1, plain.layers + 1)
        },
    }


def blocks_of(text: Path) -> Batch:
    """The same ones every time."""
    blocks = Tokenised.load(text)
    return blocks.batch(np.linspace(0, len(blocks) - 1, min(BLOCKS, len(blocks))).astype(np.int64))
