"""End the attempts whose engine disconnected: all together after a crash, or alone if only connections broke."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from queue_schemas import EngineState
from queue_schemas.addresses import hide_addresses
from telemetry import get_logger

from ..engines import Engine
from .attempt import Attempt, EngineDisconnected, Release
from .end_reports import EndReports

GATHER_S = 0.25
"""How long after one attempt was disconnected others may be, as part of the same crash."""

log = get_logger(__name__)


class _Group:
    """Attempts that were disconnected at about the same time. ``beside``: what ran when the first one did."""

    __slots__ = ("attempts", "beside", "ended")

    def __init__(self, first: Attempt, beside: Sequence[Attempt]) -> None:
        self.attempts = [first]
        self.beside = beside
        self.ended = asyncio.Event()

    @property
    def is_whole(self) -> bool:
        """Whether nothing went on that ran beside them."""
        return all(attempt.ending for attempt in self.beside)


class EngineDisconnects:
    """Tells a crash of ``engine`` from single broken connections, and reports either to the queue.

    A crash is one event: its jobs are reported together, so that the queue can tell which of them may have caused it.
    """

    def __init__(self, engine: Engine, reports: EndReports) -> None:
        self._engine = engine
        self._reports = reports
        self._group: _Group | None = None

    async def end(self, attempt: Attempt, ending: EngineDisconnected, running: Iterable[Attempt]) -> None:
        """End ``attempt`` with all that ran beside it (``running``) if the engine crashed, or alone if it only closed
        this connection."""
        group = self._group
        if group is not None:
            group.attempts.append(attempt)
            await group.ended.wait()
            return
        group = self._group = _Group(attempt, list(running))
        await asyncio.sleep(GATHER_S)
        self._group = None
        if self._engine.state is EngineState.READY and not group.is_whole:
            release = Release(ending.reason, counted=True)
            await asyncio.gather(*(self._reports.release(one, release) for one in group.attempts))
        else:
            await self._crashed(group.attempts, ending.reason)
        group.ended.set()

    async def _crashed(self, attempts: Sequence[Attempt], reason: str) -> None:
        detail = self._engine.detail
        if detail:
            log.warning("engine_crashed_under_jobs", jobs=len(attempts), detail=detail)
            # The reason reaches clients: what the engine wrote last, and where it listens, stays in the log.
            reason = f"{reason}; {hide_addresses(detail.partition('; its last lines')[0])}"
        await self._reports.crashed(attempts, reason)
