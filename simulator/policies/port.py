"""What decides which request runs where, and the order of workers by load that several policies need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..clock import Clock
from ..fleet import Membership, Worker
from ..requests import Request

Dispatch = Callable[[Worker, Request], None]
"""Sends a request to a worker's engine; from then on it counts as running there."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy works with. ``take_back`` ends an attempt that its engine has stopped. What is said to a worker
    takes ``hop_s``. A block of a prompt has ``block_tokens``."""

    clock: Clock
    dispatch: Dispatch
    take_back: Callable[[Request], None]
    hop_s: float
    block_tokens: int


class Policy(Membership, Protocol):
    """Decides which request runs where, and when."""

    @property
    def waiting(self) -> int:
        """Requests that were sent to no engine yet."""

    def arrive(self, request: Request) -> None:
        """A client sent ``request``."""

    def ended(self, request: Request, worker: Worker) -> None:
        """``request`` runs on ``worker`` no more."""


class LoadLevels:
    """Workers by a level, from the lowest: each change takes constant time while levels change by one."""

    __slots__ = ("_at", "_levels", "_lowest")

    def __init__(self) -> None:
        self._at: dict[Worker, int] = {}
        self._levels: dict[int, OrderedDict[Worker, None]] = {}
        self._lowest = 0

    def __len__(self) -> int:
        return len(self._at)

    def put(self, worker: Worker, level: int) -> None:
        """``worker`` is at ``level`` from now on, behind those that are there."""
        self.remove(worker)
        if not self._at or level < self._lowest:
            self._lowest = level
        self._at[worker] = level
        self._levels.setdefault(level, OrderedDict())[worker] = None

    def remove(self, worker: Worker) -> None:
        """``worker`` is at no level any more, if it was."""
        level = self._at.pop(worker, None)
        if level is not None:
            del self._levels[level][worker]

    def lowest(self) -> Worker | None:
        """The worker at the lowest level that has been there longest."""
        if not self._at:
            return None
        levels = self._levels
        while not levels.get(self._lowest):
            levels.pop(self._lowest, None)
            self._lowest += 1
        return next(iter(levels[self._lowest]))
