"""What decides how many workers there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from queue_schemas import PoolDepth


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """What a scaler sees: the pool as Routers say it, and ``workers`` that start or take work. Requests wait until an
    engine begins them."""

    now_s: float
    pool: PoolDepth
    workers: int


class Scaler(Protocol):
    """Asked every ``interval_s``."""

    @property
    def interval_s(self) -> float:
        """Time between two decisions."""

    def wanted(self, load: FleetLoad) -> int:
        """How many workers there should be."""
