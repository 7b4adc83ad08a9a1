"""The worker's calls to its Manager, directly or through a Router: both serve the same paths."""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Mapping
from typing import TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    AuthenticationFailed,
    BadRequest,
    Fenced,
    Heartbeat,
    HeartbeatAnswer,
    InferqError,
    ManagerUnavailable,
    PermissionRefused,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
)
from telemetry.redaction import redact_url

from .addresses import Addresses

CALL_TIMEOUT_S = 5.0
"""The Manager may first have to check another session of that worker id, and to reclaim its jobs."""
HEARTBEAT_TIMEOUT_S = 3.0
"""A heartbeat is answered from memory."""
AVOID_S = 10.0
"""How long a URL is avoided after a call to it timed out: a frozen host costs a whole timeout at every visit."""
_NO_SUCH_WORKER = frozenset({404, UnknownWorker.status})
"""Some Managers answer the heartbeat of a worker that they do not know with 404."""
_NO_SUCH_PAGE = frozenset({404, 405})
IDLE_TIMEOUT_S = 45.0
"""A session connection carries a byte every 15 s; one without for so long is dead."""
_MAX_ANSWER_BYTES = 8 << 20
_TITLE = re.compile(rb"<title>([^<\r\n]{1,100})</title>", re.IGNORECASE)
_PAGE_BYTES = 2_048
"""Of a proxy's page: where its title has to be."""
_REFUSALS: Mapping[str, type[InferqError]] = {kind.code: kind for kind in (Fenced, PermissionRefused, WorkerIdTaken)}
_Answer = TypeVar("_Answer", bound=BaseModel)


class ManagerClient:
    """Calls one of ``urls`` at a time; :meth:`turn` switches to the next.

    Every call raises ``ManagerUnavailable`` if it is not answered or the Manager is not ready, ``AuthenticationFailed``
    for a wrong join token and ``BadRequest`` for a message it does not accept.
    """

    prefix = FABRIC_PREFIX

    def __init__(self, addresses: Addresses) -> None:
        self._urls = [url.rstrip("/") for url in addresses.urls]
        self._headers = addresses.headers
        self._tls = addresses.tls
        self._avoided_until: dict[str, float] = {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """The URL in use."""
        return self._urls[0]

    @property
    def urls(self) -> frozenset[str]:
        """All URLs."""
        return frozenset(self._urls)

    def turn(self) -> None:
        """Use the next URL from now on, past those where a call timed out a moment ago, unless all did."""
        now = time.monotonic()
        later = self._urls[1:] + self._urls[:1]
        best = min(range(len(later)), key=lambda place: max(self._avoided_until.get(later[place], now), now))
        self._urls = later[best:] + later[:best]

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Raises ``WorkerIdTaken`` while another worker of that id answers the Manager."""
        answer = await self.call("POST", "workers", registration)
        return parse_answer(RegistrationAnswer, answer, self.url)

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Raises ``UnknownWorker`` if the Manager does not know this session: register again."""
        path = f"workers/{worker_id}/heartbeat"
        answer = await self.call("POST", path, heartbeat, timeout_s=HEARTBEAT_TIMEOUT_S, unknown=_NO_SUCH_WORKER)
        return parse_answer(HeartbeatAnswer, answer, self.url)

    async def hold_session_connection(self, worker_id: str, session_id: SessionId) -> None:
        """Hold a connection to the URL in use until it ends: its other end notices at once when this process
        dies. Raises ``UnknownWorker`` where session connections are not supported."""
        url = f"{self.url}{self.prefix}/workers/{worker_id}/session?session_id={session_id}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S, sock_read=IDLE_TIMEOUT_S)
        try:
            async with self._open().get(url, timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await _read(answer), self.url, _NO_SUCH_PAGE)
                while await answer.content.readany():
                    continue
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ManagerUnavailable(f"the session connection to {self.url} broke ({type(error).__name__})") from error

    async def deregister(self, worker_id: str, session_id: SessionId) -> None:
        """Deregister the session at the first URL that leads to a Manager."""
        for tried in range(1, len(self._urls) + 1):
            try:
                await self.call("DELETE", f"workers/{worker_id}?session_id={session_id}", None)
            except ManagerUnavailable:
                if tried == len(self._urls):
                    raise
                self.turn()
            else:
                return

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            tls: ssl.SSLContext | bool = True if self._tls is None else self._tls
            connector = aiohttp.TCPConnector(ssl=tls)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, trust_env=False)
        return self._session

    async def call(
        self,
        method: str,
        path: str,
        message: BaseModel | None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        unknown: frozenset[int] = frozenset(),
    ) -> bytes:
        """The answer's body. Statuses of ``unknown`` mean that the worker is, whatever the body says."""
        url = f"{self.url}{self.prefix}/{path}"
        body = message.model_dump_json().encode() if message is not None else None
        headers = {"content-type": "application/json"} if body else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._open().request(
                method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                content = await _read(answer)
                status = answer.status
        except TimeoutError as error:
            self._avoided_until[self.url] = time.monotonic() + AVOID_S
            raise ManagerUnavailable(f"{redact_url(self.url)} does not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ManagerUnavailable(
                f"{redact_url(self.url)} does not answer: {error or type(error).__name__}"
            ) from error
        if status >= 300:
            raise _refusal(status, content, redact_url(self.url), unknown)
        return content


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The body, or of one that is larger than the limit its beginning: one read gives only what has arrived."""
    parts, capacity = [], _MAX_ANSWER_BYTES
    while capacity > 0 and (part := await answer.content.read(capacity)):
        parts.append(part)
        capacity -= len(part)
    return b"".join(parts)


def parse_answer(kind: type[_Answer], content: bytes, url: str) -> _Answer:
    """The ``kind`` in an answer of who is at ``url``. Raises ``ManagerUnavailable`` for anything else."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ManagerUnavailable(f"{url} answers something else than a Manager: is it the right URL?") from error


def _refusal(status: int, content: bytes, url: str, unknown: frozenset[int]) -> InferqError:
    if 300 <= status < 400:
        # Not followed: the join token would go with the request.
        return ManagerUnavailable(f"{url} redirects to another address: give the Manager's own URL")
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        code, message = "", f"{url} answers {status}{_title(content)}: is it the right URL?"
    if code == UnknownWorker.code or status in unknown:
        return UnknownWorker(message)
    if status == AuthenticationFailed.status:
        return AuthenticationFailed(
            f"{url} refuses this worker's credential, or that it has none: give it the fleet's INFERQ_JOIN_TOKEN or, "
            f"over HTTP, an INFERQ_WORKER_KEY that its Routers know ({message})"
        )
    if code in _REFUSALS and status == _REFUSALS[code].status:
        return _REFUSALS[code](message)
    return BadRequest(message) if code and status in (400, 413, 422) else ManagerUnavailable(message)


def _title(page: bytes) -> str:
    """That of a proxy's page, in brackets: it tells a client certificate that is missing from a wrong URL."""
    found = _TITLE.search(page, 0, _PAGE_BYTES)
    return f" ({found[1].decode('utf-8', 'replace').strip()})" if found else ""
