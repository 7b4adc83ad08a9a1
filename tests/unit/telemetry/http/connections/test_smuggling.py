"""Requests that parsers may disagree about, sent straight to the server."""

from __future__ import annotations

import asyncio
import re

import pytest

from telemetry.http.connections import ConnectionLimits
from tests.support.smuggling import HIDDEN, PAIRS, TWO_BY_RIGHT
from tests.support.sockets import RawClient
from tests.unit.telemetry.http.connections.serving import EchoApp, serving

LIMITS = ConnectionLimits(body_idle_timeout_s=0.5, head_timeout_s=0.5, keep_alive_s=0.5, linger_s=0.5)


async def exchanged(request: bytes, *, split: bool) -> tuple[EchoApp, bytes]:
    """What an app saw of ``request``, and all that was answered until the connection ended."""
    app, at = EchoApp(), request.index(b"\n") + 3 if split else len(request)
    async with serving(app, LIMITS) as port, RawClient.to(port) as client:
        await client.send(request[:at])
        await asyncio.sleep(0.05)
        await client.send(request[at:])
        return app, await client.ended()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "in pieces"])
async def test_no_reading_of_a_request_hides_another(split: bool) -> None:
    """[B4] A request that can be read in two ways is refused and ends its connection; none makes two of one."""
    names = sorted(PAIRS.keys() - TWO_BY_RIGHT)
    results = await asyncio.gather(*(exchanged(PAIRS[name], split=split) for name in names))
    wrong = {}
    for name, (app, text) in zip(names, results, strict=True):
        bodies = [body for _, _, body in app.seen]
        if bodies not in ([], [HIDDEN]) or len(re.findall(rb"HTTP/1.1 [2-5]\d\d ", text)) != 1:
            wrong[name] = (app.seen, text)
    assert not wrong


async def test_what_all_read_alike_is_served() -> None:
    """What follows a body that no parser doubts is the next request."""
    for name in sorted(name for name in TWO_BY_RIGHT if "underscore" not in name):
        app, text = await exchanged(PAIRS[name], split=False)
        assert [path for _, path, _ in app.seen] == ["/echo", "/hidden"], name
        assert text.count(b"HTTP/1.1 200") == 2
