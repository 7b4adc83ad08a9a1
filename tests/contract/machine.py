"""Any order of calls by several Routers and workers that come, die and return, as a Hypothesis state machine.

Each rule is one call, so a crash between two steps is a call that never comes: a worker that is reclaimed between its
claim and its answer, a reclaim that stops half way, a Router whose stream is gone. Any call may come a second time, at
once (its reply was lost) or much later (a late copy of it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from broker import Budgets
from queue_schemas import (
    BANDS,
    CONTINUED,
    END,
    HEAD,
    LANES,
    Frame,
    Job,
    JobId,
    Lane,
    Lease,
    Outcome,
    Pool,
    SessionId,
    Tenant,
)
from tests.support.queue import Backend, FakeBackend

from .model_records import require
from .rewriting import Rewrite
from .side_by_side import SideBySide

BUDGETS = Budgets(tenant_jobs=9, tenant_bytes=6_000, pool_jobs=14, pool_bytes=8_000)
POOLS = (Pool("m"), Pool("sim/tiny:v1"))
TENANTS = ("a", "b", "c:{d} é")
MAX_WORKERS = 4
SLOTS = 6
"""Of a worker, in all."""
DAY_MS = 24 * 3600 * 1000
WAITS_MS = (1, 500, 2_001, 5_001, 31_000)
Served = tuple[tuple[Pool, tuple[Lane, ...]], ...]
SERVED: tuple[Served, ...] = (
    ((POOLS[0], LANES),),
    ((POOLS[0], LANES), (POOLS[1], LANES)),
    ((POOLS[0], (Lane.INTERACTIVE,)), (POOLS[1], (Lane.BATCH,))),
)
"""What workers pull."""
PREFIXES = ("", "", "aa1000000000", "aa2000000000aa1000000000", "aa2111111111aa1000000000", "bb1000000000aa1000000000")
"""Digests of prefixes: some begin alike, and two share a slot of the table."""

_ON_THE_WAY = ("enqueued", "requeued", "lost", "yielded", "asked_to_yield")
"""Events of jobs that are no ends."""
GONE = "its client went away"
Item = TypeVar("Item")
picks = st.integers(0, 99)


def pick(items: Sequence[Item], number: int) -> Item:
    """Any of the items; 0 is the newest."""
    return items[-1 - number % len(items)]


@st.composite
def jobs(draw: Any) -> dict[str, Any]:
    """Fields of a job, most of one place so that lines form. ``router``: whose it is, -1 for nobody's."""
    kind = draw(st.sampled_from(["plain", "plain", "continued", "persisted", "nobody's"]))
    return {
        "tenant": draw(st.sampled_from(TENANTS)),
        "model": draw(st.sampled_from((POOLS[0], *POOLS))),
        "lane": draw(st.sampled_from((Lane.INTERACTIVE, *LANES))),
        "band": draw(st.sampled_from((2, *range(BANDS)))),
        "max_attempts": draw(st.integers(1, 3)),
        "ttl_ms": draw(st.sampled_from([600_000, 600_000, 10_000, 1_000])),
        "body": b"x" * draw(st.sampled_from([0, 0, 0, 2_000])),
        "cost_estimate": draw(st.sampled_from([0, 1, 40, 7_000])),
        "weight": draw(st.sampled_from([1.0, 1.0, 4.0, 0.5])),
        "affinity": draw(st.sampled_from(PREFIXES)),
        "stream": kind == "continued",
        "on_loss": "continue" if kind == "continued" else "restart",
        "persisted": kind == "persisted",
        "idempotency_key": draw(st.sampled_from(["", "", "one"])) if kind == "persisted" else "",
        "yields": draw(st.sampled_from([0, 1, 2])),
        "router": -1 if kind == "nobody's" else draw(st.integers(0, 1)),
    }


class QueueMachine(RuleBasedStateMachine):
    """The calls, and who makes them. Subclasses name the server and what is rewritten of the scripts."""

    backend: ClassVar[Backend] = FakeBackend()
    rewrites: ClassVar[tuple[Rewrite, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.both = SideBySide(self.backend, BUDGETS, self.rewrites)
        self.runner.run(self.both.open())
        self.workers: list[SessionId] = []
        self.dead: list[SessionId] = []
        self.seqs: dict[SessionId, int] = {}
        self.turns: dict[SessionId, int] = {}
        self.routers = [_session_id("router", number) for number in range(2)]
        self.jobs: list[Job] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failed = False

    @property
    def model(self) -> Any:
        return self.both.model

    def play(self, name: str, *args: Any) -> Any:
        """Make a call, of which late copies may come."""
        self.calls.append((name, args))
        return self.once(name, *args)

    def once(self, name: str, *args: Any) -> Any:
        """Make a call, or let something happen."""
        note(f"  {name} {_brief(args)}")
        try:
            return self.runner.run(self.both.play(name, *args))
        except BaseException:
            self.failed = True
            raise

    def running(self) -> list[Lease]:
        """What is leased now, oldest first."""
        live = self.model.live
        return [
            lease
            for lease, _ in self.both.history.leases.values()
            if lease.job.id in live and live[lease.job.id].attempt_id == lease.attempt_id
        ]

    def ever(self) -> list[Lease]:
        """All that was ever leased."""
        return [lease for lease, _ in self.both.history.leases.values()]

    def half_dead(self) -> list[SessionId]:
        """Workers whose reclaim is under way."""
        return [worker for worker in self.dead if worker in self.model.runs]

    # Before anything

    @initialize()
    def begin(self) -> None:
        """Two Routers listen, two workers are there."""
        for router in self.routers:
            self.once("open_replies", router)
        for _ in range(2):
            self._new_worker()

    def _new_worker(self) -> SessionId:
        worker = _session_id("worker", len(self.workers) + len(self.dead))
        self.workers.append(worker)
        self.seqs[worker] = self.turns[worker] = 0
        self.play("join", worker)
        return worker

    # Routers

    @rule(fields=st.lists(jobs(), min_size=1, max_size=3))
    def enqueue(self, fields: list[dict[str, Any]]) -> None:
        """New jobs, in one batch."""
        new = []
        for given in fields:
            router = given["router"]
            rest = {name: value for name, value in given.items() if name != "router"}
            number = len(self.jobs) + len(new)
            reply_to = self.routers[router] if router >= 0 else ""
            rest["tenant"] = Tenant(rest["tenant"])
            new.append(Job(id=_job_id(number), path="/v1/chat/completions", reply_to=reply_to, **rest))
        self.jobs += new
        self.play("enqueue", *new)

    @precondition(lambda self: any(live.state == "lost" for live in self.model.live.values()))
    @rule(number=picks, grown=st.sampled_from(["", "Once", "Once upon a time"]))
    def resume(self, number: int, grown: str) -> None:
        """A Router says where a lost stream goes on."""
        live = pick([live for live in self.model.live.values() if live.state == "lost"], number)
        self.play("resume", replace(live.job, prefix=grown), live.epoch)

    @rule(number=picks, unknown=st.booleans(), if_queued=st.booleans())
    def cancel(self, number: int, unknown: bool, if_queued: bool) -> None:
        """A client goes away, before or after its answer, or before its request, which comes all the same; or a batch
        takes a line back that does not run yet."""
        if unknown or not self.jobs:
            job = Job(id=_job_id(len(self.jobs)), tenant=Tenant("a"), model=POOLS[0], path="/", body=b"")
            self.jobs.append(job)
            self.play("cancel", job.id, GONE, if_queued)
            self.play("enqueue", job)
        else:
            self.play("cancel", pick(self.jobs, number).id, GONE, if_queued)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, heard=st.integers(0, 3))
    def raise_epoch(self, number: int, heard: int) -> None:
        """A Router finds another run of the server, and asks where its job stands."""
        self.play("raise_epoch", pick(self.jobs, number).id, heard)

    @rule(number=st.integers(0, 1))
    def lose_or_open_replies(self, number: int) -> None:
        """A Router's stream is gone, or there again."""
        router = self.routers[number]
        self.once("lose_replies" if router in self.model.listening else "open_replies", router)

    # Workers

    @rule(
        number=picks,
        n=st.integers(0, 4),
        more=st.integers(-1, 2),
        unread=st.integers(0, 2),
        served=st.sampled_from(SERVED),
        cache=st.sampled_from((0, 0, 0, 1, 2)),
        capacity=st.sampled_from((SLOTS, SLOTS, 3 * SLOTS)),
    )
    def claim(self, number: int, n: int, more: int, unread: int, served: Served, cache: int, capacity: int) -> None:
        """A worker asks for work, and offers to take more, or nothing, without asking. It has not read yet of the last
        jobs that it was handed. Its engine may have forgotten much, or all, since."""
        offer = n + more if n and more >= 0 else 0
        self._claim(pick(self.workers, number), n, served, offer=offer, unread=unread, cache=cache, capacity=capacity)

    @rule(number=picks, offers=st.booleans())
    def claim_well(self, number: int, offers: bool) -> None:
        """A worker asks for all that there is for it."""
        self._claim(pick(self.workers, number), 4, SERVED[1], offer=4 * offers)

    def _claim(
        self,
        worker: SessionId,
        n: int,
        served: Served,
        offer: int = 0,
        unread: int = 0,
        cache: int = 0,
        capacity: int = SLOTS,
    ) -> list[Lease]:
        self.seqs[worker] += 1
        run = self.model.runs.get(worker)
        received = max(run.handed_over - unread, 0) if run is not None else 0
        leases: list[Lease] = self.play(
            "claim", worker, self.seqs[worker], self.turns[worker], n, served, offer, received, cache, SLOTS, capacity
        )
        self.turns[worker] += len(leases)
        return leases

    @precondition(lambda self: self.running())
    @rule(number=picks, outcome=st.sampled_from([Outcome.DONE, Outcome.FAILED]), times=st.integers(1, 2))
    def settle(self, number: int, outcome: Outcome, times: int) -> None:
        """A worker answers, perhaps twice in a batch."""
        lease = pick(self.running(), number)
        self.play("settle", *[(lease, outcome, _frame(lease, last=True))] * times)

    @precondition(lambda self: any(lease.job.persisted for lease in self.ever()))
    @rule(number=picks, router=st.integers(-1, 1), continued=st.booleans())
    def follow(self, number: int, router: int, continued: bool) -> None:
        """A worker adds to the output of a persisted job, which it may have lost; or a Router reads what is kept of it,
        and listens from then on."""
        lease = pick([lease for lease in self.ever() if lease.job.persisted], number)
        if router >= 0:
            self.play("attach", lease.job.id, self.routers[router])
            return
        live = self.model.live.get(lease.job.id)
        goes_on = continued and live is not None and bool(live.output)
        self.play("append", lease, _frame(lease, last=False, flags=CONTINUED if goes_on else 0))

    @precondition(lambda self: len(self.running()) > 1)
    @rule()
    def settle_all(self) -> None:
        """Several answers share a call."""
        self.play("settle", *((lease, Outcome.DONE, _frame(lease, last=True)) for lease in self.running()))

    @precondition(lambda self: self.running())
    @rule(number=picks, counted=st.booleans())
    def release(self, number: int, counted: bool) -> None:
        """A worker hands a job back."""
        self.play("release", "handed back", (pick(self.running(), number), counted))

    @precondition(lambda self: self.running())
    @rule(number=picks, said=st.sampled_from(["", "Once", "Once upon a time"]))
    def yield_slot(self, number: int, said: str) -> None:
        """A worker has a job yield, asked or not, which goes on behind what it said; or declines."""
        lease = pick(self.running(), number)
        if number % 3 == 0:
            self.play("decline_to_yield", pick(self.ever(), number // 3), number % 2 == 0)
            return
        following = replace(lease.job, prefix=said, yields=max(lease.job.yields - 1, 0)) if said else None
        self.play("release_yielded", "it yields", lease, following)

    @precondition(lambda self: self.running())
    @rule(number=picks, old=picks)
    def crashed(self, number: int, old: int) -> None:
        """A worker's engine crashes with all that runs there, and with something that does not run there any more."""
        running, live = self.running(), self.model.live
        worker = live[pick(running, number).job.id].owner
        held = [lease for lease in running if live[lease.job.id].owner == worker]
        over = pick(self.ever(), old)
        self.play("crashed", "the engine crashed", *held, *([] if over in running else [over]))

    @precondition(lambda self: self.running())
    @rule(number=picks)
    def clear(self, number: int) -> None:
        """A job went on behind what crashed its engine before."""
        self.play("clear", pick(self.running(), number))

    @rule(number=picks, runs=picks, old=picks)
    def reconcile(self, number: int, runs: int, old: int) -> None:
        """A worker finds another run of the server, and says what it runs: not all that it holds, and more."""
        worker = pick(self.dead + self.workers, number)
        held = [lease for lease in self.running() if self.model.live[lease.job.id].owner == worker]
        over = [lease for lease in self.ever() if lease not in self.running()]
        said = [lease for bit, lease in enumerate(held) if runs >> bit & 1] + over[: old % 2]
        self.play("reconcile", worker, max(self.seqs[worker] - old // 2 % 2, 0), *said)

    @precondition(lambda self: self.ever())
    @rule(number=picks, other=picks, what=st.sampled_from(["settle", "release", "resume", "publish"]))
    def call_wrongly(self, number: int, other: int, what: str) -> None:
        """An attempt speaks whose time is over, or one that is made up of two."""
        lease = pick(self.ever(), number)
        mixed = replace(lease, attempt_id=pick(self.ever(), other).attempt_id)
        match what:
            case "settle":
                self.play("settle", (lease, Outcome.DONE, b""), (mixed, Outcome.DONE, _frame(mixed, last=True)))
            case "release":
                self.play("release", "handed back", (lease, bool(other % 2)), (mixed, True))
            case "resume":
                self.play("resume", replace(lease.job, prefix="Twice"), lease.epoch + other % 2)
            case "publish" if lease.job.reply_to:
                self.play("publish", lease.job.reply_to, _frame(lease, last=False))

    @rule(number=picks, what=st.sampled_from(["renew", "claim", "join"]))
    def be_there(self, number: int, what: str) -> None:
        """A worker renews, alive or declared dead; one that was declared dead asks for work; another one comes."""
        if what == "claim" and self.dead:
            self._claim(pick(self.dead, number), 1, SERVED[0])
        elif what == "join" and len(self.workers) < MAX_WORKERS:
            self._new_worker()
        else:
            self.play("renew", pick(self.dead + self.workers, number))

    @rule(number=picks, counted=st.booleans(), limit=st.sampled_from([0, 0, 1, 2]))
    def die(self, number: int, counted: bool, limit: int) -> None:
        """A worker is declared dead, or leaves, and another comes. With a limit, whoever reclaims dies behind the first
        step; then the next one may go on, and die too."""
        if limit and number % 2 and self.half_dead():
            self.once("reclaim_step", pick(self.half_dead(), number // 2), counted, limit)
            return
        worker = pick(self.workers, number)
        self.workers.remove(worker)
        self.dead.append(worker)
        if not self.workers:
            self._new_worker()
        if limit:
            self.once("reclaim_step", worker, counted, limit)
        else:
            self.play("reclaim", worker, counted)

    # Time, and calls that come again

    @rule(ms=st.sampled_from((0, 0, *WAITS_MS)))
    def pass_time(self, ms: int) -> None:
        """Time passes, and the sweep of each second comes; or, after a minute, what ended is forgotten: no copy of an
        enqueue comes as late as that."""
        if ms:
            self.once("wait", ms)
        if ms == WAITS_MS[-1]:
            gone = set(self.once("forget_ended"))
            self.calls = [
                call for call in self.calls if call[0] != "enqueue" or not gone.intersection(job.id for job in call[1])
            ]
        else:
            self.once("expire")

    @rule(ms=st.sampled_from(WAITS_MS))
    def wait(self, ms: int) -> None:
        """Time passes, and no sweep comes."""
        self.once("wait", ms)

    @precondition(lambda self: self.calls)
    @rule(number=st.one_of(st.just(0), picks))
    def call_again(self, number: int) -> None:
        """The reply to the last call was lost, so it is sent again; or a copy of an older one arrives."""
        self._again(number)

    def _again(self, number: int) -> None:
        name, args = pick(self.calls, number)
        # Who is declared dead and forgotten would be let in once more: each start of a worker is a new session_id.
        if name != "join" or args[0] in self.model.runs:
            self.once(name, *args)

    def teardown(self) -> None:
        """All is well again: whatever still lives ends, and nothing is left of it."""
        try:
            if not self.failed:
                self._heal()
        finally:
            self.runner.run(self.both.close())
            self.runner.close()

    def _heal(self) -> None:
        for worker in [*self.dead, *self.workers]:
            self.once("reclaim", worker, True)
        self.once("wait", 3_000)
        worker = self._new_worker()
        for _ in range(200):
            for live in [live for live in self.model.live.values() if live.state == "lost"]:
                self.once("resume", live.job, live.epoch)
            if not self.model.live:
                break
            for lease in self._claim(worker, 4, SERVED[1]):
                self.once("settle", (lease, Outcome.DONE, _frame(lease, last=True)))
        require(not self.model.live, f"{set(self.model.live)} wait beside a free worker")
        self.once("wait", DAY_MS)
        self.once("expire")
        seen = self.model.snapshot()
        kept = [name for name in seen.budgets if name.endswith(":persisted")]
        require(not (kept or seen.kept or seen.keys or seen.outputs or seen.listeners), "answers are kept for ever")
        require(not (seen.lines or seen.leases or seen.deadlines or seen.lost), "something is left over")
        enqueued = sum(n for (*_, event), n in seen.totals.items() if event == "enqueued")
        ended = sum(n for (*_, event), n in seen.totals.items() if event not in _ON_THE_WAY)
        require(enqueued == ended, f"{enqueued} jobs came, {ended} ended")


def _brief(value: object) -> str:
    """What a call was given, without what does not matter."""
    match value:
        case Job():
            return f"job {value.id[-2:]} of {value.tenant}"
        case Lease():
            return f"attempt {value.attempt_id} of job {value.job.id[-2:]}"
        case tuple() | list():
            return f"({', '.join(map(_brief, value))})"
        case bytes():
            return f"{len(value)} bytes"
    return str(value)


def _session_id(role: str, number: int) -> SessionId:
    return SessionId(f"{role}-{number}.{number:016x}")


def _job_id(number: int) -> JobId:
    return JobId(f"0-{number:032x}")


def _frame(lease: Lease, *, last: bool, flags: int = 0) -> bytes:
    """A part of an answer."""
    flags |= HEAD | END if last else HEAD
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, 0, flags, b"answer", 200, "application/json").pack()
