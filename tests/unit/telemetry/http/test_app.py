"""Every app of the fleet: error objects, request ids, the join token, health pages, metrics."""

import json

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel

from queue_schemas import AuthenticationFailed, ManagerUnavailable, OverCapacity
from telemetry import MetricsRegistry, bound_facts
from telemetry.http.access import allow_members, check_join_token, is_join_token
from telemetry.http.app import health_routes, prepare_app
from telemetry.http.error_answers import error_answer
from telemetry.http.loopback_access import LoopbackAccess
from telemetry.http.request_context import request_id_from


class Order(BaseModel):
    count: int


def _app(reasons: list[str] | None = None) -> tuple[FastAPI, MetricsRegistry]:
    metrics = MetricsRegistry("manager")
    app = prepare_app(FastAPI(), metrics)
    app.include_router(health_routes(metrics, lambda: reasons or []))

    @app.post("/orders")
    async def order(order: Order) -> dict[str, str]:
        return {"request_id": str(bound_facts()["request_id"])}

    @app.get("/busy")
    async def busy() -> None:
        raise OverCapacity("too much at once: try again later", retry_after_s=7)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a bug with a secret")

    @app.get("/guarded", dependencies=[allow_members("s3cret", LoopbackAccess())])
    async def guarded() -> str:
        return "in"

    routes = APIRouter(tags=["deep"])

    @routes.get("/{name:path}")
    async def deep(name: str) -> str:
        return name

    app.include_router(routes, prefix="/deep")
    return app, metrics


def _client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/orders", b"{", 400, "invalid_request"),
        ("POST", "/orders", b'{"count": "many"}', 400, "invalid_request"),
        ("GET", "/nowhere", b"", 404, "unknown_path"),
        ("GET", "/orders", b"", 405, "method_not_allowed"),
        ("GET", "/busy", b"", 429, "over_capacity"),
        ("GET", "/broken", b"", 500, "internal_error"),
        ("GET", "/guarded", b"", 401, "invalid_api_key"),
    ],
)
async def test_every_error_is_the_openai_error_object(
    method: str, path: str, body: bytes, status: int, code: str
) -> None:
    """Whatever goes wrong, the client gets the four keys, the right status and a request id."""
    async with _client(_app()[0]) as client:
        answer = await client.request(method, path, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    assert "secret" not in error["message"]


async def test_a_wrong_field_is_named() -> None:
    """The error of a wrong field says which one."""
    async with _client(_app()[0]) as client:
        answer = await client.post("/orders", json={"count": "many"})
    assert answer.json()["error"]["param"] == "count"


async def test_retry_after_and_allow_headers() -> None:
    """429 says when to come back, 405 what would work."""
    async with _client(_app()[0]) as client:
        assert (await client.get("/busy")).headers["retry-after"] == "7"
        assert (await client.get("/orders")).headers["allow"] == "OPTIONS, POST"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
async def test_a_path_with_a_slash_too_many_is_unknown(method: str) -> None:
    """[H11] It is a 404, as on inference paths: no redirect leads a client with its key to plain HTTP."""
    async with _client(_app()[0]) as client:
        answer = await client.request(method, "/orders/", headers={"x-forwarded-proto": "https"})
    assert (answer.status_code, answer.headers.get("location")) == (404, None)


async def test_a_sane_request_id_is_kept_and_bound() -> None:
    """The caller's id comes back in the answer and stands in the task's logs."""
    async with _client(_app()[0]) as client:
        answer = await client.post("/orders", json={"count": 1}, headers={"x-request-id": "my-1"})
    assert answer.headers["x-request-id"] == "my-1"
    assert answer.json()["request_id"] == "my-1"


@pytest.mark.parametrize("value", [b"", b"a b", b"x\r\ny", b"x" * 129, "é".encode(), b"-x"])
def test_a_wild_request_id_is_replaced(value: bytes) -> None:
    """Ids that could break a log line or a header are not taken over."""
    assert request_id_from([(b"x-request-id", value)]).startswith("req_")


async def test_the_join_token_opens() -> None:
    """The right token passes; where none is set, none does."""
    async with _client(_app()[0]) as client:
        assert (await client.get("/guarded", headers={"x-inferq-join-token": "s3cret"})).status_code == 200
        assert (await client.get("/guarded", headers={"x-inferq-join-token": "s3creT"})).status_code == 401
    with pytest.raises(AuthenticationFailed, match="INFERQ_JOIN_TOKEN"):
        check_join_token("", "")
    with pytest.raises(AuthenticationFailed, match="INFERQ_JOIN_TOKEN"):
        check_join_token("s", "é")


def test_an_unset_join_token_opens_nothing() -> None:
    """Only a set token, shown exactly, lets an operator in."""
    assert is_join_token("t", "t")
    assert not is_join_token("t", "x")
    assert not is_join_token("", "")


async def test_health_pages() -> None:
    """Alive while the process is; ready only without a reason against it; the reasons are told."""
    async with _client(_app(["Redis is away"])[0]) as client:
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reasons": ["Redis is away"]})
    async with _client(_app()[0]) as client:
        assert (await client.get("/readyz")).status_code == 200


async def test_requests_are_counted_by_route() -> None:
    """Metrics count by route template; unknown paths share one label, so a scanner cannot make them grow."""
    async with _client(_app()[0]) as client:
        await client.post("/orders", json={"count": 1})
        await client.get("/a")
        await client.get("/b")
        await client.get("/deep/x/y")
        text = (await client.get("/metrics")).text
    assert 'inferq_requests_total{code="200",path="/orders",role="manager"} 1.0' in text
    assert 'inferq_requests_total{code="200",path="/deep/{name:path}",role="manager"} 1.0' in text
    assert 'inferq_requests_total{code="404",path="unknown",role="manager"} 2.0' in text


def test_a_503_always_says_when_to_come_back() -> None:
    """Without a time of its own, an unavailable role asks for a second."""
    status, headers, body = error_answer(ManagerUnavailable("standby"))
    assert (status, dict(headers)[b"retry-after"]) == (503, b"1")
    assert json.loads(body)["error"]["code"] == "manager_unavailable"


@pytest.mark.parametrize(("reasons", "status"), [([], 200), (["the queue is away"], 503)])
async def test_both_answers_of_readyz_are_documented(reasons: list[str], status: int) -> None:
    """Whoever reads the OpenAPI document expects both."""
    app, _ = _app(reasons)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://manager") as client:
        answer = await client.get("/readyz")
    assert answer.status_code == status
    assert str(status) in app.openapi()["paths"]["/readyz"]["get"]["responses"]
