"""Every test runs offline, on one thread, with sockets blocked. The models are tiny, random and real."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.pop("OPENBOOK_DATA", None)

import csv
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from openbook.recipe import load_recipe
from openbook.types import Batch
from openbook.workspace import Run

torch.set_num_threads(1)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
GLUE = "the a this my was seemed and in to of he she you me us them we great"
THINGS = "film movie book play song meal plot actor"
GOOD, BAD = "good great fine lovely nice superb", "bad awful poor dull weak horrid"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = tuple(
    dict.fromkeys([*f"{GLUE} {THINGS} {GOOD} {BAD}".split(), *LETTERS, *(f"##{letter}" for letter in LETTERS)])
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection to anywhere fails."""

    def refuse(self: socket.socket, address: object, *rest: object) -> None:
        raise OSError(f"this test tried to reach {address!r}; the suite runs offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


def wordpiece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A BERT tokenizer over these words."""
    rules = Tokenizer(WordPiece({word: place for place, word in enumerate((*SPECIAL, *words))}, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = Lowercase(), Whitespace()
    rules.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=rules, model_input_names=inputs, **names)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return wordpiece(WORDS)


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same words in another order: every id means something else."""
    return wordpiece(WORDS[::-1])


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as the Hub would give it: a BERT of four layers and width 32, without a head of the task."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_config(vocabulary: int, **changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
    }
    return BertConfig(vocab_size=vocabulary, **{**sizes, **changes})


@pytest.fixture
def batch() -> Batch:
    """Three rows of 7, 4 and 6 word-pieces; the second texts of the rows begin at the fourth."""
    lengths = torch.tensor([7, 4, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()  # (3, 7)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 40, mask.shape, generator=generator) * mask
    types = (torch.arange(7) >= 3).long() * mask
    return Batch(("t/0", "t/1", "t/2"), ids, mask, types, torch.tensor([0, 1, 2]))


def one_of(random: Random, words: str) -> str:
    return random.choice(words.split())


def write_rows(path: Path, count: int, seed: int) -> None:
    """Reviews whose label is plain from their words."""
    random = Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(count):
            label = ("negative", "positive")[row % 2]
            words = [one_of(random, GOOD if label == "positive" else BAD) for _ in range(2)]
            things = random.sample(THINGS.split(), 2)
            ending = f"{random.choice('abcdefgh')} {random.randint(1, 99)}"
            writer.writerow([f"the {things[0]} was {words[0]} and the {things[1]} was {words[1]} {ending}", label])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    """A folder with all that a small run reads: rows to learn, rows to report on, general text, a recipe."""
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder / "train.csv", 160, seed=0)
    write_rows(folder / "test.csv", 48, seed=1)
    random = Random(2)
    sentences = [
        f"{one_of(random, 'the a this my')} {one_of(random, THINGS)} seemed {one_of(random, f'{GOOD} {BAD}')} "
        f"to {one_of(random, 'me you us them')} in {number}"
        for number in range(500)
    ]
    (folder / "general.txt").write_text("\n".join(sentences))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, pretrained=pretrained))
    return folder


@pytest.fixture
def attend(world: Path, school: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run of the small recipe with overrides, in a copy of what the module's `school` made for all its tests."""

    def begin(*overrides: str) -> Run:
        if not (tmp_path / "run").exists():
            shutil.copytree(school, tmp_path / "run")
        return Run(load_recipe(world / "recipe.yaml", overrides), tmp_path / "run")

    return begin


RECIPE = """\
name: small
task:
  name: reviews
  text: text
  label: label
  train: {{path: {folder}/train.csv}}
  test: {{path: {folder}/test.csv}}
  max_length: 24
teacher:
  model: {pretrained}
  optim: {{learning_rate: 2.0e-3, epochs: 4, batch_size: 16, checkpoint_every: 5, precision: fp32}}
corpus:
  sources: [{{path: {folder}/general.txt}}]
  budget_tokens: 1500
  k_max: 20
student: {{architecture: bert, layers: 1, hidden_size: 32, heads: 2, embeddings: projected}}
distill:
  corpus: {{optim: {{learning_rate: 5.0e-3, epochs: 3, batch_size: 16, checkpoint_every: 5, precision: fp32}}}}
  task: {{optim: {{learning_rate: 5.0e-3, epochs: 5, batch_size: 16, checkpoint_every: 5, precision: fp32}}}}
  labels: {{optim: {{learning_rate: 5.0e-3, epochs: 5, batch_size: 16, precision: fp32}}}}
  workers: 1
evaluate: {{latency_rows: 4, throughput_rows: 8, repeats: 2, examples: 3}}
seeds: [0, 1]
"""


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory, world: Path, pretrained: Path) -> Path:
    folder = tmp_path_factory.mktemp("many")
    random = Random(5)
    with (folder / "scores.jsonl").open("w") as file:
        for row in range(120):
            good = random.randint(0, 4)
            words = [one_of(random, GOOD if place < good else BAD) for place in range(4)]
            file.write(
                json.dumps({"text": f"the {one_of(random, THINGS)} was {' '.join(words)} {row}", "score": good}) + "\n"
            )
    with (folder / "pairs.jsonl").open("w") as file:
        for row in range(120):
            one = one_of(random, THINGS)
            two = one if row % 2 else one_of(random, " ".join(thing for thing in THINGS.split() if thing != one))
            file.write(
                json.dumps({"one": f"the {one} {row}", "two": f"a {two}", "label": "same" if row % 2 else "other"})
                + "\n"
            )
    (folder / "recipe.yaml").write_text(MANY.format(world=world, pretrained=pretrained, folder=folder))
    return folder


@pytest.fixture(scope="session")
def trials_here() -> Any:
    """Trials run in this process: starting others costs seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "openbook.stages.evaluate_agnostic.run_jobs",
            lambda work, jobs, *_: [work(*job, lambda done: None) for job in jobs],
        )
        yield


MANY = """\
name: many
teacher:
  model: {pretrained}
  tasks:
    - &reviews {{name: reviews, text: text, label: label, train: {{path: {world}/train.csv}},
        test: {{path: {world}/test.csv}}, max_length: 24}}
    - &scores {{name: scores, kind: regression, text: text, label: score, train: {{path: {folder}/scores.jsonl}},
        test_share: 0.2, max_length: 24}}
    - {{name: pairs, text: one, text_pair: two, label: label, train: {{path: {folder}/pairs.jsonl}}, test_share: 0.2,
        max_length: 24}}
  mixture: {{passes: 6, tasks_per_update: 4, micro_batch: 8}}
  optim: {{learning_rate: 2.0e-3, precision: fp32, checkpoint_every: 7, keep: best}}
  judge_every: 10
text:
  sources: [{{path: {world}/general.txt}}]
  budget_tokens: 3000
  length: 12
  long_length: 24
  least: 4
students:
  - {{name: small, layers: 1, hidden_size: 16, heads: 2, dropout: 0.1}}
  - {{name: wide, layers: 2, hidden_size: 32, heads: 4, embeddings: projected,
      optim: {{learning_rate: 5.0e-3}}}}
fine_tune:
  tasks:
    - *reviews
    - {{name: other, text: text, label: label, train: {{path: {world}/train.csv}}, test: {{path: {world}/test.csv}},
        max_length: 24, family: sentiment, group: reviews}}
  learning_rates: [2.0e-3, 1.0e-6]
  epochs: [4]
  seeds: [0, 1]
  optim: {{precision: fp32, batch_size: 16}}
  few:
    tasks: [*scores]
    shots: [4]
    draws: 2
    epochs: [3]
distill:
  optim: {{learning_rate: 2.0e-3, precision: fp32, batch_tokens: 256, tokens: 6000, checkpoint_every: 7}}
"""
