"""What clients are told: answers, refusals that name the field, and nothing of the inside."""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from stand_in import LENGTH, StandIn
from starlette.testclient import TestClient

from openbook.config import UsageError
from openbook.server.app import create_app
from openbook.server.limits import Limits
from openbook.server.telemetry import JsonLines, log

KEY = "a-key-of-this-test-long"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
TEXTS = ["the film was great", "", "dull", "a book of the week"]
JSON = {"content-type": "application/json"}

Open = Callable[..., TestClient]


def test_answers_come_in_the_order_of_the_texts(client: TestClient) -> None:
    told = client.post("/predict", json={"texts": TEXTS}).json()["answers"]
    model = StandIn()
    for answer, chances in zip(told, model.answer(model.encode(TEXTS)), strict=True):
        assert answer["probabilities"] == pytest.approx(dict(zip(("no", "yes"), chances, strict=True)))
        assert answer["prediction"] == ("no", "yes")[int(chances.argmax())]
        assert answer["probability"] == pytest.approx(chances.max())
    assert [answer["tokens"] for answer in told] == [4, 0, 1, 5]


def test_a_pair_is_a_list_of_two(client: TestClient) -> None:
    pairs = [["the film", "was great"], ["dull", ""]]
    told = client.post("/predict", json={"texts": pairs}).json()["answers"]
    assert [answer["tokens"] for answer in told] == [4, 1]


def test_a_text_that_was_cut_says_so(client: TestClient) -> None:
    told = client.post("/predict", json={"texts": ["word " * 20_000, "word"]}).json()["answers"]
    assert [(answer["truncated"], answer["tokens"]) for answer in told] == [(True, LENGTH), (False, 1)]


def test_scores_have_no_probabilities(opened: Open) -> None:
    client = opened(StandIn(labels=None, kind="regression"))
    (answer,) = client.post("/predict", json={"texts": ["a b"]}).json()["answers"]
    assert isinstance(answer["prediction"], float)
    assert (answer["probability"], answer["probabilities"]) == (None, None)
    (answer,) = client.post("/explain", json={"texts": ["a b"]}).json()["answers"]
    assert isinstance(answer["alone"], float)
    assert isinstance(answer["neighbours"][0]["prediction"], float)


def test_contributions_sum_to_the_probability(client: TestClient) -> None:
    client.post("/remember", json={"texts": ["b", "c"], "ids": ["b", "c"]}, headers=WITH_KEY)
    for answer in client.post("/explain", json={"texts": TEXTS}).json()["answers"]:
        looked_up = sum(one["contribution"] for one in answer["neighbours"])
        assert answer["student_contribution"] + looked_up == pytest.approx(answer["probability"])
        assert [one["text"] for one in answer["neighbours"]] == ["the first entry", "b", "c"]
        assert {one["prediction"] for one in answer["neighbours"]} == {"yes"}


def test_an_empty_book_says_so(opened: Open) -> None:
    client = opened(StandIn(entries={}))
    assert client.get("/model").json()["book"] == {"entries": 0, "generation": 1, "open": False}
    (answer,) = client.post("/explain", json={"texts": ["a b"]}).json()["answers"]
    assert (answer["neighbours"], answer["reason"]) == ([], "the book is empty: the student answers alone")


def test_a_model_without_a_book_has_nothing_to_explain_or_edit(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "book", None)
    client = opened()
    assert client.post("/predict", json={"texts": ["a"]}).status_code == 200
    for path, body in (("explain", {"texts": ["a"]}), ("remember", {"texts": ["a"]}), ("forget", {"ids": ["a"]})):
        told = client.post(f"/{path}", json=body, headers=WITH_KEY)
        assert (told.status_code, told.json()["error"]) == (409, "no_book")
    assert client.get("/model").json()["book"] is None


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b"{", None, "not valid JSON"),
        (b"", None, "field required"),
        (b"\xff\xfe{}", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"texts": ["a"], "n": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (b"[1]", None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b"{}", "texts", "texts: field required"),
        (b'{"texts": []}', "texts", "texts: list should have at least 1 item, not 0"),
        (b'{"texts": "a"}', "texts", "texts: input should be a valid list"),
        (b'{"texts": [1]}', "texts[0]", "valid string"),
        (b'{"texts": ["a", null]}', "texts[1]", "valid string"),
        (b'{"texts": ["a", ["b", "c"]]}', "texts[1]", "valid string"),
        (b'{"texts": [["b", "c"], "a"]}', "texts[1]", "valid list"),
        (b'{"texts": [["b"]]}', "texts[0]", "at least 2"),
        (b'{"texts": [["b", "c", "d"]]}', "texts[0]", "at most 2"),
        (b'{"texts": [["b", 3]]}', "texts[0][1]", "valid string"),
        (b'{"texts": ["a", "b\\u0000"]}', "texts[1]", "NUL"),
        (b'{"texts": [["a", "b\\u0000"]]}', "texts[0][1]", "NUL"),
        (b'{"texts": ["\\ud800"]}', "texts[0]", "surrogates"),
        (b'{"texts": ["a"], "text": "b"}', "text", "text: this field is not known"),
        (b'{"texts": [1, 2, 3]}', "texts[0]", "(and 2 more)"),
        (b'{"texts": ["a"], "' + b"x" * 5000 + b'": 1}', "x" * 200, "not known"),
        (b'{"texts": ["a"], "\\ud800": 1}', None, "unicode"),
    ],
    ids=lambda part: str(part)[:40],
)
@pytest.mark.parametrize("path", ["predict", "explain"])
def test_what_is_not_understood_is_refused_by_name(
    client: TestClient, path: str, body: bytes, field: str | None, message: str
) -> None:
    told = client.post(f"/{path}", content=body, headers=JSON)
    assert told.status_code == 422
    problem = told.json()
    assert (problem["error"], problem["field"]) == ("invalid", field)
    assert message in problem["message"]
    assert len(told.content) < 1000
    assert problem["request_id"] == told.headers["x-request-id"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_another_site_can_send_is_refused(client: TestClient, kind: str) -> None:
    """A form on any page in a user's browser can send these to a server on the same machine, but not JSON."""
    told = client.post("/predict", content=b'{"texts": ["a"]}', headers={"content-type": kind})
    assert told.status_code == 422
    assert "content-type application/json" in told.json()["message"]


def test_unknown_paths_and_methods_have_the_same_shape(client: TestClient) -> None:
    assert client.get("/nothing").json()["error"] == "not_found"
    told = client.get("/predict")
    assert (told.status_code, told.headers["allow"], told.json()["error"]) == (405, "POST", "method_not_allowed")


@pytest.mark.parametrize("path", ["predict", "explain", "remember", "forget"])
def test_too_many_texts_are_refused(opened: Open, path: str) -> None:
    client = opened(max_texts=3)
    field = "ids" if path == "forget" else "texts"
    told = client.post(f"/{path}", json={field: list("abcd")}, headers=WITH_KEY)
    assert (told.status_code, told.json()["field"]) == (413, field)
    assert "send at most 3" in told.json()["message"]
    if path in ("predict", "explain"):
        assert client.post(f"/{path}", json={field: list("abc")}).status_code == 200


@pytest.mark.parametrize("path", ["predict", "explain", "remember"])
def test_a_text_that_is_too_long_is_refused(opened: Open, path: str) -> None:
    client = opened(max_characters=10)
    for texts in (["a", "b" * 11], [["a", ""], ["b" * 5, "c" * 6]]):
        told = client.post(f"/{path}", json={"texts": texts}, headers=WITH_KEY)
        assert (told.status_code, told.json()["field"]) == (413, "texts[1]")
    assert client.post(f"/{path}", json={"texts": ["b" * 10]}, headers=WITH_KEY).status_code == 200


def test_the_usual_hundred_thousand_characters_are_answered(client: TestClient) -> None:
    assert client.post("/predict", json={"texts": ["x" * 100_000]}).status_code == 200
    assert client.post("/predict", json={"texts": ["x" * 100_001]}).status_code == 413


def test_edits_take_effect_at_the_next_prediction(client: TestClient) -> None:
    told = client.post("/remember", json={"texts": ["new"], "labels": ["no"], "ids": ["mine"]}, headers=WITH_KEY)
    assert told.json() == {"added": 1, "removed": 0, "entries": 2, "generation": 2, "stale": False}
    ids = [one["id"] for one in client.post("/explain", json={"texts": ["a"]}).json()["answers"][0]["neighbours"]]
    assert ids == ["first", "mine"]
    assert client.get("/model").json()["book"] == {"entries": 2, "generation": 2, "open": True}
    told = client.post("/forget", json={"ids": ["first"]}, headers=WITH_KEY)
    assert told.json() == {"added": 0, "removed": 1, "entries": 1, "generation": 3, "stale": False}


EDITS: list[tuple[str, dict[str, Any]]] = [("remember", {"texts": ["a"]}), ("forget", {"ids": ["first"]})]


@pytest.mark.parametrize(("path", "body"), EDITS)
def test_edits_are_off_without_a_key(opened: Open, path: str, body: dict[str, Any]) -> None:
    client = opened(key=None)
    told = client.post(f"/{path}", json=body, headers=WITH_KEY)
    assert (told.status_code, told.json()["error"]) == (403, "edits_off")
    assert "OPENBOOK_API_KEY" in told.json()["message"]
    assert client.get("/model").json()["edits"] is False
    assert list(client.model.entries) == ["first"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer ", "Bearer ÿ"])
@pytest.mark.parametrize(("path", "body"), EDITS)
def test_a_wrong_key_is_refused(client: TestClient, given: str | None, path: str, body: dict[str, Any]) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    told = client.post(f"/{path}", json=body, headers=headers)
    assert (told.status_code, told.json()["error"], told.headers["www-authenticate"]) == (401, "wrong_key", "Bearer")
    assert KEY not in told.text
    assert list(client.model.entries) == ["first"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("remember", {"texts": ["a"], "labels": ["no", "no"]}, "labels", "there are 2 for 1 texts"),
        ("remember", {"texts": ["a"], "labels": []}, "labels", "there are 0 for 1 texts"),
        ("remember", {"texts": ["a"], "ids": ["x", "y"]}, "ids", "there are 2 for 1 texts"),
        ("remember", {"texts": ["a", "b"], "labels": ["no", "other"]}, "labels[1]", "the model knows no, yes"),
        ("remember", {"texts": ["a"], "labels": [1.5]}, "labels[0]", "the model knows no, yes"),
        ("remember", {"texts": ["a"], "labels": [None]}, "labels[0]", "valid number"),
        ("remember", {"texts": ["a"], "labels": "no"}, "labels", "valid list"),
        ("remember", {"texts": ["a"], "ids": [""]}, "ids[0]", "at least 1 item"),
        ("remember", {"texts": []}, "texts", "at least 1 item"),
        ("forget", {"ids": []}, "ids", "at least 1 item"),
        ("forget", {"ids": ["first"], "all": True}, "all", "not known"),
    ],
)
def test_an_edit_that_is_wrong_changes_nothing(
    client: TestClient, path: str, body: dict[str, Any], field: str | None, message: str
) -> None:
    told = client.post(f"/{path}", json=body, headers=WITH_KEY)
    assert (told.status_code, told.json()["field"]) == (422, field)
    assert message in told.json()["message"]
    assert list(client.model.entries) == ["first"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("remember", {"texts": ["a", "b"], "ids": ["new", "first"]}, "id 'first' is there already"),
        ("forget", {"ids": ["first", "nothing"]}, "'nothing' is not in the knowledge base"),
    ],
)
def test_an_edit_that_does_not_fit_the_book_changes_nothing(
    client: TestClient, path: str, body: dict[str, Any], message: str
) -> None:
    told = client.post(f"/{path}", json=body, headers=WITH_KEY)
    assert (told.status_code, told.json()["error"]) == (409, "conflict")
    assert message in told.json()["message"]
    assert list(client.model.entries) == ["first"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("label", "status"), [(2, 200), (2.5, 200), ("a", 422), (True, 422), (float("nan"), 422)])
def test_scores_are_remembered_as_finite_numbers(opened: Open, label: Any, status: int) -> None:
    client = opened(StandIn(labels=None, kind="regression"))
    body = json.dumps({"texts": ["x"], "labels": [label]})
    assert client.post("/remember", content=body, headers={**WITH_KEY, **JSON}).status_code == status


def test_what_breaks_inside_is_not_told_and_the_server_goes_on(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = opened()
    answer = StandIn.answer

    def broken(self: StandIn, encoded: Any) -> Any:
        raise UsageError("/secret/folder/manifest.json cannot be read")

    monkeypatch.setattr(StandIn, "answer", broken)
    with caplog.at_level(logging.ERROR, log.name):
        for path in ("predict", "explain"):
            told = client.post(f"/{path}", json={"texts": ["a"]})
            assert (told.status_code, told.json()["error"]) == (500, "failed")
            assert "secret" not in told.text
            assert told.json()["request_id"] == told.headers["x-request-id"]
            logged = next(line for line in lines_of(caplog) if line.get("id") == told.headers["x-request-id"])
            assert "/secret/folder" in logged["error"]
    monkeypatch.setattr(StandIn, "answer", answer)
    assert client.post("/predict", json={"texts": ["a"]}).status_code == 200


def test_a_book_that_cannot_be_read_is_no_fault_of_an_edit(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    client = opened()

    def broken(self: StandIn) -> Any:
        raise UsageError("/secret/folder/manifest.json cannot be read")

    monkeypatch.setattr(StandIn, "book", property(broken))
    for path, body in EDITS:
        told = client.post(f"/{path}", json=body, headers=WITH_KEY)
        assert told.status_code == 500
        assert "secret" not in told.text


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_is_an_error_not_an_answer(
    opened: Open, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    client = opened()
    monkeypatch.setattr(StandIn, "answer", lambda self, encoded: np.full((len(encoded), 2), number))
    assert client.post("/predict", json={"texts": ["a"]}).status_code == 500


class Slow(StandIn):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.entered = threading.Event(), threading.Event()
        self.opened.set()
        self.seen: list[int] = []

    def answer(self, encoded: Any) -> Any:
        self.entered.set()
        assert self.opened.wait(10)
        self.seen.append(len(encoded))
        return super().answer(encoded)


@pytest.fixture
def slow() -> Iterator[Slow]:
    model = Slow()
    yield model
    model.opened.set()


def test_a_request_that_takes_too_long_is_given_up_with_its_work(opened: Open, slow: Slow) -> None:
    client = opened(slow, timeout=0.2)
    slow.opened.clear()
    slow.seen.clear()
    told = client.post("/predict", json={"texts": ["a"]})  # reaches the model
    also = client.post("/predict", json={"texts": ["b"]})  # waits behind it
    assert [one.status_code for one in (told, also)] == [504, 504]
    assert told.json()["error"] == "timeout"
    slow.opened.set()
    assert client.post("/predict", json={"texts": ["a", "b"]}).status_code == 200
    assert slow.seen == [1, 2]


def test_a_full_queue_says_when_to_come_back(opened: Open, slow: Slow) -> None:
    client = opened(slow, max_waiting=2)
    slow.opened.clear()
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(client.post("/predict", json={"texts": ["a"]}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    service = client.app.state.service  # type: ignore[attr-defined]
    while service.in_flight < 2:
        pass
    told = client.post("/predict", json={"texts": ["a"]})
    assert (told.status_code, told.json()["error"], told.headers["retry-after"]) == (429, "busy", "1")
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    slow.opened.set()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    assert client.post("/predict", json={"texts": ["a"]}).status_code == 200
    assert (service.held, service.accepted, service.in_flight) == (0, 0, 0)


def test_health_is_not_readiness(opened: Open) -> None:
    entered, let = threading.Event(), threading.Event()

    class Loading(StandIn):
        def encode(self, rows: Any) -> Any:
            entered.set()
            assert let.wait(10)
            return super().encode(rows)

    client = opened(Loading(), wait=False)
    assert entered.wait(10)  # the model is there, and being warmed
    assert client.get("/health").json() == {"status": "alive"}
    for told in (client.get("/ready"), client.get("/model"), client.post("/predict", json={"texts": ["a"]})):
        assert (told.status_code, told.json()["error"], told.headers["retry-after"]) == (503, "loading", "1")
    let.set()
    while client.get("/ready").status_code != 200:
        pass
    assert client.post("/predict", json={"texts": ["a"]}).status_code == 200
    client.app.state.service.drain()  # type: ignore[attr-defined]
    for told in (client.get("/ready"), client.post("/predict", json={"texts": ["a"]})):
        assert (told.status_code, told.json()["error"], told.headers["connection"]) == (503, "draining", "close")
    assert client.get("/health").status_code == 200


def test_a_model_that_cannot_be_loaded_stops_the_server() -> None:
    def load() -> StandIn:
        raise UsageError("no student")

    stopped = threading.Event()
    app = create_app(load, on_failure=stopped.set)
    with TestClient(app) as client:
        assert stopped.wait(10)
        assert client.get("/ready").json()["error"] == "failed"
        assert str(app.state.service.failure) == "no student"


@pytest.mark.parametrize(
    "key", ["short", "with spaces in its middle", "ünïcödéünïcödéünïcödé", "line\nline\nline\nline"]
)
def test_a_key_that_is_weak_or_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="OPENBOOK_API_KEY") as refused:
        create_app(StandIn, key=key)
    assert key not in str(refused.value)


@pytest.mark.parametrize("name", ["max_body", "max_texts", "timeout", "grace", "batch_tokens"])
def test_a_limit_of_nothing_is_refused_by_its_option(name: str) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        Limits(**{name: 0})


def test_no_body_may_be_larger_than_all_together() -> None:
    with pytest.raises(UsageError, match="--max-waiting-bytes is 10, less than --max-body"):
        Limits(max_waiting_bytes=10)


def test_every_request_has_an_id(client: TestClient) -> None:
    ids = [client.get("/health").headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 65, "{}"):
        assert re.fullmatch(
            "[0-9a-f]{16}-[0-9]+", client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        )


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == log.name]


@pytest.mark.parametrize("log_texts", [False, True])
def test_a_request_is_one_line_and_its_texts_stay_out_of_it(caplog: pytest.LogCaptureFixture, log_texts: bool) -> None:
    with TestClient(create_app(StandIn, log_texts=log_texts)) as client, caplog.at_level(logging.INFO, log.name):
        while client.get("/ready").status_code != 200:
            pass
        caplog.clear()
        client.post("/predict", json={"texts": ["secret\nword", "b"]}, headers={"x-request-id": "mine"})
        client.post("/predict?q=secret", content=b'{"texts": ["secret", 3], "secret": 1}', headers=JSON)
        client.get("/secret")
        client.get("/metrics")
    first, second, third = lines_of(caplog)
    assert {**first, "time": 0, "ms": 0, "asked": 0} == {
        "time": 0, "level": "info", "event": "request", "id": "mine", "method": "POST", "route": "/predict",
        "status": 200, "ms": 0, "texts": 2, "tokens": 3, "truncated": 0, "asked": 0,
    }  # fmt: skip
    assert (second["status"], third["status"], third["route"]) == (422, 404, "other")
    assert first.get("asked") == (["secret\nword", "b"] if log_texts else None)
    assert ("secret" in json.dumps([first, second, third])) is log_texts
    assert all("\n" not in JsonLines().format(record) for record in caplog.records)


def test_prometheus_can_read_the_figures(client: TestClient) -> None:
    client.post("/predict", json={"texts": ["a", "word " * 100]})
    client.post("/predict", content=b"{", headers=JSON)
    client.request("BREW", "/anything/at/all")
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    for line in (
        'openbook_requests_total{method="POST",route="/predict",status="200"} 1.0',
        'openbook_requests_total{method="POST",route="/predict",status="422"} 1.0',
        'openbook_requests_total{method="other",route="other",status="404"} 1.0',
        "openbook_texts_total 2.0",
        "openbook_truncated_texts_total 1.0",
        "openbook_batch_rows_count 1.0",
        "openbook_batch_tokens_sum 128.0",
        "openbook_waiting_requests 0.0",
        "openbook_requests_in_flight 0.0",
        "openbook_ready 1.0",
    ):
        assert line in told.text.splitlines(), line
    assert "process_resident_memory_bytes" in told.text


def test_the_description_names_every_route_and_refusal(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert sorted(paths) == ["/explain", "/forget", "/health", "/metrics", "/model", "/predict", "/ready", "/remember"]
    assert set(paths["/predict"]["post"]["responses"]) == {"200", "408", "413", "422", "429", "500", "503", "504"}
    assert {"401", "403", "409"} < set(paths["/forget"]["post"]["responses"])
    assert "security" in paths["/remember"]["post"]
    for path in ("/docs", "/redoc"):  # these pages load scripts from elsewhere
        assert client.get(path).status_code == 404


class Several(StandIn):
    """Any number of its labels may be told."""

    def name(self, answer: Any) -> Any:
        assert self.labels is not None
        return [name for name, chance in zip(self.labels, answer, strict=True) if chance > 0.5]


def test_several_labels_are_told_as_lists(opened: Open) -> None:
    client = opened(Several(kind="multi_label"), key=KEY)
    (told,) = client.post("/explain", json={"texts": ["one"]}).json()["answers"]
    chances = told["probabilities"]
    assert told["prediction"] == [name for name in ("no", "yes") if chances[name] > 0.5]
    assert told["probability"] is None
    assert told["neighbours"][0]["prediction"] == ["yes"]
    body = {"texts": ["a", "b"], "labels": [["no", "yes"], []]}
    assert client.post("/remember", json=body, headers=WITH_KEY).status_code == 200
    refused = client.post("/remember", json={"texts": ["c"], "labels": [["no", "perhaps"]]}, headers=WITH_KEY)
    assert (refused.status_code, refused.json()["field"]) == (422, "labels[0]")
    one = opened(StandIn(), key=KEY)
    assert one.post("/remember", json={"texts": ["c"], "labels": [["no"]]}, headers=WITH_KEY).status_code == 422
