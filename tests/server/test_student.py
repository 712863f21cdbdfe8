"""The server around a real student and its book: the answers of the predictor, whatever came in the same batch."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

from openbook.backends.pytorch import TorchBackend
from openbook.config import StudentSettings
from openbook.knowledge_base.search import normalise
from openbook.models.encoder import Encoder, Head
from openbook.models.student import new_student
from openbook.predictor import OpenBook
from openbook.server.app import create_app
from openbook.server.limits import Limits
from openbook.types import KnowledgeBase

LABELS = ("bad", "fair", "good")
KEY = "a-key-of-this-test-long"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
WORDS = [*["the", "film", "was", "great", "and", "my", "song", "seemed", "nice", "but", "that", "plot", "is", "poor"]]
TEXTS = [" ".join(WORDS[place % 7 : place % 7 + 1 + place % 11]) for place in range(64)]


def student(tokenizer: Any) -> Encoder:
    settings = StudentSettings(architecture="bert", layers=2, hidden_size=16, heads=2)
    student = new_student(settings, Head(LABELS), tokenizer, len(tokenizer), positions=24, seed=4)
    for place, weight in enumerate(student.parameters()):
        nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(place))
    student.model.config.key_space = "space"
    return student


def base() -> KnowledgeBase:
    random = np.random.default_rng(0)
    keys = normalise(random.normal(size=(30, 16))).astype(np.float32)
    values = random.dirichlet(np.ones(3), 30).astype(np.float32)
    names = tuple(f"t/train/{row}" for row in range(30))
    retrieval = {"top_k": 5, "temperature": 0.2, "beta": 0.4}
    about = {"kind": "classification", "labels": LABELS, "key_space": "space", "retrieval": retrieval}
    return KnowledgeBase(keys, values, names, tuple(f"text of {name}" for name in names), about)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    OpenBook(TorchBackend(student(tokenizer), tokenizer), base()).save_pretrained(folder)
    OpenBook.from_pretrained(folder).rekey()  # there is no teacher to find new texts by
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    limits = Limits(batch_tokens=256)
    app = create_app(lambda: OpenBook.from_pretrained(folder), limits, KEY)
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            pass
        yield client


def asked(client: TestClient, texts: Any, path: str = "predict") -> list[dict[str, Any]]:
    told = client.post(f"/{path}", json={"texts": texts})
    assert told.status_code == 200, told.text
    answers: list[dict[str, Any]] = told.json()["answers"]
    return answers


def chances(answers: list[dict[str, Any]]) -> list[list[float]]:
    return [[answer["probabilities"][label] for label in LABELS] for answer in answers]


def test_answers_are_the_predictors_whatever_came_in_the_same_batch(client: TestClient, folder: Path) -> None:
    own = OpenBook.from_pretrained(folder)
    wanted = np.array([own.predict_proba(text) for text in TEXTS])
    np.testing.assert_allclose(chances(asked(client, TEXTS)), wanted, atol=1e-5)
    with ThreadPoolExecutor(8) as pool:  # many small requests at once share batches
        sizes = [TEXTS[place : place + 1 + place % 3] for place in range(60)]
        told = list(pool.map(lambda texts: chances(asked(client, texts)), sizes))
    for place, answers in enumerate(told):
        np.testing.assert_allclose(answers, wanted[place : place + len(answers)], atol=1e-5)
    assert np.abs(wanted - wanted[0]).max() > 1e-3  # they do differ


def test_pairs_are_answered_as_pairs(client: TestClient, folder: Path) -> None:
    pairs = [(TEXTS[place], TEXTS[place + 1]) for place in range(6)]
    wanted = OpenBook.from_pretrained(folder).predict_proba(pairs)
    np.testing.assert_allclose(chances(asked(client, pairs)), wanted, atol=1e-5)


def test_an_explanation_is_the_predictors(client: TestClient, folder: Path) -> None:
    own = OpenBook.from_pretrained(folder)
    for text, told in zip(TEXTS[:5], asked(client, TEXTS[:5], "explain"), strict=True):
        wanted = own.explain(text)
        assert (told["prediction"], told["alone"]) == (wanted.prediction, wanted.alone)
        assert [one["id"] for one in told["neighbours"]] == [one.id for one in wanted.evidence.neighbours]
        added = sum(one["contribution"] for one in told["neighbours"]) + told["student_contribution"]
        assert added == pytest.approx(told["probability"])


@pytest.mark.parametrize("text", ["", "   ", "🙂 ß 西", "the film " * 11_000])
def test_odd_texts_are_answered(client: TestClient, text: str) -> None:
    (answer,) = asked(client, [text])
    assert answer["truncated"] is (len(text) > 1000)
    assert answer["tokens"] <= 24


def test_edits_count_at_once_whoever_makes_them(client: TestClient, folder: Path) -> None:
    def nearest() -> str:
        return str(asked(client, ["the film was great"], "explain")[0]["neighbours"][0]["id"])

    body = {"texts": ["the film was great"], "labels": ["bad"], "ids": ["mine"]}
    assert client.post("/remember", json=body, headers=WITH_KEY).json()["entries"] == 31
    assert nearest() == "mine"
    assert client.post("/remember", json=body, headers=WITH_KEY).status_code == 409
    OpenBook.from_pretrained(folder).forget(["mine"])  # as another process would
    assert nearest() != "mine"
    told = client.post("/remember", json={"texts": ["a"]}, headers=WITH_KEY)
    assert (told.status_code, "give labels" in told.json()["message"]) == (409, True)


def test_a_book_that_breaks_is_an_error_until_it_is_whole_again(client: TestClient, folder: Path) -> None:
    manifest = folder / "knowledge_base" / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{")
    for path, body in (("predict", {"texts": ["a"]}), ("forget", {"ids": ["t/train/1"]})):
        told = client.post(f"/{path}", json=body, headers=WITH_KEY)
        assert (told.status_code, told.json()["error"]) == (500, "failed")
        assert str(folder) not in told.text
    assert client.get("/model").status_code == 500
    assert client.get("/ready").status_code == 200
    manifest.write_bytes(whole)
    assert asked(client, ["a"])[0]["prediction"] in LABELS


def test_the_server_itself_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    program = "import sys, openbook.server.launch; print(sorted(sys.modules))"
    names = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'fastapi'" in names
    assert "'torch'" not in names
    assert "'transformers'" not in names
