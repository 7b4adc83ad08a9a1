"""Mirror a registry's metrics as Ray gauges, so that Ray's metrics endpoint shows them beside its own.

Ray exports them under ``ray_`` and our name, with tags that tell the processes apart. Counters and the parts of
histograms are gauges of the same value there: ``rate()`` treats both alike, a restart included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

from ray.util.metrics import Gauge

from .metrics import MetricsRegistry

EVERY_S = 5.0
_OURS = "inferq_"


async def mirror_metrics(
    registry: MetricsRegistry, before: Callable[[], Awaitable[None]] | None = None, *, every_s: float = EVERY_S
) -> NoReturn:
    """Hand the figures of ``registry`` to Ray every ``every_s`` seconds, until cancelled; ``before`` each time."""
    mirror = Mirror(registry)
    while True:
        if before is not None:
            await before()
        mirror.update()
        await asyncio.sleep(every_s)


class Mirror:
    """The Ray gauges of one registry."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    def update(self) -> None:
        """Bring every gauge up to date."""
        for family in self._registry.collectors.collect():
            if not family.name.startswith(_OURS):
                continue  # the process's own figures Ray has already
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = Gauge(sample.name, family.documentation, tag_keys=tuple(sample.labels))
                    self._gauges[sample.name] = gauge
                gauge.set(sample.value, tags=sample.labels)
