"""Pass on calls from a standby Manager to the acting one: workers may be given any Manager's URL."""

from __future__ import annotations

from fastapi import Request, Response

from queue_schemas import JOIN_TOKEN_HEADER, InferqError, ManagerUnavailable
from queue_schemas.fleet.acting_manager import RAY_SCHEME, why_not_followed
from telemetry import get_logger
from telemetry.http.error_answers import error_response
from telemetry.http.fabric_calls import FORWARDED_BY_MANAGER, UNREACHABLE, FabricCall, FabricHttp

from .ports import QueuePort, call_queue

FORWARD_LIMIT_S = 8.0
"""Limit on one call passed on: a registration may take the acting Manager some seconds."""

log = get_logger(__name__)


class ActingManagerClient:
    """The way from this Manager to the one that acts, as that one says in Redis.

    The address is used only with a proof that its writer has our join token
    (:mod:`queue_schemas.fleet.acting_manager`).
    """

    def __init__(self, manager_id: str, own_url: str, join_token: str, limit_ms: int) -> None:
        self._manager_id = manager_id
        self._own_url = own_url
        self._join_token = join_token
        self._limit_ms = limit_ms
        self._http = FabricHttp(FORWARD_LIMIT_S)
        self._refused = ""
        self.url = ""
        """Where it is, as far as known; empty: nowhere that this Manager can pass calls on to."""

    async def poll(self, queue: QueuePort) -> None:
        """Read again where it is. Raises ``BrokerUnavailable``."""
        acting = await call_queue(self._limit_ms, queue.fleet.acting_manager())
        self.url = ""
        if not acting.renewal_count or acting.manager_id == self._manager_id or not acting.url:
            return
        if why := why_not_followed(acting, self._join_token, [self._own_url]):
            self._refuse(acting.url, why)
        elif acting.url.startswith(RAY_SCHEME):
            self._refuse(acting.url, "it is an actor of a Ray cluster, which only Routers there can reach")
        else:
            self.url, self._refused = acting.url.rstrip("/"), ""

    async def forward(self, call: FabricCall) -> Response:
        """The acting Manager's answer. Raises ``ManagerUnavailable``."""
        if not self.url:
            why = "no Manager acts that this one can pass calls on to; try again shortly"
            raise ManagerUnavailable(why, retry_after_s=2, public=why)
        try:
            answer = await self._http.forward(self.url, call)
        except UNREACHABLE as error:
            log.warning("acting_manager_unreachable", url=self.url, error=f"{type(error).__name__}: {error}")
            why = "the acting Manager cannot be reached; try again shortly"
            raise ManagerUnavailable(why, retry_after_s=2, public=why) from error
        return Response(answer.body, answer.status, headers=dict(answer.headers))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    def _refuse(self, url: str, why: str) -> None:
        if self._refused != f"{url} {why}":
            log.warning("acting_manager_not_followed", url=url[:200], why=why)
        self._refused = f"{url} {why}"


async def forward_request(acting_manager: ActingManagerClient, request: Request, refusal: InferqError) -> Response:
    """The acting Manager's answer to a call that came here; ``refusal`` where there is none to be had."""
    if FORWARDED_BY_MANAGER in request.headers or not acting_manager.url:
        return error_response(refusal)
    call = FabricCall(
        request.method,
        request.scope["raw_path"].decode("latin-1"),
        request.url.query,
        request.headers.get(JOIN_TOKEN_HEADER, ""),
        await request.body(),
        request.state.request_id,
        by_manager=True,
    )
    try:
        return await acting_manager.forward(call)
    except ManagerUnavailable as error:
        return error_response(error)
