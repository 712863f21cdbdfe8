"""Who is taught what: the students of a run, their trainings, and the texts each reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from openbook.config import Recipe, Terms, Training
from openbook.readings import Texts, tokens_of
from openbook.workspace import Run

Origin = Literal["fine_tuned", "pretrained"]  # of the teacher: after or before its fine-tuning

TEACHER, LABELS, KD, CORPUS, OPEN_BOOK = (
    "teacher",
    "student-labels",
    "student-kd",
    "student-corpus",
    "student-open-book",
)
STUDENTS = (LABELS, KD, CORPUS)  # those that are trained; the open-book student is the last one with its book
LAST = ("task", "labels")  # courses on what the student is for; those before them are its first stage


@dataclass(frozen=True)
class Course:
    """One training of a student: what it reads, whom it hears, what is minimised, for how long."""

    name: str
    texts: Texts
    training: Training
    teacher: Origin = "fine_tuned"


def outline(recipe: Recipe, student: str) -> list[Course]:
    """A student's trainings in their order. The rivals differ from `student-corpus` in one thing each."""
    distill = recipe.distill
    if student == LABELS:
        plan = [Course("labels", "task", distill.labels)]
    else:
        first = Course("corpus", "corpus", distill.corpus, distill.corpus_teacher)
        if student == KD:
            first = replace(first, name="task text", texts="task")
        plan = [first, Course("task", "task", distill.task)]
        if distill.general is not None:
            plan.insert(0, Course("general", "general", distill.general, distill.general.teacher))
    return [course for course in plan if course.training.optim.epochs > 0]


def courses(run: Run, student: str) -> list[Course]:
    """The same, and what reads the task's text in place of the corpus reads as much of it."""
    return [
        replace(course, training=at_equal_tokens(run, course.training)) if course.name == "task text" else course
        for course in outline(run.recipe, student)
    ]


def reads_corpus(recipe: Recipe) -> bool:
    """Whether any student reads anything but the task's text, or the knowledge base holds some."""
    plans = (course for student in STUDENTS for course in outline(recipe, student))
    return recipe.knowledge_base.texts != "task" or any(course.texts != "task" for course in plans)


def at_equal_tokens(run: Run, training: Training) -> Training:
    """A training that ends when as many word-pieces were read as it would read of the corpus."""
    if training.optim.tokens is not None:
        return training
    tokens = round(training.optim.epochs * int(tokens_of(run, "corpus", run.tokenizer).tokens.sum()))
    return training.model_copy(update={"optim": training.optim.model_copy(update={"tokens": tokens})})


def trainings(recipe: Recipe) -> dict[str, Course]:
    """Every training that takes place, by its key in the recipe."""
    return {course.name: course for student in (LABELS, CORPUS) for course in outline(recipe, student)}


def retrieves(recipe: Recipe) -> bool:
    """Whether a course's soft labels are mixed with those of neighbours."""
    return any(course.training.terms.retrieved_share > 0 for course in trainings(recipe).values())


def needs_teacher(terms: Terms) -> bool:
    return any((terms.soft_labels, terms.embedding, terms.hidden, terms.attention, terms.relations, terms.neighbours))
