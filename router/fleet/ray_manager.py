"""The way to the Manager within a Ray cluster: remote calls to its actor."""

from __future__ import annotations

import asyncio
from typing import Any

from queue_schemas import RAY_NAMESPACE, CannotStart
from queue_schemas.fleet.acting_manager import RAY_SCHEME
from telemetry.http.fabric_calls import FabricCall, Forwarded, forwarded_answer

from .manager_client import RemoteManager


class RayManager(RemoteManager):
    """The actor ``name``, found by its name again whenever a call to it fails: it may have been replaced."""

    def __init__(self, name: str, join_token: str, timeout_ms: int) -> None:
        try:
            import ray  # noqa: PLC0415 - needed in this topology only
        except ImportError as error:
            raise CannotStart(f"{RAY_SCHEME}{name} needs Ray: install inferq[ray]") from error
        if not ray.is_initialized():
            raise CannotStart(
                f"{RAY_SCHEME}{name} is the Manager of a Ray cluster, and this process is in none: "
                "use `inferq ray up`, or give the Manager's http:// address"
            )
        super().__init__(f"{RAY_SCHEME}{name}", join_token)
        self._name = name
        self._timeout_s = timeout_ms / 1000
        self._actor: Any = None

    async def forward(self, call: FabricCall) -> Forwarded:
        import ray  # noqa: PLC0415

        try:
            async with asyncio.timeout(self._timeout_s):
                if self._actor is None:
                    # Asks Ray's control store and waits for it, so not in the event loop.
                    self._actor = await asyncio.to_thread(ray.get_actor, self._name, RAY_NAMESPACE)
                status, headers, body = await self._actor.answer.remote(
                    call.method, call.path, call.query, call.headers, call.body
                )
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            self._actor = None
            raise self.unreachable(error) from error
        self.reached()
        return forwarded_answer(status, headers, body)
