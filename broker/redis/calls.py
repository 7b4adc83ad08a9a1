"""``Caller`` sends a script or a command to Redis until it is answered or the retry limit is over.

Every script is safe to repeat after a reply that was lost: it gives the same answer and has no second effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from queue_schemas import BrokerFull, BrokerUnsuitable
from telemetry.backoff import Backoff

from .failures import FAILURES, as_inferq_error
from .link import Link
from .scripts import load_scripts

_BACKOFF = Backoff(0.05, 1.0)


class Caller:
    """Sends scripts and commands over a link, and counts round trips and retries."""

    def __init__(self, link: Link, *, retry_limit_s: float, script_flags: bool) -> None:
        self.link = link
        self.round_trips = 0
        self.retries = 0
        self._retry_limit_s = retry_limit_s
        self._scripts = load_scripts(flags=script_flags)

    async def script(
        self,
        name: str,
        key: str,
        *args: Any,
        wait_when_full: bool = True,
        retry: bool = True,
        repeat_args: Sequence[Any] | None = None,
    ) -> Any:
        """Run script ``name`` with KEYS[1] = ``key``; once, if it is not to ``retry``. ``repeat_args``: the arguments
        of repeated calls, if they are others.

        Raises ``BrokerUnavailable`` when the limit is over, ``BrokerUnsuitable`` when the server refuses us, and
        ``BrokerFull``, at once unless ``wait_when_full``, when it refuses writes.
        """
        script = self._scripts[name]

        async def attempt() -> Any:
            nonlocal args
            sent = args
            if repeat_args is not None:
                args = tuple(repeat_args)
            try:
                return await self.link.command(key, "EVALSHA", script.sha, 1, key, *sent)
            except NoScriptError:
                self.round_trips += 1
                return await self.link.command(key, "EVAL", script.source, 1, key, *sent)

        return await self._until_answered(attempt, wait_when_full, None if retry else 0.0)

    async def command(self, key: str, *args: Any) -> Any:
        """Send a command that may be repeated without harm. Raises like :meth:`script`."""
        return await self._until_answered(lambda: self.link.command(key, *args), True)

    async def once(self, key: str, *args: Any) -> Any:
        """Send a command that must not be repeated blindly. Raises like :meth:`script`, after one try."""
        self.round_trips += 1
        try:
            return await self.link.command(key, *args)
        except FAILURES as error:
            raise as_inferq_error(error) from error

    async def _until_answered(self, attempt: Any, wait_when_full: bool, limit_s: float | None = None) -> Any:
        """``limit_s`` is that of all calls unless another is given."""
        limit_s = self._retry_limit_s if limit_s is None else limit_s
        deadline: float | None = None
        failures = 0
        while True:
            self.round_trips += 1
            try:
                return await attempt()
            except FAILURES as error:
                failure = as_inferq_error(error)
                if isinstance(failure, BrokerUnsuitable) or (isinstance(failure, BrokerFull) and not wait_when_full):
                    raise failure from error
                failures += 1
                pause_s = _BACKOFF.pause_s(failures)
                deadline = deadline or time.monotonic() + limit_s
                if time.monotonic() + pause_s > deadline:
                    raise failure from error
            self.retries += 1
            await asyncio.sleep(pause_s)


def pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """The fields and values of a hash, in whichever shape the client gives them."""
    if isinstance(reply, dict):
        return list(reply.items())
    return list(zip(reply[::2], reply[1::2], strict=True))
