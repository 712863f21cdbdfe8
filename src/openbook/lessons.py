"""Who is taught what: the students of a run, the texts each reads, and the teacher that answers for them."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from openbook.checkpoint import fingerprint, open_artifact
from openbook.config import Terms, Training, UsageError
from openbook.distillation.mapping import copied_layers, layer_map
from openbook.distillation.objective import Objective, Widths
from openbook.distillation.teachers import FirstThatKnows, LiveTeacher, RecordedTeacher, silent
from openbook.models.encoder import Encoder, load_finished
from openbook.models.student import compare_widths, new_student, refuse_widening
from openbook.types import Example, Passage, Teacher
from openbook.workspace import Run, tokenizer_digest

Texts = Literal["task", "corpus"]

TEACHER, LABELS, KD, CORPUS, OPEN_BOOK = (
    "teacher",
    "student-labels",
    "student-kd",
    "student-corpus",
    "student-open-book",
)
STUDENTS = (LABELS, KD, CORPUS)  # those that are trained; the open-book student is the last one with its book


@dataclass(frozen=True)
class Course:
    """One training of a student: what it reads, what is minimised, for how long."""

    name: str
    texts: Texts
    training: Training


def courses(run: Run, student: str) -> list[Course]:
    """A student's trainings in their order. The rivals differ from `student-corpus` in one thing each."""
    distill = run.recipe.distill
    if student == LABELS:
        return [Course("labels", "task", distill.labels)]
    if student == KD:
        first = Course("task text", "task", at_equal_tokens(run, distill.corpus))
    else:
        first = Course("corpus", "corpus", distill.corpus)
    return [course for course in (first, Course("task", "task", distill.task)) if course.training.optim.epochs > 0]


def at_equal_tokens(run: Run, training: Training) -> Training:
    """The corpus training on the task's own text instead, repeated until it has read as many tokens."""
    corpus = run.tokens("corpus", corpus_examples(run), run.tokenizer)
    task = run.tokens("task", run.task.train, run.tokenizer)
    epochs = training.optim.epochs * float(corpus.lengths.sum()) / float(task.lengths.sum())
    return training.model_copy(update={"optim": training.optim.model_copy(update={"epochs": epochs})})


def corpus_examples(run: Run) -> list[Example]:
    """The retrieved sentences in the task's input form: single, or two by two in seeded random order for pair tasks."""
    table = pq.read_table(run.folder / "corpus" / "passages.parquet")
    passages = [Passage(**row) for row in table.to_pylist()]
    if not run.task.pair:
        return [Example(passage.id, passage.text) for passage in passages]
    random.Random(run.recipe.corpus.seed).shuffle(passages)
    return [Example(f"{a.id}+{b.id}", a.text, b.text) for a, b in zip(passages[::2], passages[1::2], strict=False)]


def widths_of(config: Any) -> Widths:
    """The sizes that losses compare, from a configuration alone. The pooled vector is as wide as the model."""
    return Widths(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.hidden_size)


def teacher_widths(run: Run) -> Widths:
    return widths_of(run.teacher_config)


def student_widths(run: Run) -> Widths:
    student = run.recipe.student
    return Widths(student.hidden_size, student.layers, student.heads, student.hidden_size)


def blank_student(run: Run, seed: int) -> Encoder:
    """The student's shape with random weights. A teacher's word embeddings may have more rows than there are words."""
    vocabulary = run.teacher_config.vocab_size if run.shares_tokenizer else len(run.tokenizer)
    return new_student(run.recipe.student, run.head, run.tokenizer, vocabulary, run.recipe.task.max_length, seed)


def trainings(run: Run) -> dict[str, Training]:
    distill = run.recipe.distill
    return {"corpus": distill.corpus, "task": distill.task, "labels": distill.labels}


def recorded_layers(run: Run) -> list[int]:
    """Teacher layers whose hidden states are kept on disk: those that a term reads, if the recipe allows the space."""
    wanted: set[int] = set()
    widths = teacher_widths(run)
    for training in trainings(run).values():
        if training.terms.hidden:
            wanted |= {0, *layer_map(widths.layers, run.recipe.student.layers, training.terms.layer_mapping)}
    if (
        not run.recipe.teacher.record_hidden
        or state_bytes(run, len(wanted)) > 1e9 * run.recipe.teacher.record_gigabytes
    ):
        return []
    return sorted(wanted)


def state_bytes(run: Run, layers: int) -> int:
    """At most so many bytes of hidden states in fp16, over the corpus and the task."""
    tokens = 2 * run.recipe.corpus.budget_tokens + len(run.task.train) * run.recipe.task.max_length
    return 2 * tokens * teacher_widths(run).hidden * layers


def objective_for(run: Run, terms: Terms, keys: tuple[Tensor, Tensor] | None) -> Objective:
    return Objective(terms, student_widths(run), teacher_widths(run), run.task.kind, keys)


def key_projection(run: Run) -> tuple[Tensor, Tensor]:
    """W (d, d_t) and b (d,) of the map from teacher embeddings to keys."""
    weights = load_file(run.folder / "teacher_outputs" / "projection.safetensors")
    return weights["weight"], weights["bias"]


def key_space(run: Run) -> str:
    """Digest of all that decides where a text's key lies: teacher, projection, tokenizer, length."""
    artifact = open_artifact(run.folder / "teacher_outputs")
    assert artifact is not None
    return fingerprint(
        [artifact.manifest["fingerprint"], tokenizer_digest(run.teacher_tokenizer), run.recipe.task.max_length]
    )


def teacher_for(run: Run, training: Training) -> Teacher:
    """The recording where it holds all that the terms read; else the live model."""
    terms = training.terms
    if not needs_teacher(terms):
        return silent
    objective = objective_for(run, terms, key_projection(run) if terms.neighbours else None)
    recordings = [RecordedTeacher(run.folder / "teacher_outputs" / texts) for texts in ("task", "corpus")]
    if objective.teacher_layers or (objective.reads_hidden and not recordings[0].hidden):
        model = load_finished(str(run.folder / "teacher")).listen(objective.reads_hidden, objective.teacher_layers)
        return LiveTeacher(model, Accelerator().device)
    return FirstThatKnows(recordings)


def needs_teacher(terms: Terms) -> bool:
    return any((terms.soft_labels, terms.embedding, terms.hidden, terms.attention, terms.relations, terms.neighbours))


def check_space(run: Run) -> None:
    """Recorded hidden states are the only large files of a run: find out now if the disk cannot hold them."""
    needed = state_bytes(run, len(recorded_layers(run)))
    place = next(folder for folder in (run.folder, *run.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"{place} has {free / 1e9:.1f} GB free, and the recorded hidden states may need {needed / 1e9:.1f} GB;"
            " free some space, lower corpus.budget_tokens, or set teacher.record_hidden: false"
        )


def check_lessons(run: Run) -> None:
    """Find impossible pairs of recipe, teacher and student before a model is loaded."""
    ours, theirs = student_widths(run), teacher_widths(run)
    for name, training in trainings(run).items():
        terms = training.terms
        keys = (
            (torch.zeros(ours.embedding, theirs.embedding), torch.zeros(ours.embedding)) if terms.neighbours else None
        )
        try:
            objective_for(run, terms, keys)
        except UsageError as error:
            raise UsageError(f"distill.{name}: {error}") from None
        if terms.attention and run.recipe.student.architecture != "bert":
            raise UsageError(
                f"distill.{name}.terms.attention={terms.attention} compares scores without rotary positions, which"
                f" student.architecture={run.recipe.student.architecture} has; use relations, or architecture: bert"
            )
        if terms.gold and name == "corpus":
            raise UsageError(f"distill.corpus.terms.gold={terms.gold}: the corpus has no gold labels; set it to 0")
        if terms.reads_tokens and not run.shares_tokenizer:
            raise UsageError(
                f"distill.{name}.terms: hidden, attention and relations compare token by token, but student.tokenizer"
                f"={run.recipe.student.tokenizer!r} differs from the teacher's; remove student.tokenizer or these terms"
            )
    check_start(run)


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
