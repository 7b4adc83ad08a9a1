"""The reference model of the queue, for the model tests: dictionaries, lists and a clock that tests set; no I/O.

Written from the contract's table of operations, ``queue_schemas.lifecycle`` and ``queue_schemas.lanes``, not from the
scripts. Where the contract leaves a choice (whose turn it is among tenants and pools, which jobs a reclaim takes first,
which dead entries a claim comes by), the model is told what the queue chose, and judges whether it may.

A call that the queue must have answered differently raises ``Disagreement``; what a call does besides its answer is in
``effects``, and what should be seen of the whole queue in :meth:`Model.snapshot`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from broker import Budgets
from queue_schemas import (
    CONTINUED,
    PERSISTED_STATES,
    Claimed,
    Frame,
    IdempotencyKeyReused,
    InferqError,
    Job,
    Lane,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    OverCapacity,
    Settled,
    State,
)
from queue_schemas.frames import unpack_frames
from queue_schemas.ids import encode_name
from queue_schemas.lanes import BAND_STEP, BANDS, band_order, lane_order
from queue_schemas.lifecycle import TERMINAL, TRANSITIONS
from queue_schemas.persisted_output import key_digest, request_digest
from scheduling.affinity import WarmTable, choose, holds, patience_ms, takes_warm
from scheduling.arrivals import LOOK_MS, Arrivals
from scheduling.fairness import Band, charge_of, units
from scheduling.prediction import RETRIED, LaneState, Rate, place_of
from scheduling.preemption import Yieldable, victim, yields_wanted

from .model_records import SUSPECT, DeadLetter, Effects, Kept, Line, Live, Place, Run, Snapshot, Tombstone, require

PARK_MS = 30_000
AVOID_MS = 2_000
ASK_AGAIN_MS = 5_000
RUN_EPOCHS = 1 << 20
"""Epochs of one run of the server: those that its lost writes may have given out were never so many."""
KEEP_MS = 24 * 3600 * 1000
MAX_HANDED_BYTES = 256 * 1024
"""The largest envelope that is handed over."""
STORED_BYTES = 1_024
"""What a persisted job counts for beside its output."""
NOBODY = "nobody waits for the answer"


class Model:
    """The reference. Every operation takes place at ``now`` (ms), which the caller moves."""

    def __init__(self, budgets: Budgets, now: int) -> None:
        self.now = now
        self.budgets = budgets
        self.live: dict[str, Live] = {}
        self.ended: dict[str, Tombstone] = {}
        self.lines: dict[Line, list[str]] = defaultdict(list)
        self.runs: dict[str, Run] = {}
        self.parked: dict[Place, dict[str, int]] = defaultdict(dict)
        self.offers: dict[Place, set[str]] = defaultdict(set)
        self.listening: set[str] = set()
        self.totals: Counter[tuple[str, Lane, str]] = Counter()
        self.turns: Counter[Place] = Counter()
        self.rates: dict[Place, Rate] = defaultdict(Rate)
        self.arrivals: dict[Place, Arrivals] = defaultdict(Arrivals)
        self.looked_at = 0
        """When the sweep looked last at how many jobs had come."""
        self.warm = WarmTable()
        self.waits: Counter[Place] = Counter()
        """The longest wait of late, where one with digests waits or did since nothing waited."""
        self.affinities: Counter[tuple[str, Lane, str]] = Counter()
        self.kept: dict[str, Kept] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        """By the digest of an idempotency key: the job that has it, and the digest of its request."""
        self.dead: list[DeadLetter] = []
        self.dead_bytes = 0
        self.effects = Effects()
        self.bands: dict[tuple[Place, int], Band] = defaultdict(Band)
        self.is_unsure = False
        """Whether a claim ended the last waiting jobs of tenants: in which order these left is not told."""

    # Routers

    def enqueue(self, job: Job, taker: str = "", attempt_id: str = "") -> State | type[InferqError]:
        """The state of the job, or of the one that has its key; or how it is refused. ``taker``: the worker that it
        was handed to as ``attempt_id``."""
        if job.id in self.ended:
            return self.ended[job.id].state
        if job.id in self.live:
            self._listen(job.id, job.reply_to)
            return self.live[job.id].state
        if job.persisted and key_digest(job) in self.keys:
            holder, request = self.keys[key_digest(job)]
            found = self.live.get(holder) or self.ended[holder]
            return found.state if request == request_digest(job) else IdempotencyKeyReused
        size, limits = len(job.pack()), self.budgets
        own = [live for live in self.live.values() if live.job.tenant == job.tenant]
        shared = [live for live in self.live.values() if live.job.model == job.model]
        if (
            len(own) + 1 > limits.tenant_jobs
            or sum(live.size for live in own) + size > limits.tenant_bytes
            or len(shared) + 1 > limits.pool_jobs
            or sum(live.size for live in shared) + size > limits.pool_bytes
        ):
            return OverCapacity
        place = Place(job.model, job.lane)
        is_first = not self.waiting(place)
        live = self.live[job.id] = Live(job, self.now + job.ttl_ms, self.now, None)
        live.may_yield = 0 if live.is_continued or job.lane is Lane.INTERACTIVE else job.yields
        self._listen(job.id, job.reply_to)
        if job.persisted and job.idempotency_key:
            self.keys[key_digest(job)] = (job.id, request_digest(job))
        self.totals[(*place, "enqueued")] += 1
        takers = {worker: self.runs[worker].order for worker in self.offers[place]}
        preferred = self._warmest(job, takers) if is_first else ""
        if takers and size <= MAX_HANDED_BYTES and is_first:
            allowed = [preferred] if preferred else [w for w, load in takers.items() if load == min(takers.values())]
            require(taker in allowed, f"{job.id} was handed to {taker or 'nobody'}, should be to one of {allowed}")
            self._hand_over(live, taker, attempt_id)
            return State.QUEUED
        require(not taker, f"{job.id} was handed to {taker}, which has offered nothing, or is not its turn")
        parked = any(until >= self.now for until in self.parked[place].values())
        if not ((takers or parked) and is_first):
            live.predicted_ms = self._predicted(live)
        self._stand(live, Line("fresh", place, job.band, job.tenant))
        if job.affinity:
            self.waits[place] = self.waits[place] or 1
        if not self._wake(place, preferred):
            self._ask_to_yield(place)
        return State.QUEUED

    def _warmest(self, job: Job, takers: Mapping[str, tuple[float, int]]) -> str:
        """The worker that a job goes to for the prefix that it holds; '' if there is none, or it is loaded too much."""
        match = self.warm.match(job.affinity)
        known = [holder.partition("#")[0] for holder in match.holders] if match else []
        holders = [w for w in known if match and w in self.runs and holds(match.holders, self._cache(w))]
        best = max((w for w in holders if w in takers), key=self._free, default="")
        if not best or match is None:
            return ""
        freest = min(takers, key=lambda worker: (takers[worker], worker))
        free, of = self._free(best), self._slots(best)
        return best if takes_warm(match, free, of, self._free(freest), self._slots(freest)) else ""

    def _slots(self, worker: str) -> int:
        return max(self.runs[worker].slots, self.runs[worker].offered)

    def _free(self, worker: str) -> int:
        """The free slots of a worker: more than it offers, if jobs have ended since it claimed."""
        return max(self._slots(worker) - len(self.held(worker)), self.runs[worker].offered)

    def _cache(self, worker: str) -> str:
        return f"{worker}#{self.runs[worker].cache}" if worker in self.runs else ""

    def _remember(self, live: Live) -> None:
        """A job was leased: its worker holds its prefix from now on."""
        digests, cache = live.job.affinity, self._cache(live.owner)
        match = self.warm.match(digests)
        outcome = ("warm" if match and holds(match.holders, cache) else "cold") if digests else "none"
        self.affinities[(*live.place, outcome)] += 1
        self.warm.remember(digests, cache)

    def _hand_over(self, live: Live, worker: str, attempt_id: str) -> None:
        run = self.runs[worker]
        live.state, live.attempts, live.owner, live.attempt_id, live.is_unread = (
            State.LEASED, 1, worker, attempt_id, True,
        )  # fmt: skip
        self._note_start(live)
        run.handed_over, run.offered = run.handed_over + 1, run.offered - 1
        self.effects.handed.append((worker, attempt_id))
        self._remember(live)
        if not run.offered:
            self._unpark(worker)

    def attach(self, job_id: str, router: str) -> tuple[object, ...] | None:
        """State, epoch and attempt of a job, and what is kept of it; a persisted one is listened to from now on."""
        self._listen(job_id, router)
        found = self.live.get(job_id) or self.ended.get(job_id)
        if found is None:
            return None
        return (found.state, found.epoch, found.attempt_id, self._outputs().get(job_id, []))

    def resume(self, job: Job, epoch: int) -> State | None:
        """None: unknown."""
        if job.id in self.ended:
            return self.ended[job.id].state
        live = self.live.get(job.id)
        if live is None or live.state is not State.LOST or live.epoch != epoch:
            return live.state if live else None
        live.job = job
        self._wait_again(live)
        self._wake(live.place)
        return State.QUEUED

    def raise_epoch(self, job_id: str, heard: int) -> tuple[State, int, str] | None:
        """Where a job stands; if it waits, above all epochs that may have been given out. None: unknown."""
        if stone := self.ended.get(job_id):
            return stone.state, stone.epoch, ""
        live = self.live.get(job_id)
        if live is None:
            return None
        if live.state is State.QUEUED:
            live.epoch = max(live.epoch, _next_run(heard))
        return live.state, live.epoch, live.attempt_id

    def cancel(self, job_id: str, reason: str, *, if_queued: bool = False) -> State | None:
        """The state it was in; None: unknown."""
        if job_id in self.ended:
            return self.ended[job_id].state
        live = self.live.get(job_id)
        if live is None:
            if not if_queued:
                self.ended[job_id] = Tombstone(State.CANCELLED, 0)
            return None
        state = live.state
        if if_queued and state is not State.QUEUED:
            return state
        self._stop(live, State.CANCELLED, reason)
        return state

    # Workers

    def join(self, worker: str) -> None:
        """A worker enters. Who is being declared dead does not come back by it."""
        run = self.runs.get(worker)
        if run is None:
            self.runs[worker] = Run()
        elif not run.fenced:
            run.number += 1

    def is_fenced(self, worker: str) -> bool:
        return worker not in self.runs or self.runs[worker].fenced

    def renew(self, worker: str) -> None:
        """Of one that is not fenced."""
        self.runs[worker].number += 1

    def claim(
        self,
        worker: str,
        seq: int,
        turn: int,
        n: int,
        pools: Sequence[tuple[str, Sequence[Lane]]],
        offer: int,
        received: int,
        cache: int,
        slots: int,
        capacity: int,
        answer: Claimed,
        dropped: Mapping[str, State],
    ) -> None:
        """Judges what a claim of one that is not fenced gave. ``dropped``: waiting jobs that it ended on its way."""
        run, given = self.runs[worker], answer.leases
        if seq <= run.seq:
            self._claim_again(worker, seq, given)
            require(not dropped, "a repeated claim ends no job")
        else:
            run.cache, run.slots, run.capacity = cache, slots, capacity
            self._claim_anew(worker, turn, n, pools, offer, received, given, dropped)
            run.seq, run.given = seq, tuple((lease.job.id, lease.attempt_id) for lease in given)
        expected = (run.parked, run.handed_over, run.offered)
        stands = (answer.parked, answer.handed_over, answer.offered)
        require(seq < run.seq or stands == expected, f"the claim answers {stands}, should be {expected}")

    def _claim_again(self, worker: str, seq: int, given: Sequence[Lease]) -> None:
        run = self.runs[worker]
        again = [pair for pair in run.given if self._runs(*pair)] if seq == run.seq else []
        require([(lease.job.id, lease.attempt_id) for lease in given] == again, f"a repeated claim gives {again}")
        for lease in given:
            self._check_lease(lease)
        if seq == run.seq and len(again) < len(run.given):
            self.effects.wakes[worker] += 1

    def _claim_anew(
        self,
        worker: str,
        turn: int,
        n: int,
        pools: Sequence[tuple[str, Sequence[Lane]]],
        offer: int,
        received: int,
        given: Sequence[Lease],
        dropped: Mapping[str, State],
    ) -> None:
        run = self.runs[worker]
        places = [Place(pool, lane) for pool, lanes in pools for lane in lanes]
        for job_id, state in dropped.items():
            live = self.live[job_id]
            require(live.place in places, f"{job_id} is none of this claim's")
            require(self._doom(live) is state, f"{job_id} may not become {state}")
            self.is_unsure = True
            self._stop(live, state, NOBODY if state is State.CANCELLED else "its time ran out in the queue")
        for number, lease in enumerate(given):
            allowed = self._next(worker, turn + number, pools)
            require(lease.job.id in allowed, f"{lease.job.id} is not next, but one of {sorted(allowed)}")
            self._lease(worker, lease)
        self._unpark(worker)
        on_their_way = max(run.handed_over - received, 0)
        n = max(n - on_their_way, 0)
        if len(given) < n:
            left = self._next(worker, turn + len(given), pools)
            require(not left, f"{sorted(left)} were not given, though asked for")
            run.parked, run.offered = True, max(offer - on_their_way - len(given), 0)
            for place in places:
                self.parked[place][worker] = self.now + PARK_MS
                if run.offered:
                    self.offers[place].add(worker)
        else:
            require(len(given) == n, f"{n} jobs were asked for, {len(given)} given")
            any(self.waiting(place) and self._wake(place) for place in places)

    def reconcile(self, worker: str, seq: int, leases: Sequence[Lease], taken: Sequence[str]) -> set[str]:
        """What one that is not fenced runs, and what it is said to: the attempts that it does not hold. ``taken``: the
        jobs that it held without running them."""
        verdicts = {lease.attempt_id: self._verdict(lease) for lease in leases}
        mine = {lease.job.id for lease in leases if verdicts[lease.attempt_id] is Settled.OK}
        held = self.held(worker)
        not_run = {job_id for job_id in held.keys() - mine if not held[job_id].is_unread}
        left_over = not_run if seq >= self.runs[worker].seq else set()
        require(set(taken) == left_over, f"{sorted(taken)} were taken, should be {sorted(left_over)}")
        for job_id in taken:
            held[job_id].epoch = _next_run(held[job_id].epoch) - 1
            self._give_up(held[job_id], "the queue lost what its worker wrote", counted=False)
        return {attempt_id for attempt_id, verdict in verdicts.items() if verdict is not Settled.OK}

    def publish(self, router: str, frames: bytes) -> bool:
        """Whether somebody listens. Frames of old attempts are let through: the Router drops them."""
        self._send(router, unpack_frames(frames))
        return router in self.listening

    def append(self, lease: Lease, frames: bytes) -> Settled:
        verdict = self._verdict(lease)
        if verdict is Settled.OK:
            self._keep(self.live[lease.job.id], unpack_frames(frames))
        return verdict

    def _keep(self, live: Live, frames: Sequence[Frame]) -> None:
        """Frames that are not kept yet are, and sent to all who listen. An answer that begins anew replaces another."""
        new = [frame for frame in frames if (frame.epoch, frame.seq) not in _places(live.output)]
        if new and new[0].seq == 0 and not new[0].flags & CONTINUED:
            live.output.clear()
        live.output += [(frame.epoch, frame.seq, len(frame.pack())) for frame in new]
        if new:
            self._send_listeners(live, new)

    def settle(
        self, lease: Lease, outcome: Outcome, frames: bytes, used: int | None = None, run_ms: int | None = None
    ) -> Settled:
        verdict = self._verdict(lease)
        if verdict is Settled.OK:
            live = self.live[lease.job.id]
            if used is not None and live.charged is not None:
                self._correct(live, charge_of(used, live.job.weight) - live.charged)
            if live.job.persisted:
                self._keep(live, unpack_frames(frames))
            self._end(live, State(outcome.value), live.attempt_id)
            if outcome is Outcome.DONE and run_ms is not None:
                self.rates[live.place] = self.rates[live.place].observed(run_ms, cost_of(live.job), live.enqueued_at)
            if frames and not live.job.persisted:
                self._send(live.job.reply_to, unpack_frames(frames))
        return verdict

    def release(self, lease: Lease, reason: str, *, counted: bool) -> Settled:
        verdict = self._verdict(lease, handing_back=True)
        if verdict is Settled.OK:
            self._hand_back(self.live[lease.job.id], reason, counted=counted, avoided=counted)
        return verdict

    def release_yielded(self, lease: Lease, reason: str, following: Job | None) -> Settled:
        """A job yields, and goes on as ``following`` says."""
        verdict = self._verdict(lease, handing_back=True)
        if verdict is Settled.OK:
            live = self.live[lease.job.id]
            may = live.may_yield > 0
            if may:
                live.may_yield, live.job = live.may_yield - 1, following or live.job
            self._hand_back(live, reason, counted=False, avoided=False)
            if may and live.state is State.QUEUED:
                self.totals[(*live.place, "yielded")] += 1
        return verdict

    def decline_to_yield(self, lease: Lease, *, for_now: bool) -> None:
        """An attempt runs on, and is asked again after the others, or not at all."""
        live = self.live.get(lease.job.id)
        if live is not None and live.state is State.LEASED and live.is_yieldable:
            live.is_yieldable, live.started_at, live.asked_at = for_now, 1, None

    def crashed(self, leases: Sequence[Lease], reason: str) -> list[Settled]:
        """All that ran on one engine: if some were suspects they are charged, else all are; all are suspects now."""
        verdicts = [self._verdict(lease, handing_back=True) for lease in leases]
        struck = [
            self.live[lease.job.id] for lease, verdict in zip(leases, verdicts, strict=True) if verdict is Settled.OK
        ]
        blames = any(live.is_suspect for live in struck)
        for live in struck:
            counted = self._suspect(live, blames, SUSPECT)
            self._hand_back(live, reason, counted=counted, avoided=True)
        return verdicts

    def clear(self, lease: Lease) -> Settled:
        verdict = self._verdict(lease)
        if verdict is Settled.OK:
            live = self.live[lease.job.id]
            if live.is_suspect and live.cleared:
                return verdict
            live.cleared = live.cleared or live.is_suspect
            if live.held_as_suspect:
                self._next_suspect(live)
                self.runs[live.owner].blames = False
            live.suspicion, live.held_as_suspect = 0, False
        return verdict

    def reclaim(self, worker: str, reason: str, *, counted: bool, limit: int, taken: Sequence[str]) -> list[int]:
        """One step of a reclaim, or of a leave: requeued, dead, cancelled, left, lost. ``taken``: the jobs it took."""
        held = self.held(worker)
        require(len(taken) == min(limit, len(held)), f"{len(taken)} of {len(held)} jobs were taken, limit {limit}")
        require(set(taken) <= held.keys(), "jobs were taken that the worker does not hold")
        run = self.runs.get(worker)
        if run is not None and not run.fenced:
            run.fenced, run.blames = True, any(live.is_suspect for live in held.values())
            self._unpark(worker)
        fates: Counter[State] = Counter()
        for job_id in taken:
            live = held[job_id]
            is_charged = counted and self._suspect(live, run is not None and run.blames, 1)
            # Its worker did not end it by its own word: what that one says later is fenced, also of a dead letter.
            live.attempt_id = ""
            fates[self._give_up(live, reason, counted=is_charged)] += 1
        if len(taken) == len(held):
            self.runs.pop(worker, None)
        left = len(held) - len(taken)
        return [fates[State.QUEUED], fates[State.DEAD], fates[State.CANCELLED], left, fates[State.LOST]]

    # Managers and time

    def expire(self) -> int:
        """The sweep. Answers how many jobs it ended because of their deadline."""
        late = sorted(
            (live for live in self.live.values() if live.deadline <= self.now), key=lambda live: live.deadline
        )
        for live in late:
            while_it_ran = live.state is State.LEASED
            self._stop(live, State.EXPIRED, f"its time ran out {'while it ran' if while_it_ran else 'in the queue'}")
        for live in [live for live in self.live.values() if live.state is State.LOST and live.ask_at <= self.now]:
            if self._nobody_waits(live):
                self._stop(live, State.CANCELLED, NOBODY)
            else:
                live.ask_at = self.now + ASK_AGAIN_MS
                self._tell(live, MarkerKind.LOST, "its router has not said where it goes on")
        for job_id, kept in [(job_id, kept) for job_id, kept in self.kept.items() if kept.until <= self.now]:
            del self.kept[job_id], self.ended[job_id]
            self._free_key(kept.job)
        for place in {line.place for line, jobs in self.lines.items() if jobs}:
            if not self._wake(place):
                while self._ask_to_yield(place):
                    pass
        self._look_at_arrivals()
        return len(late)

    def _look_at_arrivals(self) -> None:
        passed_ms = self.now - self.looked_at
        if passed_ms < LOOK_MS:
            return
        self.looked_at = self.now
        for pool, lane, event in self.totals:
            if event == "enqueued":
                place = Place(pool, lane)
                total = self.totals[pool, lane, event]
                self.arrivals[place] = self.arrivals[place].looked_at(total, passed_ms)

    def forget_ended(self) -> list[str]:
        """A minute has passed for what has ended: the ids whose tombstones are gone."""
        gone = [job_id for job_id in self.ended if job_id not in self.kept]
        for job_id in gone:
            del self.ended[job_id]
        return gone

    # What is to be seen

    def held(self, worker: str) -> dict[str, Live]:
        return {i: live for i, live in self.live.items() if live.state is State.LEASED and live.owner == worker}

    def waiting(self, place: Place) -> int:
        return sum(live.state is State.QUEUED and live.place == place for live in self.live.values())

    def doomed(self) -> set[str]:
        """Jobs that wait and must not be started any more."""
        return {i for i, live in self.live.items() if live.state is State.QUEUED and self._doom(live) is not None}

    def snapshot(self) -> Snapshot:
        for place in [place for place in self.turns if not self.waiting(place)]:
            del self.turns[place]  # they begin anew where nothing waits any more
        self.waits = Counter({place: wait for place, wait in self.waits.items() if wait and self.waiting(place)})
        budgets: Counter[str] = Counter()
        for live in self.live.values():
            for who in (f"t:{live.job.tenant}", f"p:{live.job.model}"):
                budgets[f"{who}:jobs"] += 1
                budgets[f"{who}:bytes"] += live.size
        for job, output in self._stored():
            budgets[f"t:{job.tenant}:persisted"] += STORED_BYTES + sum(size for _, _, size in output)
        if self.dead_bytes:
            budgets["dead:bytes"] = self.dead_bytes
        leases: dict[str, dict[str, int]] = defaultdict(dict)
        for job_id, live in self.live.items():
            if live.state is State.LEASED:
                leases[live.owner][job_id] = live.epoch
        ended: dict[str, tuple[object, ...]] = {job_id: tuple(stone) for job_id, stone in self.ended.items()}
        return Snapshot(
            records=ended | {job_id: _seen(live) for job_id, live in self.live.items()},
            lines={line: list(jobs) for line, jobs in self.lines.items() if jobs},
            leases=dict(leases),
            budgets=dict(budgets),
            waiting=dict(Counter(live.place for live in self.live.values() if live.state is State.QUEUED)),
            costs=self._costs(),
            rates={place: rate for place, rate in self.rates.items() if rate.jobs},
            arrivals=dict(self.arrivals),
            looked_at=self.looked_at,
            bands={where: band for where, band in self.bands.items() if band != Band()},
            leased=dict(Counter(live.place for live in self.live.values() if live.state is State.LEASED)),
            totals=dict(self.totals),
            turns=dict(self.turns),
            deadlines={job_id: live.deadline for job_id, live in self.live.items()},
            lost={job_id: live.ask_at for job_id, live in self.live.items() if live.state is State.LOST},
            parked={place: dict(workers) for place, workers in self.parked.items() if workers},
            offers={
                place: {worker: self.runs[worker].offered for worker in workers}
                for place, workers in self.offers.items()
                if workers
            },
            yieldable={
                pool: {one.job_id: one.started_at if one.asked_at is None else -one.asked_at for one in attempts}
                for pool in {live.job.model for live in self.live.values()}
                if (attempts := self._yieldable(pool))
            },
            renewals={worker: -1 if run.fenced else run.number for worker, run in self.runs.items()},
            dead=sorted(self.dead),
            listening=set(self.listening),
            listeners={job_id: set(live.listeners) for job_id, live in self.live.items() if live.listeners},
            outputs=self._outputs(),
            kept={job_id: kept.until for job_id, kept in self.kept.items()},
            keys={digest: job_id for digest, (job_id, _) in self.keys.items()},
            warm=dict(self.warm.slots),
            waits=dict(self.waits),
            affinities=dict(self.affinities),
        )

    def _predicted(self, live: Live) -> int | None:
        """How long a new job is thought to wait."""
        place, band, costs = live.place, live.job.band, self._costs()
        lanes = {}
        for lane in Lane:
            at = Place(place.pool, lane)
            waiting = self.waiting(at) - (lane is place.lane)  # it is not in its line yet
            leased = sum(one.place == at and one.state is State.LEASED for one in self.live.values())
            of_bands = tuple(costs.get((at, one), 0) for one in range(RETRIED, BANDS))
            lanes[lane] = LaneState(waiting, of_bands, leased, self.rates[at])
        own = len(self.lines.get(Line("fresh", place, band, live.job.tenant), ()))
        return place_of(lanes, place.lane, band, own, len(self._fresh_lines(place, band))).wait_ms

    def _costs(self) -> dict[tuple[Place, int], int]:
        """What waits in each band costs."""
        costs: Counter[tuple[Place, int]] = Counter()
        for live in self.live.values():
            if live.state is State.QUEUED and live.line is not None:
                band = live.line.band if live.line.kind == "fresh" else RETRIED
                costs[live.place, band] += cost_of(live.job)
        return dict(costs)

    def _stored(self) -> list[tuple[Job, list[tuple[int, int, int]]]]:
        live = [(live.job, live.output) for live in self.live.values() if live.job.persisted]
        return live + [(kept.job, kept.output) for kept in self.kept.values()]

    def _outputs(self) -> dict[str, list[tuple[int, int]]]:
        return {job.id: _places(output) for job, output in self._stored() if output}

    # The rules behind

    def _verdict(self, lease: Lease, *, handing_back: bool = False) -> Settled:
        """Whether an attempt owns its job."""
        job_id, attempt = lease.job.id, (lease.epoch, lease.attempt_id)
        if stone := self.ended.get(job_id):
            return Settled.DUPLICATE if (stone.epoch, stone.attempt_id) == attempt else Settled.FENCED
        live = self.live.get(job_id)
        if live is None:
            return Settled.GONE
        if live.state is State.LEASED and (live.epoch, live.attempt_id) == attempt:
            return Settled.OK
        return Settled.DUPLICATE if handing_back and live.handed_back == attempt else Settled.FENCED

    def _runs(self, job_id: str, attempt_id: str) -> bool:
        live = self.live.get(job_id)
        return live is not None and live.state is State.LEASED and live.attempt_id == attempt_id

    def _next(self, worker: str, turn: int, pools: Sequence[tuple[str, Sequence[Lane]]]) -> set[str]:
        """The jobs of which a worker's ``turn``-th may be one."""
        for lane in lane_order(turn):
            allowed: set[str] = set()
            for pool, lanes in pools:
                if lane in lanes:
                    allowed |= self._next_at(worker, Place(pool, lane))
            if allowed:
                return allowed
        return set()

    def _next_at(self, worker: str, place: Place) -> set[str]:
        again, fresh = self._first_again(worker, place), self._first_fresh(worker, place)
        fresh_first = self.turns[place] % BAND_STEP == BAND_STEP - 1
        return (fresh or again) if fresh_first else (again or fresh)

    def _first_again(self, worker: str, place: Place) -> set[str]:
        """The first of the retries and, unless this worker has one, of the suspects, without those it gave up."""
        kinds = ["retry"] if any(live.is_suspect for live in self.held(worker).values()) else ["retry", "suspects"]
        heads = set()
        for kind in kinds:
            for job_id in self._startable(Line(kind, place)):
                gave_up, until = self.live[job_id].avoid
                if gave_up != worker or until <= self.now:
                    heads.add(job_id)
                    break
        return heads

    def _first_fresh(self, worker: str, place: Place) -> set[str]:
        for band in band_order(self.turns[place]):
            lines = {name_of(line): jobs for line in self._fresh_lines(place, band) if (jobs := self._startable(line))}
            waiting = {name: self.bands[place, band].waiting[name] for name in lines}
            if (first := Band(waiting).next()) is not None:
                return {self._chosen(worker, place, lines[first])}
        return set()

    def _chosen(self, worker: str, place: Place, jobs: Sequence[str]) -> str:
        """The first of a tenant's jobs, or while that is not over its patience one that is worth more here."""
        if self.now - self.live[jobs[0]].enqueued_at >= self.waits[place]:
            return jobs[0]
        return jobs[choose(self.warm, [self.live[job_id].job.affinity for job_id in jobs], self._cache(worker))]

    def _fresh_lines(self, place: Place, band: int) -> list[Line]:
        return [
            line
            for line, jobs in self.lines.items()
            if jobs and line.kind == "fresh" and line.place == place and line.band == band
        ]

    def _startable(self, line: Line) -> list[str]:
        return [job_id for job_id in self.lines.get(line, ()) if self._doom(self.live[job_id]) is None]

    def _doom(self, live: Live) -> State | None:
        """How a waiting job ends instead of being started."""
        if live.deadline <= self.now:
            return State.EXPIRED
        return State.CANCELLED if self._nobody_waits(live) else None

    def _nobody_waits(self, live: Live) -> bool:
        return bool(live.job.reply_to) and not live.job.persisted and live.job.reply_to not in self.listening

    def _lease(self, worker: str, lease: Lease) -> None:
        live = self.live[lease.job.id]
        charge = charge_of(cost_of(live.job), live.job.weight)
        if live.line is not None and live.line.kind == "fresh":
            self._band(live).charge(encode_name(live.job.tenant), charge)
        else:
            self._correct(live, charge)
        live.charged = units(charge)
        self.turns[live.place] += 1
        if live.line is not None and live.line.kind == "fresh":
            self.waits[live.place] = patience_ms(self.waits[live.place], self.now - live.enqueued_at)
        self._enter(live, State.LEASED)
        self._leave_line(live)
        live.attempts += 1
        require(live.attempts <= live.job.max_attempts, f"{live.job.id} was started once too often")
        live.owner, live.attempt_id, live.held_as_suspect = worker, lease.attempt_id, live.is_suspect
        self._note_start(live)
        self._check_lease(lease)
        self._remember(live)

    def _check_lease(self, lease: Lease) -> None:
        live = self.live[lease.job.id]
        told = Lease(
            live.job, live.epoch, live.attempt_id, live.attempts, max(live.deadline - self.now, 0),
            self.now - live.enqueued_at, suspect=live.is_suspect, predicted_ms=live.predicted_ms,
        )  # fmt: skip
        require(lease == told, f"the lease should be {told}")

    def _band(self, live: Live) -> Band:
        return self.bands[live.place, live.job.band]

    def _correct(self, live: Live, by: float) -> None:
        self._band(live).correct(encode_name(live.job.tenant), by)

    def _give_up(self, live: Live, reason: str, *, counted: bool) -> State:
        """An attempt ended unsettled. Answers what becomes of its job."""
        if self._nobody_waits(live):
            self._stop(live, State.CANCELLED, NOBODY)
            return State.CANCELLED
        if not counted:
            live.attempts -= 1
        if live.attempts >= live.job.max_attempts:
            self.dead.append(DeadLetter(live.job.id, reason, live.owner, live.attempts))
            self.dead_bytes += live.size
            self._end(live, State.DEAD, live.attempt_id)
            self._tell(live, MarkerKind.DEAD, reason)
            return State.DEAD
        self._leave_lease(live)
        if live.charged is not None:
            self._correct(live, -live.charged)
            live.charged = None
        live.epoch, live.owner, live.attempt_id, live.is_unread = live.epoch + 1, "", "", False
        if live.is_continued:
            self._enter(live, State.LOST)
            live.ask_at = self.now + ASK_AGAIN_MS
            self.totals[(*live.place, "lost")] += 1
            self._tell(live, MarkerKind.LOST, reason)
        else:
            self._wait_again(live)
            self.totals[(*live.place, "requeued")] += 1
            self._tell(live, MarkerKind.REQUEUED, reason)
            self._wake(live.place)
        return live.state

    def _hand_back(self, live: Live, reason: str, *, counted: bool, avoided: bool) -> None:
        """The same by the word of its own worker, whose repeated call is known."""
        attempt, owner = (live.epoch, live.attempt_id), live.owner
        if self._give_up(live, reason, counted=counted) in (State.QUEUED, State.LOST):
            live.handed_back = attempt
            if avoided:
                live.avoid = (owner, self.now + AVOID_MS)

    def _suspect(self, live: Live, blames: bool, weight: int) -> bool:
        """Whether a job is charged for what ended around it; it is suspected more from now on."""
        counted = live.is_suspect or not blames or live.spared
        live.spared = live.spared or not counted
        live.suspicion = max(live.suspicion + weight, 0 if counted else SUSPECT)
        return counted

    def _stop(self, live: Live, state: State, reason: str) -> None:
        """A job ends by the word of another than its worker."""
        if live.state is State.LEASED:
            self.effects.aborts[live.owner, live.job.id] += 1
        self._end(live, state, "")
        self._tell(live, MarkerKind(state.value), reason)

    def _end(self, live: Live, state: State, attempt_id: str) -> None:
        if live.state is State.LEASED:
            self._leave_lease(live)
        elif live.state is State.QUEUED:
            self._leave_line(live)
        self._enter(live, state)
        require(state in TERMINAL, f"{state} is no end")
        del self.live[live.job.id]
        if live.job.persisted and state in PERSISTED_STATES:
            self.kept[live.job.id] = Kept(live.job, live.output, self.now + KEEP_MS)
        elif live.job.persisted:
            self._free_key(live.job)
        self.ended[live.job.id] = Tombstone(state, live.epoch, attempt_id)
        self.totals[(*live.place, state.value)] += 1

    def _enter(self, live: Live, state: State) -> None:
        require(state in TRANSITIONS[live.state], f"{live.state} -> {state} is no transition")
        live.state = state

    def _leave_lease(self, live: Live) -> None:
        self.effects.may_wake.add(live.owner)
        if live.held_as_suspect:
            self._next_suspect(live)
        live.held_as_suspect = False

    def _next_suspect(self, live: Live) -> None:
        """Its worker may hold another suspect now: it is told so, if there is one."""
        if self.lines[Line("suspects", live.place)]:
            self.effects.wakes[live.owner] += 1

    def _wait_again(self, live: Live) -> None:
        self._enter(live, State.QUEUED)
        self._stand(live, Line("suspects" if live.is_suspect else "retry", live.place))

    def _stand(self, live: Live, line: Line) -> None:
        live.line = line
        self.lines[line].append(live.job.id)
        if line.kind == "fresh":
            self.bands[line.place, line.band].come(name_of(line))

    def _leave_line(self, live: Live) -> None:
        line = live.line
        if line is None:
            return
        live.line = None
        self.lines[line].remove(live.job.id)
        if not self.lines[line] and line.kind == "fresh":
            self.bands[line.place, line.band].leave(name_of(line))

    def _unpark(self, worker: str) -> None:
        for workers in self.parked.values():
            workers.pop(worker, None)
        for takers in self.offers.values():
            takers.discard(worker)
        run = self.runs[worker]
        run.parked, run.offered = False, 0

    def _wake(self, place: Place, preferred: str = "") -> bool:
        """Tell the preferred worker, or the one that parked there first, that there is work."""
        workers = self.parked[place]
        for worker in sorted(workers, key=lambda worker: (worker != preferred, workers[worker], worker)):
            if workers.pop(worker) >= self.now and worker in self.runs:
                self.effects.wakes[worker] += 1
                return True
        return False

    def _yieldable(self, pool: str) -> list[Yieldable]:
        """The running jobs of a pool that may yield."""
        return [
            Yieldable(live.job.id, live.started_at, live.asked_at)
            for live in self.live.values()
            if live.state is State.LEASED and live.job.model == pool and live.is_yieldable
        ]

    def _note_start(self, live: Live) -> None:
        live.is_yieldable, live.started_at, live.asked_at = live.may_yield > 0 and not live.is_suspect, self.now, None

    def _ask_to_yield(self, place: Place) -> bool:
        """One attempt of a lower lane is asked to yield to what waits here, if that is interactive. Whether one was."""
        if place.lane is not Lane.INTERACTIVE:
            return False
        attempts = self._yieldable(place.pool)
        running = [live for live in self.live.values() if live.state is State.LEASED and live.job.model == place.pool]
        interactive = sum(live.job.lane is Lane.INTERACTIVE for live in running)
        if not yields_wanted(self.waiting(place), len(running) - interactive, interactive, attempts, self.now):
            return False
        found = victim(attempts, self.now)
        if found is None:
            return False
        live = self.live[found.job_id]
        live.asked_at = self.now
        self.effects.yields.append((live.owner, live.attempt_id))
        self.totals[(*live.place, "asked_to_yield")] += 1
        return True

    def _free_key(self, job: Job) -> None:
        """An idempotency key is nobody's any more, unless it is another job's."""
        if self.keys.get(key_digest(job), ("",))[0] == job.id:
            del self.keys[key_digest(job)]

    def _listen(self, job_id: str, router: str) -> None:
        live = self.live.get(job_id)
        if live is not None and live.job.persisted and router:
            live.listeners.add(router)

    def _send_listeners(self, live: Live, news: Sequence[Frame | Marker]) -> None:
        """Those who are gone listen no more."""
        for router in live.listeners:
            self._send(router, news)
        live.listeners &= self.listening

    def _tell(self, live: Live, kind: MarkerKind, reason: str) -> None:
        marker = Marker(kind, live.job.id, live.epoch, reason)
        if live.job.persisted:
            self._send_listeners(live, [marker])
        else:
            self._send(live.job.reply_to, [marker])

    def _send(self, router: str, news: Sequence[Frame | Marker]) -> None:
        if router in self.listening:
            self.effects.news += [(router, item) for item in news]


def name_of(line: Line) -> str:
    """The tenant of a line as keys name it, and so as those that stand level are ordered."""
    return encode_name(line.tenant)


def cost_of(job: Job) -> int:
    """What the queue takes a job to cost: never nothing."""
    return max(job.cost_estimate, 1)


def _next_run(epoch: int) -> int:
    """The first epoch of the next run of the server."""
    return (epoch // RUN_EPOCHS + 1) * RUN_EPOCHS


def _places(output: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(epoch, seq) for epoch, seq, _ in output]


def _seen(live: Live) -> tuple[object, ...]:
    line = live.line if live.state is State.QUEUED else None
    return (live.state, live.epoch, live.attempt_id, live.attempts, live.owner, line, live.is_suspect, live.job.pack())
