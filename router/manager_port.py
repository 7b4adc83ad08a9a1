"""The way to the Manager over HTTP."""

from __future__ import annotations

from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    AuthenticationFailed,
    BrokerAddress,
    CannotStart,
    ManagerUnavailable,
)

from .ports import Forwarded

_PASSED_ON = ("content-type", "retry-after", "www-authenticate")
_ANSWER_LIMIT_BYTES = 16 * 1024 * 1024


class HttpManager:
    """A :class:`~router.ports.ManagerPort`: the Manager (or another Router) at a base URL."""

    def __init__(self, url: str, join_token: str, timeout_ms: int) -> None:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise CannotStart(f"the Manager's URL {url!r} is not understood; write it like http://localhost:9000")
        self._url = url.rstrip("/")
        self._join_token = join_token
        self._timeout = aiohttp.ClientTimeout(total=timeout_ms / 1000)
        self._session: aiohttp.ClientSession | None = None

    async def forward(self, method: str, path: str, query: str, join_token: str, body: bytes) -> Forwarded:
        headers = {"content-type": "application/json"} if body else {}
        if join_token:
            headers[JOIN_TOKEN_HEADER] = join_token
        url = self._url + path + (f"?{query}" if query else "")
        try:
            async with self._open().request(
                method, url, data=body or None, headers=headers, allow_redirects=False
            ) as answer:
                content = await answer.content.read(_ANSWER_LIMIT_BYTES)
                while more := await answer.content.read(_ANSWER_LIMIT_BYTES - len(content)):
                    content += more
                kept = tuple((name, answer.headers[name]) for name in _PASSED_ON if name in answer.headers)
                return Forwarded(answer.status, kept, content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ManagerUnavailable(
                f"the Manager at {self._url} cannot be reached ({type(error).__name__}: {error}); try again shortly",
                retry_after_s=2,
            ) from error

    async def broker_address(self) -> BrokerAddress:
        answer = await self.forward("GET", f"{FABRIC_PREFIX}/broker", "", self._join_token, b"")
        if answer.status in (401, 403):
            raise AuthenticationFailed(
                f"the Manager at {self._url} refuses our join token: give both the same INFERQ_JOIN_TOKEN"
            )
        try:
            if answer.status != 200:
                raise ManagerUnavailable(f"the Manager at {self._url} does not say where Redis is ({answer.status})")
            return BrokerAddress.model_validate_json(answer.body)
        except ValidationError as error:
            raise ManagerUnavailable(f"what answers at {self._url} is not a Manager: {error}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self._session
