"""Calls of the worker protocol to one of several Routers.

Each call may be repeated without harm, so one that is not answered is sent to the next Router at once: the worker goes
on there with the same session and the same leases.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from queue_schemas import (
    AuthenticationFailed,
    BadMessage,
    BadRequest,
    BrokerUnavailable,
    EngineFailed,
    Fenced,
    InferqError,
    ManagerUnavailable,
    UnknownWorker,
)
from queue_schemas.errors import PermissionRefused, ShuttingDown
from queue_schemas.worker_protocol.encoding import MSGPACK, decode, encode
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from telemetry.redaction import redact_url

from ..engines.connection import ConnectionPool
from ..registration.addresses import Addresses

ANSWER_LIMIT_S = 10.0
"""How long an answer may take beyond the time for which the call may be held."""
LEAST_BYTES_PER_S = 16 * 1024
"""A call with a body may take longer, as on a slow link."""
MAX_ANSWER_BYTES = 256 << 20
_ERRORS: Mapping[str, type[InferqError]] = {
    kind.code: kind
    for kind in (
        *(AuthenticationFailed, BadMessage, Fenced, ManagerUnavailable, PermissionRefused, ShuttingDown),
        UnknownWorker,
    )
}

_M = TypeVar("_M", bound=BaseModel)


class _Router:
    """One Router: connections to it, and what each call to it begins with."""

    def __init__(self, url: str, addresses: Addresses) -> None:
        parts = urlsplit(url)
        self.name = redact_url(url)
        self.pool = ConnectionPool(url, f"the router at {self.name}", addresses.tls)
        self.path = parts.path.rstrip("/") + WORKER_PREFIX
        headers = {"host": parts.netloc.rpartition("@")[2], "accept": MSGPACK, **addresses.headers}
        self.head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of an answer. Raises ``EngineFailed`` if there is none."""
        head = f"{method} {self.path}{path} HTTP/1.1\r\n{self.head}"
        if body is not None:
            head += f"content-type: {MSGPACK}\r\n"
        length = 0 if body is None else len(body)
        request = f"{head}content-length: {length}\r\n\r\n".encode("latin-1") + (body or b"")
        connection = self.pool.take() or await self.pool.connect()
        try:
            connection.send(request)
            await connection.head()
            content = b""
            while piece := await connection.piece():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise EngineFailed(f"the router at {self.name} answers more than {MAX_ANSWER_BYTES} bytes")
            return connection.status, content
        finally:
            self.pool.give_back(connection)


class RouterCalls:
    """Calls Routers, one at a time; of ``addresses`` the one in use first. Use and close it in one event loop."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._routers: list[_Router] = []
        self.sent = 0
        """Calls sent so far."""

    async def ask(self, path: str, message: Mapping[str, Any], kind: type[_M], *, wait_s: float = 0.0) -> _M:
        """POST ``message``; the answer. ``wait_s``: how long it may be held. Raises as :meth:`send`."""
        return decode(await self.send("POST", path, message, wait_s=wait_s), MSGPACK, kind)

    async def send(
        self, method: str, path: str, message: Mapping[str, Any] | None = None, *, wait_s: float = 0.0
    ) -> bytes:
        """The body of the answer, in msgpack. Raises ``BrokerUnavailable`` if no Router answers, and what one refuses
        as the error that it names, or ``BadRequest``."""
        if not self._routers:
            self._routers = [_Router(url, self._addresses) for url in self._addresses.urls]
        body = None if message is None else encode(message, MSGPACK)
        limit_s = ANSWER_LIMIT_S + wait_s + (len(body) / LEAST_BYTES_PER_S if body else 0.0)
        failure = ""
        # The one in use may just have closed a connection as idle: one more try is for that.
        for _ in range(len(self._routers) + 1):
            router = self._routers[0]
            self.sent += 1
            try:
                async with asyncio.timeout(limit_s):
                    status, content = await router.exchange(method, path, body)
            except TimeoutError:
                failure = f"the router at {router.name} does not answer within {limit_s:.0f} s"
            except EngineFailed as error:
                failure = error.message
            else:
                if status < 300:
                    return content
                refusal = _refusal(status, content, router.name)
                if not isinstance(refusal, ShuttingDown):
                    raise refusal
                failure = refusal.message
            self._turn(router)
        raise BrokerUnavailable(failure)

    async def close(self) -> None:
        """Close the connections."""
        for router in self._routers:
            router.pool.close()

    def _turn(self, failed: _Router) -> None:
        """Use the next Router, unless another call has turned already."""
        if self._routers[0] is failed:
            self._routers = [*self._routers[1:], failed]


def _refusal(status: int, content: bytes, name: str) -> InferqError:
    """The error in an answer. Whatever a later call may be answered otherwise is ``BrokerUnavailable``."""
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"{name} answers {status}: is it the address of a Router?"
    if code in _ERRORS:
        return _ERRORS[code](message)
    return BadRequest(message) if 400 <= status < 500 and status != 429 and code else BrokerUnavailable(message)
