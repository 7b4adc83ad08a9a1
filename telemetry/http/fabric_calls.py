"""Forward calls under ``/fabric/v1`` to the acting Manager, for Routers and standby Managers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from queue_schemas import FABRIC_PREFIX, JOIN_TOKEN_HEADER, AuthenticationFailed, BrokerAddress, ManagerUnavailable

from .fleet_session import fleet_session

FORWARDED_BY_MANAGER = "x-inferq-forwarded"
"""Header of a call that a standby Manager forwards: its receiver does not forward it again."""
UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)
"""What :meth:`FabricHttp.forward` raises when no answer comes."""
_FORWARDED_HEADERS = ("content-type", "retry-after", "www-authenticate")
_ANSWER_LIMIT_BYTES = 16 * 1024 * 1024
_CONNECT_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class FabricCall:
    """A call under ``/fabric/v1`` that the Manager answers, as it came."""

    method: str
    path: str
    query: str = ""
    join_token: str = ""
    body: bytes = b""
    request_id: str = ""
    by_manager: bool = False

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What the Manager needs of the call's headers, lower case."""
        headers = {
            "content-type": "application/json" if self.body else "",
            JOIN_TOKEN_HEADER: self.join_token,
            "x-request-id": self.request_id,
            FORWARDED_BY_MANAGER: "1" if self.by_manager else "",
        }
        return [(name, value) for name, value in headers.items() if value]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The Manager's answer, to be returned as it is. ``headers`` are lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def forwarded_answer(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Forwarded:
    """The Manager's answer without the headers that concern only the way to it."""
    kept = tuple((name.lower(), value) for name, value in headers if name.lower() in _FORWARDED_HEADERS)
    return Forwarded(status, kept, body)


def broker_address_call(join_token: str) -> FabricCall:
    """The call that asks a Manager where Redis is; :func:`read_broker_address` reads its answer."""
    return FabricCall("GET", f"{FABRIC_PREFIX}/broker", join_token=join_token)


def read_broker_address(answer: Forwarded, manager: str) -> BrokerAddress:
    """Where Redis is, as ``manager`` (its URL or name) answers. Raises ``AuthenticationFailed`` if it refuses the join
    token, and ``ManagerUnavailable`` for any other answer."""
    if answer.status in (401, 403):
        raise AuthenticationFailed(
            f"the Manager at {manager} refuses our join token: set INFERQ_JOIN_TOKEN to the fleet's"
        )
    if answer.status != 200:
        raise ManagerUnavailable(f"the Manager at {manager} does not say where Redis is ({answer.status})")
    try:
        return BrokerAddress.model_validate_json(answer.body)
    except ValidationError as error:
        raise ManagerUnavailable(f"what answers at {manager} is not a Manager: {error}") from error


class FabricHttp:
    """Passes calls on over HTTP: no proxy, no redirect, one limit for each call."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._session: aiohttp.ClientSession | None = None

    async def forward(self, base_url: str, call: FabricCall) -> Forwarded:
        """The answer of who is at ``base_url``. Raises one of ``UNREACHABLE``."""
        if self._session is None:
            self._session = fleet_session()
        url = base_url + call.path + (f"?{call.query}" if call.query else "")
        limit = aiohttp.ClientTimeout(total=self._limit_s, sock_connect=min(_CONNECT_LIMIT_S, self._limit_s))
        async with self._session.request(
            call.method, url, data=call.body or None, headers=call.headers, allow_redirects=False, timeout=limit
        ) as answer:
            content = await answer.content.read(_ANSWER_LIMIT_BYTES)
            while more := await answer.content.read(_ANSWER_LIMIT_BYTES - len(content)):
                content += more
            return forwarded_answer(answer.status, answer.headers.items(), content)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
