"""The worker's calls to its Manager, directly or through a Router: both serve the same paths."""

from __future__ import annotations

import json
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
    Incarnation,
    InferqError,
    ManagerUnavailable,
    Registration,
    RegistrationAnswer,
    UnknownWorker,
    WorkerIdTaken,
)

CALL_LIMIT_S = 5.0
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
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """The one in use."""
        return self._urls[0]

    def turn(self) -> None:
        """Use the next URL from now on."""
        self._urls.append(self._urls.pop(0))

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Raises ``WorkerIdTaken`` while another worker of that id answers the Manager."""
        answer = await self._call("POST", "workers", registration)
        return _parse(RegistrationAnswer, answer, self.url)

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Raises ``UnknownWorker`` if the Manager does not know this incarnation: register again."""
        answer = await self._call("POST", f"workers/{worker_id}/heartbeat", heartbeat)
        return _parse(HeartbeatAnswer, answer, self.url)

    async def deregister(self, worker_id: str, incarnation: Incarnation) -> None:
        """Tell the Manager that this worker ends."""
        await self._call("DELETE", f"workers/{worker_id}?incarnation={incarnation}", None)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _call(self, method: str, path: str, message: BaseModel | None) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=CALL_LIMIT_S), headers=self._headers, trust_env=False
            )
        url = f"{self.url}{FABRIC_PREFIX}/{path}"
        body = message.model_dump_json().encode() if message is not None else None
        headers = {"content-type": "application/json"} if body else {}
        try:
            async with self._session.request(method, url, data=body, headers=headers) as answer:
                content = await _read(answer)
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ManagerUnavailable(f"{self.url} does not answer: {error or type(error).__name__}") from error
        if status >= 300:
            raise _refusal(status, content, self.url)
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


def _refusal(status: int, content: bytes, url: str) -> InferqError:
    try:
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "", f"{url} answers {status}: is it the right URL?"
    if code == UnknownWorker.code:
        return UnknownWorker(message)
    if status == WorkerIdTaken.status and code == WorkerIdTaken.code:
        return WorkerIdTaken(message)
    if status == AuthenticationFailed.status:
        return AuthenticationFailed(message)
    if code and status in (400, 413, 422):
        return BadRequest(message)
    return ManagerUnavailable(message)
