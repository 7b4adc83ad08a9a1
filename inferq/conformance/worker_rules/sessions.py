"""Rules about a session: join, heartbeats, pings, and the end of a session that was declared dead."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from queue_schemas import EngineState

from ..scorecard import Broken, Rule
from ..scripted_engine import event, whole_stream
from ..scripted_queue import MODEL, chat
from ..scripted_router import HEARTBEAT_MS
from ..worker_kit import SLOTS, SOON_S, WorkerKit
from .checks import check_answer, require

_LATE = 4.0
"""A heartbeat that comes this much later than agreed is late, on a busy machine too."""


async def _joins(kit: WorkerKit) -> None:
    join = kit.router.seen.joins[-1]
    require(
        join.session_id.rpartition(".")[0] == join.worker_id, "session_id is not worker_id, a dot and 16 hex digits"
    )
    require(join.slots >= 1, "it joins without slots")
    require(not join.again, "it says again: true, though the session is new")
    said = [join, *(heartbeat for _, heartbeat in kit.router.seen.heartbeats)][-1]
    require(said.models == [MODEL], f"it says models {said.models}; its engine lists {MODEL}")
    require(said.engine is EngineState.READY, f"its engine answers, and it says {said.engine}")


async def _heartbeats(kit: WorkerKit) -> None:
    seen = kit.router.seen.heartbeats
    first = len(seen)
    await kit.until(lambda: len(seen) >= first + 4, "four heartbeats come")
    times = [at for at, _ in seen[first:]]
    longest = max(later - earlier for earlier, later in pairwise(times))
    limit_s = HEARTBEAT_MS / 1000 * _LATE
    require(longest <= limit_s, f"{longest:.1f} s passed between two heartbeats; {HEARTBEAT_MS / 1000:g} s were agreed")
    require(seen[-1][1].session_id == kit.router.session_id, "a heartbeat names another session")


async def _answers_pings(kit: WorkerKit) -> None:
    seen, now = kit.router.seen, asyncio.get_running_loop().time
    await kit.until(lambda: bool(seen.heartbeats), "a heartbeat comes")
    # Just after a heartbeat the next one is furthest away.
    before = len(seen.heartbeats)
    await kit.until(lambda: len(seen.heartbeats) > before, "a heartbeat comes")
    asked, count = now(), len(seen.heartbeats) + len(seen.renewals)
    kit.queue.tell("ping")
    await kit.until(lambda: len(seen.heartbeats) + len(seen.renewals) > count, "a ping is answered")
    late = now() - asked
    require(
        late < HEARTBEAT_MS / 1000 * 0.8,
        f"a ping was answered after {late:.2f} s: with the next heartbeat, not at once",
    )


async def _joins_again(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("held", stream=True))
    session_id, joins = kit.router.session_id, len(kit.router.seen.joins)
    kit.router.refusals["heartbeat"] = (410, "unknown_worker")
    await kit.until(lambda: len(kit.router.seen.joins) > joins, "it joins again when a heartbeat is answered 410")
    kit.router.refusals.clear()
    join = kit.router.seen.joins[-1]
    require(join.session_id == session_id, "it joins as another session; its leases are this one's")
    require(join.again, "it joins again without again: true")
    kit.engine.release.set()
    await kit.until(lambda: attempt.ended, "the job that ran meanwhile is settled")
    check_answer(attempt, whole_stream(1), content_type="text/event-stream")


async def _begins_anew(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("held", stream=True))
    session_id = kit.router.session_id
    kit.router.session_id = "nobody.0000000000000000"
    await kit.until(
        lambda: kit.router.session_id not in ("nobody.0000000000000000", session_id),
        "it joins as a new session when its calls are answered 409 fenced",
    )
    require(not kit.router.seen.joins[-1].again, "a new session joins with again: true")
    await kit.until(lambda: kit.engine.running == 0, "it stops what the dead session ran")
    require(not attempt.settles, "it settles a job of the dead session in the new one")
    [other] = await kit.run(chat("stream 3", stream=True))
    check_answer(other, whole_stream(3), content_type="text/event-stream")


async def _survives_401(kit: WorkerKit) -> None:
    kit.router.refusals["*"] = (401, "invalid_api_key")
    await asyncio.sleep(1.5)
    kit.router.refusals.clear()
    try:
        [attempt] = await kit.run(chat("stream 3", stream=True), limit_s=2 * SOON_S)
    except Broken:
        raise Broken("it does not come back after its credential was refused for a while") from None
    check_answer(attempt, whole_stream(3), content_type="text/event-stream")


async def _reports_slots(kit: WorkerKit) -> None:
    jobs = [chat("held", stream=True) for _ in range(SLOTS)]
    kit.queue.put(*jobs)
    await kit.until(lambda: kit.engine.running == SLOTS, "as many jobs run as there are slots")
    await kit.until(
        lambda: [heartbeat.running for _, heartbeat in kit.router.seen.heartbeats][-1:] == [SLOTS],
        f"heartbeats say running: {SLOTS} while so many run",
    )
    kit.engine.release.set()
    await kit.until(lambda: all(job.attempts and job.last.ended for job in jobs), "all are settled")
    for job in jobs:
        check_answer(job.last, event(0) + whole_stream(0), content_type="text/event-stream")


SESSION_RULES: tuple[Rule[WorkerKit], ...] = (
    Rule("join", "it joins with its models, its slots and a session id of its own", _joins),
    Rule("heartbeat", "it sends heartbeats as often as agreed", _heartbeats),
    Rule("running", "its heartbeats say how many jobs run", _reports_slots),
    Rule("ping", "it answers a ping at once", _answers_pings),
    Rule(
        "unknown-worker",
        "forgotten by the Manager, it joins again as the same session, and its jobs go on",
        _joins_again,
    ),
    Rule("fenced-session", "declared dead, it stops everything and begins a new session", _begins_anew),
    Rule("refused-credential", "it goes on once a credential that was refused is valid", _survives_401),
)
