"""The simulated engine as a bare ASGI application.

A request whose answer needs no wait costs two sends and nothing else. Only one that waits is watched for its client
going away, which aborts it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from .adapter_load import AdapterLoad
from .api.wire import Reply
from .run import ConnectionClosed, EngineCrashed, Run
from .simulation import Simulation

MAX_BODY_BYTES = 128 * 1024 * 1024


def crash_process() -> None:
    """End this process as a segmentation fault or the kernel's memory killer would: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class _ClientGone(Exception):
    pass


class SimulationApp:
    """The ASGI application of ``simulation``. ``crash`` is called where a crash was ordered."""

    def __init__(self, simulation: Simulation, crash: Callable[[], None] = crash_process) -> None:
        self._simulation = simulation
        self._crash = crash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a simulated engine speaks http, not {scope['type']}")
        try:
            body = await _read_body(receive)
            answer = self._simulation.open(scope["method"], scope["path"], body)
            if isinstance(answer, Reply):
                await _send_reply(send, answer)
            else:
                await _send_run(receive, send, answer)
        except* EngineCrashed:
            self._crash()
        except* ConnectionClosed as group:
            await _send_part(send, group)
        except* _ClientGone:
            pass


async def _read_body(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body
    parts, size = [body], len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise ConnectionClosed
    return b"".join(parts)


async def _send_run(receive: Receive, send: Send, run: Run | AdapterLoad) -> None:
    """Send what ``run`` gives; abort it when the client goes away."""
    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(_watch_client(receive))
        if isinstance(run, Run) and run.streams:
            await _send_events(send, run)
        else:
            await _send_reply(send, await run.reply())
        watcher.cancel()


async def _watch_client(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    raise _ClientGone


async def _send_reply(send: Send, reply: Reply) -> None:
    length = str(len(reply.body)).encode()
    headers = [(b"content-type", reply.content_type.encode()), (b"content-length", length)]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


async def _send_events(send: Send, run: Run) -> None:
    headers = [(b"content-type", run.content_type.encode()), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with aclosing(run.events()) as pieces:
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ConnectionClosed:
            return  # the server closes the connection of an answer that is left without its end
    await send({"type": "http.response.body", "body": b""})


async def _send_part(send: Send, closed: BaseExceptionGroup[ConnectionClosed]) -> None:
    """Begin a plain answer and leave it without its end."""
    for error in _leaves(closed):
        length = str(max(error.total, len(error.partial) + 1)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": error.partial, "more_body": True})
        return


def _leaves(group: BaseExceptionGroup[ConnectionClosed]) -> list[ConnectionClosed]:
    found: list[ConnectionClosed] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
