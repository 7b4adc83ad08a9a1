"""Reach an engine by HTTP: any server that answers the OpenAI API.

Used as it is for a server that somebody else runs, and inside :mod:`worker.engines.process` for one of our own.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from urllib.parse import urlsplit

from queue_schemas import BadMessage, BadRequest, EngineFailed, EngineState
from queue_schemas.fleet.messages import MAX_MODELS
from queue_schemas.fleet.model_cards import Card, bounded_cards
from queue_schemas.headers import retry_after_s
from queue_schemas.ids import check_name
from scheduling.slots import EngineLoad
from telemetry import get_logger

from ..core import read_load
from .adapter_calls import load_adapter, unload_adapter
from .connection import ConnectionPool, EngineConnection
from .port import EngineAnswer, EngineCall
from .step_reader import StepReader

PROGRESS_LIMIT_S = 2.0
CHECK_LIMIT_S = 5.0
_CHECK_READY_S = 5.0
_CHECK_AWAY_S = 1.0
REPOST_LIMIT_S = 0.05
"""A kept connection that closes this soon after a request was closed as idle: the two crossed on their way. An engine
that closes later had the request, and may have worked on it."""
HEADERS_REFUSED = frozenset({400, 422, 431})
"""How an engine may refuse a request because of headers that it does not expect."""
_MISSES_ALLOWED = 3
"""Health checks in a row that a busy engine may leave unanswered."""
_MAX_PAGE_BYTES = 16 << 20
MAX_LOAD_PAGE_BYTES = 2 << 20
"""vLLM's metrics page has about 100 kB. Its load is read every second."""
_UNSAFE = re.compile(r"[^\x21-\x7e]")
"""What must not stand in a request line or a header: it would begin another line."""
_PROGRESS = re.compile(
    rb"^vllm:(?:(?:generation_tokens|prompt_tokens|request_success)_total"
    rb"|iteration_tokens_total_sum|(?:gpu_|kv_)cache_usage_perc)(?:\{[^}]*\})? [0-9.e+-]+",
    re.MULTILINE,
)
"""What moves while vLLM works (its docs, "Metrics"). The token counters stand still during a long prefill in chunks: a
prompt is counted when its last one is done; the cache fills up meanwhile."""

log = get_logger(__name__)


class HttpEngine:
    """The engine at ``base_url``, with or without ``/v1`` at its end. ``api_key`` is sent as a bearer token."""

    failures = 0
    """It is not ours to start: how often it was, and failed, is not known here."""

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self.base_url = _base(base_url)
        self.models: tuple[str, ...] = ()
        self.cards: dict[str, Card] = {}
        self.state = EngineState.STARTING
        self.detail = f"waiting for {self.base_url} to answer"
        url = urlsplit(self.base_url)
        self._prefix = url.path
        self._always = f"host: {url.netloc.rpartition('@')[2]}\r\naccept: */*\r\n"
        if api_key:
            self._always += f"authorization: Bearer {_safe(api_key)}\r\n"
        self._pool = ConnectionPool(self.base_url)
        self._known = _Known()
        self._answered = 0
        self._misses = 0

    async def run(self, changed: Callable[[], None]) -> None:
        """Watch health and models until cancelled."""
        while True:
            before = (self.state, self.detail, self.models, self.cards)
            await self._watch()
            if (self.state, self.detail, self.models, self.cards) != before:
                changed()
            await asyncio.sleep(_CHECK_READY_S if self.state is EngineState.READY else _CHECK_AWAY_S)

    def call(self, call: EngineCall) -> _Call:
        begin = f"POST {self._prefix}{_path(call.path)} HTTP/1.1\r\n{self._always}"
        end = f"content-type: {_content_type(call.content_type)}\r\ncontent-length: {len(call.body)}\r\n\r\n"
        known = self._known
        optional = "" if known.takes_optional is False else _optional(call)
        request = f"{begin}{optional}{end}".encode("latin-1") + call.body
        if not optional or known.takes_optional:
            return _Call(self._pool, request, known)
        return _Call(self._pool, request, known, f"{begin}{end}".encode("latin-1") + call.body)

    async def progress(self) -> int | None:
        """A digest of vLLM's counters; of a server that shows none, a number that counts its answers."""
        try:
            async with asyncio.timeout(PROGRESS_LIMIT_S):
                status, metrics = await self._get("/metrics")
                if status != 200 and not await self.healthy():
                    return None
        except (TimeoutError, EngineFailed):
            return None
        self._answered += 1
        shown = _PROGRESS.findall(metrics)
        return zlib.crc32(b"\n".join(shown)) if shown else self._answered

    async def load(self) -> EngineLoad | None:
        """The load that ``/metrics`` tells. A server that has told none yet is not asked while it works: it may serve
        one request at a time, and even end a stream for this one."""
        if self._known.calls and not self._known.tells_load:
            return None
        try:
            async with asyncio.timeout(PROGRESS_LIMIT_S):
                status, page = await self._get("/metrics", MAX_LOAD_PAGE_BYTES)
        except (TimeoutError, EngineFailed):
            return None
        load = read_load(page) if status == 200 and len(page) <= MAX_LOAD_PAGE_BYTES else None
        self._known.tells_load |= load is not None
        return load

    async def load_adapter(self, name: str, path: str) -> None:
        self.models = await load_adapter(self, name, path)

    async def unload_adapter(self, name: str) -> None:
        self.models = await unload_adapter(self, name)

    async def stop(self, limit_s: float) -> None:
        """Close the connections: the engine itself is not ours to end."""
        self._pool.close()

    async def healthy(self) -> bool:
        """Whether the engine answers. Raises ``EngineFailed`` if it cannot be reached, ``TimeoutError``."""
        # Servers without /health are judged by their model list.
        return await self._health() < 500

    async def answers_well(self) -> bool:
        """Whether ``/health`` and ``/v1/models`` both answer 200: a server that starts is ready then."""
        return (await self._get("/health"))[0] == 200 and (await self._get("/v1/models"))[0] == 200

    async def list_models(self) -> tuple[str, ...]:
        """The model ids of ``/v1/models``; their cards are noted. Raises ``EngineFailed`` with what is wrong."""
        status, body = await self._get("/v1/models")
        if status != 200:
            redirects = " but with a redirect: give the URL that it leads to" if 300 <= status < 400 else ""
            raise EngineFailed(f"{self.base_url}/v1/models did not answer with a list of models{redirects}")
        try:
            page = json.loads(body)
            # Some servers answer with the bare list.
            listed = {str(model["id"]): model for model in (page if isinstance(page, list) else page["data"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineFailed(f"{self.base_url}/v1/models answers something else than a list of models") from error
        names = tuple(name for name in list(listed)[:MAX_MODELS] if _nameable(name))
        self.cards = bounded_cards({name: listed[name] for name in names})
        return names

    async def _watch(self) -> None:
        try:
            health = await self._health()
            if self._spares(health):
                self._misses = 0
                return
            models = await self.list_models() if health < 500 else ()
        except TimeoutError:
            self._misses += 1
            if self._misses >= _MISSES_ALLOWED or self.state is not EngineState.READY:
                self._away(f"{self.base_url} does not answer within {CHECK_LIMIT_S:.0f} s")
        except EngineFailed as error:
            self._away(error.message)
        else:
            self._misses = 0
            if not models:
                self._away(f"{self.base_url} is not well, or lists no models")
                return
            if self.state is not EngineState.READY:
                # It may be another server now.
                self._known.takes_optional, self._known.tells_load = None, False
                await self.load()
                log.info("engine_ready", url=str(self.base_url), models=models)
            self.state, self.detail, self.models = EngineState.READY, "", models

    def _spares(self, health: int) -> bool:
        """Whether an engine that answered ``health`` should not be asked for its models now: one without ``/health``,
        while it works. It serves one request at a time perhaps, and llama-cpp-python's even ends a stream for the next
        request, whatever that asks for."""
        return health == 404 and self._known.calls > 0 and self.state is EngineState.READY

    async def _health(self) -> int:
        return (await self._get("/health"))[0]

    def _away(self, detail: str) -> None:
        if self.state is not EngineState.FAILED:
            log.warning("engine_unreachable", url=str(self.base_url), detail=detail)
        self.state, self.detail = EngineState.FAILED, detail

    async def _get(self, path: str, limit_bytes: int = _MAX_PAGE_BYTES) -> tuple[int, bytes]:
        """Status and body of a page; of one that is larger than the limit, more than so many bytes of it."""
        async with asyncio.timeout(CHECK_LIMIT_S):
            return await self.exchange("GET", path, limit_bytes=limit_bytes)

    async def exchange(
        self, method: str, path: str, body: bytes = b"", limit_bytes: int = _MAX_PAGE_BYTES
    ) -> tuple[int, bytes]:
        """Status and body of the answer to a call that is no inference; ``body`` is JSON."""
        about = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        request = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._always}{about}\r\n".encode("latin-1") + body
        async with _Call(self._pool, request, _Known()) as answer:
            return answer.status, await answer.read(limit_bytes)


class _Known:
    """What is known of an engine. ``calls``: under way now. ``takes_optional``: whether it takes headers that serve
    observers only, ``x-request-id`` and ``traceparent``; None until it answered a request that had some.
    ``tells_load``: whether its metrics have told its load."""

    __slots__ = ("calls", "takes_optional", "tells_load")

    def __init__(self) -> None:
        self.calls = 0
        self.takes_optional: bool | None = None
        self.tells_load = False


class _Call:
    """One request under way: an async context manager that gives its answer.

    ``bare``: the same request without optional headers, where it is not known yet whether the engine takes them.
    """

    __slots__ = ("_bare", "_connection", "_known", "_pool", "_request")

    def __init__(self, pool: ConnectionPool, request: bytes, known: _Known, bare: bytes = b"") -> None:
        self._pool = pool
        self._request = request
        self._known = known
        self._bare = bare
        self._connection: EngineConnection | None = None

    async def __aenter__(self) -> EngineAnswer:
        self._known.calls += 1
        try:
            connection = await self._ask(self._request)
            if self._bare:
                connection = await self._learn(connection)
        except BaseException:
            self._known.calls -= 1
            raise
        self._connection = connection
        return _Answer(connection)

    async def _learn(self, connection: EngineConnection) -> EngineConnection:
        """Find out whether the engine takes optional headers. One that refuses the request, which costs it nothing, is
        asked again without them; what it then answers is the answer."""
        known = self._known
        if connection.status not in HEADERS_REFUSED:
            if connection.status < 400:
                known.takes_optional = True
            return connection
        connection.close()
        connection = await self._ask(self._bare)
        if connection.status not in HEADERS_REFUSED:
            log.info("engine_takes_no_optional_headers", without=["x-request-id", "traceparent"])
            known.takes_optional = False
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
        self._known.calls -= 1
        if self._connection is not None:
            self._pool.give_back(self._connection)


class _Answer:
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


def _optional(call: EngineCall) -> str:
    """Header lines that serve observers only: one that cannot be sent is left out, not the job."""
    return "".join(
        f"{name}: {value}\r\n"
        for name, value in (("x-request-id", call.call_id), ("traceparent", call.traceparent), *call.headers.items())
        if value and not _UNSAFE.search(value.replace(" ", ""))
    )


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _path(path: str) -> str:
    if not path.startswith("/") or _UNSAFE.search(path):
        raise EngineFailed(f"{path[:100]!r} is not a path")
    return path


def _safe(value: str) -> str:
    """``value`` for a header line; raises ``EngineFailed`` for one that would not stay in it."""
    if _UNSAFE.search(value):
        raise EngineFailed("the engine's API key cannot be sent in a header")
    return value


def _content_type(value: str) -> str:
    """``value`` for its header line; raises ``BadRequest``: it is the client's, and no engine would get it."""
    if _UNSAFE.search(value.replace(" ", "")):
        raise BadRequest(f"the content type {value[:100]!r} cannot be sent in a header")
    return value


def _nameable(name: str) -> bool:
    try:
        check_name(name, "model")
    except BadMessage:
        log.warning("model_name_refused", model=name[:100])
        return False
    return True
