"""The worker's calls to its Manager, directly or through a Router: both serve the same paths."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    AuthenticationFailed,
    BadRequest,
    Heartbeat,
    HeartbeatAnswer,
    InferqError,
    ManagerUnavailable,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
)
from telemetry.redaction import redact_url

CALL_LIMIT_S = 5.0
"""The Manager may have to look for another worker of that id first, and to take back what a dead one held."""
HEARTBEAT_LIMIT_S = 3.0
"""A heartbeat is answered from memory."""
AVOID_S = 10.0
"""How long a URL that let a call run out of time is left for others: a frozen host costs that time at every visit."""
_NO_SUCH_WORKER = frozenset({404, UnknownWorker.status})
"""Other versions and other makes of Managers answer the heartbeat of a worker that they do not know with 404."""
_NO_SUCH_PAGE = frozenset({404, 405})
SILENCE_LIMIT_S = 45.0
"""A held connection carries a byte every 15 s; one that is silent for so long leads nowhere."""
_MAX_ANSWER_BYTES = 8 << 20
_Answer = TypeVar("_Answer", bound=BaseModel)


class FabricClient:
    """Calls one of ``urls`` at a time; :meth:`turn` goes on to the next.

    Every call raises ``ManagerUnavailable`` if nobody answers or the Manager is not ready, ``AuthenticationFailed``
    for a wrong join token and ``BadRequest`` for a message it does not accept.
    """

    def __init__(self, urls: Sequence[str], join_token: str = "") -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._headers = {JOIN_TOKEN_HEADER: join_token} if join_token else {}
        self._avoided_until: dict[str, float] = {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """The one in use."""
        return self._urls[0]

    @property
    def urls(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self._urls)

    def turn(self) -> None:
        """Use the next URL from now on, past those that let a call run out of time a moment ago, unless all did."""
        now = time.monotonic()
        later = self._urls[1:] + self._urls[:1]
        best = min(range(len(later)), key=lambda place: max(self._avoided_until.get(later[place], now), now))
        self._urls = later[best:] + later[:best]

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Raises ``WorkerIdTaken`` while another worker of that id answers the Manager."""
        answer = await self._call("POST", "workers", registration)
        return _parse(RegistrationAnswer, answer, self.url)

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Raises ``UnknownWorker`` if the Manager does not know this session_id: register again."""
        path = f"workers/{worker_id}/heartbeat"
        answer = await self._call("POST", path, heartbeat, limit_s=HEARTBEAT_LIMIT_S, unknown=_NO_SUCH_WORKER)
        return _parse(HeartbeatAnswer, answer, self.url)

    async def hold_session_connection(self, worker_id: str, session_id: SessionId) -> None:
        """Hold a connection to the URL in use until it ends: its other end notices at once when this process
        dies. Raises ``UnknownWorker`` where nobody holds such connections (an older version)."""
        url = f"{self.url}{FABRIC_PREFIX}/workers/{worker_id}/session?session_id={session_id}"
        limit = aiohttp.ClientTimeout(total=None, sock_connect=CALL_LIMIT_S, sock_read=SILENCE_LIMIT_S)
        try:
            async with self._open().get(url, timeout=limit, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await _read(answer), self.url, _NO_SUCH_PAGE)
                while await answer.content.readany():
                    continue
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ManagerUnavailable(f"{self.url} has let go of this worker ({type(error).__name__})") from error

    async def deregister(self, worker_id: str, session_id: SessionId) -> None:
        """Tell the Manager that this worker ends, by way of the first URL that leads to one."""
        for tried in range(1, len(self._urls) + 1):
            try:
                await self._call("DELETE", f"workers/{worker_id}?session_id={session_id}", None)
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
            self._session = aiohttp.ClientSession(headers=self._headers, trust_env=False)
        return self._session

    async def _call(
        self,
        method: str,
        path: str,
        message: BaseModel | None,
        *,
        limit_s: float = CALL_LIMIT_S,
        unknown: frozenset[int] = frozenset(),
    ) -> bytes:
        """The answer's body. Statuses of ``unknown`` mean that the worker is, whatever the body says."""
        url = f"{self.url}{FABRIC_PREFIX}/{path}"
        body = message.model_dump_json().encode() if message is not None else None
        headers = {"content-type": "application/json"} if body else {}
        limit = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._open().request(
                method, url, data=body, headers=headers, timeout=limit, allow_redirects=False
            ) as answer:
                content = await _read(answer)
                status = answer.status
        except TimeoutError as error:
            self._avoided_until[self.url] = time.monotonic() + AVOID_S
            raise ManagerUnavailable(f"{redact_url(self.url)} does not answer within {limit_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ManagerUnavailable(
                f"{redact_url(self.url)} does not answer: {error or type(error).__name__}"
            ) from error
        if status >= 300:
            raise _refusal(status, content, redact_url(self.url), unknown)
        return content


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The body, or of one that is larger than the limit its beginning: one read gives only what has arrived."""
    parts, room = [], _MAX_ANSWER_BYTES
    while room > 0 and (part := await answer.content.read(room)):
        parts.append(part)
        room -= len(part)
    return b"".join(parts)


def _parse(kind: type[_Answer], content: bytes, url: str) -> _Answer:
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
        code, message = "", f"{url} answers {status}: is it the right URL?"
    if code == UnknownWorker.code or status in unknown:
        return UnknownWorker(message)
    if status == WorkerIdTaken.status and code == WorkerIdTaken.code:
        return WorkerIdTaken(message)
    if status == AuthenticationFailed.status:
        return AuthenticationFailed(
            f"{url} refuses this worker's join token, or that it has none: give it the Manager's INFERQ_JOIN_TOKEN "
            f"({message})"
        )
    if code and status in (400, 413, 422):
        return BadRequest(message)
    return ManagerUnavailable(message)
