"""Teachers that each leave out a fold of the training rows -> what is said of every row by one that never saw it."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from openbook.checkpoint import SCRATCH, building, fingerprint, is_fresh, open_artifact
from openbook.config import Terms
from openbook.console import track
from openbook.data.batches import BatchPlan
from openbook.data.splits import normalised
from openbook.distillation.objective import Objective
from openbook.distillation.teachers import silent
from openbook.inference import answers_of
from openbook.models.encoder import load_pretrained
from openbook.recordings import widths_of
from openbook.training import Lesson, train
from openbook.types import Example
from openbook.workspace import Run


def out_of_fold_logits(run: Run) -> NDArray[np.float32]:
    """Logits (n, C) of the training rows by teachers fine-tuned without them (cross-fitting; specification, 2.2).

    Each teacher is trained as the one that teaches, and only what it says of its fold is kept, in `folds/`: a killed
    run goes on with the fold, and in it from the checkpoint, where it stopped.
    """
    count, teacher = run.recipe.knowledge_base.folds, open_artifact(run.folder / "teacher")
    assert teacher is not None
    fold_of = folds(run.task.train, count)
    told: list[NDArray[np.float32]] = []
    for fold in range(count):
        inputs = {"teacher": teacher.manifest["fingerprint"], "fold": fold, "folds": count}
        folder = run.folder / "folds" / fingerprint(inputs)[:16]
        if not is_fresh(folder, inputs):
            with building(folder, inputs) as partial:
                np.save(partial / "logits.npy", logits_of_fold(run, fold_of, fold, partial / SCRATCH / "training"))
        told.append(np.load(folder / "logits.npy", allow_pickle=False))
    logits = np.empty((len(fold_of), told[0].shape[1]), np.float32)
    for fold, said in enumerate(told):
        logits[fold_of == fold] = said
    return logits


def logits_of_fold(run: Run, fold_of: NDArray[np.int64], fold: int, scratch: Path) -> NDArray[np.float32]:
    """Fine-tune a teacher on the other folds, with the teacher's own settings, and ask it about this one."""
    settings, rows = run.recipe.teacher, list(zip(run.task.train, fold_of == fold, strict=True))
    teacher = load_pretrained(run.teacher_location, run.head, settings.revision, settings.seed)
    widths = widths_of(teacher.model.config)
    lesson = Lesson(teacher, Objective(Terms(gold=1), widths, widths, run.kind))
    learned = run.tokens("fold-train", [row for row, out in rows if not out], run.teacher_tokenizer)
    plan = BatchPlan(learned, settings.optim, settings.seed)
    with track(f"fine-tuning a teacher without fold {fold}", len(plan)) as advance:
        train(
            lambda batch: lesson(batch, silent(batch)),
            lesson, plan, settings.optim, settings.seed, Accelerator(), scratch, advance,
        )  # fmt: skip
    return answers_of(teacher, run.tokens("fold", [row for row, out in rows if out], run.teacher_tokenizer)).logits


def folds(examples: list[Example], count: int) -> NDArray[np.int64]:
    """The fold of each row (n,): equal texts share one, and every class is spread over all of them."""
    texts: dict[tuple[str, ...], list[int]] = {}
    for place, example in enumerate(examples):
        texts.setdefault(normalised(example), []).append(place)
    ordered = sorted(texts.items(), key=lambda item: (stratum_of(examples[item[1][0]]), drawn(item[0])))
    fold_of = np.empty(len(examples), np.int64)
    for turn, (_, places) in enumerate(ordered):
        fold_of[places] = turn % count
    return fold_of


def stratum_of(example: Example) -> int:
    return example.label if isinstance(example.label, int) else 0


def drawn(text: Any) -> bytes:
    """A number by chance that is the same in every run."""
    return blake2b("\n".join(text).encode(), digest_size=8).digest()
