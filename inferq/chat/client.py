"""Chat completions through a Router, in one piece or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from ..client import RequestFailed, RouterClient, checked

Message = Mapping[str, str]


@dataclass(slots=True)
class Answer:
    """One chat answer and its timing, in seconds since the request was sent."""

    text: str = ""
    model: str = ""
    request_id: str = ""
    finish_reason: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)


class ChatClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def chat(self, model: str, messages: Sequence[Message], **parameters: object) -> Answer:
        """One chat completion in one piece."""
        began = time.monotonic()
        async with self._ask("/v1/chat/completions", model, messages, stream=False, **parameters) as response:
            data = orjson.loads(await checked(response))
            choice = data["choices"][0]
            took = time.monotonic() - began
            return Answer(
                text=choice["message"].get("content") or "",
                model=data.get("model", model),
                request_id=response.headers.get("x-request-id", ""),
                finish_reason=choice.get("finish_reason") or "",
                first_s=took,
                total_s=took,
                usage=data.get("usage") or {},
            )

    async def stream_chat(
        self, answer: Answer, model: str, messages: Sequence[Message], **parameters: object
    ) -> AsyncIterator[str]:
        """A streamed chat completion: yields the text's pieces as they come and fills ``answer``."""
        began = time.monotonic()
        options = {"stream_options": {"include_usage": True}, **parameters}
        async with self._ask("/v1/chat/completions", model, messages, stream=True, **options) as response:
            answer.request_id = response.headers.get("x-request-id", "")
            if response.status != 200:
                await checked(response)
            async for event in _events(response):
                if "error" in event:
                    raise RequestFailed(str(event["error"].get("message", event["error"])))
                answer.model = event.get("model", answer.model)
                answer.usage = event.get("usage") or answer.usage
                for choice in event.get("choices", [])[:1]:
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    piece = choice.get("delta", {}).get("content")
                    if piece:
                        answer.first_s = answer.first_s or time.monotonic() - began
                        answer.text += piece
                        yield piece
            answer.total_s = time.monotonic() - began

    @asynccontextmanager
    async def _ask(
        self, path: str, model: str, messages: Sequence[Message], **fields: object
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = orjson.dumps({"model": model, "messages": list(messages), **fields})
        async with self.send_inference(path, body, "application/json") as response:
            yield response


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each ``data:`` line of an event stream (WHATWG HTML, 9.2), until ``[DONE]``."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield orjson.loads(data)
