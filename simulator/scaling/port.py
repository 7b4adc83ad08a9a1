"""What decides how many workers there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """What a scaler sees. ``waiting`` requests have begun on no engine, ``running`` ones have; ``workers`` start or
    take work; times are in seconds."""

    now_s: float
    waiting: int
    running: int
    workers: int


class Scaler(Protocol):
    """Asked every ``interval_s``."""

    @property
    def interval_s(self) -> float:
        """Time between two decisions."""

    def wanted(self, load: FleetLoad) -> int:
        """How many workers there should be."""
