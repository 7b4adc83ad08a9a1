"""The app that answers what is no request."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from queue_schemas import InferqError


def answer_with(error: InferqError) -> ASGIApp:
    """An app that answers with ``error`` and ends the connection."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse
