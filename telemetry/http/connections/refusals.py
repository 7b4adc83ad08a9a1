"""The ASGI app for what is no valid request: it answers with the error and ends the connection."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from queue_schemas import InferqError


def answer_with(error: InferqError) -> ASGIApp:
    """An app that answers with ``error`` and ends the connection."""

    async def refuse(_scope: Scope, _receive: Receive, send: Send) -> None:
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse
