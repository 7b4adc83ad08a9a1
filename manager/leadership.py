"""Take and keep the leader lease of a Manager, and run the loops of an acting Manager while it is held."""

from __future__ import annotations

import asyncio

from pydantic import ValidationError

from queue_schemas import InferqError, ManagerUnavailable
from queue_schemas.fleet.acting_manager import prove_address
from telemetry import get_logger

from .forwarding import ActingManagerClient
from .metrics import FleetMetrics
from .ports import Clock, QueuePort, WorkerProbe, call_queue
from .settings import ManagerSettings
from .term import Term

SAVE_PAUSE_S, FAILED_SAVE_PAUSE_S = 0.05, 0.5
ANOTHER_ACTS = "another Manager acts"
"""The reason for standing by that is as it should be."""

log = get_logger(__name__)


class NotActing(ManagerUnavailable):
    """Only the acting Manager may answer this, and this one does not act."""


class Leadership:
    """Whether this Manager acts, and what it does while it acts.

    :meth:`run` competes for the leader lease until cancelled; :attr:`term` is the term in which it acts now.
    ``acting_manager`` learns where the acting Manager is while this one stands by.
    """

    def __init__(
        self,
        settings: ManagerSettings,
        probe: WorkerProbe,
        metrics: FleetMetrics,
        acting_manager: ActingManagerClient,
        *,
        manager_id: str,
        url: str,
        clock: Clock,
    ) -> None:
        self.problem = "the queue's Redis has not been reached yet"
        """Why it does not act, or what its last sweep failed on; empty when all is well."""
        self._settings = settings
        self._probe = probe
        self._metrics = metrics
        self._acting_manager = acting_manager
        self._manager_id = manager_id
        self._url = url
        self._proof = prove_address(settings.join_token.get_secret_value(), manager_id, url) if url else ""
        self._clock = clock
        self._term: Term | None = None
        self._acting_until = 0.0
        self._changed = asyncio.Event()
        self._newcomers = asyncio.Event()

    @property
    def term(self) -> Term | None:
        """The term in which this Manager acts now; None while it stands by, also if its lease ran out unnoticed."""
        return self._term if self._term is not None and self._clock() < self._acting_until else None

    @property
    def unreachable_shards(self) -> set[int]:
        """The shards that did not answer the last sweep."""
        return self._term.unreachable_shards if self._term is not None else set()

    def verify_newcomers(self) -> None:
        """A worker has registered: probe its URL now, not with the next sweep."""
        self._newcomers.set()

    async def run(self, queue: QueuePort) -> None:
        """Compete for the lease, and act while it is held, until cancelled; then save what changed, and resign."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_lease(queue), name="manager: leader lease")
                tasks.create_task(self._sweep(), name="manager: sweep")
                tasks.create_task(self._verify_urls(), name="manager: newcomers")
                tasks.create_task(self._save(), name="manager: snapshot")
        finally:
            await self._save_last_changes()
            await self._resign(queue)

    async def _keep_lease(self, queue: QueuePort) -> None:
        """Take or keep the leader lease, three times within its time to live."""
        ttl_ms = self._settings.leader_lease_ms
        while True:
            started_at = self._clock()
            try:
                taking = queue.fleet.acquire_leader_lease(self._manager_id, ttl_ms, self._url, self._proof)
                number = await call_queue(min(self._settings.broker_timeout_ms, ttl_ms), taking)
                if number is None:
                    self._stand_by(ANOTHER_ACTS)
                    await self._acting_manager.poll(queue)
                else:
                    if self._term is None or self._term.number != number:
                        await self._begin_term(queue, number)
                    self._acting_until = started_at + ttl_ms / 1000
            except InferqError as error:
                self._note_problem("leader_lease_not_renewed", error)
                if self._clock() >= self._acting_until:
                    self._stand_by(error.public)
            await asyncio.sleep(ttl_ms / 3000)

    async def _begin_term(self, queue: QueuePort, number: int) -> None:
        term = Term(self._settings, queue, self._probe, self._metrics, number, self._changed, self._clock)
        try:
            await term.load()
        except ValidationError as error:
            # A snapshot of a version that we cannot read: the next heartbeats tell all that is in it.
            log.warning("registry_snapshot_unreadable", error=str(error))
        self._term = term
        self._acting_manager.url = ""
        self._newcomers.set()
        self.problem = ""
        self._metrics.acting.set(1)
        log.info("manager_acting", term=number, workers=len(term.registry.members()))

    def _stand_by(self, why: str) -> None:
        self.problem = f"standing by: {why}"
        if self._term is not None:
            log.warning("standing_by", why=why)
            self._term.close()
            self._term = None
            self._metrics.acting.set(0)

    async def _save_last_changes(self) -> None:
        """Of workers that deregistered a moment ago the next Manager must not wait for more."""
        term = self.term
        if term is not None:
            try:
                await term.save()
            except InferqError as error:
                log.info("registry_not_saved", error=error.message, then="the next heartbeats tell what is in it")

    async def _resign(self, queue: QueuePort) -> None:
        self._stand_by("the Manager is shutting down")
        try:
            await call_queue(self._settings.broker_timeout_ms, queue.fleet.release_leader_lease(self._manager_id))
        except InferqError as error:
            log.info("leader_lease_not_released", error=error.message, then="it expires by itself")

    # The loops of an acting Manager

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sweep_interval_ms / 1000)
            term = self.term
            if term is None:
                continue
            try:
                await term.sweep()
                self.problem = ""
            except InferqError as error:
                self._note_problem("sweep_failed", error)

    async def _verify_urls(self) -> None:
        """Probe newcomers as they come."""
        while True:
            await self._newcomers.wait()
            self._newcomers.clear()
            term = self.term
            if term is not None:
                await term.verify_urls()

    async def _save(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            pause = SAVE_PAUSE_S
            term = self.term
            if term is not None:
                try:
                    await term.save()
                except InferqError as error:
                    log.warning("registry_not_saved", error=error.message)
                    self._changed.set()
                    pause = FAILED_SAVE_PAUSE_S
            await asyncio.sleep(pause)

    def _note_problem(self, event: str, error: InferqError) -> None:
        """The first line of an outage says all, so the following ones are for debugging."""
        (log.warning if not self.problem else log.debug)(event, error=error.message)
        self.problem = error.public
