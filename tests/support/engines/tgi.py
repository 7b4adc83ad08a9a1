"""text-generation-inference as its source and docs say (``tests/fixtures/engines/tgi``)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from .fake import FakeEngine, page, recorded, rendered, reply, text_of, tokens_of, with_figures


class FakeTgi(FakeEngine):
    """It goes on behind an assistant's last message, without the white space at its end."""

    name = "tgi"

    def chat_prompt(self, body: dict[str, Any]) -> str:
        *before, last = body["messages"]
        if last["role"] != "assistant":
            return rendered(body["messages"])
        return (rendered(before) + last["content"]).rstrip()

    async def serve_page(self, request: web.Request) -> web.Response:  # noqa: PLR0911 - one for each page
        match request.method, request.path:
            case "GET", "/health" if self.loading:
                return page(recorded(self.name, "health_unhealthy.json"), 503)
            case "GET", "/health":
                return web.Response()
            case "GET", "/v1/models":
                return page(recorded(self.name, "models.json"))
            case "GET", "/info":
                return page(recorded(self.name, "info.json"))
            case "GET", "/metrics":
                return page(self._metrics(), content_type="text/plain")
            case "POST", "/chat_tokenize":
                text = self.chat_prompt(await request.json())
                return reply({"tokenize_response": _tokens(text), "templated_text": text})
            case "POST", "/tokenize":
                return reply(_tokens((await request.json())["inputs"]))
        return web.Response(status=404)

    def _metrics(self) -> bytes:
        """Before the first request nothing is there."""
        if not self.asked:
            return b""
        figures = {"tgi_batch_current_size": self.running, "tgi_queue_size": self.waiting}
        page_ = with_figures(recorded(self.name, "metrics.txt"), figures)
        return page_.replace(b'{method="decode"} 1203', b'{method="decode"} %d' % self.steps)


def _tokens(text: str) -> list[dict[str, Any]]:
    return [{"id": one, "text": text_of([one], specials=True), "start": 0, "stop": 0} for one in tokens_of(text)]
