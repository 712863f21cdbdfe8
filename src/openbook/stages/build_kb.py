"""Teacher answers -> knowledge base; how far each student trusts it is tuned on held-out training data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.checkpoint import read_json, write_json
from openbook.distillation.teachers import RecordedTeacher
from openbook.inference import answers_of, outputs_of, probabilities_of
from openbook.knowledge_base import store
from openbook.knowledge_base.search import normalise, search
from openbook.knowledge_base.tuning import TOP_K, Tuned, check_disjoint, tune
from openbook.lessons import CORPUS, key_projection, key_space
from openbook.metrics import METRICS
from openbook.models.encoder import load_finished
from openbook.types import Example, KnowledgeBase
from openbook.workspace import Run


def inputs(run: Run) -> dict[str, Any]:
    settings = run.recipe.knowledge_base.model_dump(mode="json", exclude={"projection"})
    return {"task": run.task_digest, "settings": settings}


def build(run: Run, folder: Path) -> None:
    base = filled(run)
    check_disjoint(base, [e.id for e in run.task.holdout], [joined(e) for e in run.task.holdout])
    tuned = {seed: tuned_for(run, base, seed) for seed in run.recipe.seeds}
    shipped = read_json(run.folder / "student" / "selection.json")["seed"]
    store.save(with_settings(base, tuned[shipped]), folder)
    rows = {
        str(seed): {**asdict(result), "table": [asdict(cell) for cell in result.table]}
        for seed, result in tuned.items()
    }
    write_json(folder / "tuning.json", rows)


def filled(run: Run) -> KnowledgeBase:
    """Keys z = normalize(W h + b) and values softmax(t / T) of every training text (ReAugKD, section 2.2)."""
    examples = run.task.train
    recorded = RecordedTeacher(run.folder / "teacher_outputs" / "task")
    rows = recorded.rows_of([example.id for example in examples])
    weight, bias = (tensor.numpy().astype(np.float64) for tensor in key_projection(run))
    keys = normalise(recorded.embedding[rows].astype(np.float64) @ weight.T + bias)
    logits = recorded.logits[rows]
    softened = logits / run.recipe.knowledge_base.value_temperature
    values = logits if run.kind == "regression" else probabilities_of(softened)
    manifest = {"kind": run.kind, "labels": run.task.labels, "key_space": key_space(run)}
    return KnowledgeBase(
        keys=keys.astype(np.float32),
        values=values.astype(np.float32),
        ids=tuple(example.id for example in examples),
        texts=tuple(joined(example) for example in examples),
        manifest=manifest,
    )


def joined(example: Example) -> str:
    return example.text if example.text_pair is None else f"{example.text}\t{example.text_pair}"


def tuned_for(run: Run, base: KnowledgeBase, seed: int) -> Tuned:
    student = load_finished(str(run.folder / "students" / CORPUS / f"seed-{seed}"))
    heard = answers_of(student, run.tokens("holdout", run.task.holdout, run.tokenizer))
    hits = search(heard.embedding, base.keys, max(TOP_K))
    gold: NDArray[Any] = heard.labels
    metric = METRICS[run.task.metric].function
    return tune(outputs_of(heard, run.kind), hits, base.values, gold, metric, run.kind)


def with_settings(base: KnowledgeBase, tuned: Tuned) -> KnowledgeBase:
    retrieval = {"top_k": tuned.top_k, "temperature": tuned.temperature, "beta": tuned.beta}
    manifest = {**base.manifest, "retrieval": retrieval, "tuned_on": "held-out training rows"}
    return KnowledgeBase(base.keys, base.values, base.ids, base.texts, manifest)
