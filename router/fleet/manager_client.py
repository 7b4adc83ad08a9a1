"""Clients of the Manager: what they share, and the one over HTTP. The one within Ray is in ``ray_manager``."""

from __future__ import annotations

import abc
from urllib.parse import urlsplit

from queue_schemas import BrokerAddress, CannotStart, ManagerUnavailable
from telemetry import get_logger
from telemetry.http.fabric_calls import (
    UNREACHABLE,
    FabricCall,
    FabricHttp,
    Forwarded,
    broker_address_call,
    read_broker_address,
)

log = get_logger(__name__)


class RemoteManager(abc.ABC):
    """A :class:`~router.ports.ManagerPort`. ``where`` names it in sentences."""

    def __init__(self, where: str, join_token: str) -> None:
        self.where = where
        self._join_token = join_token
        self._logged = ""

    @abc.abstractmethod
    async def forward(self, call: FabricCall) -> Forwarded:
        """As :meth:`~router.ports.ManagerPort.forward`."""

    async def close(self) -> None:
        """Close what is open; nothing, unless overridden."""
        return

    async def broker_address(self) -> BrokerAddress:
        """As :meth:`~router.ports.ManagerPort.broker_address`."""
        return read_broker_address(await self.forward(broker_address_call(self._join_token)), self.where)

    def unreachable(self, error: BaseException) -> ManagerUnavailable:
        """The error of a call without an answer; logged once per outage, with the Manager's address."""
        cause = next(iter(str(error).splitlines()), "")
        message = f"the Manager at {self.where} cannot be reached ({type(error).__name__}: {cause}); try again shortly"
        if message != self._logged:
            log.warning("manager_unreachable", error=message)
            self._logged = message
        public = "the Manager cannot be reached; try again shortly"
        return ManagerUnavailable(message, retry_after_s=2, public=public)

    def reached(self) -> None:
        """It answered."""
        self._logged = ""


class HttpManager(RemoteManager):
    """The Manager (or another Router) at a base URL."""

    def __init__(self, url: str, join_token: str, http: FabricHttp) -> None:
        """``http`` may be shared by several; closing one closes it for all."""
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise CannotStart(
                f"the Manager's URL {url!r} is not understood; write it like http://localhost:9000, "
                "or ray:manager for the one in this Ray cluster"
            )
        super().__init__(url.rstrip("/"), join_token)
        self._http = http

    async def forward(self, call: FabricCall) -> Forwarded:
        try:
            answer = await self._http.forward(self.where, call)
        except UNREACHABLE as error:
            raise self.unreachable(error) from error
        self.reached()
        return answer

    async def close(self) -> None:
        await self._http.close()
