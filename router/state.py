"""What the parts of a Router share: settings, figures, the link to the queue, the open requests; and its running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from queue_schemas import InferqError, JobId, ShuttingDown
from storage import StorageSettings
from telemetry import get_logger
from webhooks.url_settings import WebhookSettings

from .files.transfers import StorageQuota, Transfers
from .fleet.manager_failover import ManagerRoute
from .http.access import Gate, local_callers
from .http.api_keys import ApiKeys
from .inference.cancellation import Canceller
from .inference.open_requests import OpenRequest, OpenRequests
from .jobs.disconnect_grace import DisconnectGrace
from .metrics import RouterMetrics
from .ports import ManagerPort, OpenQueue
from .queue_link import QueueLink
from .settings import RouterSettings
from .store import Store
from .tenant_limits import tenant_limit

LAST_WORDS_S = 2.0
"""How long, at the end, the last errors may take to be sent, the last cancels to reach the queue and the last files
the store."""
RETRY_AFTER_SHUTDOWN_S = 2

log = get_logger(__name__)


class RouterState:
    """One Router. ``running`` runs what works in the background; ``drain`` ends the open requests."""

    def __init__(
        self,
        settings: RouterSettings,
        open_queue: OpenQueue,
        manager: ManagerPort | None,
        store: Store,
        storage_settings: StorageSettings,
        webhook_settings: WebhookSettings,
    ) -> None:
        self.settings = settings
        self.storage_settings = storage_settings
        self.webhook_settings = webhook_settings
        self.manager = manager
        self.store = store
        local = local_callers(settings)
        self.keys = ApiKeys(settings.api_keys, settings.api_keys_file, local)
        self.gate = Gate(self.keys, settings.join_token.get_secret_value(), local)
        self.metrics = RouterMetrics()
        alone = not self.keys.required
        self.requests = OpenRequests(settings, self.metrics, self._drop, self._cancel_orphan, alone=alone)
        self._route = manager if isinstance(manager, ManagerRoute) else None
        heard = self._route.heard if self._route is not None else None
        self.link = QueueLink(settings, open_queue, self.requests.deliver, self.requests.lost, self._broken, heard)
        self.canceller = Canceller(lambda: self.link.queue, self.requests.stored)
        self.abandoned = DisconnectGrace(settings.resume_grace_ms / 1000, self._give_up)
        self.leaving = False
        """Still serving, but asking clients and load balancers to go elsewhere."""
        self.draining = False
        self.hurry = asyncio.Event()
        """Set once: at the end, wait for no request."""
        self._idle = asyncio.Event()
        self.transfers = Transfers(
            settings.max_transfers,
            tenant_limit(settings.tenant_transfers, settings.max_transfers, alone=alone),
            self._note_idle,
        )
        self.allowance = StorageQuota(store, settings.tenant_files, settings.tenant_file_bytes)
        self.metrics.watch(
            waiting=lambda: self.requests.waiting,
            round_trips=lambda: self.link.round_trips,
            transfers=lambda: self.transfers.open,
            managed=lambda: not self.warnings(),
        )

    def reasons(self) -> list[str]:
        """Why the Router is not ready."""
        return ["the router is shutting down"] if self.draining or self.leaving else self.link.reasons

    def warnings(self) -> list[str]:
        """What is not as it should be, though the Router is ready: requests need no Manager."""
        trouble = self._route.trouble if self._route is not None else ""
        return [trouble] if trouble else []

    def done(self, request: OpenRequest) -> None:
        """A request is over."""
        self.requests.discard(request)
        self._note_idle()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything in the background runs within."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self.link.run(), name="queue link"),
                tasks.create_task(self.canceller.run(), name="canceller"),
                tasks.create_task(self._sweep(), name="sweep"),
            ]
            try:
                yield
            finally:
                for task in running:
                    task.cancel()
        await self.store.close(LAST_WORDS_S)
        if self.manager is not None:
            await self.manager.close()

    async def drain(self, limit_s: float) -> None:
        """Take no new request, give the open ones ``limit_s`` to finish, and end the rest with an error."""
        self.draining = True
        if self._busy:
            log.info("draining", open_requests=len(self.requests), transfers=self.transfers.open, limit_s=limit_s)
            if not await self._idle_within(limit_s):
                log.warning("cut_short", open_requests=len(self.requests), transfers=self.transfers.open)
                self.requests.fail_all(
                    ShuttingDown(
                        "this router shut down before the answer was complete; ask another one for the rest if it is "
                        "kept, or else send the request again",
                        retry_after_s=RETRY_AFTER_SHUTDOWN_S,
                    )
                )
                await self._idle_within(LAST_WORDS_S if len(self.requests) else 0, hurried=False)
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self.canceller.settled()
        except TimeoutError:
            log.warning("cancels_left", limit_s=LAST_WORDS_S)

    async def _idle_within(self, limit_s: float, *, hurried: bool = True) -> bool:
        """Whether nothing is open any more, within ``limit_s`` and, if ``hurried``, until that is asked for."""
        events = (self._idle, self.hurry) if hurried else (self._idle,)
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._busy

    @property
    def _busy(self) -> bool:
        return len(self.requests) > 0 or self.transfers.open > 0

    def _note_idle(self) -> None:
        if self.draining and not self._busy:
            self._idle.set()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.sweep_ms / 1000)
            self.requests.sweep(loop.time())
            self.abandoned.sweep(loop.time())
            self.keys.refresh()

    def _drop(self, request: OpenRequest, why: str) -> None:
        job_id = request.job.id if request.job is not None else ""
        log.warning("client_dropped", why=why, job_id=job_id)
        request.sending_since_s = float("inf")
        request.on_gone(why)
        request.connection.cut()

    def _give_up(self, job_id: JobId) -> None:
        grace_ms = self.settings.resume_grace_ms
        self.canceller.cancel_abandoned(job_id, f"its client was away for more than {grace_ms} ms", grace_ms)

    def _cancel_orphan(self, job_id: JobId) -> None:
        self.canceller.cancel(job_id, "nobody waits for the answer", if_orphaned=True)

    def _broken(self, error: InferqError) -> None:
        self.requests.fail_all(error)
