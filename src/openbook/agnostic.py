"""What can be set in task-agnostic distillation: a teacher of many tasks, general text, students (arXiv 2301.03416)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from openbook.config import Optim, PackagedModel, Positive, Settings, Shape, Source, Steps, TaskSettings, Weight

Pair = Literal["qq", "kk", "vv", "qk", "qv", "kq", "kv", "vq", "vk"]


RESERVED = {"scratch", "teacher"}
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class MixtureSettings(Settings):
    """How the tasks are mixed (specification 2.2)."""

    passes: Annotated[float, Field(gt=0)] = Field(3.0, description="over all tasks together")
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="tasks are drawn by their size to this power")
    cap: Positive | None = Field(None, description="rows from which on a task counts as no larger")
    tasks_per_update: Positive = Field(32, description="micro-batches an update, each of one task")
    micro_batch: Positive = Field(16, description="rows of a micro-batch")
    systematic: bool = Field(False, description="tasks are dealt out evenly, not drawn by chance")
    rows: Positive | None = Field(None, description="at most so many training rows of a task, drawn by the seed beside")
    shuffle_labels: bool = Field(False, description="a control: labels change their rows within each task")
    masked_text: bool = Field(
        False, description="a control: hidden words of the tasks' texts are guessed, and no label is read"
    )


class EncoderSettings(Settings):
    """A pretrained encoder."""

    model: str | PackagedModel = Field(description="a Hub id, a local folder, or `{package: NAME, path: FOLDER}`")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")


class MultiTaskSettings(Settings):
    """The tasks that an encoder learns all at once, and how; students do so after their distillation."""

    tasks: tuple[TaskSettings, ...] = Field((), description="what it learns, all at once")
    mixture: MixtureSettings = MixtureSettings()
    scale_losses: bool = Field(True, description="cross-entropies divided by the logarithm of the number of choices")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="before every head")
    optim: Steps = Steps(learning_rate=5e-5, warmup=0.06, keep="best")
    judge_every: Positive = Field(100, description="updates between two looks at the rows set aside")
    processes: Positive = Field(1, description="that train it together, each with its share of an update")
    seed: int = Field(0, description="of heads, draws, batches and dropout")


class SharedTeacherSettings(MultiTaskSettings, EncoderSettings):
    """The large encoder, and the tasks it learns before it teaches; without tasks it teaches as it is."""


class TextSettings(Settings):
    """The general text that students are distilled on, cut into blocks of word-pieces."""

    sources: tuple[Source, ...] = Field(min_length=1, description="general text: files, packages or Hub data sets")
    budget_tokens: Positive = Field(description="word-pieces kept, drawn from all documents alike")
    length: Annotated[int, Field(ge=8)] = Field(128, description="word-pieces of a block, special ones included")
    long_length: Positive | None = Field(None, description="of the blocks read last; the longest your tasks will need")
    long_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="of the word-pieces, in long blocks")
    pair_share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="of the blocks, made of two segments")
    least: Positive = Field(16, description="word-pieces of a document's last block, or it is dropped")
    task_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="a control: so much of the budget is the tasks' own training text, without labels"
    )
    task_text: tuple[TaskSettings, ...] = Field((), description="whose, for `task_share`")
    seed: int = Field(0, description="of the choice of documents and of the blocks with two segments")

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        if (self.task_share > 0) != bool(self.task_text):
            raise ValueError("text.task_share and text.task_text belong together; give both or neither")
        if self.least > self.length // 2:
            raise ValueError(
                f"text.least={self.least} is more than half of text.length={self.length}; lower the first or raise the"
                " second"
            )
        if self.long_length is not None and self.long_length <= self.length:
            raise ValueError(
                f"text.long_length={self.long_length} is no more than text.length={self.length}; raise or remove it"
            )
        return self


class OwnSteps(Settings):
    """What a student's training has for itself; what is absent is as in `distill.optim`, and so is all else."""

    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="the highest, after the warm-up")
    weight_decay: Weight | None = Field(None, description="of matrices; biases and layer norms have none")
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="share of the updates")
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="largest global gradient norm")

    def over(self, shared: Optim) -> Optim:
        return shared.model_copy(update=self.model_dump(exclude_none=True))


class NamedStudent(Shape):
    """One of the students that listen to the same teacher, whose tokenizer they share."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="its folder")
    architecture: Literal["modernbert", "bert"] = "bert"
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="while it learns, everywhere")
    embeddings: Literal["random", "projected"] = Field(
        "random", description="`projected`: the teacher's word embeddings, by principal components"
    )
    optim: OwnSteps = OwnSteps()


class RelationSettings(Settings):
    """What students imitate: relations among queries, keys and values of one layer (MiniLMv2, section 3.1)."""

    relations: Annotated[tuple[Pair, ...], Field(min_length=1)] = Field(
        ("qq", "kk", "vv"), description="pairs of projections, weights 1"
    )
    teacher_layer: Positive | None = Field(
        None,
        description="whose relations are taught, from 1. If absent, the last; of 24, the 21st of a BERT and the 19th of"
        " a RoBERTa (MiniLMv2)",
    )
    relation_heads: Positive | None = Field(None, description="must divide both widths; chosen if absent")
    norm: Literal["token", "flat", "paddle"] = Field(
        "token", description="what weighs the same: each text (`token`), each token (`flat`), or as in PaddleNLP"
    )
    sample_relations: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the loss that compares the texts of a batch with each other, position by position"
    )
    tail: Literal["leave", "aux", "init"] = Field(
        "leave",
        description="what follows the last projections learns nothing: leave it as drawn, teach through one more layer"
        " that is dropped afterwards, or take it from the teacher (equal widths)",
    )
    optim: Optim = Optim(learning_rate=6e-4, batch_tokens=8192, warmup=0.1)

    @model_validator(mode="after")
    def last_weights_stay(self) -> Self:
        if self.optim.keep == "best":
            raise ValueError(
                "distill.optim.keep=best needs rows to judge by, and general text has none; set it to last"
            )
        if self.optim.tokens is None and self.optim.epochs == 0:
            raise ValueError("distill.optim.epochs=0 distils no student; raise it, or set distill.optim.tokens")
        return self


def refuse_repeated(where: str, settings: Settings, *keys: str) -> None:
    """Raise ValueError where a list names something twice: it would be trained, and count, twice."""
    for key in keys:
        found = getattr(settings, key) or ()
        named = [one.name if isinstance(one, TaskSettings) else one for one in found]
        if twice := [one for one in named if named.count(one) > 1]:
            raise ValueError(f"{where}.{key} names {twice[0]!r} twice; name everything once")


class FewShotSettings(Settings):
    """The same with few examples a class, in draws that everybody gets alike, and as many to select by."""

    tasks: tuple[TaskSettings, ...] = Field((), description="classification or regression")
    shots: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field((16, 32), description="examples a class")
    draws: Annotated[int, Field(ge=1, le=5)] = Field(5, description="of the five there are")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="of the fine-tunings of a draw; `fine_tune.seeds` if absent"
    )
    learning_rates: Rates = (1e-4, 3e-4)
    epochs: Rates = (20.0,)

    @model_validator(mode="after")
    def nothing_twice(self) -> Self:
        refuse_repeated("fine_tune.few", self, "tasks", "shots", "seeds", "learning_rates", "epochs")
        return self


class FineTuneSettings(Settings):
    """How students, and the teacher beside them, are fine-tuned and judged: a fresh head, all weights, no scaling."""

    tasks: tuple[TaskSettings, ...] = Field((), description="whose reported rows are scored")
    learning_rates: Rates = (3e-5, 1e-4, 3e-4)
    epochs: Rates = (3.0,)
    optim: Optim = Optim(batch_size=32)
    select: Literal["honest", "dev-max"] = Field(
        "honest",
        description="rate and epochs are chosen on rows cut from train, or by the best reported score (to compare with"
        " published numbers that were)",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = Field((0, 1, 2), description="the first one selects")
    rows: Positive | None = Field(None, description="at most so many training rows, drawn once for everybody")
    test_rows: Positive | None = Field(None, description="at most so many reported rows, likewise")
    few: FewShotSettings = FewShotSettings()
    teacher: bool = Field(True, description="fine-tune the teacher too")
    teacher_seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = Field(
        None, description="of the teacher's fine-tunings on all rows, which cost most; `seeds` if absent"
    )
    teacher_learning_rates: Rates | None = Field(
        None,
        description="the teacher's, of all rows and of few: a pretrained model needs lower ones than a small student",
    )
    teacher_tasks: tuple[TaskSettings, ...] = Field(
        (), description="fine-tune the teacher alone on these as well, such as all that another teacher learned at once"
    )
    known: tuple[TaskSettings, ...] | None = Field(
        None, description="what counts as trained on, where roles are told; what this run learns if absent"
    )

    @model_validator(mode="after")
    def nothing_twice(self) -> Self:
        keys = "tasks", "teacher_tasks", "seeds", "teacher_seeds", "learning_rates", "teacher_learning_rates", "epochs"
        refuse_repeated("fine_tune", self, *keys)
        return self

    @model_validator(mode="after")
    def trials_decide(self) -> Self:
        """What every trial has of its own is not set for all."""
        if self.optim.keep == "best":
            raise ValueError(
                "fine_tune.optim.keep=best would choose an epoch on rows that the last training learns from; set it to"
                " last, and name several fine_tune.epochs to choose among"
            )
        for key, instead in (("learning_rate", "learning_rates"), ("epochs", "epochs")):
            value = getattr(self.optim, key)
            if value != Optim.model_fields[key].default:
                raise ValueError(f"fine_tune.optim.{key}={value} has no effect; set fine_tune.{instead}")
        return self


class AgnosticRecipe(Settings):
    """One task-agnostic run: a teacher of many tasks or none, general text, and students of any number and shape."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="its folder below `runs/`")
    teacher: SharedTeacherSettings
    text: TextSettings
    students: Annotated[tuple[NamedStudent, ...], Field(min_length=1)]
    distill: RelationSettings = RelationSettings()
    students_learn: MultiTaskSettings | None = Field(
        None, description="a control: what each student learns after distillation, as a teacher would; its heads go"
    )
    fine_tune: FineTuneSettings = FineTuneSettings()
    manifest: str | None = Field(None, description="a YAML file with tasks of your own; elsewhere their name is enough")
    seed: int = Field(0, description="of the students' starts, batches and dropout")

    @model_validator(mode="after")
    def names_differ(self) -> Self:
        names = [student.name for student in self.students]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"students: {twice[0]!r} is the name of two; each has a folder of its own")
        if taken := sorted({*names} & RESERVED):
            raise ValueError(f"students: {taken[0]!r} is the name of something else in a run; choose another")
        return self

    @model_validator(mode="after")
    def text_fills_a_batch(self) -> Self:
        share = min(self.text.long_share, 1 - self.text.long_share) if self.text.long_length else 1.0
        batch, smallest = self.distill.optim.batch_tokens, round(self.text.budget_tokens * share)
        if batch is not None and smallest < batch:
            raise ValueError(
                f"text.budget_tokens={self.text.budget_tokens} gives {smallest} word-pieces of blocks of one length,"
                f" fewer than a batch, distill.optim.batch_tokens={batch}; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def tasks_can_be_learned(self) -> Self:
        if self.students_learn is not None and not self.students_learn.tasks:
            raise ValueError("students_learn.tasks is empty; name what the students learn, or remove students_learn")
        for key, settings in (("teacher", self.teacher), ("students_learn", self.students_learn)):
            names = [task.name for task in settings.tasks] if settings else []
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key}.tasks names {twice[0]!r} twice; a task has one head")
            if settings and settings.mixture.masked_text:
                refuse_masked_text(key, settings)
        return self


def refuse_masked_text(key: str, settings: MultiTaskSettings) -> None:
    """Raise ValueError where there is no text to hide words of, or labels are asked for too."""
    told = f"{key}.mixture.masked_text=true hides words of the tasks' texts"
    if not settings.tasks:
        raise ValueError(f"{told}, and {key}.tasks is empty; name tasks, or set it to false")
    if settings.mixture.shuffle_labels:
        raise ValueError(f"{told} and reads no labels, and {key}.mixture.shuffle_labels=true moves them; keep one")
