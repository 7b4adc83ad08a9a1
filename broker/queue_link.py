"""The way to the queue for a process that may begin before Redis or the Manager can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import aiohttp
from pydantic import ValidationError

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from broker.redis.link import open_link
from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    BrokerAddress,
    BrokerUnsuitable,
    CannotStart,
    InferqError,
    ManagerUnavailable,
)
from telemetry import MetricsRegistry, get_logger
from telemetry.http.fleet_session import fleet_session

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 2.0
_ASK_LIMIT_S = 10.0

log = get_logger(__name__)


class QueueLink:
    """``broker`` is None while the queue cannot be reached, for the reason ``why``."""

    def __init__(
        self,
        manager_urls: Sequence[str],
        join_token: str,
        *,
        variable: str,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``variable`` names what would tell where the Managers are. ``tell`` is told each new ``why``."""
        self.broker: Broker | None = None
        self.why = "not connected yet"
        self._manager_urls = manager_urls
        self._join_token = join_token
        self._variable = variable
        self._tell = tell

    async def address(self, given: BrokerSettings, stop: asyncio.Event) -> BrokerSettings | None:
        """Where the queue is: as the settings say, or a Manager, which is asked until it answers or we are to stop.
        Raises ``CannotStart``."""
        if not given.redis_url:
            if not self._manager_urls:
                raise CannotStart(
                    "say where the queue is: --redis-url (INFERQ_REDIS_URL), or --manager-url "
                    f"({self._variable}) to ask the Manager"
                )
            pause = _FIRST_PAUSE_S
            while not stop.is_set():
                try:
                    address = await _ask_managers(self._manager_urls, self._join_token)
                except ManagerUnavailable as error:
                    self._cannot(error)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await stop.wait()
                    pause = min(pause * 2, _MAX_PAUSE_S)
                else:
                    url = await complete_url(address.broker_url)
                    given = given.model_copy(update={"redis_url": url, "shards": address.shards})
                    break
            else:
                return None
        open_link(given)  # connects to nothing: it only reads the URL
        return given

    async def keep(self, queue: BrokerSettings, registry: MetricsRegistry, connected: Callable[[Broker], None]) -> None:
        """Connect to the queue, once it can be, and tell ``connected``; then stay so until cancelled."""
        pause = _FIRST_PAUSE_S
        while self.broker is None:
            try:
                self.broker = await Broker.connect(queue)
            except BrokerUnsuitable:
                raise
            except InferqError as error:
                if error.public != self.why:
                    log.warning("queue_not_connected", error=error.message)
                self._cannot(error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MAX_PAUSE_S)
        broker = self.broker
        registry.watch_round_trips(lambda: broker.round_trips)
        connected(broker)
        log.info("queue_connected")
        try:
            await asyncio.Event().wait()
        finally:
            await broker.close()

    def _cannot(self, error: InferqError) -> None:
        self.why = error.public
        self._tell(self.why)


async def _ask_managers(urls: Sequence[str], token: str) -> BrokerAddress:
    """What the first says that answers. Raises ``ManagerUnavailable``, or ``CannotStart`` if none will have us."""
    faults: list[InferqError] = []
    async with fleet_session(_ASK_LIMIT_S) as session:
        for url in urls:
            try:
                return await _ask_manager(session, url, token)
            except (ManagerUnavailable, CannotStart) as error:
                faults.append(error)
    # One that is away may yet have us: only when all refuse is there nothing to wait for.
    raise next((fault for fault in faults if isinstance(fault, ManagerUnavailable)), faults[0])


async def _ask_manager(session: aiohttp.ClientSession, url: str, token: str) -> BrokerAddress:
    where = f"{url}{FABRIC_PREFIX}/broker"
    headers = {JOIN_TOKEN_HEADER: token} if token else {}
    try:
        async with session.get(where, headers=headers, allow_redirects=False) as answer:
            if answer.status in (401, 403):
                raise CannotStart(f"the Manager at {url} refuses our join token: set INFERQ_JOIN_TOKEN to the fleet's")
            if answer.status != 200:
                raise ManagerUnavailable(f"the Manager at {url} does not say where Redis is ({answer.status})")
            return BrokerAddress.model_validate_json(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
        raise ManagerUnavailable(f"the Manager at {url} cannot be asked ({type(error).__name__}: {error})") from error
