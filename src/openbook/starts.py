"""How a student starts: at random, with word embeddings that the teacher lends it, or from the teacher's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openbook.checkpoint import building, fingerprint, is_fresh, open_artifact
from openbook.console import track
from openbook.distillation.mapping import copied_layers
from openbook.lessons import blank_student
from openbook.models.encoder import Encoder, load_finished, load_pretrained
from openbook.models.student import start_from_layers, start_from_word_answers, start_from_word_embeddings
from openbook.types import Batch
from openbook.workspace import Run

AT_ONCE = 512  # words the teacher reads in one batch


def fresh_student(run: Run, seed: int) -> Encoder:
    """The start that every student of a seed shares."""
    settings, student = run.recipe.student, blank_student(run, seed)
    if settings.init == "random" and settings.embeddings == "random":
        return student
    if settings.init == "layer_copy" and settings.copy_from == "pretrained":
        teacher = load_pretrained(run.teacher_location, run.head, run.recipe.teacher.revision, seed)
    else:
        teacher = load_finished(str(run.folder / "teacher"))
    if settings.init == "layer_copy":
        start_from_layers(student, teacher, copied_layers(teacher.layers, student.layers, settings.copy_which))
    elif settings.embeddings == "projected":
        start_from_word_embeddings(student, teacher)
    else:
        answers = np.load(words_folder(run) / "answers.npy", allow_pickle=False)
        start_from_word_answers(student, teacher, torch.from_numpy(answers.astype(np.float32)))
    return student


def word_inputs(run: Run) -> dict[str, Any]:
    artifact = open_artifact(run.folder / "teacher")
    assert artifact is not None
    return {"teacher": artifact.manifest["fingerprint"]}


def words_folder(run: Run) -> Path:
    return run.folder / "words" / fingerprint(word_inputs(run))[:16]


def record_word_answers(run: Run) -> None:
    """Keep the teacher's answer to every word-piece of its vocabulary on disk, if the students start from it."""
    if run.recipe.student.embeddings != "distilled" or run.recipe.student.init != "random":
        return
    inputs, folder = word_inputs(run), words_folder(run)
    if not is_fresh(folder, inputs):
        with building(folder, inputs) as partial:
            answers = word_answers(load_finished(str(run.folder / "teacher")), run.teacher_tokenizer)
            np.save(partial / "answers.npy", answers.to(torch.float16).numpy())


def word_answers(teacher: Encoder, tokenizer: Any) -> Tensor:
    """The mean of the last hidden states of every word-piece read alone: (V, d).

    The static embeddings of model2vec (van Dongen and Tulkens, 2024), here only a start.
    """
    vocabulary = teacher.words().num_embeddings
    teacher.eval().listen(hidden=True)
    means = []
    with torch.inference_mode(), track("the teacher reads its vocabulary", vocabulary) as advance:
        for start in range(0, vocabulary, AT_ONCE):
            batch = alone(torch.arange(start, min(vocabulary, start + AT_ONCE)), tokenizer)
            means.append(teacher(batch).hidden[-1].mean(1))
            advance(start + len(means[-1]))
    return torch.cat(means)


def alone(words: Tensor, tokenizer: Any) -> Batch:
    """Each word between the tokenizer's special tokens, where it has them."""
    before, after = tokenizer.cls_token_id, tokenizer.sep_token_id
    columns = [torch.full_like(words, before)] if before is not None else []
    columns += [words]
    columns += [torch.full_like(words, after)] if after is not None else []
    ids = torch.stack(columns, dim=1)  # (B, 3)
    return Batch(tuple(map(str, words.tolist())), ids, torch.ones_like(ids), torch.zeros_like(ids))
