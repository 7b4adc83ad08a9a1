"""Whether a client takes what is written to it."""

from __future__ import annotations

import asyncio


class FlowControl(asyncio.Protocol):
    """A protocol that knows whether its transport wants no more for now, and lets writers wait for room."""

    def __init__(self) -> None:
        self.write_paused = False
        self._writable: asyncio.Event | None = None

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    async def writable(self) -> None:
        """Until the client has taken most of what was written."""
        if self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()
