"""What the Router and the Manager say in their OpenAPI documents is what they do, whatever is sent.

The requests are made by schemathesis from the documents: right ones, and wrong ones in every way that a schema knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.integration.untrusted.fabric import Fabric, running_fabric
from tests.support.servers import Server

LIMIT_S = 20.0
ANYTHING = {"ids": [], "worker_id": "w", "session_id": "w.0000000000000001", "slots": 1}
"""A body that every operation with a body takes."""
EXAMPLES = 6
"""For each operation, right requests and as many wrong ones."""
CHECKS: list[Any] = [content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture
def fabric(valkey: Server) -> Iterator[Fabric]:
    with running_fabric(valkey) as fabric:
        yield fabric


@pytest.fixture
def guarded(valkey: Server) -> Iterator[Fabric]:
    with running_fabric(valkey, "a token for the fleet") as fabric:
        yield fabric


def _url(fabric: Fabric, role: str) -> str:
    return fabric.manager_url if role == "manager" else fabric.router_url


@pytest.mark.parametrize("role", ["manager", "router"])
def test_every_answer_is_as_documented(fabric: Fabric, role: str) -> None:
    """Statuses, content types and bodies are those of the document, and every error is OpenAI's error object."""
    url, answered = _url(fabric, role), Counter[int]()
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        # Only bodies and parameters can be wrong.
        may_be_wrong = bool(operation.body) or bool(operation.query)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + may_be_wrong]:

            @settings(max_examples=EXAMPLES, derandomize=True, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: Case) -> None:
                response = case.call(timeout=LIMIT_S)
                answered[response.status_code] += 1
                case.validate_response(response, checks=CHECKS)
                if case.path != "/readyz":
                    _is_an_answer(response, anthropic=case.path.startswith("/v1/messages"))

            ask()
    assert answered[200] > EXAMPLES
    assert answered[400] > EXAMPLES


def _is_an_answer(response: Response, *, anthropic: bool) -> None:
    assert response.status_code not in (500, 501, 502, 504), response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() >= ({"message", "type"} if anthropic else {"message", "type", "param", "code"})
        assert "Traceback" not in response.text
        assert response.headers["content-type"] == ["application/json"]


@pytest.mark.parametrize("role", ["manager", "router"])
def test_without_the_token_only_the_public_pages_answer(guarded: Fabric, role: str) -> None:
    """Of every operation of the fabric an outsider learns only that a token is needed."""
    url = _url(guarded, role)
    document = requests.get(f"{url}/openapi.json", timeout=LIMIT_S).json()
    # What clients ask for is guarded by API keys, of which this Router has none.
    of_clients = {"/fabric/v1/pools", "/fabric/v1/pools/{model}"} if role == "router" else set()
    paths = {path for path in document["paths"] if path.startswith("/fabric/")} - of_clients
    inner = [(path, method) for path in sorted(paths) for method in document["paths"][path]]
    assert len(inner) > 5
    for path, method in inner:
        asked = url + path.format(worker_id="w", model="m", letter_id="0:1-1") + "?session_id=w.0000000000000001"
        answer = requests.request(method, asked, json=ANYTHING, timeout=LIMIT_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), f"{method} {path}"
