"""Telling a person how a long step is getting on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.status import Status

QUIET_S = 10.0
"""How often a line is written where the output is not a terminal."""


class Progress(Protocol):
    """Where a set-up reports."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Everything inside belongs to ``title``; leaving says how long it took."""
        ...

    def detail(self, text: str) -> None:
        """What the current step does at the moment. Called often."""
        ...


class ConsoleProgress:
    """A spinner on a terminal; elsewhere a line for each step and one each 10 s within it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._title = ""
        self._began = 0.0
        self._told = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._title = title
        self._began = self._told = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(f"{title} ...") as status:
                self._status = status
                try:
                    yield
                finally:
                    self._status = None
        else:
            self._console.print(f"{title} ...", highlight=False, soft_wrap=True)
            yield
        self._console.print(f"[green]done[/green] {title} ({self._elapsed_s():.0f} s)", highlight=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        now = time.monotonic()
        if self._status is not None:
            self._status.update(f"{self._title}: {text} ({self._elapsed_s():.0f} s)")
        elif now - self._told >= QUIET_S:
            self._told = now
            self._console.print(f"  {text} ({self._elapsed_s():.0f} s)", highlight=False, soft_wrap=True)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began
