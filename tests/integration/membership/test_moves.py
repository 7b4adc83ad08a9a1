"""The acting Manager changes: workers go where it is, and what runs does not notice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from queue_schemas import FABRIC_PREFIX, UnknownWorker
from queue_schemas.keys import WORKERS, ShardKeys
from telemetry.http.fabric_calls import FORWARDED_BY_MANAGER
from tests.integration.membership.scene import (
    WAIT_LIMIT_S,
    LongStream,
    TwoManagers,
    foreign_manager,
    open_ended_engine,
)
from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

LEADER_LEASE_MS = 2_400
TAKE_OVER_S = LEADER_LEASE_MS / 1000 * 4 / 3
"""A lease that nobody renews runs out, and is tried for three times meanwhile."""
RESIGNED_S = LEADER_LEASE_MS / 1000 / 3
SLACK_S = 2.0
"""What a busy machine may add: the processes share two cores with other tests."""


async def sessions(fleet: Fleet) -> list[str]:
    """Who the workers are."""
    return [(await worker.page("/status"))["session_id"] for worker in fleet.workers]


async def requeued(fleet: Fleet) -> int:
    """How many attempts were taken away from workers so far."""
    totals = await asyncio.to_thread(fleet.server.ask, "HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith(b":requeued"))


async def test_workers_follow_the_acting_manager(tmp_path: Path, own_valkey: Server) -> None:
    """The acting Manager resigns, freezes, is killed: each time the other acts within its lease, all workers are there
    by themselves, in a higher term, the same sessions; a stream through each Router runs across it all in one
    attempt; and the frozen one, awake again, changes nothing."""
    async with (
        open_ended_engine() as engine,
        TwoManagers(tmp_path, own_valkey, manager={"leader_lease_ms": LEADER_LEASE_MS}) as fleet,
    ):
        await fleet.up(workers=2, engine="url", engine_url=engine.url)
        before, term = await sessions(fleet), await fleet.term(0)
        streams = [await LongStream(fleet, router).begun() for router in fleet.routers]

        async def moves(to: int, end: Callable[[], None], limit_s: float) -> int:
            end()
            begin = time.monotonic()
            await eventually(lambda: fleet.acts(to), "the other Manager acts", limit_s=WAIT_LIMIT_S)
            without = time.monotonic() - begin
            assert without <= limit_s + SLACK_S, f"{without:.2f} s without an acting Manager"
            await fleet.settled_at(to)
            higher = await fleet.term(to)
            assert higher > term
            for stream in streams:
                await stream.goes_on()
            return higher

        first, second = fleet.managers
        term = await moves(1, lambda: first.process.send(signal.SIGTERM), RESIGNED_S)
        assert await first.ended() == 0
        first.process.start()
        await eventually(lambda: fleet.stands_by(0), "the first Manager is back", limit_s=WAIT_LIMIT_S)

        term = await moves(0, second.process.pause, TAKE_OVER_S)
        second.process.resume()
        await eventually(lambda: fleet.stands_by(1), "the frozen one knows that it acts no more", limit_s=WAIT_LIMIT_S)
        worker = await fleet.workers[0].page("/status")
        heartbeat = {"session_id": worker["session_id"], "slots": 1}
        late = f"{second.url}{FABRIC_PREFIX}/workers/worker-1/heartbeat"
        async with fleet.session.post(late, json=heartbeat, headers={FORWARDED_BY_MANAGER: "1"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "manager_unavailable")

        async def passes_on() -> bool:
            async with fleet.session.post(late, json=heartbeat) as answer:
                return answer.status == 200

        await eventually(passes_on, "it passes a worker's call on to the one that acts", limit_s=WAIT_LIMIT_S)
        assert await fleet.acts(0)
        assert await fleet.term(0) == term
        assert (await fleet.workers[0].page("/status"))["assignment"] == worker["assignment"]

        term = await moves(1, first.process.kill, TAKE_OVER_S)
        assert await sessions(fleet) == before
        engine.finish()
        for stream in streams:
            await stream.whole()
        assert engine.calls == len(streams)
        assert await requeued(fleet) == 0


async def test_workers_register_again_with_a_manager_that_forgot_them(tmp_path: Path, own_valkey: Server) -> None:
    """The Manager comes back to an empty snapshot: the worker registers again, and what it runs goes on."""
    async with open_ended_engine() as engine, Fleet(tmp_path, own_valkey) as fleet:
        await fleet.manager.start()
        await fleet.router.start()
        await fleet.worker("worker-1", engine="url", engine_url=engine.url).start()
        before = await sessions(fleet)
        stream = await LongStream(fleet, fleet.router).begun()
        fleet.manager.process.kill()
        await asyncio.to_thread(fleet.server.ask, "DEL", WORKERS)
        await fleet.manager.start()

        async def known() -> bool:
            workers = (await fleet.manager.page(f"{FABRIC_PREFIX}/workers"))["workers"]
            return [worker["session_id"] for worker in workers] == before

        await eventually(known, "the worker is known again", limit_s=WAIT_LIMIT_S)
        await fleet.workers[0].ready()
        engine.finish()
        await stream.whole()
        assert engine.calls == 1


def _assignment(term: int, version: int, *pools: str) -> dict[str, Any]:
    return {"term": term, "version": version, "pools": [{"pool": pool, "shard": 0} for pool in pools]}


async def test_what_foreign_managers_say_of_heartbeats(tmp_path: Path, own_valkey: Server) -> None:
    """404 and 410, with our error or somebody else's, all mean register again, as the same session id; an answer of an
    older term, or an older version, changes nothing."""
    unknown: dict[str, Any] = {"error": {"code": UnknownWorker.code, "message": "who are you?"}}
    async with foreign_manager(own_valkey.url) as manager, Fleet(tmp_path, own_valkey) as fleet:
        manager.assignment = _assignment(5, 2, "sim")
        worker = await fleet.worker("worker-1", manager_url=manager.url).start()

        async def answered(heartbeats: int) -> None:
            heard = manager.heartbeats
            await eventually(lambda: manager.heartbeats >= heard + heartbeats, "heartbeats come", limit_s=WAIT_LIMIT_S)

        async def registered(times: int) -> None:
            await eventually(lambda: len(manager.registered) == times, "it registers again", limit_s=WAIT_LIMIT_S)
            await worker.ready()

        for number, answer in enumerate(((404, unknown), (410, unknown), (404, {"detail": "Not Found"})), 2):
            manager.heartbeat_answers = [answer]
            await registered(number)
        assert set(manager.registered) == {(await worker.page("/status"))["session_id"]}
        for older in (_assignment(4, 99), _assignment(5, 1)):
            manager.heartbeat_answers = [(200, {"assignment": older})] * 1_000
            await answered(3)
            assert (await worker.page("/status"))["assignment"] == [5, 2]
        manager.heartbeat_answers = []
        manager.assignment = _assignment(6, 1, "sim")
        await answered(2)
        assert (await worker.page("/status"))["assignment"] == [6, 1]


async def test_two_managers_never_both_accept(tmp_path: Path, own_valkey: Server) -> None:
    """The acting Manager is cut off from Redis, without a word: no registration that begins after one of the next term
    was accepted is accepted in the old one, whichever Manager is asked (the one that stands by passes it on); what
    workers are assigned only rises; healed, it stands by, and nobody was declared dead."""
    async with FaultProxy(own_valkey.port) as proxy:
        manager = {"leader_lease_ms": LEADER_LEASE_MS, "advertised_redis_url": own_valkey.url}
        async with TwoManagers(tmp_path, own_valkey, manager=manager) as fleet:
            arguments = fleet.managers[0].process.args
            arguments[arguments.index("--redis-url") + 1] = proxy.url
            await fleet.up(workers=1)
            before = await sessions(fleet)
            seen: list[tuple[int, int]] = []
            accepted: list[list[Accepted]] = [[], []]
            async with asyncio.TaskGroup() as group:
                watching = [
                    group.create_task(_watch_assignment(fleet.workers[0], seen)),
                    *(group.create_task(_keep_joining(fleet, number, accepted[number])) for number in (0, 1)),
                ]
                await eventually(lambda: len(accepted[0]) > 5, "the first one accepts", limit_s=WAIT_LIMIT_S)
                proxy.silence()
                before_it = {one.term for one in accepted[0]}
                await eventually(
                    lambda: sum(one.term not in before_it for one in accepted[1]) > 5, "the second one accepts",
                    limit_s=WAIT_LIMIT_S,
                )  # fmt: skip
                await fleet.settled_at(1)
                proxy.heal()
                await eventually(lambda: fleet.stands_by(0), "the first one stands by", limit_s=WAIT_LIMIT_S)
                now = len(accepted[1])
                await eventually(lambda: len(accepted[1]) > now + 5, "the second one goes on", limit_s=WAIT_LIMIT_S)
                for task in watching:
                    task.cancel()
            (old,) = before_it
            answers = [*accepted[0], *accepted[1]]
            next_term_since = min(one.ended_s for one in answers if one.term > old)
            assert max(one.begun_s for one in answers if one.term == old) < next_term_since
            assert seen == sorted(seen)
            assert seen[0][0] < seen[-1][0]
            assert await sessions(fleet) == before
            assert await requeued(fleet) == 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """A registration that was answered with 200, and the term of its assignment."""

    begun_s: float
    ended_s: float
    term: int


async def _keep_joining(fleet: TwoManagers, number: int, accepted: list[Accepted]) -> None:
    """Register a worker of its own with one Manager again and again."""
    body = {"worker_id": f"probe-{number}", "session_id": f"probe-{number}.0000000000000001", "slots": 0}
    url = f"{fleet.managers[number].url}{FABRIC_PREFIX}/workers"
    while True:
        begun = time.monotonic()
        async with fleet.session.post(url, json=body) as answer:
            if answer.status == 200:
                term = (await answer.json())["assignment"]["term"]
                accepted.append(Accepted(begun, time.monotonic(), term))
            else:
                assert answer.status == 503, await answer.text()
        await asyncio.sleep(0.02)


async def _watch_assignment(worker: Role, seen: list[tuple[int, int]]) -> None:
    while True:
        term, version = (await worker.page("/status"))["assignment"]
        seen.append((term, version))
        await asyncio.sleep(0.03)
