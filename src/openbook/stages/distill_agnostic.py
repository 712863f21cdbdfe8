"""Teacher + general text -> students of any number and shape, who learn relations and no task."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from openbook.agnostic import NamedStudent
from openbook.agnostic_run import AgnosticRun, lengths_of
from openbook.checkpoint import SCRATCH, write_json
from openbook.config import Optim, UsageError
from openbook.console import track
from openbook.data.batches import BatchPlan, Tokenised
from openbook.distillation.mapping import copied_layers, relation_heads
from openbook.distillation.relations import RelationLesson, Relations, without_gradient
from openbook.distillation.teachers import AskedOnce, LiveTeacher
from openbook.models.encoder import Encoder, Head, load_headless, refuse_untappable
from openbook.models.student import (
    TAIL,
    compare_widths,
    config_of,
    drop_last_block,
    headless,
    new_student,
    refuse_widening,
    start_from_layers,
    start_from_word_embeddings,
    start_tail,
)
from openbook.training import Learner, Plan, count_updates, train_together, uses_bf16
from openbook.types import Batch

EPSILON = 1e-6  # AdamW's (MiniLMv2, specification 2.7)
LARGE_LAYERS, LARGE = 24, {"bert": 21, "roberta": 19, "xlm-roberta": 19}  # the layer of large teachers (MiniLMv2)


def inputs(run: AgnosticRun) -> dict[str, Any]:
    return run.recipe.model_dump(mode="json", include={"students", "distill", "seed"})


def check(run: AgnosticRun) -> None:
    """Every student can imitate the teacher, before a model is loaded."""
    layers = run.teacher_config.num_hidden_layers
    if not 1 <= teacher_layer(run) <= layers:
        raise UsageError(
            f"distill.teacher_layer={run.recipe.distill.teacher_layer}: the teacher has layers 1 to {layers}"
        )
    refuse_untappable(run.teacher_config)
    for student in run.recipe.students:
        try:
            relations_of(run, student)
            check_start(run, student)
        except UsageError as error:
            raise UsageError(f"students, {student.name}: {error}") from None


def check_start(run: AgnosticRun, student: NamedStudent) -> None:
    """What it takes from the teacher fits it."""
    teacher, settings = run.teacher_config, run.recipe.distill
    if student.embeddings == "projected":
        refuse_widening(student.hidden_size, getattr(teacher, "embedding_size", teacher.hidden_size))
    if student.init == "layer_copy":
        copied_layers(teacher.num_hidden_layers, student.layers, student.copy_which)
    if settings.tail == "init" and student.hidden_size != teacher.hidden_size:
        raise UsageError(
            f"distill.tail=init takes weights of the teacher, whose width is {teacher.hidden_size}, and"
            f" student.hidden_size={student.hidden_size}; make them equal, or take tail: leave or aux"
        )
    shape = config_of(student, Head(None), run.tokenizer, teacher.vocab_size, run.longest)
    if student.init == "layer_copy":
        compare_widths(shape, teacher)
    if settings.tail == "init":
        compare_widths(shape, teacher, TAIL)


def build(run: AgnosticRun, folder: Path) -> None:
    plan = plan_of(run)
    teacher = live_teacher(run)
    learners = [learner_of(run, student, teacher) for student in run.recipe.students]
    accelerator = Accelerator()
    untaught = [untaught_by(learner, plan[0].to(accelerator.device)) for learner in learners]
    with track("distilling", count_updates(plan, learners[0].optim)) as advance:
        histories = train_together(learners, plan, accelerator, folder / SCRATCH, advance)
    for student, learner, history, names in zip(run.recipe.students, learners, histories, untaught, strict=True):
        place = folder / student.name
        place.mkdir(exist_ok=True)  # it is there if the run was killed while it saved
        encoder: Encoder = learner.lesson.student  # type: ignore[assignment]
        if run.recipe.distill.tail == "aux":
            drop_last_block(encoder)
        encoder.save(place, run.tokenizer)
        write_json(place / "history.json", history)
        kept = encoder.model.state_dict()
        write_json(place / "untaught.json", [name for name in names if name in kept])


def teacher_layer(run: AgnosticRun) -> int:
    """Whose relations are taught: as the recipe says, else as MiniLMv2 found best for large models, else the last."""
    layers = int(run.teacher_config.num_hidden_layers)
    found = LARGE.get(run.teacher_config.model_type, layers) if layers == LARGE_LAYERS else layers
    return int(run.recipe.distill.teacher_layer or found)


def relations_of(run: AgnosticRun, student: NamedStudent) -> Relations:
    settings = run.recipe.distill
    heads = relation_heads(
        run.teacher_config.hidden_size, student.hidden_size, settings.relation_heads, "distill.relation_heads"
    )
    taught = student.layers + (settings.tail == "aux")
    return Relations(settings.relations, heads, settings.norm, settings.sample_relations, teacher_layer(run), taught)


def live_teacher(run: AgnosticRun) -> AskedOnce:
    """It stops after the projections that are imitated, and speaks once for all students."""
    model = load_headless(str(run.folder / "teacher")).listen(layers=[teacher_layer(run)], stop=True)
    device = Accelerator().device
    is_bf16 = uses_bf16(run.recipe.distill.optim, device)
    return AskedOnce(LiveTeacher(model, device, "bf16" if is_bf16 else "fp32"))


def learner_of(run: AgnosticRun, settings: NamedStudent, teacher: AskedOnce) -> Learner:
    relations = relations_of(run, settings)
    student = fresh(run, settings, relations.student_layer)
    student.listen(layers=[relations.student_layer], stop=True)
    lesson = RelationLesson(student, relations)
    optim = settings.optim.over(run.recipe.distill.optim)
    return Learner(lambda batch: lesson(batch, teacher(batch)), lesson, optim, run.recipe.seed, EPSILON)


def fresh(run: AgnosticRun, settings: NamedStudent, layers: int) -> Encoder:
    """A student before its first batch; the draw of its weights depends on seed and shape alone."""
    shape = settings.model_copy(update={"layers": layers})
    student = headless(
        new_student(shape, Head(None), run.tokenizer, run.teacher_config.vocab_size, run.longest, run.recipe.seed)
    )
    if settings.embeddings == "projected" or settings.init == "layer_copy" or run.recipe.distill.tail == "init":
        teacher = load_headless(str(run.folder / "teacher"))
        if settings.embeddings == "projected":
            start_from_word_embeddings(student, teacher)
        if settings.init == "layer_copy":
            start_from_layers(student, teacher, copied_layers(teacher.layers, settings.layers, settings.copy_which))
        if run.recipe.distill.tail == "init":
            start_tail(student, teacher, teacher_layer(run))
    return student


def untaught_by(learner: Learner, batch: Batch) -> list[str]:
    """The student's weights, named as in its folder, that get no gradient: nothing but weight decay changes them."""
    learner.lesson.to(batch.input_ids.device)
    loss, _ = learner.loss_of(batch)
    torch.autograd.backward(loss)
    names = without_gradient(learner.lesson.student.model)  # type: ignore[union-attr, arg-type]
    learner.lesson.zero_grad()
    return names


@dataclass(frozen=True)
class Sequel:
    """One plan after the other."""

    plans: Sequence[Plan]

    def __len__(self) -> int:
        return sum(map(len, self.plans))

    def __getitem__(self, step: int) -> Batch:
        starts = np.cumsum([0, *map(len, self.plans)])
        place = min(bisect_right(starts.tolist(), step), len(self.plans)) - 1
        return self.plans[place][step - int(starts[place])]


def plan_of(run: AgnosticRun) -> Sequel:
    """Short blocks, then long ones, each for its share of what is read. Raises UsageError where they fill no batch."""
    optim = run.recipe.distill.optim
    plans = []
    for name, _, share in lengths_of(run.recipe.text):
        blocks = Tokenised.load(run.folder / "text" / name)
        there, wanted = (
            (len(blocks), optim.batch_size)
            if optim.batch_tokens is None
            else (int(blocks.tokens.sum()), optim.batch_tokens)
        )
        if there < wanted:
            key = "batch_size" if optim.batch_tokens is None else "batch_tokens"
            raise UsageError(
                f"text.sources: the {name} blocks cut from it are too few for one batch, {there} of"
                f" distill.optim.{key}={wanted}; name more text, or lower distill.optim.{key}"
            )
        plans.append(BatchPlan(blocks, share_of(optim, share), run.recipe.seed))
    return Sequel(plans)


def share_of(optim: Optim, share: float) -> Optim:
    tokens = None if optim.tokens is None else max(1, round(optim.tokens * share))
    return optim.model_copy(update={"tokens": tokens})
