"""A small client of the Router's HTTP API, for the commands: connection, errors, retries and list pages.

Each command group extends it in its own ``client.py``.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode, urlsplit

import aiohttp
import orjson
from pydantic import BaseModel, ValidationError

from openai_api.pages import Page
from queue_schemas import JOIN_TOKEN_HEADER, InferqError
from telemetry import redact_url
from telemetry.backoff import Backoff
from telemetry.http.fleet_session import fleet_session
from telemetry.http.header_secrets import header_secret

ASK_LIMIT_S = 10.0
"""Limit on a request other than inference."""
ANSWER_LIMIT_S = 3600.0
"""Limit on an inference request, which may wait in the queue."""

CREDENTIALS_ADVICE = "give --api-key / --join-token (INFERQ_API_KEY, INFERQ_JOIN_TOKEN)"
"""What to do about HTTP 401. Models need the key, workers and dead letters the join token; pools take either."""

_LINE_BYTES = 1 << 20
_ASK_LIMIT = aiohttp.ClientTimeout(total=ASK_LIMIT_S)
PAGE = 100
TRIES = 5
BACKOFF = Backoff(0.5, 8.0)
_TRANSIENT = frozenset({0, 408, 429, 500, 502, 503, 504})
_Result = TypeVar("_Result")
Parsed = TypeVar("Parsed", bound=BaseModel)


class RequestFailed(InferqError):
    """The Router answered with an error, or nothing answered; the message says what to do next."""

    code = "request_failed"

    def __init__(self, message: str, *, http_status: int = 0) -> None:
        """``http_status`` is the HTTP status of the answer; 0 if there was none."""
        super().__init__(message)
        self.http_status = http_status

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.http_status in _TRANSIENT


class RouterClient:
    """``async with RouterClient(url) as client``. All methods raise :class:`RequestFailed`, and so does the constructor
    for a URL that cannot be a Router's."""

    def __init__(self, url: str, *, api_key: str = "", join_token: str = "") -> None:
        self.url = check_url(url)
        key = _sendable(api_key, "API key", "--api-key or INFERQ_API_KEY")
        token = _sendable(join_token, "join token", "--join-token or INFERQ_JOIN_TOKEN")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if token:
            headers[JOIN_TOKEN_HEADER] = token
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = fleet_session(headers=self._headers, connections=0, line_bytes=_LINE_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[str]:
        """The ids of the models that are served now."""
        found = await self.call("GET", "/v1/models")
        return [str(model["id"]) for model in orjson.loads(found).get("data", [])]

    async def health(self) -> bool:
        """Whether an inferq Router answers at the URL."""
        try:
            return b"inferq" in await self.call("GET", "/metrics")
        except RequestFailed:
            return False

    async def call(
        self,
        method: str,
        path: str,
        *,
        data: bytes | aiohttp.FormData | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _ASK_LIMIT,
    ) -> bytes:
        """Send a request; the body of the answer."""
        async with self.opened(method, path, data=data, headers=headers, timeout=timeout) as response:
            return await checked(response)

    @asynccontextmanager
    async def opened(
        self,
        method: str,
        path: str,
        *,
        data: bytes | aiohttp.FormData | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _ASK_LIMIT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; the successful answer, to be read inside the block."""
        asking = self.session.request(
            method, self.url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
        )
        try:
            async with asking as response:
                if response.status >= 300:
                    await checked(response)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self.unreachable(error) from error

    @asynccontextmanager
    async def send_inference(self, path: str, body: bytes, content_type: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send an inference request, which may wait in the queue; its answer, whatever its status."""
        headers = {"content-type": content_type}
        limit = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
        try:
            async with self.session.post(
                self.url + path, data=body, headers=headers, timeout=limit, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self.unreachable(error) from error

    async def get(self, path: str) -> bytes:
        """The body of the answer to a GET request, which is retried."""
        return await with_retries(lambda: self.call("GET", path))

    async def send_json(
        self,
        path: str,
        body: object,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _ASK_LIMIT,
    ) -> bytes:
        """The body of the answer to a POST request with a JSON body. It is not retried."""
        headers = {"content-type": "application/json", **(headers or {})}
        return await self.call("POST", path, data=orjson.dumps(body), headers=headers, timeout=timeout)

    async def get_all(
        self, path: str, item: type[Parsed], limit: int | None = None, *, query: Mapping[str, str] | None = None
    ) -> list[Parsed]:
        """The first ``limit`` items of a list (None: all), page by page."""
        found: list[Parsed] = []
        after, more = "", True
        while more and (limit is None or len(found) < limit):
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            fields = {"limit": str(size), **({"after": after} if after else {}), **(query or {})}
            page = parse(Page[dict[str, Any]], await self.call("GET", f"{path}?{urlencode(fields)}"))
            found += [parse(item, orjson.dumps(data)) for data in page.data]
            after = page.last_id or ""
            more = page.has_more and bool(after)
        return found

    def unreachable(self, error: BaseException) -> RequestFailed:
        """The error for a Router that did not answer because of ``error``."""
        return RequestFailed(
            f"no Router answers at {self.url} ({_reason(error)}): start one with `inferq up`, "
            "or name it with --router-url"
        )

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP session of the ``async with`` block."""
        if self._session is None:
            raise RuntimeError("enter the client first")
        return self._session


def check_url(url: str) -> str:
    """The Router's URL without a trailing slash. Raises :class:`RequestFailed` with what is wrong with it."""
    wrong = _url_fault(url.strip())
    if wrong:
        raise RequestFailed(f"the Router's URL {url!r} {wrong}: give one like http://127.0.0.1:18000 with --router-url")
    return url.strip().rstrip("/")


def _sendable(secret: str, name: str, where: str) -> str:
    try:
        return header_secret(secret)
    except ValueError as error:
        raise RequestFailed(f"the {name} ({where}) cannot be sent: {error}") from None


def _url_fault(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return f"cannot be read ({error})"
    if parts.scheme not in {"http", "https"} or "://" not in url:
        return "does not begin with http:// or https://"
    if not host or any(character.isspace() for character in parts.netloc):
        return "names no host"
    if port == 0:
        return "has the port 0"
    if parts.query or parts.fragment:
        return "goes on after its path"
    return "ends with /v1, which the command adds itself" if parts.path.rstrip("/").endswith("/v1") else ""


def _reason(error: BaseException) -> str:
    """Why nothing answered, without terms of the HTTP library."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the host {error.host} is not known"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno is not None:
        if error.os_error.errno == errno.ECONNREFUSED:
            return "connection refused"
        return (error.os_error.strerror or str(error)).lower()
    return str(error) or type(error).__name__


async def checked(response: aiohttp.ClientResponse) -> bytes:
    """The body of a successful answer. Raises :class:`RequestFailed` for any other."""
    body = await response.read()
    if response.status < 300:
        return body
    if response.status < 400:
        # Not followed: the API key and the join token would go with the request.
        raise RequestFailed(
            f"{response.url.path} is redirected to {redact_url(response.headers.get('location', 'nowhere'))}: "
            "give the Router's own URL with --router-url",
            http_status=response.status,
        )
    try:
        message = orjson.loads(body)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body[:300].decode("utf-8", "replace")
    answer = f"{message} (HTTP {response.status}, {response.url.path})"
    advice = f": {CREDENTIALS_ADVICE}" if response.status == 401 else ""
    raise RequestFailed(answer + advice, http_status=response.status)


def parse(model: type[Parsed], body: bytes) -> Parsed:
    """``body`` as a ``model``. Raises :class:`RequestFailed` if it is none."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestFailed("what answered is not an inferq Router, or one of another version") from error


def path_part(text: str, what: str, command: str) -> str:
    """``text`` as a part of a path. Raises :class:`RequestFailed` if it cannot be the id of ``what``; ``command`` lists
    the ids."""
    if not text.replace("_", "").replace("-", "").isalnum() or not text.isascii():
        raise RequestFailed(f"{text[:80]!r} is not the id of {what}: `{command}` shows the ids", http_status=404)
    return text


async def with_retries(attempt: Callable[[], Awaitable[_Result]]) -> _Result:
    """What ``attempt`` returns, tried up to ``TRIES`` times while it fails for transient reasons."""
    return await BACKOFF.retry(
        attempt, when=lambda error: isinstance(error, RequestFailed) and error.transient, max_attempts=TRIES
    )
