"""The page and the OpenAPI document that authors of workers read are what the Router does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from inferq.conformance.document import DOCUMENT, protocol_document, render
from inferq.conformance.router_rules import ROUTER_RULES
from inferq.conformance.worker_rules import WORKER_RULES
from queue_schemas.control import ControlKind
from queue_schemas.worker_protocol.encoding import JSON, decode
from queue_schemas.worker_protocol.messages import ClaimAnswer, ClaimCall, Join, Joined, Reconcile, Reconciled
from queue_schemas.worker_protocol.output import Answers, OutputCall, ReleaseCall, SettleCall
from router.workers.calls import SESSION_CALLS
from router.workers.rules import parse_credentials

PAGE = (Path(__file__).parents[4] / "docs" / "worker-protocol.md").read_text()
ASKED = {"sessions": Join, "claim": ClaimCall, "settle": SettleCall, "output": OutputCall, "release": ReleaseCall}
ASKED |= {"reconcile": Reconcile}
ANSWERED = {"sessions": Joined, "claim": ClaimAnswer, "settle": Answers, "output": Answers, "reconcile": Reconciled}


def test_the_openapi_document_is_that_of_the_router() -> None:
    """`python -m inferq.conformance.document --write` brings it up to date."""
    assert DOCUMENT.read_text() == render()
    OpenAPIV31SpecValidator(protocol_document()).validate()


def test_every_call_is_in_the_document_and_on_the_page() -> None:
    """Each by its path or its name."""
    paths = protocol_document()["paths"]
    for name in SESSION_CALLS:
        assert f"/worker/v1/sessions/{{session_id}}/{name}" in paths
        assert name in PAGE, name


def test_every_message_is_on_the_page() -> None:
    """A worker's author reads there what to do about each."""
    for kind in ControlKind:
        assert f"| `{kind}` |" in PAGE, kind


def examples() -> list[tuple[str, str, str]]:
    """The calls on the page: name, what is sent, what is answered (empty: it is not shown)."""
    found = []
    for block in re.findall(r"```\n(POST [^`]+)```", PAGE):
        request, _, answer = block.partition("\n\n200\n")
        head, _, body = request.partition("\n")
        found.append((head.rpartition("/")[2].strip(), body, answer))
    return found


@pytest.mark.parametrize(("name", "body", "answer"), examples(), ids=[name for name, _, _ in examples()])
def test_the_examples_on_the_page_are_messages(name: str, body: str, answer: str) -> None:
    """Whoever copies them is understood."""
    json.loads(body)
    assert decode(body.encode(), JSON, ASKED[name]) is not None
    if answer:
        assert set(json.loads(answer)) <= set(ANSWERED[name].model_fields)


def test_there_are_examples() -> None:
    """The test above has found them."""
    assert {name for name, _, _ in examples()} == set(ASKED)


def test_the_example_of_credentials_is_one() -> None:
    """But for its digest, which is cut short."""
    [toml] = re.findall(r"```toml\n([^`]+)```", PAGE)
    [scope] = parse_credentials(toml.replace("9f86d0...", "0" * 64), "the page").values()
    assert (scope.name, scope.workers, scope.slots) == ("edge-1", 2, 64)


def test_rules_have_names_of_their_own() -> None:
    """They are asked for by name."""
    for rules in (WORKER_RULES, ROUTER_RULES):
        names = [rule.name for rule in rules]
        assert len(set(names)) == len(names)
