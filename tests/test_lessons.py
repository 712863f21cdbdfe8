"""Two stages: which texts a student reads in which order, whom it hears, and what of that is recorded and kept."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from openbook import lessons
from openbook.checkpoint import building, open_artifact, read_json
from openbook.config import UsageError
from openbook.courses import CORPUS, KD, LABELS, Course, courses, outline, reads_corpus
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher
from openbook.lessons import check_lessons, teacher_for
from openbook.readings import corpus_examples, tokens_of
from openbook.recipe import load_recipe
from openbook.recordings import Recording, bytes_of, check_space, merged, recordings
from openbook.stages import distill, record_answers, train_teacher
from openbook.training import train
from openbook.types import Batch, Passage
from openbook.workspace import Run

GENERAL = "distill.general={budget_tokens: 300, terms: {hidden: 1}, optim: {epochs: 1, batch_size: 16}}"
HEADS = "student.heads=4"  # as many as the teacher has
TINYBERT = (
    HEADS,
    "student.dropout=0.1",
    "distill.corpus={terms: {hidden: 1, attention: 1}, optim: {tokens: 400, batch_tokens: 64, checkpoint_every: 2}}",
    "distill.task={terms: {soft_labels: 1}, optim: {epochs: 2, batch_size: 32, keep: best, checkpoint_every: 2}}",
)
COLUMNS = ("id", "text", "document", "text_pair", "tokens", "rank", "anchors")
SCHEMA = pa.schema([(name, pa.int64() if name in ("tokens", "rank", "anchors") else pa.string()) for name in COLUMNS])


def sentence(number: int, words: int = 8) -> Passage:
    return Passage(f"bank/{number}", " ".join(["the film was"[: 3 + number % 8], *"abcdefghijkl"[:words]]), "d")


def write_corpus(folder: Path, **files: list[Passage]) -> None:
    """A corpus as the stage before leaves it."""
    with building(
        folder / "corpus", {"files": {name: [asdict(one) for one in rows] for name, rows in files.items()}}
    ) as to:
        for name, rows in files.items():
            pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), to / f"{name}.parquet")


@pytest.fixture(scope="module")
def school(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a teacher and a corpus."""
    folder = tmp_path_factory.mktemp("school")
    run = Run(load_recipe(world / "recipe.yaml", ["teacher.optim.epochs=1"]), folder)
    with building(folder / "teacher", {"of": "the test"}) as to:
        train_teacher.build(run, to)
    write_corpus(
        folder,
        passages=[sentence(number, 4 + number % 8) for number in range(40)],
        general=[sentence(number, 4 + number % 5) for number in range(100, 130)],
    )
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Overrides that make the task one of pairs."""
    file = tmp_path_factory.mktemp("pairs") / "rows.csv"
    rows = [f"the film {n},a plot {'was great' if n % 2 else 'was bad'},{('no', 'yes')[n % 2]}" for n in range(60)]
    file.write_text("\n".join(["one,two,label", *rows]))
    return (
        f"task={{name: pairs, text: one, text_pair: two, label: label, max_length: 24, train: {{path: {file}}},"
        f" test: {{path: {file}}}}}"
    )


def record(run: Run) -> None:
    with building(run.folder / "teacher_outputs", record_answers.inputs(run)) as folder:
        record_answers.build(run, folder)


def taught(run: Run, student: str = CORPUS, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a student after all its courses; the answers it hears are recorded first."""
    if open_artifact(run.folder / "teacher_outputs") is None:
        record(run)
    distill.teach(run.recipe, run.folder, student, seed, lambda done: None)
    return load_file(distill.folder_of(run, student, seed) / "model.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def plan(run: Run, student: str) -> list[tuple[str, str, str]]:
    return [(course.name, course.texts, course.teacher) for course in outline(run.recipe, student)]


# The order of the courses


def test_the_students_differ_in_one_thing_each(attend: Callable[..., Run]) -> None:
    last = ("task", "task", "fine_tuned")
    assert plan(attend(), CORPUS) == [("corpus", "corpus", "fine_tuned"), last]
    assert plan(attend(), KD) == [("task text", "task", "fine_tuned"), last]
    assert plan(attend(), LABELS) == [("labels", "task", "fine_tuned")]
    run = attend(GENERAL, "distill.corpus_teacher=pretrained")
    general = ("general", "general", "pretrained")
    assert plan(run, CORPUS) == [general, ("corpus", "corpus", "pretrained"), last]
    assert plan(run, KD) == [general, ("task text", "task", "pretrained"), last]
    assert plan(run, LABELS) == [("labels", "task", "fine_tuned")]
    fine_tuned = GENERAL.replace("{budget", "{teacher: fine_tuned, budget")
    assert plan(attend(fine_tuned), CORPUS)[0] == ("general", "general", "fine_tuned")


def test_no_epoch_is_no_course_even_where_tokens_are_given(attend: Callable[..., Run]) -> None:
    run = attend("distill.corpus.optim={epochs: 0, tokens: 5000}")
    assert plan(run, CORPUS) == plan(run, KD) == [("task", "task", "fine_tuned")]
    assert not reads_corpus(run.recipe)
    assert reads_corpus(attend().recipe)
    assert reads_corpus(attend("distill.corpus.optim.epochs=0", GENERAL).recipe)


def test_the_rival_reads_as_much_of_the_task_as_the_other_of_the_corpus(attend: Callable[..., Run]) -> None:
    run = attend()
    corpus = tokens_of(run, "corpus", run.tokenizer)
    first = courses(run, KD)[0].training.optim
    assert first.tokens == 3 * corpus.tokens.sum()
    assert first.model_copy(update={"tokens": None}) == run.recipe.distill.corpus.optim
    for student in (CORPUS, KD):  # both end within a batch of it
        course = courses(run, student)[0]
        batches = distill.plan_of(run, course, 0)
        read = sum(int(batch.attention_mask.sum()) - 2 * len(batch.ids) for batch in batches)  # type: ignore[attr-defined]
        assert first.tokens <= read < first.tokens + 16 * 22


def test_equal_tokens_are_equal_steps_for_both(attend: Callable[..., Run]) -> None:
    run = attend("distill.corpus.optim={tokens: 6000, batch_tokens: 64}")
    steps = [len(distill.plan_of(run, courses(run, student)[0], 0)) for student in (CORPUS, KD)]
    assert courses(run, KD)[0].training == run.recipe.distill.corpus
    assert steps[0] == pytest.approx(6000 / 64, rel=0.15)
    assert courses(run, KD)[0].training.optim.tokens == 6000


# What they read


def texts(run: Run, which: Any = "corpus") -> list[tuple[str, str, str | None]]:
    return [(example.id, example.text, example.text_pair) for example in corpus_examples(run, which)]


def test_a_single_task_reads_passages_as_they_are(attend: Callable[..., Run]) -> None:
    run = attend()
    assert texts(run)[:2] == [("bank/0", "the a b c d", None), ("bank/1", "the  a b c d e", None)]
    assert [name for name, _, _ in texts(run, "general")] == [f"bank/{number}" for number in range(100, 130)]
    assert tokens_of(run, "general", run.tokenizer).ids.to_pylist() == [name for name, _, _ in texts(run, "general")]


def test_a_pair_task_reads_sentences_two_by_two(attend: Callable[..., Run], pairs: str) -> None:
    run = attend(pairs)
    ready = Passage("row/1", "one text", "task", "another text")
    write_corpus(run.folder, passages=[*(sentence(number, 4) for number in range(7)), ready])
    read = texts(run)
    assert read[0] == ("row/1", "one text", "another text")
    assert [pair is None for _, _, pair in read] == [False, False, False, False, True]
    names = [part for name, _, _ in read[1:] for part in name.split("+")]
    assert sorted(names) == [f"bank/{number}" for number in range(7)]
    assert names != sorted(names)
    by_name = {f"bank/{number}": sentence(number, 4).text for number in range(7)}
    assert all(by_name[name.split("+")[0]] == text for name, text, _ in read[1:])
    assert all(by_name[name.split("+")[1]] == pair for name, _, pair in read[1:] if pair is not None)
    assert texts(attend(pairs)) == read
    assert texts(attend(pairs, "corpus.seed=1")) != read
    tokenised = tokens_of(run, "corpus", run.tokenizer)
    assert tokenised.special.tolist() == [3, 3, 3, 3, 2]


@pytest.mark.parametrize("form", ["auto", "single"])
def test_a_sentence_has_half_the_room_of_a_pair(attend: Callable[..., Run], pairs: str, form: str) -> None:
    """24 word-pieces, three of them special: ten for each."""
    run = attend(pairs, f"corpus.form={form}")
    write_corpus(run.folder, passages=[sentence(number, 12) for number in range(3)])
    read = texts(run)
    assert [pair is None for _, _, pair in read] == ([False, True] if form == "auto" else [True] * 3)
    assert {len(run.tokenizer(text)["input_ids"]) - 2 for _, text, _ in read} == {10}
    assert all(
        sentence(number, 12).text.startswith(text) for number, (_, text, _) in enumerate(read) if form == "single"
    )
    assert tokens_of(run, "corpus", run.tokenizer).tokens.sum() == 30


def test_ready_made_forms_are_not_paired_again(attend: Callable[..., Run], pairs: str) -> None:
    run = attend(pairs, "corpus.form=packed")
    write_corpus(run.folder, passages=[sentence(0, 3), sentence(1, 3), Passage("p", "a b", "d", "c")])
    assert {(name, pair) for name, _, pair in texts(run)} == {("bank/0", None), ("bank/1", None), ("p", "c")}


def test_other_passages_are_tokenised_anew(attend: Callable[..., Run]) -> None:
    run = attend()
    before = tokens_of(run, "corpus", run.tokenizer)
    write_corpus(run.folder, passages=[sentence(number) for number in range(3)])
    assert (len(before), len(tokens_of(run, "corpus", run.tokenizer))) == (40, 3)


# What is recorded


def kept(run: Run) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {one.name: (one.hidden, one.taps) for one in recordings(run)}


def test_each_text_is_recorded_as_deep_as_its_courses_hear(attend: Callable[..., Run]) -> None:
    """The teacher has four layers, the student one: layer 4 and the embeddings."""
    shallow = "distill.task.terms={soft_labels: 1}"
    assert kept(attend()) == {"corpus": ((0, 4), ()), "task": ((0, 4), ())}
    assert kept(attend("distill.corpus.terms={soft_labels: 1}", shallow)) == {"corpus": ((), ()), "task": ((), ())}
    run = attend(*TINYBERT, GENERAL)
    assert kept(run) == {"corpus": ((0, 4), (4,)), "general-pretrained": ((0, 4), ()), "task": ((0, 4), (4,))}
    # what the rival hears in its first course is of the teacher that the corpus has, too
    run = attend(*TINYBERT, "distill.corpus_teacher=pretrained")
    deep = ((0, 4), (4,))
    assert kept(run) == {"corpus-pretrained": deep, "task": ((), ()), "task-pretrained": deep}
    assert kept(attend("distill.corpus.optim.epochs=0", shallow)) == {"task": ((), ())}


def test_relations_hear_the_live_teacher_and_the_others_their_recording(attend: Callable[..., Run]) -> None:
    run = attend("distill.corpus.terms={relations: 1}", "distill.task.terms={soft_labels: 1}")
    assert kept(run) == {"task": ((), ())}
    record(run)
    first, last = courses(run, CORPUS)
    assert isinstance(teacher_for(run, first), LiveTeacher)
    assert isinstance(teacher_for(run, last), RecordedTeacher)
    task = attend("distill.corpus.terms={soft_labels: 1}", "distill.task.terms={relations: 1}")
    assert isinstance(teacher_for(task, courses(task, CORPUS)[1]), LiveTeacher)


def test_layers_without_room_are_heard_live(attend: Callable[..., Run]) -> None:
    """Two layers of width 32 in fp16: 144 rows of 24, and 1,500 word-pieces in sentences of at least five."""
    corpus, task = 2 * 2 * 32 * (1500 + 600), 2 * 2 * 32 * 144 * 24
    assert [bytes_of(attend(), one) for one in recordings(attend())] == [corpus, task]
    for room, deep in (
        (corpus - 1, ()),
        (corpus, ("corpus",)),
        (task, ("corpus",)),
        (corpus + task, ("corpus", "task")),
    ):
        run = attend(f"teacher.record_gigabytes={room / 1e9!r}")
        assert tuple(one.name for one in recordings(run) if one.is_deep) == deep, room
        assert ("task" in deep) == (Recording("task", "fine_tuned", exact=True) not in recordings(run))
    assert kept(attend("teacher.record_hidden=false")) == {"task": ((), ())}
    mixed = attend("teacher.record_hidden=false", "distill.corpus.terms={soft_labels: 1}")
    assert kept(mixed) == {"corpus": ((), ()), "task": ((), ())}


def test_what_several_hear_is_recorded_as_finely_as_the_finest_asks_for() -> None:
    one, other = Recording("task", "fine_tuned", exact=True), Recording("task", "fine_tuned", hidden=(1,))
    assert merged([one, other]) == merged([other, one]) == [Recording("task", "fine_tuned", hidden=(1,), exact=True)]


def test_queries_and_keys_of_a_layer_take_the_room_of_two_states(attend: Callable[..., Run]) -> None:
    states, taps = Recording("task", "fine_tuned", hidden=(0, 2)), Recording("task", "fine_tuned", taps=(2,))
    assert bytes_of(attend(), taps) == bytes_of(attend(), states) > 0


def test_soft_labels_are_never_rounded_to_bf16(attend: Callable[..., Run]) -> None:
    """Bf16 moved the probabilities of a MiniLM by 0.009, its states by 0.4 %; states alone may be read in it."""
    bf16, live = "teacher.optim.precision=bf16", "teacher.record_hidden=false"
    run = attend(*TINYBERT, bf16, live)
    corpus, task = courses(run, CORPUS)
    assert [one.exact for one in recordings(attend(*TINYBERT, bf16))] == [False, True]
    record(run)
    heard = teacher_for(run, corpus)
    assert isinstance(heard, LiveTeacher)
    assert heard.uses_bf16
    assert recordings(run) == [Recording("task", "fine_tuned", exact=True)]
    assert not lessons.live_teacher(run, recordings(run)[0], ()).uses_bf16
    soft = attend(*TINYBERT, bf16, live, "distill.corpus.terms={hidden: 1, soft_labels: 1}")
    heard = teacher_for(soft, courses(soft, CORPUS)[0])
    assert isinstance(heard, LiveTeacher)
    assert not heard.uses_bf16
    exact = attend(*TINYBERT, "teacher.optim.precision=fp32", live)
    assert not teacher_for(exact, corpus).uses_bf16  # type: ignore[attr-defined]


@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_a_course_whose_layers_were_not_recorded_hears_the_live_teacher(attend: Callable[..., Run], term: str) -> None:
    run = attend(HEADS, f"distill.task.terms={{{term}: 1}}", "teacher.record_hidden=false")
    record(run)
    heard = teacher_for(run, courses(run, CORPUS)[1])
    assert isinstance(heard, LiveTeacher)
    said = heard(tokens_of(run, "task", run.tokenizer).batch([0, 1]))
    assert (len(said.hidden), list(said.relations)) == ((5, []) if term == "hidden" else (0, [4]))


@pytest.mark.parametrize("teacher", ["pretrained", "fine_tuned"])
def test_recorded_answers_are_those_of_the_live_teacher(attend: Callable[..., Run], teacher: str) -> None:
    run = attend(*TINYBERT, f"distill.corpus_teacher={teacher}")
    record(run)
    course = courses(run, CORPUS)[0]
    recorded = teacher_for(run, course)
    live = teacher_for(attend(*TINYBERT, f"distill.corpus_teacher={teacher}", "teacher.record_hidden=false"), course)
    assert (type(recorded), type(live)) == (RecordedTeacher, LiveTeacher)
    batch = tokens_of(run, "corpus", run.tokenizer).batch(range(20))
    told, said = recorded(batch), live(batch)
    real = batch.attention_mask.bool()
    for layer in (0, 4):
        torch.testing.assert_close(told.hidden[layer][real].float(), said.hidden[layer][real], rtol=1e-2, atol=2e-2)
    for left, right in zip(told.relations[4][:2], said.relations[4][:2], strict=True):
        torch.testing.assert_close(left[real].float(), right[real], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(told.logits, said.logits, rtol=0, atol=1e-4 if teacher == "fine_tuned" else 1)
    other = teacher_for(attend(*TINYBERT, "teacher.record_hidden=false"), Course("c", "corpus", course.training))(batch)
    differs = (other.hidden[4][real] - said.hidden[4][real]).abs().max()
    assert bool(differs > 0.1) == (teacher == "pretrained")


def test_a_course_reads_no_layer_that_it_does_not_hear(attend: Callable[..., Run]) -> None:
    """The rival needs layers of the task's text in its first course; the last course hears soft labels alone."""
    run = attend(*TINYBERT)
    record(run)
    batch = tokens_of(run, "task", run.tokenizer).batch([0, 1])
    first, last = (teacher_for(run, course)(batch) for course in courses(run, KD))
    assert (len(first.hidden), list(first.relations)) == (5, [4])
    assert (last.hidden, dict(last.relations), last.logits.shape) == ((), {}, (2, 2))


def test_a_full_disk_is_no_matter_when_all_is_recorded(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    free = {"bytes": 10**6}
    monkeypatch.setattr("openbook.recordings.shutil.disk_usage", lambda place: usage._replace(free=free["bytes"]))
    run = attend()
    needed = sum(bytes_of(run, one) for one in recordings(run))
    free["bytes"] = needed - 1
    with pytest.raises(UsageError, match=r"0\.0 GB free, .* may need 0\.0 GB; .*teacher\.record_hidden: false"):
        check_space(run)
    begun = run.folder / ".teacher_outputs.partial" / "task"
    begun.mkdir(parents=True)
    (begun / "hidden-0.npy").write_bytes(b"1")  # one byte is there already
    check_space(run)
    shutil.rmtree(begun.parent)
    free["bytes"] = needed
    check_space(run)
    record(run)
    free["bytes"] = 0
    check_space(run)
    with pytest.raises(UsageError, match="may need"):
        check_space(attend("student.layers=2"))


# What is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["distill.corpus_teacher=pretrained"],
            r"distill\.corpus\.terms\.soft_labels=1\.0 .* distill\.corpus_teacher=pretrained .*to 0, or .* fine_tuned",
        ),
        (
            ["distill.corpus_teacher=pretrained", "distill.corpus.terms={hidden: 1, neighbours: 2}"],
            r"distill\.corpus\.terms\.neighbours=2\.0 .* distill\.corpus_teacher=pretrained",
        ),
        (
            [GENERAL.replace("{hidden: 1}", "{hidden: 1, embedding: 1}")],
            r"distill\.general\.terms\.embedding=1\.0 .* distill\.general\.teacher=pretrained",
        ),
        ([GENERAL.replace("{hidden: 1}", "{gold: 1}")], r"distill\.general\.terms\.gold=1\.0: .* no gold labels"),
        ([GENERAL.replace("hidden", "attention")], r"distill\.general: terms\.attention needs equal head counts"),
        (["knowledge_base.projection.optim.keep=best"], r"knowledge_base\.projection\.optim\.keep=best"),
    ],
)
def test_what_a_teacher_cannot_say_is_refused_by_its_key(
    attend: Callable[..., Run], overrides: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        check_lessons(attend(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [GENERAL],
        [*TINYBERT, "distill.corpus_teacher=pretrained"],
        ["distill.corpus_teacher=pretrained", "distill.corpus.terms={relations: 1}"],
        [GENERAL.replace("{budget", "{teacher: fine_tuned, budget").replace("{hidden: 1}", "{soft_labels: 1}")],
        ["distill.corpus_teacher=pretrained", "distill.corpus.optim.epochs=0"],
    ],
)
def test_what_it_can_say_passes(attend: Callable[..., Run], overrides: list[str]) -> None:
    check_lessons(attend(*overrides))


# The courses taken


def test_all_courses_leave_their_mark(attend: Callable[..., Run]) -> None:
    """General text from the pretrained teacher, the corpus, the task; what the first learned goes on to the next."""
    run = attend(*TINYBERT, GENERAL)
    start = distill.fresh_student(run, 0).state_dict()
    weights = taught(run)
    folder = distill.folder_of(run, CORPUS, 0)
    history = read_json(folder / "history.json")
    stages = list(dict.fromkeys(row["stage"] for row in history))
    assert stages == ["general", "corpus", "task"]
    parts = {stage: {*next(row for row in history if row["stage"] == stage)} for stage in stages}
    assert {"hidden"} <= parts["general"] >= {"loss"}
    assert {"hidden", "attention"} <= parts["corpus"]
    assert {"soft_labels"} <= parts["task"]
    last = {stage: [row["step"] for row in history if row["stage"] == stage][-1] for stage in stages}
    assert sum(last.values()) == distill.updates_of(run, CORPUS)
    unmoved = [name for name, value in weights.items() if torch.equal(value, start[f"model.{name}"])]
    assert unmoved == []
    first = distill.after(run, courses(run, CORPUS)[:1], 0, lambda done: None)
    second = distill.after(run, courses(run, CORPUS)[:2], 0, lambda done: None)
    assert [row["stage"] for row in first.history] == ["general"] * len(first.history)
    assert first.projections.keys() == second.projections.keys() != set()
    moved = {name: (value - second.projections[name]).abs().max() for name, value in first.projections.items()}
    assert all(0 < float(distance) < 0.3 for distance in moved.values()), moved


def test_projections_go_from_course_to_course(attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = attend(*TINYBERT, GENERAL)
    record(run)
    begun: list[dict[str, torch.Tensor]] = []

    def watched(loss_of: Any, lesson: Any, *rest: Any, **options: Any) -> Any:
        begun.append({name: value.clone() for name, value in lesson.objective.projections.state_dict().items()})
        return train(loss_of, lesson, *rest, **options)

    monkeypatch.setattr(distill, "train", watched)
    taught(run)
    first = distill.after(run, courses(run, CORPUS)[:1], 0, lambda done: None)
    assert len(begun) == 3
    assert_equal(begun[1], first.projections)


def test_a_student_without_corpus_needs_none(attend: Callable[..., Run]) -> None:
    run = attend(
        *(f"distill.{name}.optim.epochs={epochs}" for name, epochs in (("corpus", 0), ("task", 1), ("labels", 1)))
    )
    shutil.rmtree(run.folder / "corpus")
    record(run)
    assert sorted(path.name for path in (run.folder / "teacher_outputs").iterdir() if path.is_dir()) == ["task"]
    for student in (CORPUS, KD, LABELS):
        taught(run, student)
    assert not (run.folder / "lessons").exists()
    left, right = (load_file(distill.folder_of(run, one, 0) / "model.safetensors") for one in (CORPUS, KD))
    assert_equal(left, right)
    assert "corpus" not in distill.student_inputs(run, CORPUS, 0)


def test_the_best_weights_of_the_last_course_ship(attend: Callable[..., Run]) -> None:
    run = attend(*TINYBERT, "distill.task.optim.epochs=4")
    taught(run)
    folder = distill.folder_of(run, CORPUS, 0)
    curve = [row["holdout"] for row in read_json(folder / "history.json") if "holdout" in row]
    assert len(curve) == 4
    assert read_json(folder / "scores.json")["holdout"] == max(curve)


def lessons_in(run: Run) -> dict[str, int]:
    return {
        path.name: path.stat().st_ino for path in (run.folder / "lessons").iterdir() if not path.name.startswith(".")
    }


def test_other_last_courses_share_the_first_stage(attend: Callable[..., Run]) -> None:
    run = attend(*TINYBERT, GENERAL)
    weights = taught(run)
    before = lessons_in(run)
    assert len(before) == 2
    other = attend(*TINYBERT, GENERAL, "distill.task.optim.learning_rate=0.004")
    assert not torch.equal(taught(other)["classifier.weight"], weights["classifier.weight"])
    assert lessons_in(other) == before
    assert_equal(taught(run), weights)
    for changed in ("corpus.optim.learning_rate=0.004", "corpus.optim.tokens=500"):
        other = attend(*TINYBERT, GENERAL, f"distill.{changed}")
        distill.stage_one(other, CORPUS, 0)
        assert len(lessons_in(other)) == len(before) + 1  # the general course is still the same
        before = lessons_in(other)
    distill.stage_one(run, CORPUS, 1)
    assert len(lessons_in(run)) == len(before) + 2
    before = lessons_in(run)
    distill.stage_one(run, KD, 1)
    assert len(lessons_in(run)) == len(before) + 1  # which shares the general course


def test_another_corpus_makes_its_course_stale_and_not_the_one_before(attend: Callable[..., Run]) -> None:
    run = attend(*TINYBERT, GENERAL)
    record(run)
    distill.stage_one(run, CORPUS, 0)
    before = lessons_in(run)
    rows = [Passage(**row) for row in pq.read_table(run.folder / "corpus" / "general.parquet").to_pylist()]
    write_corpus(run.folder, passages=[sentence(number, 5) for number in range(30)], general=rows)
    record(run)
    distill.stage_one(run, CORPUS, 0)
    assert len(lessons_in(run)) == 3
    assert before.items() <= lessons_in(run).items()


@pytest.mark.parametrize("course", ["general", "corpus", "task"])
def test_a_killed_student_ends_as_one_that_was_not(
    attend: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, course: str
) -> None:
    overrides = [*TINYBERT, GENERAL.replace("epochs: 1", "epochs: 3, checkpoint_every: 2")]
    run = attend(*overrides)
    weights = taught(run)
    history = read_json(distill.folder_of(run, CORPUS, 0) / "history.json")
    shutil.rmtree(run.folder / "students")
    shutil.rmtree(run.folder / "lessons")
    plans = {one.name: one for one in courses(run, CORPUS)}
    calls = {"left": 3}
    hear = teacher_for

    def dying(run: Run, course_now: Course) -> Any:
        teacher = hear(run, course_now)

        def heard(batch: Batch) -> Any:
            if course_now.name == course:
                calls["left"] -= 1
                if calls["left"] < 0:
                    raise KeyboardInterrupt
            return teacher(batch)

        return heard

    with monkeypatch.context() as patch:
        patch.setattr(distill, "teacher_for", dying)
        with pytest.raises(KeyboardInterrupt):
            taught(run)
    assert not distill.folder_of(run, CORPUS, 0).exists()
    done = {"general": 0, "corpus": 1, "task": 2}[course]
    assert len(lessons_in(run)) == done
    told: list[int] = []
    distill.teach(run.recipe, run.folder, CORPUS, 0, told.append)
    before = sum(distill.updates_in(run, plans[name]) for name in list(plans)[:done])
    assert told == list(range(before + 3, distill.updates_of(run, CORPUS) + 1))  # it goes on after the last checkpoint
    assert_equal(load_file(distill.folder_of(run, CORPUS, 0) / "model.safetensors"), weights)
    assert read_json(distill.folder_of(run, CORPUS, 0) / "history.json") == history


def test_two_at_once_take_a_course_one_after_the_other(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def enter() -> None:
        with distill.one_at_a_time(tmp_path / "lessons" / "x"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_another_metric_is_another_score(attend: Callable[..., Run]) -> None:
    accuracy, f1 = attend(), attend("task.metric=f1")
    assert distill.student_inputs(accuracy, LABELS, 0) != distill.student_inputs(f1, LABELS, 0)
    assert distill.inputs(accuracy) != distill.inputs(f1)
