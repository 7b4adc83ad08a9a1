"""The engine beside a worker under test. The message of a chat says what it does, so that a rule knows what must come.

``stream 5``: five events and the end; ``slow 20``: twenty, a tenth of a second apart; ``break 3``: the connection
breaks after three; ``held``: one, and then nothing until :attr:`ScriptedEngine.release`; ``status 500``: that status;
``plain``: one JSON answer; ``garbage``: no JSON that says it is; ``bytes``: an answer that is no text; ``large``: of 20
MiB.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from .scripted_queue import MODEL

LARGE = b"0123456789abcdef" * (20 * 65_536)
BINARY = bytes(range(256)) * 8
STREAM_TYPE = "text/event-stream; charset=utf-8"


@dataclass
class EngineCall:
    """A request that the engine got."""

    path: str
    body: bytes
    content_type: str
    aborted: bool = False
    """Whether the worker closed the connection before the answer was whole."""
    finished: bool = False


def event(n: int) -> bytes:
    """The event with number ``n`` of each stream."""
    return _chunk({"content": f"word{n} "}, None)


def _chunk(delta: Mapping[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


FINISH = _chunk({}, "stop")
DONE = b"data: [DONE]\n\n"


def whole_stream(events: int) -> bytes:
    """What a stream of so many events is."""
    return b"".join(map(event, range(events))) + FINISH + DONE


def plain_answer(content: str) -> bytes:
    """What ``plain`` and what follows it is answered: with spaces and letters that must arrive as they are."""
    message = {"role": "assistant", "content": f"you said: {content} \u00e9\u6c34"}
    answer = {"id": "chatcmpl-1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return json.dumps(answer, ensure_ascii=False, indent=1).encode()


@dataclass
class ScriptedEngine:
    """An OpenAI-compatible server on loopback."""

    url: str = ""
    calls: list[EngineCall] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/{path:.*}", self._infer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        call = EngineCall(request.path, await request.read(), request.headers.get("content-type", ""))
        words = _content(call.body).split()
        if not words:
            return web.json_response({"error": {"message": "no message"}}, status=400)
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = await self._act(request, words)
        except (asyncio.CancelledError, ConnectionError):
            call.aborted = True
            raise
        finally:
            self.running -= 1
        call.finished = True
        return answer

    async def _act(self, request: web.Request, words: list[str]) -> web.StreamResponse:
        what, number = words[0], int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
        match what:
            case "stream" | "slow" | "break" | "held":
                return await self._stream(request, what, number)
            case "status":
                return web.Response(status=number, body=b'{"error": {"message": "scripted"}}', content_type=_JSON)
            case "garbage":
                return web.Response(body=b"\x00\xff<<<", content_type=_JSON)
            case "bytes":
                return web.Response(body=BINARY, content_type="audio/mpeg")
            case "large":
                return web.Response(body=LARGE, content_type="application/octet-stream")
            case "pause":
                await asyncio.sleep(number / 1000)
        return web.Response(body=plain_answer(" ".join(words)), content_type=_JSON)

    async def _stream(self, request: web.Request, what: str, number: int) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": STREAM_TYPE})
        await answer.prepare(request)
        for n in range(1 if what == "held" else number):
            await answer.write(event(n))
            await asyncio.sleep(0.1 if what == "slow" else 0.005)
        if what == "break":
            assert request.transport is not None  # noqa: S101 - it is connected
            request.transport.abort()
            return answer
        if what == "held":
            await self.release.wait()
        await answer.write(FINISH)
        await answer.write(DONE)
        await answer.write_eof()
        return answer


_JSON = "application/json"


def _content(body: bytes) -> str:
    try:
        return str(json.loads(body)["messages"][-1]["content"])
    except (ValueError, KeyError, TypeError, IndexError):
        return "plain"
