"""How far training moved a teacher's relations, in the unit of its students' loss."""

from __future__ import annotations

from dataclasses import replace
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
from openbook.types import Batch, Outputs

BLOCKS = 64


def drift(run: AgnosticRun, text: Path) -> dict[str, Any]:
    """The relation loss of the pretrained encoder against the run's teacher, as each student would have it.

    That is KL(teacher || pretrained) at the layer that is taught, in all and by relation (specification, 7.1): what
    is left to learn for a student that imitates the plain teacher to perfection. Of the blocks in `text`, as many as
    `BLOCKS` are read, evenly spread.
    """
    layer, batch = teacher_layer(run), blocks_of(text).to(Accelerator().device)
    answers = answers_of(str(run.folder / "teacher"), layer, batch)
    plain = load_headless(run.teacher_location, run.recipe.teacher.revision).to(batch.input_ids.device)
    plain.listen(layers=[layer], stop=True)
    settings = {
        student.name: replace(relations_of(run, student), student_layer=layer) for student in run.recipe.students
    }
    found: dict[Relations, dict[str, float]] = {}
    for how in dict.fromkeys(settings.values()):  # students of equal relation heads share one
        with torch.no_grad():
            loss, parts = RelationLesson(plain, how).eval()(batch, answers)
        found[how] = {name: round(part.item(), 6) for name, part in {"loss": loss, **parts}.items()}
    return {"blocks": len(batch.ids), "layer": layer, "students": {name: found[how] for name, how in settings.items()}}


def blocks_of(text: Path) -> Batch:
    """The same ones every time."""
    blocks = Tokenised.load(text)
    return blocks.batch(np.linspace(0, len(blocks) - 1, min(BLOCKS, len(blocks))).astype(np.int64))


def answers_of(folder: str, layer: int, batch: Batch) -> Outputs:
    """What a teacher says, which is gone from memory afterwards."""
    model = load_headless(folder).listen(layers=[layer], stop=True)
    return LiveTeacher(model, batch.input_ids.device)(batch)
