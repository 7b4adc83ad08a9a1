"""The ways to the Manager: what they have in common, and the one over HTTP. The one within Ray: ``ray_manager``."""

from __future__ import annotations

import abc
from urllib.parse import urlsplit

from pydantic import ValidationError

from queue_schemas import (
    FABRIC_PREFIX,
    AuthenticationFailed,
    BrokerAddress,
    CannotStart,
    ManagerUnavailable,
)
from telemetry import get_logger
from telemetry.http.fabric_calls import UNREACHABLE, FabricCall, FabricHttp, Forwarded

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
        answer = await self.forward(FabricCall("GET", f"{FABRIC_PREFIX}/broker", join_token=self._join_token))
        if answer.status in (401, 403):
            raise AuthenticationFailed(
                f"the Manager at {self.where} refuses our join token: give both the same INFERQ_JOIN_TOKEN"
            )
        try:
            if answer.status != 200:
                raise ManagerUnavailable(f"the Manager at {self.where} does not say where Redis is ({answer.status})")
            return BrokerAddress.model_validate_json(answer.body)
        except ValidationError as error:
            raise ManagerUnavailable(f"what answers at {self.where} is not a Manager: {error}") from error

    def unreachable(self, error: BaseException) -> ManagerUnavailable:
        """What to raise when the call got no answer. The log says where it should have come from, once an outage."""
        told = next(iter(str(error).splitlines()), "")
        message = f"the Manager at {self.where} cannot be reached ({type(error).__name__}: {told}); try again shortly"
        if message != self._logged:
            log.warning("manager_not_reached", error=message)
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
