"""Derive methods from an app's routes: HEAD wherever there is GET, OPTIONS, and the ``Allow`` header of a 405."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def answered_methods(app: Starlette, path: str) -> set[str]:
    """The methods that ``app`` answers on ``path``, with what follows from them; empty if there is no such path."""
    scope: Scope = {"type": "http", "path": path, "root_path": "", "headers": [], "query_string": b""}
    found = {
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.routes)
    }
    if "GET" in found:
        found.add("HEAD")
    return found | {"OPTIONS"} if found else found


def allow_header(methods: set[str]) -> str:
    """The value of ``Allow``."""
    return ", ".join(sorted(methods))


class DerivedMethods:
    """ASGI middleware of a Starlette app: answers HEAD as GET without its body, and OPTIONS with ``Allow``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else ""
        if method == "HEAD":
            await self._head(scope, receive, send)
        elif method == "OPTIONS" and (methods := _of_target(scope)):
            headers = [(b"allow", allow_header(methods).encode())]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        explicit = any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)

        async def send_head(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b""})
                raise _HeadSent  # a stream would go on for nobody

        if not explicit and "GET" in answered_methods(scope["app"], scope["path"]):
            scope = {**scope, "method": "GET"}
        try:
            await self._app(scope, receive, send_head)
        except _HeadSent:
            return


class _HeadSent(Exception):
    pass


def _of_target(scope: Scope) -> set[str]:
    return {*_METHODS, "OPTIONS"} if scope["path"] == "*" else answered_methods(scope["app"], scope["path"])
