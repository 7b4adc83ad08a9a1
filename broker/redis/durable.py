"""Run scripts that are answered once what they wrote is on the server's disk (``durability = disk``), for enqueues.

Script calls go out in pipelines on a connection that nothing else uses, each closed by a write and WAITAOF: the server
answers that one when its append-only file is fsynced up to the write, and nothing else on the connection until then.
What gathers meanwhile shares the next pipeline, so that one fsync a second (appendfsync everysec) bounds how long a
call takes, not how many there may be. The write is there because WAITAOF waits for the latest one of its own
connection: a repeated call that changes nothing would be confirmed at once, whatever became of the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import NoScriptError

from queue_schemas import BrokerUnsuitable, NotOnDisk, ShardKeys

from ..batching import Batcher
from .calls import Caller
from .failures import FAILURES, UNREACHABLE, as_inferq_error
from .link import Link
from .scripts import Script
from .server_checks import ServerFacts

MAX_PIPELINE_BYTES = 32 << 20


def waits_for_disk(facts: ServerFacts) -> bool:
    """Whether WAITAOF is needed on this server: where it is missing, ``appendfsync always`` has every reply wait.

    Raises ``BrokerUnsuitable``, saying how to correct it, for a server that cannot say when a write is on the disk.
    """
    if not facts.appendonly:
        raise BrokerUnsuitable(
            "durability is disk, and this Redis has no append-only file; set appendonly yes there, "
            "or durability to memory here"
        )
    if facts.has_waitaof and facts.appendfsync == "no":
        raise BrokerUnsuitable(
            "durability is disk, and appendfsync is no: this Redis never knows what is on its disk; "
            "set appendfsync everysec or always there, or durability to memory here"
        )
    if not facts.has_waitaof and facts.appendfsync != "always":
        raise BrokerUnsuitable(
            f"durability is disk, and {facts.kind} {facts.version} cannot say when a write is on the disk (WAITAOF "
            "came with Redis 7.2 and Valkey 8); set appendfsync always there, upgrade it, or set durability to memory "
            "here"
        )
    return facts.has_waitaof


@dataclass(frozen=True, slots=True)
class _Call:
    script: Script
    key: str
    args: tuple[Any, ...]


class DurableCaller(Caller):
    """A caller for one shard whose scripts are answered when what they wrote is on the server's disk.

    Calls made at once share a pipeline and a fsync. Raises like :class:`Caller`, but ``BrokerFull`` at once, and
    ``NotOnDisk`` when the disk does not confirm within the limit.
    """

    def __init__(self, link: Link, keys: ShardKeys, *, retry_limit_s: float, fsync_limit_s: float) -> None:
        super().__init__(link, retry_limit_s=retry_limit_s, script_flags=True)
        self._key = keys.budget
        self._mark = keys.synced
        self._fsync_limit_s = fsync_limit_s
        self._line: Batcher[_Call, Any] = Batcher(self._send, _size, max_bytes=MAX_PIPELINE_BYTES)

    async def script(
        self,
        name: str,
        key: str,
        *args: Any,
        wait_when_full: bool = False,
        retry: bool = True,
        repeat_args: Sequence[Any] | None = None,
    ) -> Any:
        """Run script ``name``. It is repeated unchanged until the disk confirms it, so with ``repeat_args`` from the
        start, if there are any."""
        args = args if repeat_args is None else tuple(repeat_args)
        return await self._line.submit(_Call(self._scripts[name], key, args))

    async def close(self) -> None:
        """Stop; calls under way are cancelled."""
        await self._line.close()

    async def _send(self, calls: Sequence[_Call]) -> list[Any]:
        """The replies of ``calls``, or their errors, once the disk has confirmed them."""
        deadline = time.monotonic() + self._retry_limit_s
        while True:
            *replies, (synced, _) = await self._until_answered(lambda: self._pipeline(calls), wait_when_full=False)
            if synced:
                return [as_inferq_error(reply) if isinstance(reply, FAILURES) else reply for reply in replies]
            if time.monotonic() >= deadline:
                raise NotOnDisk(
                    "the queue's Redis took the work, but its disk did not confirm it within "
                    f"{self._retry_limit_s:g} s: it may be run, and a crash may lose it; look at the server's disk, "
                    "and send the same again",
                    retry_after_s=10,
                )

    async def _pipeline(self, calls: Sequence[_Call]) -> list[Any]:
        replies = await self._try(("EVALSHA", call.script.sha, 1, call.key, *call.args) for call in calls)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            self.round_trips += 1
            replies = await self._try(("EVAL", call.script.source, 1, call.key, *call.args) for call in calls)
        for number, reply in enumerate(replies):
            confirms = number >= len(calls)
            if isinstance(reply, UNREACHABLE) or (confirms and isinstance(reply, FAILURES)):
                raise reply
        return [*replies[: len(calls)], replies[-1]]

    async def _try(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        confirm = (("SET", self._mark, ""), ("WAITAOF", 1, 0, int(self._fsync_limit_s * 1000)))
        return await self.link.pipeline(self._key, self._fsync_limit_s, [*commands, *confirm])


def _size(call: _Call) -> int:
    return sum(len(arg) for arg in call.args if isinstance(arg, bytes | str))
