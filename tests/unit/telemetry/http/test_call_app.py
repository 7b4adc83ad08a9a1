"""An ASGI app called without a socket answers as over one."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from telemetry import MetricsRegistry
from telemetry.http.app import call_app, prepare_app


def _app() -> FastAPI:
    app = prepare_app(FastAPI(), MetricsRegistry("manager"), max_body_bytes=100)

    @app.api_route("/things/{name}", methods=["GET", "POST", "DELETE"])
    async def things(name: str, request: Request) -> dict[str, Any]:
        body = await request.body()
        headers = {key: value for key, value in request.headers.items() if key != "content-length"}
        return {"name": name, "method": request.method, "query": str(request.url.query), "headers": headers,
                "body": body.decode()}  # fmt: skip

    @app.delete("/things")
    async def nothing() -> Response:
        return Response(status_code=204)

    return app


async def test_a_call_arrives_as_it_was_made() -> None:
    """Method, path, query, headers and body; the answer has status, headers and body."""
    status, headers, body = await call_app(
        _app(), "POST", "/things/one", "a=1&b=%20", [("content-type", "text/plain"), ("x-given", "yes")], b"hello"
    )
    assert status == 200
    assert dict(headers)["content-type"] == "application/json"
    assert b'"method":"POST"' in body and b'"query":"a=1&b=%20"' in body and b'"body":"hello"' in body
    assert b'"x-given":"yes"' in body


async def test_a_path_is_decoded_as_a_server_does() -> None:
    """The app sees the path with its percent signs resolved."""
    assert b'"name":"a b"' in (await call_app(_app(), "GET", "/things/a%20b", "", [], b""))[2]


async def test_an_answer_without_a_body() -> None:
    assert (await call_app(_app(), "DELETE", "/things", "", [], b""))[::2] == (204, b"")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, b"unknown_path"),
        ("PATCH", "/things/x", b"", 405, b"method_not_allowed"),
        ("POST", "/things/x", b"x" * 101, 413, b"request_too_large"),
    ],
)
async def test_errors_are_the_error_object(method: str, path: str, body: bytes, status: int, code: bytes) -> None:
    """The app's own middleware is around it: limits, error objects, request ids."""
    answered, headers, content = await call_app(_app(), method, path, "", [("x-request-id", "req_7")], body)
    assert (answered, dict(headers)["x-request-id"]) == (status, "req_7")
    assert code in content


async def test_an_answer_in_pieces_is_put_together() -> None:
    """And whoever waits for the client to leave hears that it is gone, instead of waiting for ever."""

    async def pieces(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"in"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"\xe9")]})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    assert await call_app(pieces, "GET", "/", "", [], b"in") == (201, [("x-a", "é")], b"one two")


async def test_an_app_that_breaks_raises() -> None:
    """There is no connection to close: the caller is told."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await call_app(broken, "GET", "/", "", [], b"")
