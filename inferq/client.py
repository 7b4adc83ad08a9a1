"""The fabric as its users see it: a small client of the Router's HTTP API, for the commands of this package."""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
from pydantic import BaseModel, ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    DeadLetterIds,
    DeadLetterList,
    DeadRequest,
    InferqError,
    PoolDepth,
    PoolList,
    Removed,
    WorkerList,
)
from telemetry import redact_url
from telemetry.http.fleet_session import fleet_session
from telemetry.http.header_secrets import header_secret

ASK_LIMIT_S = 10.0
"""Limit on an answer of the control plane."""
ANSWER_LIMIT_S = 3600.0
"""Limit on an inference request: requests may wait in the queue."""

GIVE_KEY = "give --api-key / --join-token (INFERQ_API_KEY, INFERQ_JOIN_TOKEN)"
"""What to do about HTTP 401. Models want the key, workers and dead letters the join token; pools take either."""

_LINE_BYTES = 1 << 20
_ASK_LIMIT = aiohttp.ClientTimeout(total=ASK_LIMIT_S)
Message = Mapping[str, str]
Parsed = TypeVar("Parsed", bound=BaseModel)


class FabricRefused(InferqError):
    """The fabric answered with an error, or nobody answered; the message says what to do."""

    code = "fabric_refused"

    def __init__(self, message: str, *, answered: int = 0) -> None:
        """``answered`` is the HTTP status of what answered; 0 if nobody did."""
        super().__init__(message)
        self.answered = answered


@dataclass(slots=True)
class Answer:
    """One chat answer and how it came about; times in seconds since the request was sent."""

    text: str = ""
    model: str = ""
    request_id: str = ""
    finish_reason: str = ""
    first_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)


class FabricClient:
    """Use it as ``async with FabricClient(url) as client``. All methods raise :class:`FabricRefused`, and so does the
    making of one whose URL cannot be a Router's."""

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
        """The ids of the models that can be asked now."""
        found = await self._get("/v1/models")
        return [str(model["id"]) for model in orjson.loads(found).get("data", [])]

    async def pools(self) -> list[PoolDepth]:
        return _parsed(PoolList, await self._get(f"{FABRIC_PREFIX}/pools")).pools

    async def pool(self, model: str) -> PoolDepth:
        return _parsed(PoolDepth, await self._get(f"{FABRIC_PREFIX}/pools/{model}"))

    async def workers(self) -> WorkerList:
        return _parsed(WorkerList, await self._get(f"{FABRIC_PREFIX}/workers"))

    async def dead_letters(self, after: str, limit: int) -> DeadLetterList:
        """A page of the requests that were given up."""
        return _parsed(DeadLetterList, await self._get(f"{FABRIC_PREFIX}/dead?after={after}&limit={limit}"))

    async def dead_request(self, letter_id: str) -> DeadRequest:
        return _parsed(DeadRequest, await self._get(f"{FABRIC_PREFIX}/dead/{quote(letter_id, safe=':')}"))

    async def forget_dead(self, letter_ids: Sequence[str]) -> int:
        """Remove dead letters; how many there were."""
        body = DeadLetterIds(ids=list(letter_ids)).model_dump_json().encode()
        answer = await self.ask_again(f"{FABRIC_PREFIX}/dead/purge", body, "application/json")
        return _parsed(Removed, answer).removed

    async def ask_again(self, path: str, body: bytes, content_type: str) -> bytes:
        """The answer to a request given byte for byte."""
        async with self._send(path, body, content_type) as answer:
            return await _checked(answer)

    async def health(self) -> bool:
        """Whether an inferq Router answers there."""
        try:
            return b"inferq" in await self._get("/metrics")
        except FabricRefused:
            return False

    async def chat(self, model: str, messages: Sequence[Message], **parameters: object) -> Answer:
        """One chat completion in one piece."""
        began = time.monotonic()
        async with self._post("/v1/chat/completions", model, messages, stream=False, **parameters) as response:
            data = orjson.loads(await _checked(response))
            choice = data["choices"][0]
            took = time.monotonic() - began
            return Answer(
                text=choice["message"].get("content") or "",
                model=data.get("model", model),
                request_id=response.headers.get("x-request-id", ""),
                finish_reason=choice.get("finish_reason") or "",
                first_s=took,
                total_s=took,
                usage=data.get("usage") or {},
            )

    async def stream_chat(
        self, answer: Answer, model: str, messages: Sequence[Message], **parameters: object
    ) -> AsyncIterator[str]:
        """A streamed chat completion: yields the text's pieces as they come and fills ``answer``."""
        began = time.monotonic()
        options = {"stream_options": {"include_usage": True}, **parameters}
        async with self._post("/v1/chat/completions", model, messages, stream=True, **options) as response:
            answer.request_id = response.headers.get("x-request-id", "")
            if response.status != 200:
                await _checked(response)
            async for event in _events(response):
                if "error" in event:
                    raise FabricRefused(str(event["error"].get("message", event["error"])))
                answer.model = event.get("model", answer.model)
                answer.usage = event.get("usage") or answer.usage
                for choice in event.get("choices", [])[:1]:
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    piece = choice.get("delta", {}).get("content")
                    if piece:
                        answer.first_s = answer.first_s or time.monotonic() - began
                        answer.text += piece
                        yield piece
            answer.total_s = time.monotonic() - began

    @asynccontextmanager
    async def _post(
        self, path: str, model: str, messages: Sequence[Message], **fields: object
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = orjson.dumps({"model": model, "messages": list(messages), **fields})
        async with self._send(path, body, "application/json") as response:
            yield response

    @asynccontextmanager
    async def _send(self, path: str, body: bytes, content_type: str) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"content-type": content_type}
        limit = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
        try:
            async with self._open.post(
                self.url + path, data=body, headers=headers, timeout=limit, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def call(
        self,
        method: str,
        path: str,
        *,
        data: bytes | aiohttp.FormData | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _ASK_LIMIT,
    ) -> bytes:
        """The body of the answer."""
        async with self.opened(method, path, data=data, headers=headers, timeout=timeout) as response:
            return await _checked(response)

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
        """An answer that is no error, to be read within."""
        asking = self._open.request(
            method, self.url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
        )
        try:
            async with asking as response:
                if response.status >= 300:
                    await _checked(response)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error

    @staticmethod
    def parsed(model: type[Parsed], body: bytes) -> Parsed:
        """``body`` as what it must be."""
        return _parsed(model, body)

    async def _get(self, path: str) -> bytes:
        return await self.call("GET", path)

    def _unreachable(self, error: BaseException) -> FabricRefused:
        return FabricRefused(
            f"no Router answers at {self.url} ({_reason(error)}): start one with `inferq up`, "
            "or name it with --router-url"
        )

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("enter the client first")
        return self._session


def check_url(url: str) -> str:
    """The Router's URL without a slash at its end. Raises :class:`FabricRefused` with what is wrong with it."""
    wrong = _what_is_wrong(url.strip())
    if wrong:
        raise FabricRefused(f"the Router's URL {url!r} {wrong}: give one like http://127.0.0.1:18000 with --router-url")
    return url.strip().rstrip("/")


def _sendable(secret: str, name: str, where: str) -> str:
    try:
        return header_secret(secret)
    except ValueError as error:
        raise FabricRefused(f"the {name} ({where}) cannot be sent: {error}") from None


def _what_is_wrong(url: str) -> str:
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
    """Why nobody answered, in words that need no knowledge of our HTTP library."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the host {error.host} is not known"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno is not None:
        if error.os_error.errno == errno.ECONNREFUSED:
            return "connection refused"
        return (error.os_error.strerror or str(error)).lower()
    return str(error) or type(error).__name__


async def _checked(response: aiohttp.ClientResponse) -> bytes:
    body = await response.read()
    if response.status < 300:
        return body
    if response.status < 400:
        # Not followed: the API key and the join token would go with the request.
        raise FabricRefused(
            f"{response.url.path} is redirected to {redact_url(response.headers.get('location', 'nowhere'))}: "
            "give the Router's own URL with --router-url",
            answered=response.status,
        )
    try:
        message = orjson.loads(body)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body[:300].decode("utf-8", "replace")
    answer = f"{message} (HTTP {response.status}, {response.url.path})"
    raise FabricRefused(f"{answer}: {GIVE_KEY}" if response.status == 401 else answer, answered=response.status)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each ``data:`` line of an event stream (WHATWG HTML, 9.2), until ``[DONE]``."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield orjson.loads(data)


def _parsed(model: type[Parsed], body: bytes) -> Parsed:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise FabricRefused("what answered is not an inferq Router, or one of another version") from error
