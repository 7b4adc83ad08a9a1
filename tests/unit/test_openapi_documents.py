"""The OpenAPI document, the documentation page and the front page of every service."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openapi_spec_validator import OpenAPIV31SpecValidator

from manager import ManagerService, create_app
from openai_api.paths import INFERENCE_PATHS
from queue_schemas import BrokerUnavailable
from telemetry import MetricsRegistry
from telemetry.http.openapi import operations
from tests.unit.manager.fakes import FakeProbe, fast_settings
from tests.unit.router.fakes import FakeQueue, router
from worker.routes import make_app

SERVICES = ["router", "guarded router", "manager", "worker"]
_ELSEWHERE = re.compile(r"""(?:src|href|url)\s*[=(:]\s*["']?(?:https?:)?//""")


@pytest.fixture(params=SERVICES)
async def service(request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, Any]]:
    """Each service's app; nothing behind it runs."""
    name: str = request.param
    if "router" in name:
        keys = {"api_keys": "0" * 64 + ":acme", "join_token": "t"} if "guarded" in name else {}
        async with router(FakeQueue("m"), **keys) as app:
            yield name, app
    elif name == "manager":
        yield (
            name,
            create_app(ManagerService(fast_settings(join_token="t"), no_queue, FakeProbe(), broker_url="redis://here")),
        )
    else:
        yield name, make_app(lambda: None, lambda: None, MetricsRegistry("worker"), "t")  # type: ignore[arg-type, return-value]


async def no_queue() -> Any:
    raise BrokerUnavailable("Redis is not there")


async def get(app: Any, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
        return await client.get(path, headers=headers)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


async def test_the_document_is_valid_and_whole(service: tuple[str, Any]) -> None:
    """[F7] It is OpenAPI 3.1, every reference leads somewhere, and every operation says what it asks for."""
    name, app = service
    document = (await get(app, "/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    assert "$defs" not in json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in references(document):
        prefix, _, schema = reference.rpartition("/")
        assert (prefix, schema in schemas) == ("#/components/schemas", True), reference
    schemes = document["components"]["securitySchemes"]
    found = list(operations(document))
    assert found
    for path, method, operation in found:
        used = {scheme for alternative in operation["security"] for scheme in alternative}
        assert used <= schemes.keys(), (path, method)
        open_to_all = path in {"/healthz", "/readyz", "/metrics", "/health", "/ping", "/version", "/load"}
        assert bool(used) != open_to_all or name == "worker", (path, method)


@pytest.mark.parametrize("service", ["router", "guarded router"], indirect=True)
async def test_the_routers_document_has_its_inference_paths(service: tuple[str, Any]) -> None:
    """[F7] With their bodies, errors and keys, which are optional where none are asked for; 422 of a key that was sent
    with another request is documented, FastAPI's own is not."""
    name, app = service
    document = (await get(app, "/openapi.json")).json()
    for path in INFERENCE_PATHS:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]
        assert {"200", "400", "401", "429", "503"} <= operation["responses"].keys()
        assert {"Bearer": []} in operation["security"] and {"ApiKey": []} in operation["security"]
        assert ({} in operation["security"]) is (name == "router")
    workers = document["paths"]["/fabric/v1/workers"]["post"]
    assert {"JoinToken": []} in workers["security"]
    assert "422" in document["paths"]["/v1/batches"]["post"]["responses"]
    assert "422" not in document["paths"]["/v1/batches"]["get"]["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_the_pages_need_no_other_host(service: tuple[str, Any]) -> None:
    """[F7] A front page and the documentation, with their assets and a policy that lets nothing else in."""
    _, app = service
    for path in ("/", "/docs"):
        page = await get(app, path, accept="text/html")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy
        assert not _ELSEWHERE.search(page.text), page.text
        links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert links
        for link in links:
            if not link.startswith(("readyz", "metrics")):
                assert (await get(app, f"/{link}")).status_code == 200, link
    assert "<script>" not in (await get(app, "/docs")).text
    script = await get(app, "/docs/assets/swagger-ui-bundle.js")
    assert script.headers["content-type"].startswith("text/javascript") and len(script.content) > 100_000
    for wrong in ("/docs/assets/redoc.standalone.js", "/docs/assets/..%2f__init__.py", "/redoc"):
        assert (await get(app, wrong)).status_code == 404


async def test_a_program_at_the_front_page_gets_json(service: tuple[str, Any]) -> None:
    """[F7] Names, versions and where to go on."""
    _, app = service
    found = (await get(app, "/", accept="application/json")).json()
    assert found["name"].startswith("inferq")
    assert (found["docs"], found["openapi"]) == ("docs", "openapi.json")


def test_every_service_serves_its_pages_itself() -> None:
    """[F7] FastAPI's own pages, which load their assets from elsewhere, are off."""
    app = make_app(lambda: None, lambda: None, MetricsRegistry("worker"), "")  # type: ignore[arg-type, return-value]
    assert isinstance(app, FastAPI)
    assert (app.docs_url, app.redoc_url) == (None, None)
