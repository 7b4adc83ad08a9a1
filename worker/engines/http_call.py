"""One HTTP exchange with an engine: send a request on a pooled connection, and give its answer to :mod:`.http`."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType

from queue_schemas import EngineFailed
from queue_schemas.headers import retry_after_s
from telemetry import get_logger

from .connection import ConnectionPool, EngineConnection
from .port import EngineAnswer, EngineCall
from .step_reader import StepReader

REPOST_LIMIT_S = 0.05
"""A kept connection that closes this soon after a request was closed as idle: the two crossed on their way. An engine
that closes later had the request, and may have worked on it."""
HEADERS_REFUSED = frozenset({400, 422, 431})
"""How an engine may refuse a request because of headers that it does not expect."""
UNSAFE = re.compile(r"[^\x21-\x7e]")
"""What must not stand in a request line or a header: it would begin another line."""

log = get_logger(__name__)


class Learned:
    """What is known of an engine. ``calls``: under way now. ``takes_optional``: whether it takes headers that serve
    observers only, ``x-request-id`` and ``traceparent``; None until it answered a request that had some.
    ``tells_load``: whether its metrics have told its load."""

    __slots__ = ("calls", "takes_optional", "tells_load")

    def __init__(self) -> None:
        self.calls = 0
        self.takes_optional: bool | None = None
        self.tells_load = False


class HttpCall:
    """One request under way: an async context manager that gives its answer.

    ``bare``: the same request without optional headers, where it is not known yet whether the engine takes them.
    """

    __slots__ = ("_bare", "_connection", "_learned", "_pool", "_request")

    def __init__(self, pool: ConnectionPool, request: bytes, learned: Learned, bare: bytes = b"") -> None:
        self._pool = pool
        self._request = request
        self._learned = learned
        self._bare = bare
        self._connection: EngineConnection | None = None

    async def __aenter__(self) -> EngineAnswer:
        self._learned.calls += 1
        try:
            connection = await self._ask(self._request)
            if self._bare:
                connection = await self._learn(connection)
        except BaseException:
            self._learned.calls -= 1
            raise
        self._connection = connection
        return _HttpAnswer(connection)

    async def _learn(self, connection: EngineConnection) -> EngineConnection:
        """Find out whether the engine takes optional headers. One that refuses the request, which costs it nothing, is
        asked again without them; what it then answers is the answer."""
        learned = self._learned
        if connection.status not in HEADERS_REFUSED:
            if connection.status < 400:
                learned.takes_optional = True
            return connection
        connection.close()
        connection = await self._ask(self._bare)
        if connection.status not in HEADERS_REFUSED:
            log.info("engine_takes_no_optional_headers", without=["x-request-id", "traceparent"])
            learned.takes_optional = False
        return connection

    async def _ask(self, request: bytes) -> EngineConnection:
        kept = self._pool.take()
        if kept is not None:
            try:
                return await _send(kept, request)
            except EngineFailed as error:
                # Closed as idle just when it was used again. Repeating a POST is right only because the engine cannot
                # have had it: not one byte was answered, and the end came too soon (RFC 9112, section 9.3.1).
                if not kept.silent or kept.lost_after_s > REPOST_LIMIT_S:
                    raise
                return await _send(await self._connect_again(error), request)
        return await _send(await self._pool.connect(), request)

    async def _connect_again(self, error: EngineFailed) -> EngineConnection:
        try:
            return await self._pool.connect()
        except EngineFailed:
            # It was no idle connection then: the engine went away with the request.
            raise error from None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._learned.calls -= 1
        if self._connection is not None:
            self._pool.give_back(self._connection)


class _HttpAnswer:
    __slots__ = ("_connection",)

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection

    @property
    def status(self) -> int:
        return self._connection.status

    @property
    def content_type(self) -> str:
        return self._connection.content_type

    @property
    def retry_after_s(self) -> float | None:
        headers = self._connection.headers
        if (milliseconds := headers.get("retry-after-ms", "")).isdecimal():
            return float(milliseconds[:12]) / 1000
        return retry_after_s(headers.get("retry-after", ""), time.time())

    @property
    def headers(self) -> Mapping[str, str]:
        return self._connection.headers

    @property
    def delimited(self) -> bool:
        return self._connection.delimited

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        while data := await self._connection.piece():
            yield data

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        return await self._connection.read_in_steps(reader, take)

    async def read(self, limit_bytes: int) -> bytes:
        connection = self._connection
        body = await connection.piece()
        if connection.complete:
            return body
        parts = [body]
        size = len(body)
        while size <= limit_bytes and (data := await connection.piece()):
            parts.append(data)
            size += len(data)
        return b"".join(parts)


async def _send(connection: EngineConnection, request: bytes) -> EngineConnection:
    """Send ``request`` and wait for the head of its answer."""
    try:
        connection.send(request)
        await connection.head()
    except BaseException:
        connection.close()
        raise
    return connection


def optional_headers(call: EngineCall) -> str:
    """Header lines that serve observers only: one that cannot be sent is left out, not the job."""
    return "".join(
        f"{name}: {value}\r\n"
        for name, value in (("x-request-id", call.call_id), ("traceparent", call.traceparent), *call.headers.items())
        if value and not UNSAFE.search(value.replace(" ", ""))
    )
