"""What workers ask of the queue: joining, claiming, keeping leases, sending output, ending attempts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence

from queue_schemas import (
    BadRequest,
    Claimed,
    Control,
    ControlKind,
    Fenced,
    Job,
    Lane,
    Lease,
    Outcome,
    Pool,
    SessionId,
    Settled,
    ShardKeys,
    shard_of_job,
)
from queue_schemas.ids import encode_name
from queue_schemas.keys import keys_of_job
from telemetry import get_logger

from .job_batches import ShardBatches, attempt_of
from .redis.calls import Caller
from .redis.link import Link
from .renewal import Renewer
from .reply_streams import read_control
from .upkeep import answers_of, on_each

PARK_MS = 30_000
"""How long a parked worker counts as idle without claiming again."""
RENEWAL_PATIENCE_S = 1.0
"""How long a renewal on one shard may hold up the next one on the others."""

log = get_logger(__name__)


class WorkerCalls:
    """The part of :class:`broker.Broker` that is for workers."""

    _caller: Caller
    _keys: Sequence[ShardKeys]
    _batches: Sequence[ShardBatches]
    _renewer: Renewer
    _control_read: dict[tuple[int, str], str]
    _unjoined: dict[str, set[int]]
    _open_link: Callable[[], Link]
    _script_flags: bool

    async def join(self, session_id: SessionId) -> set[int]:
        """Enter the fabric: from now on ``session_id`` may claim, on every shard but those of the answer, which did
        not answer: there it has to :meth:`join_on`. Raises if none did."""
        self._unjoined[session_id] = {keys.shard for keys in self._keys}
        found = await on_each(self._keys, lambda keys: self.join_on(keys.shard, session_id))
        missing = self._unjoined.get(session_id, set())
        if len(missing) == len(found):
            answers_of(found)
        return set(missing)

    async def join_on(self, shard: int, session_id: SessionId) -> None:
        """:meth:`join` on one shard."""
        keys = self._keys[shard]
        await self._caller.script("join", keys.budget, keys.prefix, session_id)
        missing = self._unjoined.get(session_id, set())
        missing.discard(shard)
        if not missing:
            self._unjoined.pop(session_id, None)

    async def claim(
        self,
        shard: int,
        session_id: SessionId,
        seq: int,
        turn: int,
        n: int,
        pools: Sequence[tuple[Pool, Sequence[Lane]]],
        region: str = "",
    ) -> Claimed:
        """Up to ``n`` jobs of ``pools`` on ``shard``; with fewer than ``n`` the worker is parked until it is woken, or
        until ``look_again_ms`` of the answer have passed.

        ``seq`` rises with every new claim: the same one again answers the same leases. ``turn`` is how many jobs the
        worker has claimed so far on the shard; it decides which lane goes first. ``region`` is the worker's: it claims
        that region's jobs and those of none first, others once they have waited their patience. Raises ``Fenced`` if
        the session id was declared dead.
        """
        keys = self._keys[shard]
        wanted: list[str] = []
        for pool, lanes in pools:
            wanted += (encode_name(pool), ",".join(lanes))
        reply = await self._caller.script(
            "claim", keys.budget, keys.prefix, session_id, seq, turn, n, secrets.token_hex(6), PARK_MS,
            encode_name(region), *wanted,
        )  # fmt: skip
        if reply[0] == b"fenced":
            raise Fenced(f"{session_id} was declared dead: join again as a new session_id")
        leases = []
        for job_id, envelope, epoch, attempt_id, attempt, remaining_ms, waited_ms, suspect in reply[2:]:
            try:
                job = Job.unpack(envelope)
            except BadRequest as error:
                await self._refuse(keys, session_id, (job_id, epoch, attempt_id), error)
            else:
                leases.append(
                    Lease(job, epoch, attempt_id.decode(), attempt, remaining_ms, waited_ms, suspect=bool(suspect))
                )
        return Claimed(tuple(leases), reply[1] if reply[1] >= 0 else None)

    async def _refuse(
        self, keys: ShardKeys, session_id: str, attempt: tuple[bytes, int, bytes], error: BadRequest
    ) -> None:
        """An envelope that this build cannot read is left to others, and ends as a dead letter if none can."""
        log.warning("envelope_refused", job_id=attempt[0].decode(), error=error.message)
        reason = f"its worker cannot read it: {error.message}"
        await self._caller.script("release", keys.budget, keys.prefix, *attempt, 1, reason)
        # The claim may have given all that was asked for, and so not parked this worker: it has to claim again.
        control = keys.control(session_id)
        await self._caller.command(control, "XADD", control, "NOMKSTREAM", "*", "k", ControlKind.WAKE.value)

    async def renew(self, session_id: SessionId) -> None:
        """Keep all leases of ``session_id``. Raises ``Fenced`` if it was declared dead."""
        await self._renewer.renew(session_id)

    def renewer_apart(self) -> Renewer:
        """A renewer with a connection of its own, to be used and closed in one event loop, which may be another."""
        caller = Caller(self._open_link(), retry_limit_s=0, script_flags=self._script_flags)
        return Renewer(caller, self._keys, self._control_read, self._unjoined, RENEWAL_PATIENCE_S)

    async def hold(self, shard: int, session_id: SessionId, seq: int, leases: Sequence[Lease]) -> set[str]:
        """Make ``leases``, all that ``session_id`` runs on ``shard``, and what Redis says of it the same: after a
        restart or a failover it may have lost its latest writes.

        Answers the ids of the attempts that are not this worker's: nobody will take their answers. What it held without
        running it waits again, uncounted. ``seq`` is that of its last claim. Raises ``Fenced`` if the session id was
        declared dead.
        """
        keys = self._keys[shard]
        last_read = self._control_read.get((shard, session_id), "0")
        attempts = [part for lease in leases for part in attempt_of(lease)]
        reply = await self._caller.script("hold", keys.budget, keys.prefix, session_id, seq, last_read, *attempts)
        if reply[0] == b"fenced":
            raise Fenced(f"{session_id} was declared dead: join again as a new session_id")
        return {attempt_id.decode() for attempt_id in reply[1:]}

    async def publish(self, shard: int, frames: Mapping[str, bytes]) -> set[str]:
        """Send packed frames to Routers (``reply_to`` -> bytes) and answer those that are gone.

        One try: on ``BrokerUnavailable`` the frames may or may not have arrived; sending them again is harmless,
        because a Router drops repeats by ``seq``.
        """
        keys = self._keys[shard]

        async def send(reply_to: str, packed: bytes) -> bool:
            key = keys.reply(reply_to)
            return await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", "f", packed) is None

        gone = await asyncio.gather(*(send(reply_to, packed) for reply_to, packed in frames.items()))
        return {reply_to for reply_to, is_gone in zip(frames, gone, strict=True) if is_gone}

    async def settle(self, lease: Lease, outcome: Outcome, frames: bytes = b"") -> Settled:
        """End an attempt with its answer. ``frames`` (packed; those not yet published, the last with END) reach the
        Router, or those who listen to a stored job, only if the answer is ``OK``."""
        return await self._batches[shard_of_job(lease.job.id)].settle(lease, outcome, frames)

    async def release(self, lease: Lease, reason: str, *, counted: bool, avoid_ms: int | None = None) -> Settled:
        """End an attempt without an answer: the job waits again, ahead of new work.

        ``counted``: the attempt is spent, this worker is avoided for ``avoid_ms`` (None: two seconds), and a job whose
        attempts are used up becomes a dead letter. Otherwise it is handed back as if never started.
        """
        return await self._batches[shard_of_job(lease.job.id)].release(lease, reason, counted, avoid_ms)

    async def crashed(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        """End all attempts that ran on an engine that crashed, in one call per shard.

        Which job did it cannot be known: if there are suspects among them, each of those is charged an attempt, else
        every job. All are suspects from now on: a worker is given one of them at a time.
        """
        answers: dict[str, Settled] = {}

        async def end(keys: ShardKeys) -> None:
            here = [lease for lease in leases if shard_of_job(lease.job.id) == keys.shard]
            if here:
                attempts = [part for lease in here for part in attempt_of(lease)]
                found = await self._caller.script("crashed", keys.budget, keys.prefix, reason, *attempts)
                for lease, answer in zip(here, found, strict=True):
                    answers[lease.attempt_id] = Settled(answer.decode())

        answers_of(await on_each(self._keys, end))
        return [answers[lease.attempt_id] for lease in leases]

    async def clear(self, lease: Lease) -> Settled:
        """Clear a running job of suspicion: it has put out more than before its engine crashed."""
        keys = keys_of_job(self._keys, lease.job.id)
        return Settled((await self._caller.script("clear", keys.budget, keys.prefix, *attempt_of(lease))).decode())

    async def read_control(
        self, shard: int, session_id: SessionId, after: str, block_ms: int
    ) -> list[tuple[str, Control | None]]:
        """Control messages behind ``after`` ("0" at first) with their ids, waiting up to ``block_ms`` for one."""
        messages = await read_control(self._caller, self._keys[shard], session_id, after, block_ms)
        self._control_read[(shard, session_id)] = after
        return messages
