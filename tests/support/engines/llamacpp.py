"""``llama-server`` as it answered itself (``tests/fixtures/engines/llamacpp``)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from .fake import FakeEngine, page, recorded, rendered, reply, tokens_of, with_figures

_CONTINUES = (True, "content", "reasoning_content")


class FakeLlamacpp(FakeEngine):
    """``metrics``: started with ``--metrics``. ``knows_continuation``: of May 2026 or later."""

    name = "llamacpp"

    def __init__(self, *, metrics: bool = True, knows_continuation: bool = True, parallel: int = 2) -> None:
        super().__init__(parallel=parallel)
        self.metrics = metrics
        self.knows_continuation = knows_continuation

    def chat_prompt(self, body: dict[str, Any]) -> str:
        *before, last = body["messages"]
        return rendered(before) + last["content"] if last["role"] == "assistant" else rendered(body["messages"])

    def repeats(self, body: dict[str, Any]) -> str:
        last = body["messages"][-1]
        goes_on = self.knows_continuation and body.get("continue_final_message") in _CONTINUES
        return "" if goes_on or last["role"] != "assistant" else last["content"]

    async def serve_page(self, request: web.Request) -> web.Response:  # noqa: PLR0911 - one for each page
        if self.loading:
            return page(recorded(self.name, "health_loading.json"), 503)
        match request.method, request.path:
            case "GET", "/health":
                return reply({"status": "ok"})
            case "GET", "/v1/models":
                return page(recorded(self.name, "models.json"))
            case "GET", "/metrics" if not self.metrics:
                return page(recorded(self.name, "metrics_off.json"), 501)
            case "GET", "/metrics":
                figures = {"requests_processing": self.running, "requests_deferred": self.waiting}
                figures["n_decode_total"] = self.steps
                values = {f"llamacpp:{name}": value for name, value in figures.items()}
                return page(with_figures(recorded(self.name, "metrics.txt"), values), content_type="text/plain")
            case "POST", "/apply-template":
                return self._apply_template(await request.json())
            case "POST", "/tokenize":
                return reply({"tokens": tokens_of((await request.json()).get("content", ""))})
        return reply({"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, 404)

    def _apply_template(self, body: dict[str, Any]) -> web.Response:
        goes_on = self.knows_continuation and body.get("continue_final_message") in _CONTINUES
        if goes_on and body.get("add_generation_prompt", True):
            return page(recorded(self.name, "apply_template_refused.json"), 400)
        return reply({"prompt": self.chat_prompt(body)})
