"""The model and the real scripts side by side: each call is made to both, and they must agree.

After each call: the answers, all that is to be seen of the queue, what Routers and workers were told, and, from the
history of calls alone, that nothing ended twice and nothing old was accepted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from broker import Broker, Budgets
from broker.redis.scripts import load_scripts
from queue_schemas import (
    END,
    ControlKind,
    Fenced,
    Frame,
    InferqError,
    Job,
    JobId,
    Lane,
    Lease,
    Marker,
    MarkerKind,
    Outcome,
    Pool,
    SessionId,
    Settled,
    State,
)
from queue_schemas.lifecycle import TERMINAL
from tests.contract.queue_snapshot import KEYS, Entries, Raw, control_messages_in, differences, frames_in, read_snapshot
from tests.support.queue import Backend, parse_record

from .model import Model
from .model_records import Effects, require
from .rewriting import CLOCK_OF_TESTS, Rewrite, rewritten, set_clock

START_MS = 1_600_000_000_000
WHOLE = 256
"""Jobs that a whole reclaim takes in one step; the examples have fewer."""
ENDS = {MarkerKind.DEAD, MarkerKind.CANCELLED, MarkerKind.EXPIRED}


class History:
    """What the calls said, judged without any model of the queue."""

    def __init__(self) -> None:
        self.leases: dict[str, tuple[Lease, SessionId]] = {}
        self._newest: dict[str, Lease] = {}
        self._ended: set[str] = set()
        self._told_of_the_end: Counter[tuple[str, str]] = Counter()

    def leased(self, lease: Lease, worker: SessionId) -> None:
        """An attempt began, or is said once more."""
        if lease.attempt_id in self.leases:
            require(self.leases[lease.attempt_id][1] == worker, "two workers were given one attempt")
            return
        job_id, before = lease.job.id, self._newest.get(lease.job.id)
        require(before is None or lease.epoch > before.epoch, f"{job_id} was leased twice in one epoch")
        require(lease.attempt <= lease.job.max_attempts, f"{job_id} was started once too often")
        require(job_id not in self._ended, f"{job_id} was started after its end")
        self.leases[lease.attempt_id] = (lease, worker)
        self._newest[job_id] = lease

    def accepted(self, lease: Lease) -> None:
        """An answer was taken."""
        require(lease == self._newest.get(lease.job.id), f"an old attempt of {lease.job.id} has answered")
        self.ended(lease.job.id)

    def ended(self, job_id: str) -> None:
        """A job came to its end."""
        require(job_id not in self._ended, f"{job_id} ended twice")
        self._ended.add(job_id)

    def told(self, router: str, news: Sequence[Frame | Marker]) -> None:
        """A Router read this."""
        for item in news:
            is_end = item.flags & END if isinstance(item, Frame) else item.kind in ENDS
            if is_end:
                self._told_of_the_end[router, item.job_id] += 1
                twice = self._told_of_the_end[router, item.job_id] > 1
                require(not twice, f"{router} heard twice that {item.job_id} has ended")


class SideBySide:
    """A queue of each kind, and who has read how far."""

    def __init__(self, backend: Backend, budgets: Budgets, rewrites: Sequence[Rewrite] = ()) -> None:
        self.model = Model(budgets, START_MS)
        self.history = History()
        self.broker: Broker
        self._backend = backend
        self._budgets = budgets
        self._rewrites = (CLOCK_OF_TESTS, *rewrites)
        self._client: Any = None
        self._raw: Raw | None = None
        self._read_to: dict[tuple[str, str], tuple[int, int]] = {}

    async def open(self) -> None:
        """Connect to the empty queue."""
        self._client = self._backend.client()
        await self._client.flushall()
        self.broker = await self._backend.connect(budgets=self._budgets)
        self.broker._caller._scripts = rewritten(load_scripts(flags=self._backend.real), *self._rewrites)

    async def close(self) -> None:
        await self.broker.close()
        await self._client.aclose()

    async def play(self, name: str, *args: Any) -> Any:
        """One call, a millisecond after the last, to both; then everything is compared."""
        self.model.now += 1
        self.model.effects, self._raw = Effects(), None
        await set_clock(self._client, self.model.now)
        answer = await getattr(self, name)(*args)
        await self._compare()
        return answer

    # What happens around the queue

    async def wait(self, ms: int) -> None:
        self.model.now += ms

    async def open_replies(self, router: SessionId) -> None:
        """A Router makes its reply stream, or makes it again."""
        self.model.listening.add(router)
        await self._client.xadd(KEYS.reply(router), {"o": "open"})

    async def lose_replies(self, router: SessionId) -> None:
        """A Router's reply stream is gone, with what was in it."""
        self.model.listening.discard(router)
        self._read_to.pop(("reply", router), None)
        await self._client.delete(KEYS.reply(router))

    async def forget_ended(self) -> list[str]:
        """The time of tombstones is over."""
        gone = self.model.forget_ended()
        if gone:
            await self._client.delete(*(KEYS.job(job_id) for job_id in gone))
        return gone

    # Calls

    async def enqueue(self, *jobs: Job) -> None:
        """In one batch."""
        before = set(self.model.live)
        answers = await asyncio.gather(*map(self.broker.jobs.enqueue, jobs), return_exceptions=True)
        records = (await self._look()).of("job")
        for job, answer in zip(jobs, answers, strict=True):
            held = records.get((job.id,), {}) if job.id not in before | set(self.model.live) else {}
            record = parse_record(held[b"record"]) if b"record" in held else {}
            expected = self.model.enqueue(job, SessionId(record.get("owner", "")), record.get("aid", ""))
            fits = type(answer) is expected if isinstance(expected, type) else answer is expected
            require(fits, f"enqueue of {job.id} answers {answer!r}, should be {expected}")

    async def attach(self, job_id: JobId, router: SessionId) -> None:
        page, expected = await self.broker.output.attach(job_id, router), self.model.attach(job_id, router)
        places = [(frame.epoch, frame.seq) for frame in page.frames] if page else []
        _same("attach", page and (page.state, page.epoch, page.attempt_id, places), expected)

    async def resume(self, job: Job, epoch: int) -> None:
        _same("resume", await self.broker.jobs.resume(job, epoch), self.model.resume(job, epoch))

    async def raise_epoch(self, job_id: JobId, heard: int) -> None:
        found = await self.broker.jobs.raise_epoch(job_id, heard)
        standing = found and (found.state, found.epoch, found.attempt_id)
        _same("raise_epoch", standing, self.model.raise_epoch(job_id, heard))

    async def cancel(self, job_id: JobId, reason: str, if_queued: bool = False) -> None:
        found = await self.broker.jobs.cancel(job_id, reason, if_queued=if_queued)
        _same("cancel", found, self.model.cancel(job_id, reason, if_queued=if_queued))

    async def join(self, worker: SessionId) -> None:
        await self.broker.workers.join(worker)
        self.model.join(worker)

    async def renew(self, worker: SessionId) -> None:
        if await self._is_refused(self.broker.workers.renew(worker), worker) is False:
            self.model.renew(worker)

    async def claim(
        self,
        worker: SessionId,
        seq: int,
        turn: int,
        n: int,
        pools: Sequence[tuple[Pool, Sequence[Lane]]],
        offer: int,
        received: int,
        cache: int,
        slots: int,
        capacity: int,
    ) -> list[Lease]:
        call = self.broker.workers.claim(
            0, worker, seq, turn, n, pools, offer=offer, received=received, cache=cache, slots=slots, capacity=capacity
        )
        if self.model.is_fenced(worker):
            await self._is_refused(call, worker)
            return []
        claimed = await call
        states = {job_id: record[0] for job_id, record in read_snapshot(await self._look()).records.items()}
        dropped = {job_id: State(states[job_id]) for job_id in self.model.doomed() if states.get(job_id) in TERMINAL}
        self.model.claim(worker, seq, turn, n, pools, offer, received, cache, slots, capacity, claimed, dropped)
        for lease in claimed.leases:
            self.history.leased(lease, worker)
        return list(claimed.leases)

    async def reconcile(self, worker: SessionId, seq: int, *leases: Lease) -> None:
        call = self.broker.workers.reconcile_leases(0, worker, seq, leases)
        if self.model.is_fenced(worker):
            await self._is_refused(call, worker)
            return
        told = await call
        taken = await self._no_more_held(worker)
        _same("reconcile", told, self.model.reconcile(worker, seq, leases, taken))

    async def publish(self, router: str, frames: bytes) -> None:
        gone = await self.broker.attempts.publish(0, {router: frames})
        _same("publish", set(gone), set() if self.model.publish(router, frames) else {router})

    async def append(self, lease: Lease, frames: bytes) -> None:
        _same("append", await self.broker.attempts.append(lease, frames), self.model.append(lease, frames))

    async def settle(self, *answers: tuple[Lease, Outcome, bytes]) -> None:
        """In one batch."""
        figures = [_figures(lease.job) for lease, _, _ in answers]
        told = await asyncio.gather(
            *(self.broker.attempts.settle(*answer, **known) for answer, known in zip(answers, figures, strict=True))
        )
        for answer, known, verdict in zip(answers, figures, told, strict=True):
            _same(f"settle of {answer[0].job.id}", verdict, self.model.settle(*answer, **known))
            if verdict is Settled.OK:
                self.history.accepted(answer[0])

    async def release(self, reason: str, *leases: tuple[Lease, bool]) -> None:
        """In one batch."""
        told = await asyncio.gather(
            *(self.broker.attempts.release(lease, reason, counted=spent) for lease, spent in leases)
        )
        for (lease, counted), verdict in zip(leases, told, strict=True):
            _same(f"release of {lease.job.id}", verdict, self.model.release(lease, reason, counted=counted))

    async def release_yielded(self, reason: str, lease: Lease, following: Job | None) -> None:
        verdict = await self.broker.attempts.release_yielded(lease, reason, following)
        _same("yield", verdict, self.model.release_yielded(lease, reason, following))

    async def decline_to_yield(self, lease: Lease, for_now: bool) -> None:
        await self.broker.attempts.decline_to_yield(lease, for_now=for_now)
        self.model.decline_to_yield(lease, for_now=for_now)

    async def crashed(self, reason: str, *leases: Lease) -> None:
        _same("crashed", await self.broker.attempts.report_crash(leases, reason), self.model.crashed(leases, reason))

    async def clear(self, lease: Lease) -> None:
        _same("clear", await self.broker.attempts.clear_suspicion(lease), self.model.clear(lease))

    async def reclaim(self, worker: SessionId, counted: bool) -> None:
        """Whole: what the Manager does, or the worker that leaves."""
        fates = await (self.broker.maintenance.reclaim(worker) if counted else self.broker.workers.leave(worker))
        told = [fates.requeued, fates.dead, fates.cancelled, 0, fates.lost]
        await self._taken(worker, told, counted, WHOLE, "its worker was lost" if counted else "its worker left")

    async def reclaim_step(self, worker: SessionId, counted: bool, limit: int) -> None:
        """Whoever reclaims dies behind its first step."""
        reason = "its worker was lost" if counted else "its worker left"
        told = await self.broker._caller.script(
            "reclaim", KEYS.budget, KEYS.prefix, worker, int(counted), limit, reason
        )
        await self._taken(worker, told, counted, limit, reason)

    async def expire(self) -> None:
        expired = await self.broker.maintenance.expire()
        _same("expire", (expired.expired, expired.woken), (self.model.expire(), self.model.effects.wakes.total()))

    async def _taken(self, worker: SessionId, told: list[int], counted: bool, limit: int, reason: str) -> None:
        taken = await self._no_more_held(worker)
        model = self.model.reclaim(worker, reason, counted=counted, limit=limit, taken=taken)
        _same("reclaim", told, model)

    async def _no_more_held(self, worker: SessionId) -> list[str]:
        """The jobs that a call took from a worker, in the order in which they wait again."""
        real = read_snapshot(await self._look())
        still = real.leases.get(worker, {})
        order = {job_id: place for jobs in real.lines.values() for place, job_id in enumerate(jobs)}
        gone = [job_id for job_id in self.model.held(worker) if job_id not in still]
        return sorted(gone, key=lambda job_id: order.get(job_id, -1))

    async def _is_refused(self, call: Any, worker: SessionId) -> bool:
        """Whether a call of a worker was fenced, which must be if and only if it is."""
        try:
            await call
        except Fenced:
            require(self.model.is_fenced(worker), f"{worker} was refused, though alive")
            return True
        except InferqError as error:
            raise AssertionError(f"the queue failed: {error}") from error
        require(not self.model.is_fenced(worker), f"{worker} was not refused, though dead")
        return False

    # Comparing

    async def _look(self) -> Raw:
        self._raw = self._raw or await Raw.read(self._client)
        return self._raw

    async def _compare(self) -> None:
        raw = await self._look()
        real = read_snapshot(raw)
        if self.model.is_unsure:
            self.model.bands.update(real.bands)
            self.model.is_unsure = False
        wrong = differences(real, self.model.snapshot())
        require(not wrong, "; ".join(wrong))
        self._compare_news(raw)
        self._compare_orders(raw)
        budget, live = self.model.snapshot().budgets, self.model.live.values()
        require(budget.get("p:m:jobs", 0) == sum(job.job.model == "m" for job in live), "budgets are of live jobs")

    def _compare_news(self, raw: Raw) -> None:
        expected = self.model.effects.news
        for router in self.model.listening:
            news = frames_in(self._unread(raw, "reply", router))
            self.history.told(router, news)
            own = [item for reader, item in expected if reader == router]
            same = Counter(news) == Counter(own)
            require(same, f"{router} was told {news}, should be {own}")

    def _compare_orders(self, raw: Raw) -> None:
        effects, runs = self.model.effects, set(self.model.runs)
        control = {worker for (worker,) in raw.of("ctl")}
        require(control == runs, f"those with a control stream are {control}, should be {runs}")
        for worker in runs:
            orders = control_messages_in(self._unread(raw, "ctl", worker))
            aborts = Counter((worker, order.job_id) for order in orders if order.kind is ControlKind.ABORT)
            asked = {pair: n for pair, n in effects.aborts.items() if pair[0] == worker}
            require(aborts == asked, f"aborts are {aborts}, should be {asked}")
            handed = [order.lease for order in orders if order.lease is not None]
            for lease in handed:
                self.history.leased(lease, SessionId(worker))
            should = [attempt for taker, attempt in effects.handed if taker == worker]
            have = [lease.attempt_id for lease in handed]
            require(have == should, f"{worker} was handed {have}, should be {should}")
            asked_to_yield = [(worker, order.attempt_id) for order in orders if order.kind is ControlKind.YIELD]
            yields = [pair for pair in effects.yields if pair[0] == worker]
            require(asked_to_yield == yields, f"asked to yield were {asked_to_yield}, should be {yields}")
            wakes = sum(order.kind is ControlKind.WAKE for order in orders)
            least = effects.wakes[worker]
            fits = wakes >= least if worker in effects.may_wake else wakes == least
            require(fits, f"{worker} was woken {wakes} times, should be {least}")

    def _unread(self, raw: Raw, family: str, name: str) -> Entries:
        read_to = self._read_to.get((family, name), (0, 0))
        entries = [entry for entry in raw.stream(family, name) if _position(entry[0]) > read_to]
        if entries:
            self._read_to[family, name] = _position(entries[-1][0])
        return entries


def _position(entry_id: bytes) -> tuple[int, int]:
    ms, _, number = entry_id.decode().partition("-")
    return int(ms), int(number)


def _same(call: str, told: object, expected: object) -> None:
    require(told == expected, f"{call} answers {told!r}, should be {expected!r}")


def _figures(job: Job) -> dict[str, int | None]:
    """What a worker says that an attempt has used and how long it ran; of some jobs it knows nothing."""
    if job.cost_estimate == 0:
        return {"used": None, "run_ms": None}
    return {"used": job.cost_estimate * 2 // 3, "run_ms": job.cost_estimate * 3 + 1}
