"""Reach an engine by HTTP: any server that answers the OpenAI API.

Used as it is for a server that somebody else runs, and inside :mod:`worker.engines.process` for one of our own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from urllib.parse import urlsplit

from queue_schemas import BadMessage, BadRequest, EngineFailed, EngineState
from queue_schemas.fleet.messages import MAX_MODELS
from queue_schemas.fleet.model_cards import Card, bounded_cards
from queue_schemas.ids import check_name
from scheduling.slots import EngineLoad
from telemetry import get_logger

from .adapter_calls import load_adapter, unload_adapter
from .connection import ConnectionPool
from .dialects import OPENAI, Dialect, find_dialect
from .http_call import UNSAFE, HttpCall, Learned, optional_headers
from .port import EngineCall

PROGRESS_LIMIT_S = 2.0
CHECK_LIMIT_S = 5.0
_CHECK_READY_S = 5.0
_CHECK_AWAY_S = 1.0
_MISSES_ALLOWED = 3
"""Health checks in a row that a busy engine may leave unanswered."""
_MAX_PAGE_BYTES = 16 << 20
MAX_LOAD_PAGE_BYTES = 2 << 20
"""vLLM's metrics page has about 100 kB. Its load is read every second."""

log = get_logger(__name__)


class HttpEngine:
    """The engine at ``base_url``, with or without ``/v1`` at its end. ``api_key`` is sent as a bearer token.

    ``dialect``: that of the engine; None: it is found each time when the server becomes ready.
    """

    failures = 0
    """It is not ours to start: how often it was, and failed, is not known here."""

    def __init__(self, base_url: str, *, api_key: str = "", dialect: Dialect | None = None) -> None:
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
        self._learned = Learned()
        self.dialect = dialect or OPENAI
        self._finds_dialect = dialect is None
        self._owners: dict[str, object] = {}
        """Whom the list of models names as their owners."""
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

    def call(self, call: EngineCall) -> HttpCall:
        begin = f"POST {self._prefix}{_path(call.path)} HTTP/1.1\r\n{self._always}"
        end = f"content-type: {_content_type(call.content_type)}\r\ncontent-length: {len(call.body)}\r\n\r\n"
        learned = self._learned
        optional = "" if learned.takes_optional is False else optional_headers(call)
        request = f"{begin}{optional}{end}".encode("latin-1") + call.body
        if not optional or learned.takes_optional:
            return HttpCall(self._pool, request, learned)
        return HttpCall(self._pool, request, learned, f"{begin}{end}".encode("latin-1") + call.body)

    async def progress(self) -> int | None:
        """A digest of its metrics; of a server that shows none, a number that counts its answers."""
        page, metrics = self.dialect.metrics_path, b""
        try:
            async with asyncio.timeout(PROGRESS_LIMIT_S):
                status, metrics = await self._get(page) if page else (404, b"")
                if status != 200 and not await self.healthy():
                    return None
        except (TimeoutError, EngineFailed):
            return None
        self._answered += 1
        shown = self.dialect.read_progress(metrics)
        return self._answered if shown is None else shown

    async def load(self) -> EngineLoad | None:
        """The load that its metrics tell. A server that has told none yet is not asked while it works: it may serve
        one request at a time, and even end a stream for this one."""
        dialect = self.dialect
        may_ask = not self._learned.calls or self._learned.tells_load or dialect.tells_load_late
        if not dialect.metrics_path or not may_ask:
            return None
        try:
            async with asyncio.timeout(PROGRESS_LIMIT_S):
                status, page = await self._get(dialect.metrics_path, MAX_LOAD_PAGE_BYTES)
        except (TimeoutError, EngineFailed):
            return None
        load = dialect.read_load(page) if status == 200 and len(page) <= MAX_LOAD_PAGE_BYTES else None
        self._learned.tells_load |= load is not None
        return load

    async def load_adapter(self, name: str, path: str) -> None:
        self.models = await load_adapter(self, name, path, self.dialect)

    async def unload_adapter(self, name: str) -> None:
        self.models = await unload_adapter(self, name, self.dialect)

    async def stop(self, limit_s: float) -> None:
        """Close the connections: the engine itself is not ours to end."""
        self._pool.close()

    async def healthy(self) -> bool:
        """Whether the engine answers. Raises ``EngineFailed`` if it cannot be reached, ``TimeoutError``."""
        # Servers without a page of their health are judged by their model list.
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
        self._owners = {name: listed[name].get("owned_by") for name in names if isinstance(listed[name], dict)}
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
                self._learned.takes_optional, self._learned.tells_load = None, False
                if self._finds_dialect:
                    self.dialect = await find_dialect(self._owners, self._get)
                await self.load()
                log.info("engine_ready", url=str(self.base_url), models=models, dialect=self.dialect.name)
            self.state, self.detail, self.models = EngineState.READY, "", models

    def _spares(self, health: int) -> bool:
        """Whether an engine that answered ``health`` should not be asked for its models now: one without ``/health``,
        while it works. It serves one request at a time perhaps, and llama-cpp-python's even ends a stream for the next
        request, whatever that asks for."""
        return health == 404 and self._learned.calls > 0 and self.state is EngineState.READY

    async def _health(self) -> int:
        return (await self._get(self.dialect.health_path))[0]

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
        async with HttpCall(self._pool, request, Learned()) as answer:
            return answer.status, await answer.read(limit_bytes)


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _path(path: str) -> str:
    if not path.startswith("/") or UNSAFE.search(path):
        raise EngineFailed(f"{path[:100]!r} is not a path")
    return path


def _safe(value: str) -> str:
    """``value`` for a header line; raises ``EngineFailed`` for one that would not stay in it."""
    if UNSAFE.search(value):
        raise EngineFailed("the engine's API key cannot be sent in a header")
    return value


def _content_type(value: str) -> str:
    """``value`` for its header line; raises ``BadRequest``: it is the client's, and no engine would get it."""
    if UNSAFE.search(value.replace(" ", "")):
        raise BadRequest(f"the content type {value[:100]!r} cannot be sent in a header")
    return value


def _nameable(name: str) -> bool:
    try:
        check_name(name, "model")
    except BadMessage:
        log.warning("model_name_refused", model=name[:100])
        return False
    return True
