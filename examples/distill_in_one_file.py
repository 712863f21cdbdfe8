"""All of it in one file: a teacher, what it says about some texts, a student, a loss, a loop.

After `make demo`: `OMP_WAIT_POLICY=PASSIVE .venv/bin/python examples/distill_in_one_file.py`. It teaches a student on
TREC questions from the teacher of that run. `openbook distill` does the same with a retrieved corpus, more terms,
several seeds, and resuming.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator
from torch import Tensor

from openbook.answers import outputs_of
from openbook.config import Optim, StudentSettings, TaskSettings
from openbook.console import console
from openbook.data.batches import BatchPlan, ordered, tokenise
from openbook.data.tasks import TaskData, load_task
from openbook.distillation import losses
from openbook.distillation.teachers import LiveTeacher, RecordedTeacher, record
from openbook.inference import answers_of
from openbook.metrics import agreement, score
from openbook.models.encoder import Encoder, Head, load_finished
from openbook.models.student import load_tokenizer, new_student, start_from_word_embeddings
from openbook.training import train
from openbook.types import Batch

LONGEST = 64  # word-pieces a text


def distill(teacher_folder: str, task: TaskData, shape: StudentSettings, optim: Optim, folder: Path) -> Encoder:
    """A student of the wanted shape, taught by the teacher's soft labels and the gold ones; also saved in `folder`."""
    # The teacher is an ordinary Hugging Face folder that was fine-tuned on the task.
    teacher, tokenizer = load_finished(teacher_folder), load_tokenizer(teacher_folder)
    texts = tokenise(task.train, tokenizer, LONGEST, folder / "tokens")

    # It speaks once: its answers are kept on disk by example id, and training reads them from there.
    answers, scratch = folder / "answers", folder / "scratch"
    answers.mkdir()
    scratch.mkdir()
    lengths = dict(zip(texts.ids.to_pylist(), texts.lengths.tolist(), strict=True))
    record(LiveTeacher(teacher), list(ordered(texts, batch_tokens=4096)), lengths, (), answers, scratch)
    recorded = RecordedTeacher(answers)

    # The student starts at random, but for the teacher's word embeddings, cut to its width by principal components.
    words = teacher.words().num_embeddings
    student = new_student(shape, Head(task.labels), tokenizer, words, LONGEST, seed=0)
    start_from_word_embeddings(student, teacher)

    # What is minimised. Every other method differs in this function only.
    def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        own, aim = student(batch), recorded(batch)
        soft = losses.soft_label_kl(own.logits, aim.logits, temperature=2.0)
        gold = losses.gold_labels(own.logits, batch.labels)
        return soft + gold, {"soft_labels": soft, "gold": gold}

    # The loop. With a scratch folder as its last argument it would leave checkpoints there and resume from them.
    train(loss_of, student, BatchPlan(texts, optim, seed=0), optim, 0, Accelerator())
    student.save(folder / "student", tokenizer)
    return student


def main() -> None:
    task, teacher_folder = load_task(TaskSettings(name="trec")), "runs/quickstart/teacher"
    shape, optim = StudentSettings(layers=2, hidden_size=128, heads=4), Optim(learning_rate=1e-3, epochs=3)
    with TemporaryDirectory() as folder:
        student = distill(teacher_folder, task, shape, optim, Path(folder))
        test = tokenise(task.test, load_tokenizer(teacher_folder), LONGEST, Path(folder) / "test")
        said = [answers_of(model, test) for model in (student, load_finished(teacher_folder))]
    own, aim = (outputs_of(answers, task.kind) for answers in said)
    for name, outputs in (("student", own), ("teacher", aim)):
        console.print(f"{name}: accuracy {score('accuracy', outputs, said[0].labels):.3f}")
    console.print(f"they agree on {agreement(own, aim):.3f} of the texts")


if __name__ == "__main__":
    main()
