"""Decide what to claim next: the slots of a worker session, and its claims on each shard.

Rules:

* A slot is free, reserved by a claim that is under way, or busy with a job. Claims never ask for more than is free.
* Each shard has at most one claim under way. Its number (``seq``) rises with each claim and not with its repeats, so a
  claim whose answer was lost is sent again unchanged.
* A claim that finds less than it asked for parks the worker on that shard: it waits for a wake, or claims again when
  its time as a parked worker is nearly over.
* A worker that serves one shard offers all its free slots with a claim. While it is parked, jobs are handed to it in
  these, without a claim: they stay reserved. When they are used up it is parked no more; it claims, and offers anew,
  once more slots have become free than it still offers. It also claims for what the queue hands over by: another
  number of its engine's cache, or more slots that it may have.
* ``total`` may change at any time. Jobs above a lowered one run on, and what was offered stays reserved until a smaller
  offer takes its place: the worker claims for that at once.
* A slot that a job gave up for an interactive one is claimed for on a turn that looks for such first: lower lanes have
  their part of what runs by another rule then (:mod:`scheduling.preemption`). Until that claim is answered the slot is
  spoken for: it is not free for another interactive job.
* A parked worker must be able to run a job. One that no longer can (drain, engine down, another assignment, slots
  taken by another shard) claims zero jobs, which unparks it and passes a wake on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from queue_schemas import Assignment, Claimed, Lane, Pool
from queue_schemas.lanes import lane_order
from queue_schemas.records import record
from scheduling.cache_age import GENERATIONS

PARK_AGAIN_S = 20.0
"""The broker counts a parked worker as idle for 30 s."""
RETRY_APART_S = 2.0
"""A worker that spent an attempt of a job is given it again after so long at the earliest, unless it asks otherwise."""
RETRY_MARGIN_S = 0.1
"""How long after that it claims the job."""
MAX_RETRIES_REMEMBERED = 1_000
MAX_CLAIM = 32
"""Most jobs in one claim: their bodies come in one reply."""

Pools = tuple[tuple[Pool, tuple[Lane, ...]], ...]


@record
class Claim:
    """One claim to send: the arguments of ``broker.workers.claim``. ``n`` is 0 for a worker that unparks. ``received``
    is how many jobs had been handed over when it was sent first; ``cache`` is the number of the engine's prefix
    cache, ``slots`` how many there are in all, ``capacity`` the most that there may be; ``given_up``: how many of those
    that it asks for were given up for interactive jobs."""

    shard: int
    seq: int
    turn: int
    n: int
    pools: Pools
    offer: int = 0
    received: int = 0
    cache: int = 0
    slots: int = 0
    capacity: int = 0
    given_up: int = 0


@dataclass(slots=True)
class _Shard:
    pools: Pools = ()
    seq: int = 0
    turn: int = 0
    under_way: Claim | None = None
    parked_for: Pools | None = None
    said: tuple[int, int] = (0, 0)
    """The number of the engine's cache and the capacity that the last claim told."""
    woken: bool = False
    claim_again_at: float = -inf
    """While parked: when to claim without being woken (s)."""
    retries_at: list[float] = field(default_factory=list)
    """When jobs may come back whose attempt was spent here."""
    given_up: int = 0
    """Slots that were given up for interactive jobs, and not claimed for since."""
    reserved: int = 0
    """Slots for what a claim under way asks for, or, while parked, for jobs that may be handed over."""
    received: int = 0
    """Jobs that were handed over in this session."""


@dataclass(slots=True)
class Slots:
    """The slots of one session and its claims. Times are seconds of one monotonic clock."""

    total: int
    maximum: int = 0
    """The most that ``total`` may become; 0: it stays."""
    busy: int = 0
    ready: bool = False
    """Whether the engine takes calls."""
    cache: int = 0
    """The number of the engine's prefix cache in this session: it rises as that forgets what was served."""
    draining: bool = False
    order: tuple[int, int] = (-1, -1)
    """``(term, version)`` of the assignment in force."""
    _shards: dict[int, _Shard] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Below 0 where more are in use than there are now."""
        return self.total - self.busy - sum(state.reserved for state in self._shards.values())

    @property
    def capacity(self) -> int:
        """What the worker's load is measured by."""
        return max(self.maximum, self.total)

    @property
    def all_in_use(self) -> bool:
        """Whether every slot is busy, or asked for by a claim that is under way; slots on offer are not in use."""
        asked = sum(state.reserved for state in self._shards.values() if state.parked_for is None)
        return self.busy + asked >= self.total

    @property
    def spare(self) -> int:
        """Slots that no job has and none was stopped for: a claim under way may fill them with anything. Below 0 where
        more are in use than there are now."""
        given_up = (state.under_way.given_up if state.under_way else 0 for state in self._shards.values())
        return self.total - self.busy - sum(given_up) - sum(state.given_up for state in self._shards.values())

    def engine_is(self, *, ready: bool) -> None:
        """The engine takes calls, or takes none any more. One that stopped begins again with an empty cache."""
        if self.ready and not ready:
            self.cache += GENERATIONS
        self.ready = ready

    def assign(self, assignment: Assignment, *, registered: bool = False) -> bool:
        """Follow ``assignment`` unless it is older than the one in force; whether it was followed.

        The answer to a registration is followed whatever its order: a queue that lost its latest writes, or whose term
        was reset, counts from a lower term."""
        if assignment.order < self.order and not registered:
            return False
        self.order = assignment.order
        wanted: dict[int, list[tuple[Pool, tuple[Lane, ...]]]] = {}
        for part in assignment.pools:
            wanted.setdefault(part.shard, []).append((Pool(part.pool), tuple(part.lanes)))
        for shard in self._shards.keys() | wanted.keys():
            self._shard(shard).pools = tuple(wanted.get(shard, ()))
        return True

    def wake(self, shard: int) -> None:
        """The queue says that there may be work on ``shard``."""
        self._shard(shard).woken = True

    def next_claim(self, shard: int, now: float) -> Claim | None:
        """The claim to send now on ``shard``, its slots reserved until :meth:`answered`; None: nothing to do yet.

        A claim that was not answered is given again.
        """
        state = self._shard(shard)
        if state.under_way is None and (wanted := self._wanted(state, now)) is not None:
            self._send(shard, state, *wanted)
        return state.under_way

    def has_claim(self, shard: int, now: float) -> bool:
        """Whether :meth:`next_claim` would give a claim that was not sent yet."""
        state = self._shard(shard)
        return state.under_way is None and self._wanted(state, now) is not None

    def answered(self, claim: Claim, answer: Claimed, now: float) -> None:
        """``claim`` was answered: the jobs it brought are busy slots from now on."""
        state, jobs = self._shard(claim.shard), len(answer.leases)
        state.under_way = None
        state.turn += jobs
        self.busy += jobs
        state.reserved = max(answer.handed_over - state.received, 0) + answer.offered
        state.parked_for = claim.pools if answer.parked else None
        state.retries_at = [due for due in state.retries_at if due > now]
        state.claim_again_at = min([now + PARK_AGAIN_S, *state.retries_at])

    def handed_over(self, shard: int) -> bool:
        """A job was handed over: a busy slot, until :meth:`freed`. False if it cannot be run now."""
        state = self._shard(shard)
        state.received += 1
        self.busy += 1
        if state.reserved:
            state.reserved -= 1
            if not state.reserved and state.under_way is None:
                state.parked_for = None
        return self.ready and not self.draining

    def last_seq(self, shard: int) -> int:
        """The number of the last claim on ``shard``; 0 before the first."""
        return self._shard(shard).seq

    def is_claiming(self, shard: int) -> bool:
        """Whether a claim on ``shard`` is not answered yet."""
        return self._shard(shard).under_way is not None

    def freed(self) -> None:
        """A job ended."""
        self.busy -= 1

    def yielded(self, shard: int) -> None:
        """The slot that a job of ``shard`` gave up is for an interactive job: the next claim looks for one first."""
        self._shard(shard).given_up += 1

    def retry_after(self, shard: int, now: float, wait_s: float) -> None:
        """An attempt on ``shard`` was spent here: the job may come back to this worker after ``wait_s``."""
        state = self._shard(shard)
        due = now + wait_s + RETRY_MARGIN_S
        if len(state.retries_at) < MAX_RETRIES_REMEMBERED:
            state.retries_at.append(due)
        state.claim_again_at = min(state.claim_again_at, due)

    def due_at(self, shard: int) -> float | None:
        """When :meth:`next_claim` gives a claim on ``shard`` though nothing happens until then; None: it never does."""
        state = self._shard(shard)
        may_claim = self.ready and not self.draining and state.pools and self._available(state) > 0
        return state.claim_again_at if may_claim and state.parked_for is not None else None

    def _shard(self, shard: int) -> _Shard:
        return self._shards.setdefault(shard, _Shard())

    def _wanted(self, state: _Shard, now: float) -> tuple[int, Pools] | None:
        """How many slots to claim now, and for which pools; None: nothing to do yet."""
        serves = state.pools if self.ready and not self.draining else ()
        if state.parked_for is not None and state.parked_for != serves:
            return 0, state.parked_for
        if not serves or not self._due(state, now):
            return None
        if self._available(state) > 0:
            return self._share(state, now), serves
        must_unpark = state.parked_for is not None and self.free < 0 < state.reserved
        return (0, serves) if state.woken or must_unpark else None

    def _due(self, state: _Shard, now: float) -> bool:
        if state.parked_for is None or state.woken or now >= state.claim_again_at:
            return True
        if state.reserved and state.said != (self.cache, self.capacity):  # jobs are handed over by these
            return True
        if self.free < 0:  # fewer slots than are offered
            return state.reserved > 0
        # More slots than are offered have become free; or another shard needs them. Who takes no offer sends a wake.
        return 0 < state.reserved <= self.free if self._serves_one_shard else state.reserved > 0

    def _available(self, state: _Shard) -> int:
        """Slots that a claim of a shard may ask for: those that it offers already are offered anew. What an unparked
        one still has reserved is on its way."""
        return self.free + (state.reserved if state.parked_for is not None else 0)

    @property
    def _serves_one_shard(self) -> bool:
        return sum(1 for state in self._shards.values() if state.pools) == 1

    def _share(self, state: _Shard, now: float) -> int:
        """The free slots, evenly between the shards that would claim now. Jobs on their way count among them, as they
        do among what a claim asks for."""
        eager = sum(1 for s in self._shards.values() if s.under_way is None and s.pools and self._due(s, now))
        return -(-(self.free + state.reserved) // max(eager, 1))

    def _send(self, shard: int, state: _Shard, slots: int, pools: Pools) -> None:
        state.seq += 1
        state.woken, state.said = False, (self.cache, self.capacity)
        while state.given_up and lane_order(state.turn)[0] is not Lane.INTERACTIVE:
            state.turn += 1
        given_up, state.given_up = (state.given_up, 0) if slots else (0, state.given_up)
        n, offer = min(slots, MAX_CLAIM), slots if self._serves_one_shard else 0
        state.under_way = Claim(
            shard,
            state.seq,
            state.turn,
            n,
            pools,
            offer,
            state.received,
            self.cache,
            self.total,
            self.capacity,
            given_up,
        )
        # By what it offered before, jobs may be handed over until this claim is answered.
        state.reserved = max(offer or n, state.reserved if state.parked_for is not None else 0)
