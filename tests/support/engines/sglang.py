"""SGLang's server as its source and docs say (``tests/fixtures/engines/sglang``)."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from .fake import FakeEngine, page, recorded, rendered, reply, text_of, tokens_of, with_figures


class FakeSglang(FakeEngine):
    """``metrics``: started with ``--enable-metrics``. ``tokenizes_chats``: as newer versions do."""

    name = "sglang"
    completion_tokens = 16
    before_prompts = "<s>"

    def __init__(self, *, metrics: bool = True, tokenizes_chats: bool = True, parallel: int = 2) -> None:
        super().__init__(parallel=parallel)
        self.metrics = metrics
        self.tokenizes_chats = tokenizes_chats
        self.adapters: list[str] = []

    def chat_prompt(self, body: dict[str, Any]) -> str:
        *before, last = body["messages"]
        if last["role"] != "assistant":
            return rendered(body["messages"])
        if body.get("continue_final_message"):
            return rendered(before) + last["content"]
        return rendered([*before, {"role": "user", "content": last["content"]}])

    async def serve_page(self, request: web.Request) -> web.Response:  # noqa: PLR0911 - one for each page
        match request.method, request.path:
            case "GET", "/health":
                return web.Response(status=503 if self.loading else 200)
            case "GET", "/v1/models":
                listed = json.loads(recorded(self.name, "models.json"))
                listed["data"] += [listed["data"][0] | {"id": name, "parent": self.model} for name in self.adapters]
                return reply(listed)
            case "GET", "/metrics" if self.metrics:
                return page(self._metrics(), content_type="text/plain")
            case "POST", "/tokenize":
                return self._tokenize(await request.json())
            case "POST", "/detokenize":
                body = await request.json()
                return reply({"text": text_of(body["tokens"], specials=not body.get("skip_special_tokens", True))})
            case "POST", "/load_lora_adapter":
                self.adapters.append((await request.json())["lora_name"])
                return reply({"success": True})
            case "POST", "/unload_lora_adapter":
                self.adapters.remove((await request.json())["lora_name"])
                return reply({"success": True})
        return reply({"detail": "Not Found"}, 404)

    def _metrics(self) -> bytes:
        """Before the first request its gauges are not there."""
        if not self.asked:
            return b""
        figures = {"num_running_reqs": self.running, "num_queue_reqs": self.waiting, "num_used_tokens": self.steps}
        return with_figures(recorded(self.name, "metrics.txt"), {f"sglang:{name}": figures[name] for name in figures})

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        chat = "messages" in body
        refused = body.get("continue_final_message") and body.get("add_generation_prompt") is False
        if chat and (refused or not self.tokenizes_chats):
            return reply({"object": "error", "message": "it cannot be", "type": "BadRequest", "code": 400}, 400)
        tokens = tokens_of(self.chat_prompt(body)) if chat else tokens_of(self.before_prompts + body["prompt"])
        return reply({"tokens": tokens, "count": len(tokens), "max_model_len": 131_072})
