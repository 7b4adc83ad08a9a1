"""Calls: a script or a command, sent until it is answered or the limit is over.

Every script survives "reply lost after commit": a repeated call gives the same answer and has no second effect. So a
call whose reply did not come is simply sent again, with backoff and an end.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from redis.exceptions import NoScriptError, OutOfMemoryError

from queue_schemas import BrokerFull, BrokerUnavailable, BrokerUnsuitable

from .failures import FAILURES, REFUSED, UNREACHABLE
from .link import Link
from .scripts import load_scripts

_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 1.0
_REFUSING = ("NOAUTH", "WRONGPASS", "NOPERM")
_REFUSING_SCRIPTS = ("ACL failure in script", "The user executing the script can't")
"""Redis 7.0 does not name the command that its user may not send within a script."""
_FULL = ("OOM", "MISCONF")


class Caller:
    """Sends scripts and commands over a link, and counts round trips and retries."""

    def __init__(self, link: Link, *, retry_limit_s: float, script_flags: bool) -> None:
        self.link = link
        self.round_trips = 0
        self.retries = 0
        self._retry_limit_s = retry_limit_s
        self._scripts = load_scripts(flags=script_flags)

    async def script(self, name: str, key: str, *args: Any, wait_when_full: bool = True, retry: bool = True) -> Any:
        """Run script ``name`` with KEYS[1] = ``key``; once, if it is not to ``retry``.

        Raises ``BrokerUnavailable`` when the limit is over, ``BrokerUnsuitable`` when the server refuses us, and
        ``BrokerFull``, at once unless ``wait_when_full``, when it refuses writes.
        """
        script = self._scripts[name]

        async def attempt() -> Any:
            try:
                return await self.link.command(key, "EVALSHA", script.sha, 1, key, *args)
            except NoScriptError:
                self.round_trips += 1
                return await self.link.command(key, "EVAL", script.source, 1, key, *args)

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
        """``limit_s``: that of all calls unless another is given."""
        limit_s = self._retry_limit_s if limit_s is None else limit_s
        give_up_at: float | None = None
        pause = _FIRST_PAUSE_S
        while True:
            self.round_trips += 1
            try:
                return await attempt()
            except FAILURES as error:
                failure = as_inferq_error(error)
                if isinstance(failure, BrokerUnsuitable) or (isinstance(failure, BrokerFull) and not wait_when_full):
                    raise failure from error
                give_up_at = give_up_at or time.monotonic() + limit_s
                if time.monotonic() + pause > give_up_at:
                    raise failure from error
            self.retries += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _MAX_PAUSE_S)


def as_inferq_error(error: BaseException) -> BrokerUnavailable | BrokerUnsuitable | BrokerFull:
    """The error of ours that says what ``error`` means for a caller."""
    text = str(error)
    if isinstance(error, REFUSED) or text.startswith(_REFUSING):
        return BrokerUnsuitable(
            f"Redis refuses us: {error}; check the user and password in INFERQ_REDIS_URL and the user's ACL rules (a "
            "Manager tells the password only to who shows its join token: INFERQ_JOIN_TOKEN; the embedded queue's is "
            "found in the folder INFERQ_DATA_DIR)",
            public="the queue's Redis refuses us; the operator finds the reason in the log",
        )
    if any(words in text for words in _REFUSING_SCRIPTS):
        return BrokerUnsuitable(
            f"Redis refuses us a part of a script: {text}; ACL LOG on the server names the command or key, and "
            "docs/topologies.md the rules that a user needs"
        )
    if isinstance(error, OutOfMemoryError) or any(code in text for code in _FULL):
        return BrokerFull(
            f"the queue's Redis takes no more work now: {text}; free memory or disk, or raise maxmemory",
            retry_after_s=10,
        )
    if isinstance(error, UNREACHABLE):
        return BrokerUnavailable(
            f"the queue's Redis cannot be reached ({type(error).__name__}: {error}); try again shortly",
            retry_after_s=2,
            public="the queue's Redis cannot be reached; try again shortly",
        )
    # Whatever else a server says (somebody's slow script runs, it is failing over) may pass: it was fit at the start.
    return BrokerUnavailable(f"the queue's Redis answers with an error: {text}; try again shortly", retry_after_s=2)


def pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """The fields and values of a hash, in whichever shape the client gives them."""
    if isinstance(reply, dict):
        return list(reply.items())
    return list(zip(reply[::2], reply[1::2], strict=True))
