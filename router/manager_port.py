"""The ways to the Manager: what they have in common, and the one over HTTP. The one within Ray: ``ray_manager``."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    AuthenticationFailed,
    BrokerAddress,
    CannotStart,
    ManagerUnavailable,
)

from .ports import FabricCall, Forwarded

_PASSED_ON = ("content-type", "retry-after", "www-authenticate")
_ANSWER_LIMIT_BYTES = 16 * 1024 * 1024


class RemoteManager(abc.ABC):
    """A :class:`~router.ports.ManagerPort`. ``where`` names it in sentences."""

    def __init__(self, where: str, join_token: str) -> None:
        self.where = where
        self._join_token = join_token

    @abc.abstractmethod
    async def forward(self, call: FabricCall) -> Forwarded:
        """As :meth:`~router.ports.ManagerPort.forward`."""

    async def close(self) -> None:
        """Close what is open; nothing, unless overridden."""
        return

    async def broker_address(self) -> BrokerAddress:
        answer = await self.forward(FabricCall("GET", f"{FABRIC_PREFIX}/broker", join_token=self._join_token))
        if answer.status in (401, 403):
            raise AuthenticationFailed(
                f"the Manager at {self.where} refuses our join token: give both the same INFERQ_JOIN_TOKEN"
            )
        try:
            if answer.status != 200:
                raise ManagerUnavailable(f"the Manager at {self.where} does not say where Redis is ({answer.status})")
            return BrokerAddress.model_validate_json(answer.body)
        except ValidationError as error:
            raise ManagerUnavailable(f"what answers at {self.where} is not a Manager: {error}") from error

    def unreachable(self, error: BaseException) -> ManagerUnavailable:
        """What to raise when the call got no answer."""
        told = next(iter(str(error).splitlines()), "")
        return ManagerUnavailable(
            f"the Manager at {self.where} cannot be reached ({type(error).__name__}: {told}); try again shortly",
            retry_after_s=2,
        )


def passed_on(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Forwarded:
    """The Manager's answer without the headers that concern only the way to it."""
    kept = tuple((name.lower(), value) for name, value in headers if name.lower() in _PASSED_ON)
    return Forwarded(status, kept, body)


class HttpManager(RemoteManager):
    """The Manager (or another Router) at a base URL."""

    def __init__(self, url: str, join_token: str, timeout_ms: int) -> None:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise CannotStart(
                f"the Manager's URL {url!r} is not understood; write it like http://localhost:9000, "
                "or ray:manager for the one in this Ray cluster"
            )
        super().__init__(url.rstrip("/"), join_token)
        self._timeout = aiohttp.ClientTimeout(total=timeout_ms / 1000)
        self._session: aiohttp.ClientSession | None = None

    async def forward(self, call: FabricCall) -> Forwarded:
        url = self.where + call.path + (f"?{call.query}" if call.query else "")
        try:
            async with self._open().request(
                call.method, url, data=call.body or None, headers=call.headers, allow_redirects=False
            ) as answer:
                content = await answer.content.read(_ANSWER_LIMIT_BYTES)
                while more := await answer.content.read(_ANSWER_LIMIT_BYTES - len(content)):
                    content += more
                return passed_on(answer.status, answer.headers.items(), content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.unreachable(error) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self._session
