"""Probe a worker's health port over HTTP: which session answers there, if any (for the failure detector)."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from queue_schemas import SessionId, WorkerId

from .core import ProbeResult, ProbeStatus

MAX_ANSWER_BYTES = 65_536


class HttpWorkerProbe:
    """Asks ``GET <url>/health``; use it as ``async with``.

    The URL comes from a registration, so the answer is bounded, redirects are not followed, and only who answered
    is returned.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A fresh connection each time: whether the port still listens is what we want to know.
        self._session = aiohttp.ClientSession(
            timeout=self._timeout, connector=aiohttp.TCPConnector(force_close=True), trust_env=False
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, url: str, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
        if self._session is None:
            raise RuntimeError("enter the probe first")
        try:
            async with self._session.get(url.rstrip("/") + "/health", allow_redirects=False) as answer:
                content = await answer.content.read(MAX_ANSWER_BYTES)
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno == errno.ECONNREFUSED:
                return ProbeResult(ProbeStatus.REFUSED, f"{url} refuses connections from here")
            return ProbeResult(
                ProbeStatus.UNKNOWN, f"{url} cannot be reached from here ({error.os_error.strerror or error})"
            )
        except TimeoutError:
            return ProbeResult(ProbeStatus.UNKNOWN, f"{url} does not answer in time")
        except (aiohttp.ClientError, ValueError, UnicodeError) as error:
            return ProbeResult(ProbeStatus.UNKNOWN, f"{url} cannot be asked ({type(error).__name__})")
        return _identify(url, content, worker_id, session_id)


def _identify(url: str, content: bytes, worker_id: WorkerId, session_id: SessionId) -> ProbeResult:
    try:
        answer = orjson.loads(content)
        name, session = str(answer["worker_id"]), str(answer["session_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ProbeResult(ProbeStatus.UNKNOWN, f"{url} is answered by something that is no worker of this fabric")
    if session == session_id:
        return ProbeResult(ProbeStatus.SAME)
    if name == worker_id:
        return ProbeResult(ProbeStatus.OTHER, f"{url} is answered by another session of this worker")
    return ProbeResult(
        ProbeStatus.OTHER, f"{url} is answered by worker {name[:63]!r}: give this one the URL it listens on"
    )
