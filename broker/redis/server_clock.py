"""Estimate the time on the queue's servers from the sweeping process's monotonic clock, for its sweeps.

The scripts keep a clock of the queue's own, which a step of the server's clock does not move (``now_ms`` in
broker/lua/_shared.lua). After a gap without calls, a script cannot know whether it was a step or an outage. A process
that saw the queue's clock before the gap and measured the time since knows, and passes a lower bound of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from telemetry import get_logger

UNCERTAIN_MS = 250
"""How long a reply may have been on its way: so much less is claimed."""
STEP_MS = 2_000
"""By how much a server's clock may differ from ours between two sweeps before that is logged."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Seen:
    queue_ms: int
    server_ms: int
    at: float


class ServerClocks:
    """What was seen of each shard's clock last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def at_least(self, shard: int) -> int:
        """How late it is by the queue's clock at least, in ms; 0 if it was not seen before."""
        seen = self._seen.get(shard)
        if seen is None:
            return 0
        return max(seen.queue_ms, seen.queue_ms + round((self._clock() - seen.at) * 1000) - UNCERTAIN_MS)

    def saw(self, shard: int, queue_ms: int, server_ms: int) -> None:
        """Take in the queue's and the server's time, as just answered."""
        now, before = self._clock(), self._seen.get(shard)
        self._seen[shard] = _Seen(queue_ms, server_ms, now)
        if before is None:
            return
        stepped_ms = server_ms - before.server_ms - (now - before.at) * 1000
        if abs(stepped_ms) > STEP_MS + UNCERTAIN_MS:
            then = "the queue's own clock goes on as before"
            log.warning("server_clock_stepped", shard=shard, by_s=round(stepped_ms / 1000, 1), then=then)
