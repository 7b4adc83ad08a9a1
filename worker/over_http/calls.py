"""Calls of the worker protocol to one of several Routers.

Each call may be repeated without harm, so one that is not answered is sent to the next Router at once: the worker goes
on there with the same session and the same leases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel

from queue_schemas import (
    AuthenticationFailed,
    BadMessage,
    BadRequest,
    BrokerUnavailable,
    Fenced,
    InferqError,
    ManagerUnavailable,
    UnknownWorker,
    WorkerIdTaken,
)
from queue_schemas.errors import PermissionRefused, ShuttingDown
from queue_schemas.worker_protocol.encoding import MSGPACK, decode, encode
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from telemetry.http.fleet_session import fleet_session
from telemetry.redaction import redact_url

from ..addresses import Addresses

CONNECT_LIMIT_S = 5.0
ANSWER_LIMIT_S = 10.0
"""How long an answer may take beyond the time for which the call may be held."""
LEAST_BYTES_PER_S = 16 * 1024
"""A call with a body may take longer, as on a slow link."""
MAX_ANSWER_BYTES = 256 << 20
_ERRORS: Mapping[str, type[InferqError]] = {
    kind.code: kind
    for kind in (AuthenticationFailed, Fenced, ManagerUnavailable, PermissionRefused, UnknownWorker, WorkerIdTaken)
}
_UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)

_M = TypeVar("_M", bound=BaseModel)


class RouterCalls:
    """Calls Routers, one at a time; of ``addresses`` the one in use first. Use and close it in one event loop."""

    def __init__(self, addresses: Addresses) -> None:
        self._urls = [url.rstrip("/") for url in addresses.urls]
        self._addresses = addresses
        self._session: aiohttp.ClientSession | None = None
        self.sent = 0
        """Calls sent so far."""

    @property
    def url(self) -> str:
        """That of the Router in use."""
        return self._urls[0]

    async def ask(self, path: str, message: Mapping[str, Any], kind: type[_M], *, wait_s: float = 0.0) -> _M:
        """POST ``message``; the answer. ``wait_s``: how long it may be held. Raises as :meth:`send`."""
        return decode(await self.send("POST", path, message, wait_s=wait_s), MSGPACK, kind)

    async def send(
        self, method: str, path: str, message: Mapping[str, Any] | None = None, *, wait_s: float = 0.0
    ) -> bytes:
        """The body of the answer, in msgpack. Raises ``BrokerUnavailable`` if no Router answers, and what one refuses
        as the error that it names, or ``BadRequest``."""
        body = None if message is None else encode(message, MSGPACK)
        failure: InferqError | None = None
        # The one in use may just have closed a connection as idle: one more try is for that.
        for _ in range(len(self._urls) + 1):
            url = self._urls[0]
            try:
                status, content = await self._exchange(method, url + WORKER_PREFIX + path, body, wait_s)
            except _UNREACHABLE as error:
                failure = BrokerUnavailable(f"{redact_url(url)} does not answer ({type(error).__name__}: {error})")
                self._turn(url)
                continue
            if status < 300:
                return content
            failure = _refusal(status, content, redact_url(url))
            if not isinstance(failure, ShuttingDown):
                raise failure
            self._turn(url)
        assert failure is not None  # noqa: S101 - there is one try at least
        raise BrokerUnavailable(failure.message) from failure

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _turn(self, failed: str) -> None:
        """Use the next Router, unless another call has turned already."""
        if self._urls[0] == failed:
            self._urls = [*self._urls[1:], failed]

    async def _exchange(self, method: str, url: str, body: bytes | None, wait_s: float) -> tuple[int, bytes]:
        session = self._session
        if session is None:
            session = self._session = fleet_session(headers=self._addresses.headers, connections=0)
        limit_s = ANSWER_LIMIT_S + wait_s + (len(body) / LEAST_BYTES_PER_S if body else 0.0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S, sock_read=limit_s)
        headers = {"accept": MSGPACK} if body is None else {"accept": MSGPACK, "content-type": MSGPACK}
        tls = True if self._addresses.tls is None else self._addresses.tls
        self.sent += 1
        async with session.request(
            method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False, ssl=tls
        ) as answer:
            return answer.status, await _read(answer)


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    content = await answer.content.read(MAX_ANSWER_BYTES)
    while more := await answer.content.read(MAX_ANSWER_BYTES - len(content)):
        content += more
    return content


def _refusal(status: int, content: bytes, url: str) -> InferqError:
    """The error in an answer. Whatever a later call may be answered otherwise is ``BrokerUnavailable``."""
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"{url} answers {status}: is it the address of a Router?"
    if code == ShuttingDown.code:
        return ShuttingDown(message)
    if code in _ERRORS:
        return _ERRORS[code](message)
    if code == BadMessage.code:
        return BadMessage(message)
    return BadRequest(message) if 400 <= status < 500 and status != 429 and code else BrokerUnavailable(message)
