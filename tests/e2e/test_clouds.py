"""Workers of one fabric at three providers: each knows a proxy's HTTPS address, an authority and a key of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from queue_schemas.keys import ShardKeys
from tests.support.connections import connections_of
from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.load import DIMENSIONS, Load
from tests.support.reverse_proxies import PROXIES, tls_before
from tests.support.servers import Certificates, Server
from tests.support.waiting import eventually

REGIONS = ("eu", "us", "ap")
DELAY_S = 0.1
"""Of each provider's link, in each direction."""
LEASE_S = 1.5
REMOTE_AFTER_S = 1.5
SLOTS = 16


@dataclass
class Clouds:
    """A Router in each region, and a worker of each at a provider of its own, behind a link of its own."""

    fleet: Fleet
    routers: dict[str, Role]
    workers: dict[str, Role]
    links: dict[str, FaultProxy]
    certificates: Certificates
    file: Path

    def allow(self, keys: Mapping[str, list[str]]) -> None:
        """Write the file of credentials: the keys that are accepted, by region."""
        tables = []
        for region in REGIONS:
            digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys[region]]
            limits = f'models = ["{MODEL}"]\nregion = "{region}"\nslots = {SLOTS}\n'
            tables.append(f"[{region}]\nsha256 = {json.dumps(digests)}\n{limits}")
        self.file.write_text("\n".join(tables))

    def worker(self, region: str, key: str, **flags: object) -> Role:
        """A worker of a region, not started yet, that is given a key and no other address or secret."""
        settings: dict[str, object] = {
            "manager_url": f"https://127.0.0.1:{self.links[region].port}", "tls_ca_file": self.certificates.ca,
            "key": key, "region": region, "slots": SLOTS, "sim_embedding_dimensions": DIMENSIONS,
        }  # fmt: skip
        with self.fleet.having({"INFERQ_JOIN_TOKEN": ""}):
            return self.fleet.worker(region, **settings | flags)


@asynccontextmanager
async def clouds(folder: Path, server: Server, *, delay_s: float = DELAY_S) -> AsyncIterator[Clouds]:
    """Everything started, all workers known."""
    async with AsyncExitStack() as stack:
        file = folder / "workers.toml"
        file.touch()
        router = {"worker_credentials_file": file, "region_remote_after_ms": int(REMOTE_AFTER_S * 1000)}
        fleet = await stack.enter_async_context(
            Fleet(
                folder, server, manager={"lease_ms": int(LEASE_S * 1000)}, router=router | {"region": "eu"},
                env={"INFERQ_JOIN_TOKEN": "the fleet's"},
            )
        )  # fmt: skip
        fleet.session.headers["x-inferq-join-token"] = "the fleet's"
        others = {region: fleet.another_router(f"router-{region}", **router, region=region) for region in REGIONS[1:]}
        routers = {"eu": fleet.router, **others}
        certificates = Certificates.make(folder / "tls")
        https = stack.enter_context(tls_before([one.port for one in routers.values()], "nginx", folder, certificates))
        links = {region: await stack.enter_async_context(FaultProxy(https)) for region in REGIONS}
        found = Clouds(fleet, routers, {}, links, certificates, file)
        found.allow({region: [f"key of {region}"] for region in REGIONS})
        for region, link in links.items():
            link.latency_s = delay_s
            found.workers[region] = found.worker(region, f"key of {region}")
        roles = [fleet.manager, *routers.values(), *found.workers.values()]
        for role in roles:
            role.process.start()
        await asyncio.gather(*(role.ready() for role in roles))
        await fleet.until_served(len(REGIONS))
        yield found


async def test_mixed_load_survives_resets_and_a_cut_link(tmp_path: Path, own_valkey: Server) -> None:
    """100 ms away in each direction, with connections reset all the time and one provider cut off for longer than a
    lease: no request fails and none is mixed up. Every worker is connected with its proxy alone."""
    async with clouds(tmp_path, own_valkey) as at:
        cut = at.links["us"]
        loads = [Load(router.url, 40, 12) for router in at.routers.values()]
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_connected(at, ended))
            resetting = group.create_task(_reset([link for link in at.links.values() if link is not cut], ended))
            running = [group.create_task(load.run()) for load in loads]
            await loads[1].reached(0.2)
            await eventually(lambda: _busy(at.workers["us"]), "it runs jobs", every_s=0.002)
            cut.cut()
            await asyncio.sleep(LEASE_S + 1)
            cut.heal()
            await asyncio.gather(*running)
            ended.set()
        assert watching.result() == {region: {link.port} for region, link in at.links.items()}
        assert [load.wrong for load in loads] == [[], [], []]
        assert await _requeued(at) > 0, "no job was ever lost: the test has proved nothing"
        assert resetting.result() > 3
        await at.fleet.until_served(3)
        assert await _served(at, "us") == {"us": 1}, "what was cut off takes jobs of its region again"


async def test_jobs_go_to_their_region_s_provider_first(tmp_path: Path, own_valkey: Server) -> None:
    """With free slots there every job runs in its region; once its link passes nothing on, elsewhere."""
    async with clouds(tmp_path, own_valkey, delay_s=0.02) as at:
        for region in REGIONS:
            assert await _served(at, region, 4) == {region: 4}
        at.links["ap"].silence()
        assert not await _served(at, "ap") & Counter(ap=1)


async def test_keys_are_rotated_and_revoked_while_requests_run(tmp_path: Path, own_valkey: Server) -> None:
    """While two keys are accepted a worker is replaced by one with the new key. A worker whose key is revoked has lost
    its jobs to others within two leases. No request fails."""
    async with clouds(tmp_path, own_valkey, delay_s=0.02) as at:
        keys = {region: [f"key of {region}"] for region in REGIONS}
        loads = [Load(router.url, 200, 8) for router in at.routers.values()]
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(load.run()) for load in loads]
            await loads[0].reached(0.1)
            at.allow(keys | {"eu": ["key of eu", "its new key"]})
            at.workers["eu"].process.send(signal.SIGTERM)
            assert await at.workers["eu"].ended() == 0
            at.workers["eu"] = await at.worker("eu", "its new key").start()
            at.allow(keys | {"eu": ["its new key"]})
            await eventually(lambda: _busy(at.workers["us"]), "it runs jobs", every_s=0.002)
            before = await _requeued(at)
            at.allow(keys | {"eu": ["its new key"], "us": []})
            began = time.monotonic()
            await eventually(lambda: _more(at, before), "its jobs run elsewhere", limit_s=3 * LEASE_S)
            lost_after = time.monotonic() - began
            assert not all(task.done() for task in running), "there was no load any more"
        assert [load.wrong for load in loads] == [[], [], []]
        assert lost_after < 2 * LEASE_S
        await at.fleet.until_served(2)
        assert await _served(at, "eu") == {"eu": 1}
        assert not await _served(at, "us") & Counter(us=1)


@pytest.mark.parametrize("kind", PROXIES)
async def test_both_sides_check_certificates(kind: str, tmp_path: Path, own_valkey: Server) -> None:
    """A worker sends its key to no proxy whose certificate is another authority's. The proxy lets none in without a
    client certificate of its workers' authority."""
    theirs, other = Certificates.make(tmp_path / "tls"), Certificates.make(tmp_path / "other")
    file = tmp_path / "workers.toml"
    file.write_text(f'[w]\nsha256 = ["{hashlib.sha256(b"key").hexdigest()}"]\nworkers = 9\n')
    env = {"INFERQ_JOIN_TOKEN": "the fleet's"}
    async with Fleet(tmp_path, own_valkey, router={"worker_credentials_file": file}, env=env) as fleet:
        fleet.session.headers["x-inferq-join-token"] = "the fleet's"
        await asyncio.gather(fleet.manager.start(), fleet.router.start())
        with (
            tls_before([fleet.router.port], kind, tmp_path, theirs, clients_ca=theirs.ca) as port,
            fleet.having({"INFERQ_JOIN_TOKEN": ""}),
        ):
            common = {"key": "key", "manager_url": f"https://127.0.0.1:{port}"}
            mistrusts = fleet.worker("w.1", tls_ca_file=other.ca, tls_cert_file=theirs.of_client("w1"), **common)
            bare = fleet.worker("w.2", tls_ca_file=theirs.ca, **common)
            stranger = fleet.worker("w.3", tls_ca_file=theirs.ca, tls_cert_file=other.of_client("w3"), **common)
            welcome = fleet.worker("w.4", tls_ca_file=theirs.ca, tls_cert_file=theirs.of_client("w4"), **common)
            for role in (mistrusts, bare, stranger, welcome):
                role.process.start()
            await welcome.ready()
            await fleet.until_served(1)
            said = {mistrusts: "CERTIFICATE_VERIFY_FAILED", bare: _BARE[kind], stranger: _STRANGER[kind]}
            for role, why in said.items():
                await eventually(partial(_says, role, why), f"{role.name} says {why}")
            known = (await fleet.router.page("/fabric/v1/workers"))["workers"]
            assert [worker["worker_id"] for worker in known] == ["w.4"]


def _says(role: Role, what: str) -> bool:
    return what in role.process.log_text()


_BARE = {"nginx": "No required SSL certificate was sent", "haproxy": "ALERT_CERTIFICATE_REQUIRED"}
_STRANGER = {"nginx": "The SSL certificate error", "haproxy": "ALERT_DECRYPT_ERROR"}


async def _connected(at: Clouds, ended: asyncio.Event) -> dict[str, set[int]]:
    """With which ports each worker was connected, looked at again and again."""
    found: dict[str, set[int]] = {region: set() for region in at.workers}
    while not ended.is_set():
        for region, worker in at.workers.items():
            listening, others = connections_of(worker.process.pid)
            found[region] |= others - listening
        await asyncio.sleep(0.05)
    return found


async def _reset(links: list[FaultProxy], ended: asyncio.Event) -> int:
    """Break all connections of one link or another, again and again; how often."""
    drawn, times = random.Random(7), 0
    while not ended.is_set():
        await asyncio.sleep(drawn.uniform(0.3, 0.6))
        link = drawn.choice(links)
        link.cut()
        link.heal()
        times += 1
    return times


async def _busy(worker: Role) -> bool:
    return bool((await worker.page("/status"))["running"])


async def _requeued(at: Clouds) -> int:
    """How many attempts were lost or handed back so far."""
    totals = at.fleet.server.ask("HGETALL", ShardKeys(0).counters)
    return sum(int(count) for name, count in totals.items() if name.endswith((b":requeued", b":lost")))


async def _more(at: Clouds, before: int) -> bool:
    return await _requeued(at) > before


async def _done(at: Clouds) -> Counter[str]:
    """How many requests each region's worker has answered."""
    pages = {region: (await worker.metrics()) for region, worker in at.workers.items()}
    return Counter({region: int(sum(map(float, _DONE.findall(page)))) for region, page in pages.items()})


_DONE = re.compile(r'^inferq_attempts_total\{.*outcome="done".*\} (\S+)$', re.MULTILINE)


async def _nothing_counted(at: Clouds) -> bool:
    """Whether workers have counted what they answered before."""
    before = await _done(at)
    await asyncio.sleep(0.3)
    return before == await _done(at)


async def _served(at: Clouds, region: str, times: int = 1) -> Counter[str]:
    """Whose workers answer requests at a region's Router."""
    await eventually(lambda: _nothing_counted(at), "what ran before is counted")
    before = await _done(at)
    for _ in range(times):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        async with at.fleet.session.post(f"{at.routers[region].url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def counted() -> Counter[str]:
        found = await _done(at) - before
        return found if found.total() >= times else Counter()

    return await eventually(counted, "workers count what they answered")
