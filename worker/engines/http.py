"""An engine reached by HTTP: any server that answers the OpenAI API.

Used as it is for a server that somebody else runs, and inside :mod:`worker.engines.process` for one of our own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from types import TracebackType

import aiohttp
from yarl import URL

from queue_schemas import BadMessage, EngineFailed, EngineState
from queue_schemas.fabric import MAX_MODELS
from queue_schemas.ids import check_name
from telemetry import get_logger

from .port import EngineAnswer, EngineCall

CONNECT_LIMIT_S = 5.0
PROGRESS_LIMIT_S = 2.0
CHECK_LIMIT_S = 5.0
_IDLE_CONNECTION_S = 4.0
"""Below the 5 s after which uvicorn, and so vLLM, closes an idle connection."""
_CHECK_READY_S = 5.0
_CHECK_AWAY_S = 1.0
_MISSES_ALLOWED = 3
"""Health checks in a row that a busy engine may leave unanswered."""
_OUTPUT = re.compile(
    rb"^vllm:(?:generation_tokens|prompt_tokens|request_success)_total(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE
)

log = get_logger(__name__)


class HttpEngine:
    """The engine at ``base_url``, with or without ``/v1`` at its end. ``api_key`` is sent as a bearer token."""

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self.base_url = _base(base_url)
        self.models: tuple[str, ...] = ()
        self.state = EngineState.STARTING
        self.detail = f"waiting for {self.base_url} to answer"
        self._headers = {"accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[str, URL] = {}
        self._answered = 0
        self._misses = 0

    async def run(self, changed: Callable[[], None]) -> None:
        """Watch health and models until cancelled."""
        try:
            while True:
                before = (self.state, self.detail, self.models)
                await self._watch()
                if (self.state, self.detail, self.models) != before:
                    changed()
                await asyncio.sleep(_CHECK_READY_S if self.state is EngineState.READY else _CHECK_AWAY_S)
        finally:
            await self.close()

    def call(self, call: EngineCall) -> _Call:
        headers = {"content-type": call.content_type}
        if call.request_id:
            headers["x-request-id"] = call.request_id
        if call.traceparent:
            headers["traceparent"] = call.traceparent
        return _Call(self._open(), self._url(call.path), call.body, headers)

    async def progress(self) -> int | None:
        """vLLM's token counters; of a server that shows none, a number that counts its answers."""
        try:
            async with asyncio.timeout(PROGRESS_LIMIT_S):
                metrics = await self._get("/metrics")
                if metrics is None and not await self.healthy():
                    return None
        except (TimeoutError, aiohttp.ClientError):
            return None
        self._answered += 1
        output = _OUTPUT.findall(metrics or b"")
        return sum(int(float(value)) for value in output) if output else self._answered

    async def stop(self, limit_s: float) -> None:
        """Close the connections: the engine itself is not ours to end."""
        await asyncio.wait_for(self.close(), limit_s)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def healthy(self) -> bool:
        """Whether the engine answers. Raises ``aiohttp.ClientError`` or ``TimeoutError`` if it cannot be reached."""
        async with self._open().get(self._url("/health"), timeout=_limit(CHECK_LIMIT_S)) as answer:
            # Servers without /health are judged by their model list.
            return answer.status < 500

    async def answers_well(self) -> bool:
        """Whether ``/health`` and ``/v1/models`` both answer 200: a server that starts is ready then."""
        return await self._get("/health") is not None and await self._get("/v1/models") is not None

    async def list_models(self) -> tuple[str, ...]:
        """The model ids of ``/v1/models``. Raises ``EngineFailed`` with what is wrong with the answer."""
        body = await self._get("/v1/models")
        if body is None:
            raise EngineFailed(f"{self.base_url}/v1/models did not answer with a list of models")
        try:
            names = [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineFailed(f"{self.base_url}/v1/models answers something else than a list of models") from error
        return tuple(name for name in names[:MAX_MODELS] if _nameable(name))

    async def _watch(self) -> None:
        try:
            models = await self.list_models() if await self.healthy() else ()
        except TimeoutError:
            self._misses += 1
            if self._misses >= _MISSES_ALLOWED or self.state is not EngineState.READY:
                self._away(f"{self.base_url} does not answer within {CHECK_LIMIT_S:.0f} s")
        except aiohttp.ClientError as error:
            self._away(f"{self.base_url} cannot be reached: {error}")
        except EngineFailed as error:
            self._away(error.message)
        else:
            self._misses = 0
            if not models:
                self._away(f"{self.base_url} is not well, or lists no models")
                return
            if self.state is not EngineState.READY:
                log.info("engine_ready", url=str(self.base_url), models=models)
            self.state, self.detail, self.models = EngineState.READY, "", models

    def _away(self, detail: str) -> None:
        if self.state is not EngineState.FAILED:
            log.warning("engine_away", url=str(self.base_url), detail=detail)
        self.state, self.detail = EngineState.FAILED, detail

    async def _get(self, path: str) -> bytes | None:
        """The body of a 200 answer, else None."""
        async with self._open().get(self._url(path), timeout=_limit(CHECK_LIMIT_S)) as answer:
            return await answer.read() if answer.status == 200 else None

    def _url(self, path: str) -> URL:
        url = self._urls.get(path)
        if url is None:
            if not path.startswith("/") or len(self._urls) > 256:
                self._urls.clear()
            if not path.startswith("/"):
                raise EngineFailed(f"{path[:100]!r} is not a path")
            url = self._urls[path] = URL(f"{self.base_url}{path}", encoded=True)
        return url

    def _open(self) -> aiohttp.ClientSession:
        """One session for all: its connector keeps connections and sets TCP_NODELAY on them."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


class _Call:
    """One request under way: an async context manager that gives its answer."""

    __slots__ = ("_answer", "_body", "_headers", "_session", "_url")

    def __init__(self, session: aiohttp.ClientSession, url: URL, body: bytes, headers: dict[str, str]) -> None:
        self._session = session
        self._url = url
        self._body = body
        self._headers = headers
        self._answer: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> EngineAnswer:
        try:
            self._answer = await self._post()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineFailed(f"the engine cannot be reached: {error or type(error).__name__}") from error
        return _Answer(self._answer)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        answer = self._answer
        if answer is not None and not answer.closed:
            # Unread: closing, not releasing, is what tells the engine that nobody waits.
            answer.close()

    async def _post(self) -> aiohttp.ClientResponse:
        try:
            return await self._session.post(self._url, data=self._body, headers=self._headers, allow_redirects=False)
        except aiohttp.ServerDisconnectedError:
            # An idle connection that the engine closed while we wrote: it has not seen the request.
            return await self._session.post(self._url, data=self._body, headers=self._headers, allow_redirects=False)


class _Answer:
    __slots__ = ("_answer",)

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def content_type(self) -> str:
        return self._answer.headers.get("content-type", "application/octet-stream")

    async def chunks(self) -> AsyncIterator[bytes]:
        content = self._answer.content
        try:
            while data := await content.readany():
                yield data
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error) from error

    async def read(self, limit_bytes: int) -> bytes:
        content = self._answer.content
        try:
            body = await content.readany()
            if content.at_eof():
                return body
            parts = [body]
            size = len(body)
            while size <= limit_bytes and (data := await content.readany()):
                parts.append(data)
                size += len(data)
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error) from error
        return b"".join(parts)


def _broken(error: Exception) -> EngineFailed:
    return EngineFailed(f"the engine broke the connection before its answer was complete: {error or 'no reason given'}")


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _limit(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)


def _nameable(name: str) -> bool:
    try:
        check_name(name, "model")
    except BadMessage:
        log.warning("model_name_refused", model=name[:100])
        return False
    return True
