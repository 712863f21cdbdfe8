"""What a course minimises and whom it hears, and whether recipe, teacher and student fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from openbook.checkpoint import fingerprint
from openbook.config import Terms, UsageError, WholeKind
from openbook.courses import CORPUS, Course, needs_teacher, outline, trainings
from openbook.distillation.mapping import copied_layers
from openbook.distillation.objective import Objective
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, silent
from openbook.keys import keys_of, parts_of, projection_in, projection_part, values_of
from openbook.knowledge_base.interpolate import training_targets
from openbook.knowledge_base.search import Hits
from openbook.models.encoder import Encoder, load_finished, load_headless, refuse_untappable
from openbook.models.student import compare_widths, new_student, refuse_widening
from openbook.recordings import Recording, hears_recording, outputs_folder, student_widths, teacher_widths, wanted_of
from openbook.training import uses_bf16
from openbook.types import Batch, Example, KnowledgeBase, Outputs, Teacher
from openbook.workspace import Run

SMALLEST = 1e-30  # a probability whose logarithm float32 still holds


def blank_student(run: Run, seed: int) -> Encoder:
    """The student's shape with random weights. A teacher's word embeddings may have more rows than there are words."""
    vocabulary = run.teacher_config.vocab_size if run.shares_tokenizer else len(run.tokenizer)
    positions = run.recipe.student.max_positions or run.recipe.task.max_length
    return new_student(run.recipe.student, run.head, run.tokenizer, vocabulary, positions, seed)


def objective_for(run: Run, terms: Terms, keys: tuple[Tensor, Tensor] | None) -> Objective:
    reads_all = terms.neighbours > 0 and terms.neighbours_scope == "knowledge_base"
    base = training_base(run, outputs_folder(run)) if reads_all else None
    entries = None if base is None else (torch.from_numpy(base.keys), base.ids)
    projected = run.recipe.student.projection == "linear"
    return Objective(terms, student_widths(run), teacher_widths(run), run.kind, keys, entries, projected)


def blank_objective(run: Run, terms: Terms) -> Objective:
    """The same before there is any key: it tells which layers are read, and refuses what does not fit."""
    ours, theirs = student_widths(run), teacher_widths(run)
    projection = torch.zeros(ours.embedding, theirs.embedding), torch.zeros(ours.embedding)
    return Objective(terms, ours, theirs, run.kind, projection, (torch.zeros(1, ours.embedding), ("",)))


def key_projection(run: Run) -> tuple[Tensor, Tensor]:
    """W (d, d_t) and b (d,) of the map from teacher embeddings to keys."""
    weight, bias = projection_in(outputs_folder(run))
    return torch.from_numpy(weight), torch.from_numpy(bias)


def training_base(run: Run, outputs: Path, temperature: float = 1.0) -> KnowledgeBase:
    """Every training row with its key and what the teacher says, softmax(t / T) or a score (specification, 2.2)."""
    recorded = RecordedTeacher(outputs / "task", (), ())
    rows = recorded.rows_of([example.id for example in run.task.train])
    return KnowledgeBase(
        keys=keys_of(outputs, recorded.embedding[rows]),
        values=values_of(run.kind, recorded.logits[rows], temperature),
        ids=tuple(example.id for example in run.task.train),
        texts=tuple(joined(example) for example in run.task.train),
        manifest={},
    )


def gold_values(run: Run) -> NDArray[np.float32]:
    """Gold labels of the training rows as values: 1 for those that apply (n, C), in regression the scores (n, 1)."""
    gold = np.array([example.label for example in run.task.train])
    values = gold[:, None] if run.kind == "regression" else gold
    values = np.eye(len(run.task.labels or ()))[gold] if run.kind == "classification" else values
    return values.astype(np.float32)


def joined(example: Example) -> str:
    """A text as a knowledge base stores it."""
    return example.text if example.text_pair is None else f"{example.text}\t{example.text_pair}"


def key_parts(run: Run) -> dict[str, str]:
    """All that decides where a text's key lies, each by its content."""
    rules = run.teacher_tokenizer.backend_tokenizer.to_str()
    own = parts_of(run.folder / "teacher", rules, run.recipe.task.max_length)
    return own | projection_part(outputs_folder(run))


def key_space(run: Run) -> str:
    """Their digest: students and knowledge bases that share it fit together, whatever data they were made from."""
    return fingerprint(key_parts(run))


def teacher_for(run: Run, course: Course) -> Teacher:
    """The recording where it holds all that the terms read; else the live model."""
    terms = course.training.terms
    if not needs_teacher(terms):
        return silent
    wanted = wanted_of(run, course)
    teacher: Teacher
    if hears_recording(run, course):
        teacher = RecordedTeacher(outputs_folder(run) / wanted.name, wanted.hidden, wanted.taps)
    else:
        teacher = live_teacher(run, wanted, blank_objective(run, terms).teacher_layers)
    return after_retrieval(run, terms, teacher) if terms.retrieved_share else teacher


def after_retrieval(run: Run, terms: Terms, teacher: Teacher) -> Teacher:
    """A teacher whose answer to a training text is lambda V + (1 - lambda) Avg, in logarithms (specification, 2.5).

    Avg is over the nearest of the other training texts, found once by the teacher's own keys; V is its soft label.
    """
    base, found = training_base(run, outputs_folder(run)), recorded_neighbours(run)
    targets = training_targets(
        base, base.keys, 1 - terms.retrieved_share, terms.retrieved_k, terms.retrieved_temperature,
        lambda queries, k, exclude: found.top(k),
    )  # fmt: skip
    logits = torch.from_numpy(LOGITS[run.kind](targets))
    rows = {name: row for row, name in enumerate(base.ids)}

    def tell(batch: Batch) -> Outputs:
        said = teacher(batch)
        return replace(said, logits=logits[[rows[name] for name in batch.ids]].to(said.logits))

    return tell


def _logarithms(probabilities: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.log(np.maximum(probabilities, SMALLEST)))


LOGITS: dict[WholeKind, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "classification": _logarithms,
    "regression": lambda scores: scores,
    "multi_label": lambda chances: _logarithms(chances) - _logarithms(1 - chances),
}  # what a teacher would have to say for it to mean these values (n, C)


def recorded_neighbours(run: Run) -> Hits:
    """What every training row finds among the others."""
    found = load_file(outputs_folder(run) / "neighbours.safetensors")
    return Hits(found["positions"].numpy(), found["similarities"].numpy())


def live_teacher(run: Run, wanted: Recording, layers: Sequence[int]) -> LiveTeacher:
    """The model itself, telling queries, keys and values of these layers beside what is wanted."""
    if wanted.teacher == "fine_tuned":
        model = load_finished(str(run.folder / "teacher"))
    else:
        model = load_headless(run.teacher_location, run.recipe.teacher.revision)
    device = Accelerator().device
    is_bf16 = not wanted.exact and uses_bf16(run.recipe.teacher.optim, device)
    return LiveTeacher(model.listen(bool(wanted.hidden), layers), device, "bf16" if is_bf16 else "fp32")


def check_lessons(run: Run) -> None:
    """Find impossible pairs of recipe, teacher and student before a model is loaded."""
    for name, course in trainings(run.recipe).items():
        terms = course.training.terms
        check_texts(name, course)
        check_neighbours(run, name, course)
        try:
            blank_objective(run, terms)
            if terms.attention or terms.relations:
                refuse_untappable(run.teacher_config, scores=terms.attention > 0)
        except UsageError as error:
            raise UsageError(f"distill.{name}: {error}") from None
        if terms.attention and run.recipe.student.architecture != "bert":
            raise UsageError(
                f"distill.{name}.terms.attention={terms.attention} compares scores without rotary positions, which"
                f" student.architecture={run.recipe.student.architecture} has; use relations, or architecture: bert"
            )
        if terms.reads_tokens and not run.shares_tokenizer:
            raise UsageError(
                f"distill.{name}.terms: hidden, attention and relations compare token by token, but student.tokenizer"
                f"={run.recipe.student.tokenizer!r} differs from the teacher's; remove student.tokenizer or these terms"
            )
    check_projection(run)
    check_own_projection(run)
    check_start(run)


def check_neighbours(run: Run, name: str, course: Course) -> None:
    """A queue holds a batch, and a text once; only the task's own texts are looked up while a student learns."""
    terms, optim = course.training.terms, course.training.optim
    if terms.neighbours and terms.neighbours_scope == "queue":
        texts = len(run.task.train) if course.texts == "task" else math.inf
        if not optim.batch_size <= terms.neighbours_queue <= texts:
            raise UsageError(
                f"distill.{name}.terms.neighbours_queue={terms.neighbours_queue} must hold a batch"
                f" ({optim.batch_size}) and no text twice (there are {texts}); choose a number between the two, or"
                " neighbours_scope: knowledge_base"
            )
    if terms.retrieved_share and (course.texts != "task" or not terms.soft_labels):
        why = "has no soft labels (terms.soft_labels=0)" if course.texts == "task" else "reads other text"
        raise UsageError(
            f"distill.{name}.terms.retrieved_share={terms.retrieved_share} mixes the teacher's soft labels with those"
            f" of other training texts, and this course {why}; set it to 0"
        )


def check_projection(run: Run) -> None:
    """Keys of the student's width can be made of the teacher's embeddings in the way that is asked for."""
    projection = run.recipe.knowledge_base.projection
    ours, theirs = student_widths(run).embedding, teacher_widths(run).embedding
    if projection.optim.keep == "best":
        raise UsageError(
            "knowledge_base.projection.optim.keep=best: the map to keys has no score to be judged by; set it to last"
        )
    needed = {"identity": ours == theirs, "pca": ours <= theirs}
    if not needed.get(projection.kind, True):
        wish = "a student as wide as its teacher" if projection.kind == "identity" else "a student that is no wider"
        raise UsageError(
            f"knowledge_base.projection.kind={projection.kind} needs {wish}, but student.hidden_size={ours} and the"
            f" teacher's width is {theirs}; change it, or take kind: supcon or random"
        )


def check_own_projection(run: Run) -> None:
    """The student's own map has something to learn from."""
    taught = [course.training.terms.neighbours for course in outline(run.recipe, CORPUS)]
    if run.recipe.student.projection == "linear" and not any(taught):
        raise UsageError(
            "student.projection=linear is learned by terms.neighbours, and no course of the student has it; set"
            " distill.task.terms.neighbours, or student.projection: none"
        )


def check_texts(name: str, course: Course) -> None:
    """The texts have, and the teacher says, what the terms read."""
    terms = course.training.terms
    if terms.gold and course.texts != "task":
        raise UsageError(f"distill.{name}.terms.gold={terms.gold}: the corpus has no gold labels; set it to 0")
    if course.teacher == "pretrained":
        key = "distill.general.teacher" if name == "general" else "distill.corpus_teacher"
        for term in ("soft_labels", "embedding", "neighbours"):
            if weight := getattr(terms, term):
                raise UsageError(
                    f"distill.{name}.terms.{term}={weight} reads what a fine-tuned teacher says, but {key}=pretrained"
                    " has hidden states, queries and keys only; set the term to 0, or the teacher to fine_tuned"
                )


def check_start(run: Run) -> None:
    """What the student would start from fits its shape."""
    student = run.recipe.student
    copies, projects = student.init == "layer_copy", student.embeddings != "random"
    if (copies or projects) and not run.shares_tokenizer:
        key = "init=layer_copy" if copies else f"embeddings={student.embeddings}"
        raise UsageError(
            f"student.{key} needs the teacher's vocabulary, but student.tokenizer={student.tokenizer!r} differs;"
            " use init: random with embeddings: random, or remove student.tokenizer"
        )
    if copies:
        copied_layers(teacher_widths(run).layers, student.layers, student.copy_which)
        with torch.device("meta"):
            compare_widths(blank_student(run, seed=0).model.config, run.teacher_config)
    elif projects:
        refuse_widening(student.hidden_size, teacher_widths(run).hidden)
