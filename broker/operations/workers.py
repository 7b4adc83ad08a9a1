"""A worker session's calls: join, claim jobs, renew and reconcile leases, read control messages, leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from queue_schemas import (
    BadRequest,
    Claimed,
    Control,
    ControlKind,
    Fenced,
    Job,
    Lane,
    Lease,
    Pool,
    SessionId,
    ShardKeys,
    parse_control,
)
from queue_schemas.ids import encode_name, random_hex
from telemetry import get_logger

from ..redis.calls import Caller
from ..redis.shards import answers_of, on_each
from ..redis.streams import Entries, read_stream
from ..renewal import Renewer
from .job_batches import attempt_of
from .maintenance import Maintenance, Reclaimed

_CONTROL_COUNT = 64
MAX_CONTROL_BYTES = 1 << 20
"""Envelopes read of a control stream before they are dropped from it."""
PARK_MS = 30_000
"""How long a parked worker counts as idle without claiming again."""
RENEWAL_SHARD_TIMEOUT_S = 1.0
"""How long a renewal on one shard may delay the next one on the others."""

log = get_logger(__name__)


class Workers:
    """The sessions of workers. ``control_read`` says per shard and session up to where control messages were read;
    ``open_caller`` opens a connection of its own, for :meth:`renewer_apart`."""

    def __init__(
        self,
        caller: Caller,
        keys: Sequence[ShardKeys],
        maintenance: Maintenance,
        control_read: dict[tuple[int, str], str],
        open_caller: Callable[[], Caller],
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._maintenance = maintenance
        self._control_read = control_read
        self._open_caller = open_caller
        self._unjoined: dict[str, set[int]] = {}
        self._control_bytes: dict[str, int] = {}
        self._renewer = Renewer(caller, keys, control_read, self._unjoined)

    async def join(self, session_id: SessionId) -> set[int]:
        """Join the fleet: from now on ``session_id`` may claim. Returns the shards that did not answer, on which it has
        to :meth:`join_on` later. Raises if none did."""
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
        *,
        others: bool = True,
        offer: int = 0,
        received: int = 0,
        cache: int = 0,
        slots: int = 0,
        capacity: int = 0,
    ) -> Claimed:
        """Up to ``n`` jobs of ``pools`` on ``shard``; with fewer than ``n`` the worker is parked until it is
        woken.

        ``seq`` rises with every new claim: the same one again answers the same leases. ``turn`` is how many jobs the
        worker has claimed so far on the shard; it decides which lane goes first. ``region`` is the worker's: it claims
        that region's jobs and those of none first, others once they have waited ``remote_after_ms``; without
        ``others`` that region's alone, as long as they wait for it.

        A parked worker that makes an ``offer`` is handed new jobs without another claim, as control messages of kind
        ``JOB``: up to ``offer``, what this claim gives included. ``received`` is how many of these the session has
        read on the shard: those on their way count among ``n``. ``cache`` rises as the engine's prefix cache
        forgets: what the session ran two numbers before is not warm any more. ``slots`` are the worker's in all, busy
        ones too, ``capacity`` is the most that there may be: jobs go to the worker of which the least part is busy.
        Raises ``Fenced`` if the session was declared dead.
        """
        keys = self._keys[shard]
        wanted: list[str] = []
        for pool, lanes in pools:
            wanted += (encode_name(pool), ",".join(lanes))
        reply = await self._caller.script(
            "claim", keys.budget, keys.prefix, session_id, seq, turn, n, offer, received, random_hex()[:12], PARK_MS,
            encode_name(region) if others else f"={encode_name(region)}", cache, slots, capacity, *wanted,
        )  # fmt: skip
        if reply[0] == b"fenced":
            raise Fenced(f"{session_id} was declared dead: join again as a new session_id")
        leases = []
        for job_id, envelope, epoch, attempt_id, attempt, remaining_ms, waited_ms, suspect, predicted in reply[4:]:
            try:
                job = Job.unpack(envelope)
            except BadRequest as error:
                await self._refuse(keys, session_id, (job_id, epoch, attempt_id), error)
            else:
                leases.append(
                    Lease(
                        job,
                        epoch,
                        attempt_id.decode(),
                        attempt,
                        remaining_ms,
                        waited_ms,
                        suspect=bool(suspect),
                        predicted_ms=int(predicted) if predicted else None,
                    )
                )
        return Claimed(tuple(leases), parked=reply[1] == 1, handed_over=reply[2], offered=reply[3])

    async def _refuse(
        self, keys: ShardKeys, session_id: str, attempt: tuple[bytes, int, bytes], error: BadRequest
    ) -> None:
        """An envelope that this build cannot read is left to others, and ends as a dead letter if none can."""
        log.warning("envelope_refused", job_id=attempt[0].decode("utf-8", "replace"), error=error.message)
        reason = f"its worker cannot read it: {error.message}"
        await self._caller.script("release", keys.budget, keys.prefix, *attempt, 1, reason, "")
        # The claim may have given all that was asked for, and so not parked this worker: it has to claim again.
        control = keys.control(session_id)
        await self._caller.command(control, "XADD", control, "NOMKSTREAM", "*", "k", ControlKind.WAKE.value)

    async def renew(self, session_id: SessionId) -> None:
        """Keep all leases of ``session_id``. Raises ``Fenced`` if it was declared dead."""
        await self._renewer.renew(session_id)

    def renewer_apart(self) -> Renewer:
        """A renewer with a connection of its own, to be used and closed in one event loop, which may be another."""
        return Renewer(self._open_caller(), self._keys, self._control_read, self._unjoined, RENEWAL_SHARD_TIMEOUT_S)

    async def reconcile_leases(
        self, shard: int, session_id: SessionId, seq: int, leases: Sequence[Lease], read_to: str = ""
    ) -> set[str]:
        """Compare ``leases``, all that ``session_id`` runs on ``shard``, with what Redis knows, which may have lost its
        latest writes in a restart or a failover.

        Returns the ids of attempts that this worker no longer owns: their answers would be rejected. Jobs leased to it
        that it does not run wait again, uncounted. ``seq`` is that of its last claim, ``read_to`` the id of the last
        control message that it has read, where that was not here. Raises ``Fenced`` if the session was declared dead.
        """
        keys = self._keys[shard]
        last_read = read_to or self._control_read.get((shard, session_id), "0")
        attempts = [part for lease in leases for part in attempt_of(lease)]
        reply = await self._caller.script(
            "reconcile_leases", keys.budget, keys.prefix, session_id, seq, last_read, *attempts
        )
        if reply[0] == b"fenced":
            raise Fenced(f"{session_id} was declared dead: join again as a new session_id")
        return {attempt_id.decode() for attempt_id in reply[1:]}

    async def forget(self, session_id: SessionId) -> None:
        """Drop what is remembered here of a session whose control messages are read elsewhere, or by nobody."""
        self._unjoined.pop(session_id, None)
        for keys in self._keys:
            key = keys.control(session_id)
            self._control_read.pop((keys.shard, session_id), None)
            self._control_bytes.pop(key, None)
            await self._caller.link.forget(key)

    async def leave(self, session_id: SessionId) -> Reclaimed:
        """Leave the fleet; leased jobs wait again as if never started. Raises once every shard was tried."""
        return await self._maintenance.hand_back(session_id)

    async def read_control(
        self, shard: int, session_id: SessionId, after: str, block_ms: int
    ) -> list[tuple[str, Control | None]]:
        """Control messages behind ``after`` ("0" at first) with their ids, waiting up to ``block_ms`` for one."""
        key = self._keys[shard].control(session_id)
        entries = await read_stream(self._caller, key, after, _CONTROL_COUNT, block_ms)
        self._control_read[(shard, session_id)] = after
        await self._trim_control(key, after, entries)
        return [(entry_id, await self._control_of(shard, session_id, entry_id, fields)) for entry_id, fields in entries]

    async def _trim_control(self, key: str, after: str, entries: Entries) -> None:
        """Drop what was read of a control stream, now and then: envelopes must not pile up between two renewals."""
        bytes_read = self._control_bytes.get(key, 0) + sum(len(fields.get(b"env", b"")) for _, fields in entries)
        if bytes_read > MAX_CONTROL_BYTES:
            bytes_read = 0
            await self._caller.command(key, "XTRIM", key, "MINID", after)
        self._control_bytes[key] = bytes_read

    async def _control_of(
        self, shard: int, session_id: str, entry_id: str, fields: dict[bytes, bytes]
    ) -> Control | None:
        """The control message in a stream entry; None for a kind this version does not know, and for a malformed one. A
        job that cannot be read is handed back; its message, without a lease, still says that a slot was used up."""
        try:
            return parse_control(fields)
        except BadRequest as error:
            if fields[b"k"] != ControlKind.JOB.value.encode():
                log.warning("control_entry_malformed", entry=entry_id, error=error.message)
                return None
            attempt = (fields.get(b"id", b""), 1, fields.get(b"aid", b""))
            await self._refuse(self._keys[shard], session_id, attempt, error)
            return Control(ControlKind.JOB)
