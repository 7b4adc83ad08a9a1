"""Workers that join, report and leave over HTTP: their calls to the Manager, as far as their credentials allow."""

from __future__ import annotations

import asyncio

from pydantic import ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    Heartbeat,
    ManagerUnavailable,
    OverCapacity,
    Registration,
    RegistrationAnswer,
    SessionId,
    WorkerInfo,
    WorkerStatus,
)
from queue_schemas.worker_protocol.messages import Join
from telemetry.http.fabric_calls import FabricCall, Forwarded

from ..ports import ManagerPort, QueuePort
from .rules import WorkerScope

REGISTRY_CACHE_S = 1.0
JOINING_S = 5.0
"""How long after a worker asked to join it counts, listed or not."""


class Registry:
    """The fleet as the acting Manager has written it down, read once a second at most."""

    def __init__(self) -> None:
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._workers: list[WorkerInfo] = []

    async def workers(self, queue: QueuePort) -> list[WorkerInfo]:
        """All workers. Raises what the queue raises."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now - self._read_at >= REGISTRY_CACHE_S:
                self._workers = list((await queue.fleet.load_workers()).values())
                self._read_at = now
        return self._workers


class Membership:
    """Passes calls on to the Manager with this Router's own join token. ``manager`` is None for a Router without one:
    then nobody can join."""

    def __init__(self, manager: ManagerPort | None, join_token: str, registry: Registry) -> None:
        self._manager = manager
        self._join_token = join_token
        self._registry = registry
        self._joining: dict[str, float] = {}
        """When workers joined that the registry may not list yet."""

    async def register(
        self, queue: QueuePort, scope: WorkerScope, join: Join, request_id: str
    ) -> RegistrationAnswer | Forwarded:
        """The Manager's answer, or its refusal. Raises ``PermissionRefused`` for what the credential does not allow,
        ``OverCapacity`` for one worker more than may use it."""
        scope.check_worker(join.worker_id)
        scope.check_region(join.region)
        scope.check_models([*join.loadable, *join.adapters])
        await self._check_count(queue, scope, join.worker_id)
        status = _allowed_status(scope, join)
        # Nobody is to call an address that such a worker names.
        fields = join.model_dump() | status.model_dump() | {"url": None}
        answer = await self._forward("POST", "workers", Registration(**fields).model_dump_json(), request_id)
        if answer.status >= 300:
            return answer
        try:
            return RegistrationAnswer.model_validate_json(answer.body)
        except ValidationError as error:
            raise ManagerUnavailable(f"the Manager answers a registration with something else: {error}") from error

    async def heartbeat(self, scope: WorkerScope, worker_id: str, heartbeat: Heartbeat, request_id: str) -> Forwarded:
        """The Manager's answer."""
        status = _allowed_status(scope, heartbeat)
        body = Heartbeat(**status.model_dump()).model_dump_json()
        return await self._forward("POST", f"workers/{worker_id}/heartbeat", body, request_id)

    async def deregister(self, worker_id: str, session_id: SessionId, request_id: str) -> Forwarded:
        """The Manager's answer."""
        return await self._forward("DELETE", f"workers/{worker_id}?session_id={session_id}", "", request_id)

    async def _check_count(self, queue: QueuePort, scope: WorkerScope, worker_id: str) -> None:
        if not scope.name:
            return
        listed = {info.worker_id for info in await self._registry.workers(queue)}
        now = asyncio.get_running_loop().time()
        self._joining = {other: at for other, at in self._joining.items() if at > now - JOINING_S}
        known = (listed | self._joining.keys()) - {worker_id}
        others = sum(1 for other in known if other == scope.name or other.startswith(f"{scope.name}."))
        if others >= scope.workers:
            raise OverCapacity(
                f"{others} workers with the credential {scope.name} are alive, as many as may be: stop one, or raise "
                "its workers",
                retry_after_s=10,
            )
        self._joining[worker_id] = now

    async def _forward(self, method: str, path: str, body: str, request_id: str) -> Forwarded:
        if self._manager is None:
            why = "this router was started without --manager-url: workers join at one that has a Manager"
            raise ManagerUnavailable(why, public=why)
        path, _, query = path.partition("?")
        return await self._manager.forward(
            FabricCall(method, f"{FABRIC_PREFIX}/{path}", query, self._join_token, body.encode(), request_id)
        )


def _allowed_status(scope: WorkerScope, status: WorkerStatus) -> WorkerStatus:
    """What a worker says of itself, with no more slots than it may fill. Raises ``PermissionRefused``."""
    scope.check_models(status.models)
    fields = status.model_dump(include=set(WorkerStatus.model_fields))
    return WorkerStatus(**fields | {"slots": min(status.slots, scope.slots)})
