"""Finds and connects the queue for a batcher or notifier, which may start before Redis or the Manager answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from broker.redis.link import open_link
from queue_schemas import (
    AuthenticationFailed,
    BrokerAddress,
    BrokerUnsuitable,
    CannotStart,
    InferqError,
    ManagerUnavailable,
)
from telemetry import MetricsRegistry, get_logger
from telemetry.backoff import Backoff
from telemetry.http.fabric_calls import UNREACHABLE, FabricHttp, broker_address_call, read_broker_address

_BACKOFF = Backoff(0.1, 2.0)
_CALL_TIMEOUT_S = 10.0

log = get_logger(__name__)


class BrokerConnector:
    """``broker`` is None until the queue is connected; ``fault`` says why."""

    def __init__(
        self,
        manager_urls: Sequence[str],
        join_token: str,
        *,
        variable: str,
        on_fault: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``variable`` names the setting of the Managers' URLs in errors. ``on_fault`` gets each ``fault``."""
        self.broker: Broker | None = None
        self.fault = "not connected yet"
        self._manager_urls = manager_urls
        self._join_token = join_token
        self._variable = variable
        self._on_fault = on_fault

    async def find(self, settings: BrokerSettings, stop: asyncio.Event) -> BrokerSettings | None:
        """``settings`` with a Redis URL: their own, or a Manager's, which is asked until it answers.

        None if ``stop`` is set before. Raises ``CannotStart``.
        """
        if not settings.redis_url:
            address = await self._ask_until_answered(stop)
            if address is None:
                return None
            url = await complete_url(address.broker_url)
            settings = settings.model_copy(update={"redis_url": url, "shards": address.shards})
        open_link(settings)  # connects to nothing: it only reads the URL
        return settings

    async def run(
        self, settings: BrokerSettings, registry: MetricsRegistry, on_connected: Callable[[Broker], None]
    ) -> None:
        """Connect to the queue as soon as it can be reached, call ``on_connected``, and stay until cancelled."""

        def failed(error: BaseException, _pause_s: float) -> None:
            if isinstance(error, InferqError):
                if error.public != self.fault:
                    log.warning("queue_unreachable", error=error.message)
                self._set_fault(error)

        broker = self.broker = await _BACKOFF.retry(
            lambda: Broker.connect(settings),
            when=lambda error: isinstance(error, InferqError) and not isinstance(error, BrokerUnsuitable),
            failed=failed,
        )
        registry.watch_round_trips(lambda: broker.round_trips)
        on_connected(broker)
        log.info("queue_connected")
        try:
            await asyncio.Event().wait()
        finally:
            await broker.close()

    async def _ask_until_answered(self, stop: asyncio.Event) -> BrokerAddress | None:
        if not self._manager_urls:
            raise CannotStart(
                "say where the queue is: --redis-url (INFERQ_REDIS_URL), or --manager-url "
                f"({self._variable}) to ask the Manager"
            )
        failures = 0
        while not stop.is_set():
            try:
                return await _ask_managers(self._manager_urls, self._join_token)
            except ManagerUnavailable as error:
                self._set_fault(error)
                failures += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(_BACKOFF.pause_s(failures)):
                        await stop.wait()
        return None

    def _set_fault(self, error: InferqError) -> None:
        self.fault = error.public
        self._on_fault(self.fault)


async def _ask_managers(urls: Sequence[str], join_token: str) -> BrokerAddress:
    """The first Manager's answer. Raises ``ManagerUnavailable``, or ``CannotStart`` if all refuse the join token."""
    http, refused, fault = FabricHttp(_CALL_TIMEOUT_S), None, None
    try:
        for url in urls:
            try:
                return read_broker_address(await http.forward(url, broker_address_call(join_token)), url)
            except AuthenticationFailed as error:
                refused = error
            except ManagerUnavailable as error:
                fault = fault or error
            except UNREACHABLE as error:
                fault = fault or ManagerUnavailable(
                    f"the Manager at {url} cannot be asked ({type(error).__name__}: {error})"
                )
    finally:
        await http.close()
    # A Manager that cannot be reached may accept the token later: only if all refuse it, waiting is in vain.
    raise fault or CannotStart(refused.message if refused is not None else "there is no Manager to ask")
