"""An edge node: a fabric of its own on one small machine, its engine lent to a larger fabric while the link is up."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from queue_schemas.keys import ShardKeys
from telemetry.environment import free_port
from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import MODEL, ROOT, Fleet, Role
from tests.support.load import DIMENSIONS, Load
from tests.support.processes import Child, answers, environment
from tests.support.queue import live_counts
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually

LEASE_S = 1.5
ENGINE_SLOTS = 8
LENT_SLOTS = 2
LONG = "word " * 200
"""Runs for a second and more."""


@dataclass
class Site:
    """A larger fabric with a worker of its own, and the edge's engine, lent to it over a link."""

    centre: Fleet
    own: Role
    lender: Role
    link: FaultProxy
    engine_url: str


@asynccontextmanager
async def site(folder: Path, server: Server, *, others: bool = True, slots: int = 4) -> AsyncIterator[Site]:
    """The centre serves, with the edge's engine."""
    file = folder / "workers.toml"
    digest = hashlib.sha256(b"the edge's").hexdigest()
    file.write_text(
        f'[edge]\nsha256 = ["{digest}"]\nregion = "edge"\nslots = {LENT_SLOTS}\nothers = {str(others).lower()}\n'
    )
    async with AsyncExitStack() as stack:
        engine_url = stack.enter_context(_engine(folder))
        centre = await stack.enter_async_context(
            Fleet(
                folder, server, manager={"lease_ms": int(LEASE_S * 1000)}, router={"worker_credentials_file": file},
                env={"INFERQ_JOIN_TOKEN": "the centre's"},
            )
        )  # fmt: skip
        centre.session.headers["x-inferq-join-token"] = "the centre's"
        link = await stack.enter_async_context(FaultProxy(centre.router.port))
        link.latency_s = 0.02
        own = centre.worker("own", slots=slots, sim_embedding_dimensions=DIMENSIONS)
        with centre.having({"INFERQ_JOIN_TOKEN": ""}):
            lender = centre.worker(
                "edge", engine="url", engine_url=engine_url, slots=LENT_SLOTS, region="edge", key="the edge's",
                manager_url=f"http://127.0.0.1:{link.port}",
            )  # fmt: skip
        for role in (centre.manager, centre.router, own, lender):
            role.process.start()
        await asyncio.gather(*(role.ready() for role in (centre.manager, centre.router, own, lender)))
        await centre.until_served(2)
        yield Site(centre, own, lender, link, engine_url)


@contextmanager
def _engine(folder: Path) -> Iterator[str]:
    """The edge's engine, which both its workers call; its URL."""
    port = free_port()
    options = ("--mode", "echo", "--ttft-ms", "5", "--tokens-per-s", "400", "--max-num-seqs", str(ENGINE_SLOTS))
    sizes = ("--embedding-dimensions", str(DIMENSIONS))
    command = [sys.executable, "-m", "worker.engines.simulated", "--port", str(port), *options, *sizes]
    engine = Child("engine", command, folder / "engine.log", env=environment(PYTHONPATH=str(ROOT)))
    engine.start()
    try:
        engine.until(lambda: answers(f"http://127.0.0.1:{port}/health"), 20)
        yield f"http://127.0.0.1:{port}"
    finally:
        engine.kill_group()


async def test_an_edge_serves_alone_while_its_link_is_cut(tmp_path: Path, own_valkey: Server) -> None:
    """Under load in both fabrics the link is cut for longer than a lease: no client at the edge waits for it, and
    the centre's jobs that ran there go on elsewhere, none failed. When the link is back the edge takes jobs again."""
    with Server(server_binary(), tmp_path / "edge-valkey") as queue:
        async with site(tmp_path, own_valkey) as at, Fleet(tmp_path / "edge-valkey", queue) as edge:
            await edge.up(workers=1, engine="url", engine_url=at.engine_url, slots=ENGINE_SLOTS - LENT_SLOTS)
            ended = asyncio.Event()
            central = Load(at.centre.router.url, 240, 12)
            async with asyncio.TaskGroup() as group:
                local = group.create_task(_local_clients(edge, ended))
                running = group.create_task(central.run())
                await eventually(lambda: _busy(at.lender), "it runs jobs of the centre", every_s=0.002)
                at.link.cut()
                lost = await eventually(lambda: _requeued(at.centre), "its jobs go elsewhere", limit_s=4 * LEASE_S)
                await at.centre.until_served(1)
                await running
                before = await _done(at.lender)
                at.link.heal()
                await at.centre.until_served(2)
                again = Load(at.centre.router.url, 40, 12)
                await again.run()
                ended.set()
            assert (central.wrong, again.wrong) == ([], [])
            assert lost <= LENT_SLOTS
            assert await _done(at.lender) > before, "it takes jobs of the centre again"
            waits = local.result()
            assert len(waits) > 40
            assert max(waits) < LEASE_S, "a client at the edge has waited for the link"
            assert live_counts(own_valkey.ask("HGETALL", ShardKeys(0).counters)) == {}


@pytest.mark.parametrize("others", [False, True])
async def test_an_edge_runs_jobs_of_others_only_when_allowed(tmp_path: Path, own_valkey: Server, others: bool) -> None:
    """While the centre has no free slot its jobs wait beside an idle edge, or run there. Those of the edge's region run
    there in either case."""
    async with site(tmp_path, own_valkey, others=others, slots=1) as at:
        regional = await at.centre.another_router("router-edge", region="edge").start()
        await eventually(lambda: _knows_models(regional), "its Router knows the worker of its region")
        central = [asyncio.create_task(_ask(at.centre, at.centre.router, LONG)) for _ in range(3)]
        await eventually(lambda: _all_arrived(at, 3), "they have come")
        await _ask(at.centre, regional, "of the region")
        assert others or not any(task.done() for task in central), "the edge was not free"
        await asyncio.gather(*central)
        await eventually(lambda: _counted(at, 4), "workers count what they answered")
        assert (await _done(at.lender) > 1) == others


async def _local_clients(edge: Fleet, ended: asyncio.Event) -> list[float]:
    """Three clients of the edge's own Router, one request after another; how long each took."""
    waits: list[float] = []

    async def ask_on(client: int) -> None:
        while not ended.is_set():
            began = time.monotonic()
            await _ask(edge, edge.router, f"client {client}, request {len(waits)}")
            waits.append(time.monotonic() - began)
            await asyncio.sleep(0.05)

    await asyncio.gather(*map(ask_on, range(3)))
    return waits


async def _ask(fleet: Fleet, router: Role, text: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    async with fleet.session.post(f"{router.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        assert (await answer.json())["choices"][0]["message"]["content"] == text


async def _busy(worker: Role) -> bool:
    return bool((await worker.page("/status"))["running"])


async def _requeued(fleet: Fleet) -> int:
    """How many attempts were lost so far."""
    totals = fleet.server.ask("HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith((b":requeued", b":lost")))


async def _done(worker: Role) -> int:
    """How many requests a worker has answered."""
    page = await worker.metrics()
    return int(sum(map(float, re.findall(r'^inferq_attempts_total\{.*outcome="done".*\} (\S+)$', page, re.MULTILINE))))


async def _counted(at: Site, times: int) -> bool:
    return await _done(at.own) + await _done(at.lender) >= times


async def _knows_models(router: Role) -> bool:
    return (await router.get(f"/v1/models/{MODEL}"))[0] == 200


async def _all_arrived(at: Site, jobs: int) -> bool:
    pool = await at.centre.depth()
    return bool(pool["waiting"] + pool["leased"] == jobs)
