"""The port between the autoscaler and what starts and ends workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from queue_schemas import InferqError


class DriverFailed(InferqError):
    """The driver could not do a step; the message says why and what to do next. The step is tried again later."""

    code = "driver_failed"


class Driver(Protocol):
    """Runs the workers of one pool. Every method but ``close`` may raise ``DriverFailed``, and may be repeated."""

    drains: bool
    """Whether :meth:`remove` has a worker finish what it runs. Otherwise it is drained first, and then removed."""

    @property
    def outdated(self) -> frozenset[str]:
        """Those of the last :meth:`workers` that were started with other settings than those of now. They are replaced
        one by one. Always empty where the platform does that, or where nobody can tell."""
        ...

    async def workers(self) -> frozenset[str]:
        """The ids of all workers that it runs, starting and draining ones included."""
        ...

    async def scale_to(self, count: int) -> None:
        """Start workers until ``count`` run; none is ended."""
        ...

    async def remove(self, worker_ids: Sequence[str]) -> None:
        """End these workers and start no others for them. Does not wait for their end."""
        ...

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        """Which ``count`` workers can go, of those that are ``ordered`` by what their end costs."""
        ...

    async def close(self) -> None:
        """Let go of the workers, which run on."""
        ...
