"""Where the Router meets the outside: the queue, and the Manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from typing import NoReturn, Protocol

from broker import Attempts, DeadLetters, JobStatus, RememberedPools, SignedLeases, Workers
from queue_schemas import (
    BrokerAddress,
    Enqueued,
    Frame,
    Job,
    JobId,
    Lane,
    LaneDepth,
    Marker,
    OutputPage,
    PersistedJob,
    PersistOptions,
    Pool,
    SessionId,
    State,
    Tenant,
    WorkerInfo,
)
from queue_schemas.fleet.acting_manager import ActingManager
from scheduling.prediction import Place
from telemetry.http.fabric_calls import FabricCall, Forwarded

Deliver = Callable[[list[Frame | Marker]], None]


class JobsPort(Protocol):
    """:class:`broker.operations.jobs.Jobs`."""

    def start_enqueue(self, job: Job, patience_ms: int | None = None) -> asyncio.Future[Enqueued]: ...

    async def enqueue_persisted(
        self,
        job: Job,
        options: PersistOptions | None = None,
        listener: str = "",
        patience_ms: int | None = None,
    ) -> Enqueued: ...

    async def places(self, job_ids: Sequence[JobId]) -> list[Place | None]: ...

    async def resume(self, job: Job, epoch: int) -> State | None: ...

    async def raise_epoch(self, job_id: JobId, heard: int) -> JobStatus | None: ...

    async def cancel(self, job_id: JobId, reason: str, *, if_orphaned: bool = False, used: int = 0) -> State | None: ...

    async def cancel_abandoned(self, job_id: JobId, reason: str, after_ms: int) -> State | None: ...


class RepliesPort(Protocol):
    """:class:`broker.operations.replies.Replies`."""

    ready: asyncio.Event
    """Set once this Router's reply streams exist: only then may it enqueue."""

    async def read(
        self, router: SessionId, deliver: Deliver, lost: Callable[[int], None] | None = None
    ) -> NoReturn: ...


class OutputPort(Protocol):
    """:class:`broker.operations.output.PersistedOutput`."""

    async def attach(
        self, job_id: JobId, listener: SessionId, after: tuple[int, int] = (0, 0)
    ) -> OutputPage | None: ...

    async def detach(self, job_id: JobId, listener: SessionId) -> None: ...

    def frames(self, job_id: JobId) -> AsyncIterator[Frame]: ...


class PersistedJobsPort(Protocol):
    """:class:`broker.operations.persisted_jobs.PersistedJobs`."""

    async def get(self, job_id: str) -> PersistedJob | None: ...

    async def page(
        self, tenant: Tenant, *, after: str = "", limit: int = 20, states: Iterable[State] = ()
    ) -> tuple[list[PersistedJob], str]: ...

    async def delete(self, job_id: str, reason: str) -> State | None: ...


class FleetPort(Protocol):
    """:class:`broker.operations.fleet.Fleet`."""

    async def load_workers(self) -> dict[str, WorkerInfo]: ...

    async def load_adapter_sets(self, names: Collection[str]) -> dict[str, frozenset[str]]: ...

    async def acting_manager(self) -> ActingManager: ...


class KnownPoolsPort(Protocol):
    """:class:`broker.operations.known_pools.KnownPools`."""

    async def remembered(self) -> RememberedPools: ...

    async def remember(self, models: Iterable[str], *, declared: bool = False) -> None: ...


class StatsPort(Protocol):
    """:class:`broker.operations.stats.QueueStats`."""

    async def depths(self) -> dict[Pool, dict[Lane, LaneDepth]]: ...


class QueuePort(Protocol):
    """The Router's side of :class:`broker.Broker`; errors as there."""

    @property
    def jobs(self) -> JobsPort: ...

    @property
    def replies(self) -> RepliesPort: ...

    @property
    def output(self) -> OutputPort: ...

    @property
    def persisted_jobs(self) -> PersistedJobsPort: ...

    @property
    def fleet(self) -> FleetPort: ...

    @property
    def known_pools(self) -> KnownPoolsPort: ...

    @property
    def stats(self) -> StatsPort: ...

    @property
    def dead_letters(self) -> DeadLetters: ...

    @property
    def workers(self) -> Workers: ...

    @property
    def attempts(self) -> Attempts: ...

    @property
    def signed_leases(self) -> SignedLeases: ...

    @property
    def shards(self) -> int: ...

    @property
    def round_trips(self) -> int: ...

    def shard_of(self, pool: str) -> int: ...

    async def server_faults(self) -> list[str]: ...

    async def close(self) -> None: ...


class ManagerPort(Protocol):
    """The Router's way to the Manager. All methods raise ``ManagerUnavailable`` when it cannot be reached."""

    async def forward(self, call: FabricCall) -> Forwarded:
        """Pass a call on."""
        ...

    async def broker_address(self) -> BrokerAddress:
        """Where the queue is. Raises the Manager's refusal (``AuthenticationFailed``, ...) as an error of ours."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


OpenQueue = Callable[[], Awaitable[QueuePort]]
"""Connects to the queue, one try. Raises ``BrokerUnavailable``, ``BrokerUnsuitable`` or ``ManagerUnavailable``."""
