"""What is kept on disk of a teacher's answers, so that it reads every text but once."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openbook.checkpoint import open_artifact, partial_folder
from openbook.config import UsageError
from openbook.courses import STUDENTS, Course, Origin, needs_teacher, outline
from openbook.distillation.mapping import layer_map
from openbook.distillation.objective import Widths
from openbook.readings import Texts
from openbook.workspace import Run


def widths_of(config: Any) -> Widths:
    """The sizes that losses compare, from a configuration alone. The pooled vector is as wide as the model."""
    return Widths(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.hidden_size)


def teacher_widths(run: Run) -> Widths:
    return widths_of(run.teacher_config)


def student_widths(run: Run) -> Widths:
    student = run.recipe.student
    return Widths(student.hidden_size, student.layers, student.heads, student.hidden_size)


@dataclass(frozen=True)
class Recording:
    """What is kept on disk of a teacher's answers to one kind of text, beside logits and embeddings."""

    texts: Texts
    teacher: Origin
    hidden: tuple[int, ...] = ()  # layers whose states are kept, 0 = the embeddings
    taps: tuple[int, ...] = ()  # layers whose queries and keys are kept, from 1
    exact: bool = False  # whether soft labels are read: bf16 would move them by up to 0.01

    @property
    def name(self) -> str:
        """Its folder below the teacher's outputs."""
        return self.texts if self.teacher == "fine_tuned" else f"{self.texts}-{self.teacher}"

    @property
    def is_deep(self) -> bool:
        return bool(self.hidden or self.taps)

    def covers(self, wanted: Recording) -> bool:
        """Whether all layers that are wanted are here. Precision is: it is the finest that anybody asks for."""
        same = (self.texts, self.teacher) == (wanted.texts, wanted.teacher)
        return same and set(wanted.hidden) <= set(self.hidden) and set(wanted.taps) <= set(self.taps)


def wanted_of(run: Run, course: Course) -> Recording:
    """What a course hears of its teacher."""
    terms = course.training.terms
    mapped: tuple[int, ...] = ()
    if terms.hidden or terms.attention:
        mapped = layer_map(teacher_widths(run).layers, run.recipe.student.layers, terms.layer_mapping)
    hidden = tuple(sorted({0, *mapped})) if terms.hidden else ()
    taps = tuple(sorted({*mapped})) if terms.attention else ()
    return Recording(course.texts, course.teacher, hidden, taps, exact=terms.soft_labels > 0)


def recordings(run: Run) -> list[Recording]:
    """What is recorded: for each text and teacher all that the courses hear, the smallest first while there is room.

    Where layers find no room, what the other courses hear is still recorded. The keys need the answers to the task's
    text, and the knowledge base those to all that it holds. Relations (which read values too) always hear the live
    teacher.
    """
    plans = [course for student in STUDENTS for course in outline(run.recipe, student)]
    heard = [wanted_of(run, c) for c in plans if needs_teacher(c.training.terms) and not c.training.terms.relations]
    heard.append(Recording("task", "fine_tuned", exact=True))
    if run.recipe.knowledge_base.texts != "task":
        heard.append(Recording("corpus", "fine_tuned", exact=True))
    unions = {(one.texts, one.teacher): one for one in merged(one for one in heard if not one.is_deep)}
    room = 1e9 * run.recipe.teacher.record_gigabytes if run.recipe.teacher.record_hidden else 0.0
    for one in sorted(merged(heard), key=lambda one: bytes_of(run, one)):
        if one.is_deep and bytes_of(run, one) <= room:
            room -= bytes_of(run, one)
            unions[one.texts, one.teacher] = one
    return [unions[key] for key in sorted(unions)]


def merged(heard: Iterable[Recording]) -> list[Recording]:
    """One recording for each text and teacher, with all layers that are heard of it."""
    unions: dict[tuple[str, str], Recording] = {}
    for one in heard:
        known = unions.setdefault((one.texts, one.teacher), one)
        hidden, taps = (tuple(sorted({*a, *b})) for a, b in ((known.hidden, one.hidden), (known.taps, one.taps)))
        unions[one.texts, one.teacher] = replace(one, hidden=hidden, taps=taps, exact=known.exact or one.exact)
    return list(unions.values())


def bytes_of(run: Run, recording: Recording) -> int:
    """At most so many bytes of hidden states, queries and keys in fp16."""
    layers = len(recording.hidden) + 2 * len(recording.taps)
    return 2 * most_tokens(run, recording.texts) * teacher_widths(run).hidden * layers


def most_tokens(run: Run, texts: Texts) -> int:
    """At most so many tokens, special ones included: the corpus is not built yet when this is asked."""
    settings, general = run.recipe.corpus, run.recipe.distill.general
    task = len(run.task.train) * run.recipe.task.max_length
    if texts == "task":
        return task
    if texts == "general":
        assert general is not None
        return with_special(general.budget_tokens, settings.min_words)
    is_bank = settings.select not in ("augmented", "task")
    return with_special(settings.budget_tokens, settings.min_words if is_bank else 1) + task * settings.include_task


def with_special(budget: int, words: int) -> int:
    """Tokens of texts of so many word-pieces in all, none of fewer words than given, each with two special tokens."""
    return budget + math.ceil(2 * budget / words)


def hears_recording(run: Run, course: Course) -> bool:
    """Whether all that a course hears was recorded."""
    wanted = wanted_of(run, course)
    return not course.training.terms.relations and any(one.covers(wanted) for one in recordings(run))


def outputs_folder(run: Run) -> Path:
    return run.folder / "teacher_outputs"


def check_space(run: Run) -> None:
    """Recorded layers are the only large files of a run: find out now if the disk cannot hold them."""
    needed = sum(bytes_of(run, one) for one in recordings(run)) - bytes_there(run)
    place = next(folder for folder in (run.folder, *run.folder.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"{place} has {free / 1e9:.1f} GB free, and the recorded layers of the teacher may need {needed / 1e9:.1f}"
            " GB; free some space, lower corpus.budget_tokens, or set teacher.record_hidden: false"
        )


def bytes_there(run: Run) -> float:
    """What is on disk already: all, if the recordings there are those that the recipe asks for."""
    folder = (run.folder / "teacher_outputs").resolve()
    artifact = open_artifact(folder)
    if artifact is not None and artifact.manifest["inputs"].get("recordings") == as_json(recordings(run)):
        return math.inf
    return sum(path.stat().st_size for path in partial_folder(folder).rglob("*.npy"))


def as_json(recordings: Iterable[Recording]) -> list[dict[str, Any]]:
    return [{**asdict(one), "hidden": list(one.hidden), "taps": list(one.taps)} for one in recordings]
