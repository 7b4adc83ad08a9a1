"""The worker's calls to its Manager over the worker protocol: a session registers and joins in one."""

from __future__ import annotations

from queue_schemas import Heartbeat, HeartbeatAnswer, Registration, RegistrationAnswer, SessionId, UnknownWorker
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from queue_schemas.worker_protocol.messages import Join, Joined

from ..registration.addresses import Addresses
from ..registration.manager_client import HEARTBEAT_TIMEOUT_S, ManagerClient, parse_answer


class HttpManagerClient(ManagerClient):
    """As :class:`ManagerClient`, of a worker that needs nothing but a Router."""

    prefix = WORKER_PREFIX

    def __init__(self, addresses: Addresses) -> None:
        super().__init__(addresses)
        self._joined = ""
        """The session that joined last."""

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """As there. The answer names no broker."""
        session_id = registration.session_id
        join = Join(**registration.model_dump(), again=session_id == self._joined)
        answer = parse_answer(Joined, await self.call("POST", "sessions", join), self.url)
        self._joined = session_id
        return answer

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """As there; it keeps the session's leases as well."""
        path = f"sessions/{heartbeat.session_id}/heartbeat"
        answer = await self.call("POST", path, heartbeat, timeout_s=HEARTBEAT_TIMEOUT_S)
        return parse_answer(HeartbeatAnswer, answer, self.url)

    async def hold_session_connection(self, worker_id: str, session_id: SessionId) -> None:
        """There is none: a worker that nobody reaches is found dead by its lease."""
        raise UnknownWorker("workers over HTTP hold no session connection")

    async def deregister(self, worker_id: str, session_id: SessionId) -> None:
        """A session that leaves the queue is deregistered by that."""
