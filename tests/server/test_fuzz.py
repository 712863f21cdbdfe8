"""Requests made from the server's own description, right and wrong: none breaks it or gets a reply it does not name."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow
KEY = "a-key-of-this-test-long"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_a_fuzzer_finds_nothing(started: Callable[..., Any], mode: str) -> None:
    server = started(key=KEY)
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:
        for headers in ({}, {"authorization": f"Bearer {KEY}"}):
            if mode == "positive" or operation.body:
                fuzz(operation, schemathesis.GenerationMode(mode), headers)
    assert httpx2.get(f"{server.url}/ready").status_code == 200
    assert not server.logged("failed")


def fuzz(operation: Any, mode: Any, headers: dict[str, str]) -> None:
    seen: list[int] = []
    checks = schemathesis.checks
    without = [checks.ignored_auth] if headers else []  # it asks again, but with the key that is given here
    if operation.path in ("/remember", "/forget"):
        without.append(checks.positive_data_acceptance)  # what is right depends on the labels and the book

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        seen.append(case.call_and_validate(headers=headers, excluded_checks=without).status_code)

    ask()
    assert seen
    assert max(seen) < 500, operation.label
