"""Teacher answers -> knowledge base; how far each student trusts it is tuned on held-out training data."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.answers import outputs_of
from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import fingerprint, read_json, write_json
from openbook.config import UsageError
from openbook.console import console
from openbook.courses import CORPUS
from openbook.cross_fit import out_of_fold_logits
from openbook.distillation.teachers import RecordedTeacher
from openbook.inference import answers_of
from openbook.keys import keys_of, queries_in, values_of
from openbook.knowledge_base import editing, store
from openbook.knowledge_base.answering import NO_CLASS
from openbook.knowledge_base.interpolate import TRAIN, scaled
from openbook.knowledge_base.rules import RULES, Rules
from openbook.knowledge_base.search import search_of
from openbook.knowledge_base.shelf import build_index
from openbook.knowledge_base.tuning import CORPUS as FROM_CORPUS
from openbook.knowledge_base.tuning import OMEGAS, Choices, HeldOut, Tuned, collect, tune
from openbook.lessons import gold_values, joined, key_parts, key_space, training_base
from openbook.metrics import METRICS
from openbook.models.encoder import load_finished
from openbook.readings import corpus_examples
from openbook.recordings import outputs_folder
from openbook.retrieval.passages import LeakGuard, key
from openbook.student_keys import queries, rekeyed
from openbook.types import Example, KnowledgeBase
from openbook.workspace import Run

LEAK_NGRAM = 13  # words in a row that no entry of the corpus shares with an evaluation text
LONE = ("single", "packed")  # forms of a corpus that have no pairs


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.knowledge_base.model_dump(mode="json", exclude={"projection"})
    return {"task": run.task_digest, "settings": settings}


def check(run: Run) -> None:
    """What is to be kept can be had of this task and teacher."""
    settings, corpus = run.recipe.knowledge_base, run.recipe.corpus
    if settings.values == "out_of_fold" and run.recipe.teacher.fine_tuned:
        raise UsageError(
            "knowledge_base.values=out_of_fold trains the teacher anew without some rows, and teacher.fine_tuned says"
            " that it was trained elsewhere; set values to teacher or gold"
        )
    if settings.skip != "none" and run.kind in NO_CLASS:
        raise UsageError(
            f"knowledge_base.skip={settings.skip}: {run.task.name} is {NO_CLASS[run.kind]}, whose student has no"
            " confidence to skip by; set it to none"
        )
    if settings.corpus_min_confidence and run.kind in NO_CLASS:
        raise UsageError(
            f"knowledge_base.corpus_min_confidence={settings.corpus_min_confidence}: {run.task.name} is"
            f" {NO_CLASS[run.kind]}, whose teacher has no confidence; set it to 0"
        )
    if settings.texts != "task" and run.task.pair and corpus.form in LONE:
        raise UsageError(
            f"knowledge_base.texts={settings.texts}: {run.task.name} has pairs of texts, and corpus.form={corpus.form}"
            " makes none; set corpus.form to auto, or texts to task"
        )


def keep_edits(run: Run) -> None:
    """Set aside a book that was edited since it was built: to build it anew would lose the edits."""
    folder = run.folder / "knowledge_base"
    try:
        edits = len(editing.changes(folder))
    except UsageError:  # there is none, or none that can be read
        return
    if edits:
        kept = folder.with_name(f"knowledge_base-edited-{datetime.now():%Y%m%d-%H%M%S}")
        shutil.copytree(folder, kept)
        console.print(
            f"{'':15} the book had {edits} edits, which the new one lacks; it is kept in {kept}", markup=False
        )


def build(run: Run, folder: Path) -> None:
    """One book ships: how much its corpus counts is chosen with the student that ships, the rest with each student."""
    keep_edits(run)
    base, left_out = filled(run)
    shipped = read_json(run.folder / "student" / "selection.json")["seed"]
    omegas = OMEGAS if run.recipe.knowledge_base.texts == "both" else (1.0,)
    tuned = {shipped: tuned_for(run, base_for(run, base, shipped), shipped, omegas)}
    base = scaled(base, FROM_CORPUS, tuned[shipped].omega)
    tuned |= {seed: tuned_for(run, base_for(run, base, seed), seed) for seed in run.recipe.seeds if seed != shipped}
    settings = {
        "retrieval": tuned[shipped].retrieval.to_manifest(),
        "tuned_on": "held-out training rows",
        RULES: rules_of(run).to_manifest(),
    }
    manifest = {**described(run, base), "omega": tuned[shipped].omega, "left_out": left_out, **settings}
    store.save(base_for(run, replace(base, manifest=manifest), shipped), folder)
    build_index(folder)
    write_json(folder / "tuning.json", {str(seed): tuned[seed].report() for seed in run.recipe.seeds})


def base_for(run: Run, base: KnowledgeBase, seed: int) -> KnowledgeBase:
    """The same entries as the student of this seed finds them."""
    if run.recipe.knowledge_base.keys == "teacher":
        return base
    return rekeyed(base, TorchBackend.load(run.folder / "students" / CORPUS / f"seed-{seed}"))


def filled(run: Run) -> tuple[KnowledgeBase, dict[str, int]]:
    """What the recipe wants kept (specification, 2.2 and 2.11), and how many texts are left out, by reason."""
    wanted = run.recipe.knowledge_base.texts
    if wanted == "task":
        return of_task(run), {}
    found, left_out = of_corpus(run)
    return (found if wanted == "corpus" else both(of_task(run), found)), left_out


def both(one: KnowledgeBase, two: KnowledgeBase) -> KnowledgeBase:
    return KnowledgeBase(
        keys=np.concatenate([one.keys, two.keys]),
        values=np.concatenate([one.values, two.values]),
        ids=one.ids + two.ids,
        texts=one.texts + two.texts,
        manifest={},
        origins=one.origins + two.origins,
    )


def of_task(run: Run) -> KnowledgeBase:
    """The training rows, with values from the source that the recipe names."""
    settings = run.recipe.knowledge_base
    base = training_base(run, outputs_folder(run), settings.value_temperature)
    base = replace(base, origins=(TRAIN,) * len(base.ids))
    if settings.values == "gold":
        return replace(base, values=gold_values(run))
    if settings.values == "out_of_fold":
        return replace(base, values=values_of(run.kind, out_of_fold_logits(run), settings.value_temperature))
    return base


def of_corpus(run: Run) -> tuple[KnowledgeBase, dict[str, int]]:
    """The corpus with the teacher's answers to it, and how many of its texts are left out, by reason.

    It has the task's input form: pairs, for a task of pairs. Its anchors are training rows that no held-out or
    evaluation text equals, and neither such a text nor one that shares a run of words with one may enter.
    """
    settings = run.recipe.knowledge_base
    recorded = RecordedTeacher(outputs_folder(run) / "corpus", (), ())
    examples = corpus_examples(run)
    rows = recorded.rows_of([example.id for example in examples])
    logits = recorded.logits[rows]
    reasons = reasons_against(run, examples, values_of(run.kind, logits))
    kept = np.array([not reason for reason in reasons])
    if not kept.any():
        raise UsageError(
            f"knowledge_base.texts={settings.texts}: none of the corpus's {len(kept)} texts may be kept"
            f" ({counted(reasons)}); lower knowledge_base.corpus_min_confidence, enlarge the corpus, or set it to task"
        )
    chosen = [example for example, reason in zip(examples, reasons, strict=True) if not reason]
    base = KnowledgeBase(
        keys=keys_of(outputs_folder(run), recorded.embedding[rows[kept]]),
        values=values_of(run.kind, logits[kept], settings.value_temperature),
        ids=tuple(example.id for example in chosen),
        texts=tuple(joined(example) for example in chosen),
        manifest={},
        origins=(FROM_CORPUS,) * len(chosen),
    )
    return base, counted(reasons)


def reasons_against(run: Run, examples: Sequence[Example], answers: NDArray[Any]) -> list[str]:
    """Why each text is not to be an entry, given the teacher's answers (n, C); empty for those that are."""
    guard = LeakGuard(run.evaluation_texts, LEAK_NGRAM)
    own = {key(joined(row)) for row in run.task.train}
    parts = [[one for one in (example.text, example.text_pair) if one is not None] for example in examples]
    least = run.recipe.knowledge_base.corpus_min_confidence
    return [
        "no_pair" if run.task.pair and len(texts) < 2
        else "evaluation_text" if any(map(guard.blocks, texts))
        else "training_text" if key(joined(example)) in own
        else "unsure" if least and answer.max() < least
        else ""
        for example, texts, answer in zip(examples, parts, answers, strict=True)
    ]  # fmt: skip


def counted(reasons: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(filter(None, reasons)).items()))


def described(run: Run, base: KnowledgeBase) -> dict[str, Any]:
    """What the manifest says of the entries' making; the store adds what it can count itself."""
    settings = run.recipe.knowledge_base
    texts = [[id, fingerprint(text)] for id, text in sorted(zip(base.ids, base.texts, strict=True))]
    return {
        "kind": run.kind,
        "labels": run.task.labels,
        "key_space": key_space(run),
        "made_from": key_parts(run),
        "value_source": settings.values,
        "value_temperature": settings.value_temperature,
        "data": fingerprint(texts),
        "keyed_by": "teacher",
        "pair": run.task.pair,
    }


def rules_of(run: Run) -> Rules:
    """What whoever tunes the finished book again has to keep to."""
    settings = run.recipe.knowledge_base
    return Rules.of(run.task.metric, settings.mode, settings.skip, map(joined, run.task.test))


def tuned_for(run: Run, base: KnowledgeBase, seed: int, omegas: Sequence[float] = (1.0,)) -> Tuned:
    """How one student retrieves, chosen on the held-out rows; `omegas` are how often the corpus may count."""
    settings, rows = run.recipe.knowledge_base, run.task.holdout
    folder = run.folder / "students" / CORPUS / f"seed-{seed}"
    heard = answers_of(load_finished(str(folder)), run.tokens("holdout", rows, run.tokenizer))
    held_out = HeldOut(tuple(row.id for row in rows), tuple(joined(row) for row in rows), heard.labels)
    asked = queries(base, heard.embedding, queries_in(folder))
    caches = collect(held_out, outputs_of(heard, run.kind), asked, base, search_of)
    choices = Choices(modes=(settings.mode,), skips=(settings.skip,))
    metric, reported = METRICS[run.task.metric].function, [row.id for row in run.task.test]
    return tune({omega: caches[omega] for omega in caches if omega in omegas}, metric, run.kind, reported, choices)
