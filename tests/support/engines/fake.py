"""A server that stands in for an engine: its pages and answers as recorded or documented, and a model that knows one
answer, so that every gap and every repetition shows.

It takes ``parallel`` requests at a time; further ones wait. A token is a character, or a word in angle brackets.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

FIXTURES = Path(__file__).parents[2] / "fixtures" / "engines"
ANSWER = "Once upon a time there was a queue that lost no job, said nothing twice, and left nothing out. " * 2
STEP_CHARACTERS = 4
SPECIALS = ("<s>", "<user>", "<end>", "<assistant>")
_FIRST_SPECIAL = 128_000
_TOKEN = re.compile("|".join(map(re.escape, SPECIALS)) + "|.", re.DOTALL)


def recorded(engine: str, name: str) -> bytes:
    """A recorded or documented answer of an engine."""
    return (FIXTURES / engine / name).read_bytes()


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """The JSON of each event of a stream but ``[DONE]``."""
    data = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n") if event.startswith(b"data: {")]
    return [json.loads(one) for one in data]


def with_figures(page: bytes, figures: Mapping[str, float]) -> bytes:
    """A metrics page with other values of these samples."""
    for name, value in figures.items():
        page = re.sub(rb"(?m)^(%s(?:\{[^\n]*\})?) \S+$" % re.escape(name.encode()), rb"\g<1> %g" % value, page)
    return page


def tokens_of(text: str) -> list[int]:
    """A text's tokens."""
    found = _TOKEN.findall(text)
    return [_FIRST_SPECIAL + SPECIALS.index(one) if one in SPECIALS else ord(one) for one in found]


def text_of(tokens: list[int], *, specials: bool) -> str:
    """The text of tokens, with or without special ones."""
    return "".join(
        chr(one) if one < _FIRST_SPECIAL else SPECIALS[one - _FIRST_SPECIAL] if specials else "" for one in tokens
    )


def rendered(messages: list[dict[str, str]]) -> str:
    """A chat as the model's template writes it, with the beginning of an answer behind it."""
    written = "".join(f"<{message['role']}>{message['content']}<end>" for message in messages)
    return f"<s>{written}<assistant>"


def reply(fields: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.json_response(fields, status=status)


def page(body: bytes, status: int = 200, content_type: str = "application/json") -> web.Response:
    """A recorded answer."""
    return web.Response(body=body, status=status, content_type=content_type)


class FakeEngine:
    """What the engines have in common. ``asked``: path and body of each inference request."""

    name = ""
    completion_tokens: int | None = None
    """What a completion without ``max_tokens`` may say."""
    before_prompts = ""
    """What its tokenizer puts in front of a completion's prompt."""

    def __init__(self, *, parallel: int = 2) -> None:
        self.url = ""
        self.parallel = parallel
        self.pace_s = 0.004
        """Between two steps of a stream."""
        self.loading = False
        self.running = self.waiting = self.steps = self.aborted = 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.pages: list[str] = []
        """The pages that were looked at, and questions about prompts."""
        self._room = asyncio.Semaphore(parallel)
        self._chunks = events_of(recorded(self.name, "chat.sse"))

    @property
    def model(self) -> str:
        """The model that it lists first."""
        listed: list[dict[str, str]] = json.loads(recorded(self.name, "models.json"))["data"]
        return listed[0]["id"]

    def chat_prompt(self, body: dict[str, Any]) -> str:
        """The prompt that it makes of a chat."""
        raise NotImplementedError

    def repeats(self, _body: dict[str, Any]) -> str:
        """What of the prompt a chat's answer says once more."""
        return ""

    async def serve_page(self, request: web.Request) -> web.Response:
        """Anything that is no inference."""
        raise NotImplementedError

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeEngine]:
        """Serve at ``url``."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._infer)
        app.router.add_post("/v1/completions", self._infer)
        app.router.add_route("*", "/{path:.*}", self._page)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        self.pages.append(request.path)
        return await self.serve_page(request)

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append((request.path, body))
        chat = "messages" in body
        prompt = self.chat_prompt(body) if chat else self.before_prompts + body["prompt"]
        rest = _rest_behind(prompt)
        limit = body.get("max_tokens") or (None if chat else self.completion_tokens)
        said = rest[:limit]
        finish = "stop" if said == rest else "length"
        usage = {"prompt_tokens": len(tokens_of(prompt)), "completion_tokens": len(said)}
        usage["total_tokens"] = sum(usage.values())
        try:
            async with self._slot():
                if body.get("stream"):
                    text = (self.repeats(body) if chat else "") + said
                    return await self._stream(request, body, text, finish, usage)
                await asyncio.sleep(self.pace_s)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        message = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        base = {name: value for name, value in self._chunks[0].items() if name != "choices"}
        whole = base | {"choices": [{"index": 0, **message, "finish_reason": finish}], "usage": usage}
        return reply(whole | {"object": "chat.completion" if chat else "text_completion"})

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._room.release()

    async def _stream(
        self, request: web.Request, body: dict[str, Any], text: str, finish: str, usage: dict[str, int]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        chat, first = "messages" in body, True
        if chat and not self._chunks[0]["choices"][0]["delta"].get("content"):
            await answer.write(_event(self._chunks[0]))
        for place in range(0, len(text), STEP_CHARACTERS):
            await asyncio.sleep(self.pace_s)
            self.steps += 1
            await answer.write(self._piece(text[place : place + STEP_CHARACTERS], None, chat=chat, first=first))
            first = False
        await answer.write(self._piece("", finish, chat=chat, first=False))
        if (body.get("stream_options") or {}).get("include_usage"):
            await answer.write(_event(self._base(chat=chat) | {"choices": [], "usage": usage}))
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def _piece(self, text: str, finish: str | None, *, chat: bool, first: bool) -> bytes:
        """A step of a stream, in the form of the recorded one."""
        recorded_choice = self._chunks[0 if first else 1]["choices"][0]
        said = {"delta": recorded_choice["delta"] | {"content": text}} if chat else {"text": text}
        if finish and chat:
            said = {"delta": self._chunks[-2]["choices"][0]["delta"]}
        return _event(self._base(chat=chat) | {"choices": [{"index": 0, **said, "finish_reason": finish}]})

    def _base(self, *, chat: bool) -> dict[str, Any]:
        base = {name: value for name, value in self._chunks[0].items() if name != "choices"}
        return base if chat else base | {"object": "text_completion"}


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _rest_behind(prompt: str) -> str:
    """What is missing of the answer behind a prompt that ends with a beginning of it."""
    begun = next((size for size in range(len(ANSWER), 0, -1) if prompt.endswith(ANSWER[:size])), 0)
    return ANSWER[begun:]
