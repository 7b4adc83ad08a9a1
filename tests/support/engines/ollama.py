"""Ollama as its source and docs say (``tests/fixtures/engines/ollama``)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from .fake import FakeEngine, page, recorded, rendered


class FakeOllama(FakeEngine):
    """It ends every message, so that an answer always begins anew."""

    name = "ollama"

    def chat_prompt(self, body: dict[str, Any]) -> str:
        return rendered(body["messages"])

    async def serve_page(self, request: web.Request) -> web.Response:
        match request.method, request.path:
            case "GET", "/":
                return web.Response(text="Ollama is running")
            case "GET", "/api/version":
                return page(recorded(self.name, "version.json"))
            case "GET", "/api/ps":
                return page(recorded(self.name, "ps.json"))
            case "GET", "/v1/models":
                return page(recorded(self.name, "models.json"))
        return web.Response(text="404 page not found", status=404)
