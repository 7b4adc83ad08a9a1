"""Several Router processes on one port: who serves whom, what a kill takes along, how they end, what is counted."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from telemetry.environment import free_port
from tests.support.fleet import MODEL, Fleet
from tests.support.processes import Child, answers, is_alive, role_starter
from tests.support.servers import Server
from tests.support.sse import read_data
from tests.support.waiting import eventually

CHAT_PATH = "/v1/chat/completions"
WORDS = 200
"""Of a long stream: about a second."""


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def holders(pids: list[int], port: int) -> dict[int, int]:
    """Which of ``pids`` holds the server's end of a connection to ``port``, by the client's port."""
    inodes = {}
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        columns = row.split()
        local, remote = (int(address.rpartition(":")[2], 16) for address in columns[1:3])
        if local == port and remote:
            inodes[f"socket:[{columns[9]}]"] = remote
    found = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            if target in inodes:
                found[inodes[target]] = pid
    return found


@dataclass
class Client:
    """A client with one connection, which stays open. ``ended`` says how its streams ended: whole, error or broken."""

    url: str
    session: aiohttp.ClientSession
    port: int = 0
    ended: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, words: int) -> None:
        text = " ".join(f"w{number}" for number in range(words))
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]}
        said = ""
        try:
            async with self.session.post(self.url + CHAT_PATH, json=body) as answer:
                assert answer.status == 200, await answer.text()
                if answer.connection is not None and answer.connection.transport is not None:  # not whole yet
                    self.port = answer.connection.transport.get_extra_info("sockname")[1]
                async for data in read_data(answer):
                    self.begun.set()
                    if data == "[DONE]":
                        self.ended.append("whole" if said == text else f"wrong: {said}")
                        return
                    event = json.loads(data)
                    if "error" in event:
                        self.ended.append("error")
                        return
                    said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        except (aiohttp.ClientError, ConnectionError):
            pass
        self.ended.append("broken")


@asynccontextmanager
async def clients(url: str, count: int) -> AsyncIterator[list[Client]]:
    """So many clients, each with a connection of its own."""
    sessions = [aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) for _ in range(count)]
    try:
        yield [Client(url, session) for session in sessions]
    finally:
        for session in sessions:
            await session.close()


@asynccontextmanager
async def fleet_of(
    folder: Path, valkey: Server, processes: int, *, tokens_per_s: int = 400, **router: object
) -> AsyncIterator[Fleet]:
    async with Fleet(folder, valkey, router={"processes": processes} | router) as fleet:
        await fleet.up(slots=64, sim_tokens_per_s=tokens_per_s)
        await all_accept(fleet, processes)
        yield fleet


async def all_accept(fleet: Fleet, processes: int, limit_s: float = 10.0) -> None:
    async def counted() -> bool:
        return await sample(fleet, "inferq_router_processes ") == processes

    await eventually(counted, f"{processes} processes accept", limit_s=limit_s)


async def sample(fleet: Fleet, begin: str) -> float:
    """The sum of the samples that begin so."""
    text = await fleet.router.metrics()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(begin))


ANSWERED = f'inferq_requests_total{{code="200",path="{CHAT_PATH}"'


async def test_all_processes_serve_and_any_of_them_shows_the_metrics_of_all(tmp_path: Path, valkey: Server) -> None:
    """Connections that come at once are dealt evenly; whichever process is asked counts what all have served and have
    open, and how many of them accept."""
    async with fleet_of(tmp_path, valkey, 3, tokens_per_s=20) as fleet, clients(fleet.router.url, 48) as asking:
        pids = children(fleet.router.process.pid)
        assert len(pids) == 3
        streams = [asyncio.ensure_future(client.stream(WORDS)) for client in asking]  # of ten seconds
        await asyncio.gather(*(client.begun.wait() for client in asking))
        serving = holders(pids, fleet.router.port)
        shares = Counter(serving[client.port] for client in asking)
        assert len(shares) == 3, shares
        assert min(shares.values()) >= 8, shares
        assert (await fleet.router.page("/load"))["server_load"] == 48
        assert await sample(fleet, "inferq_open_requests ") == 48
        await asyncio.gather(*streams)
        assert [client.ended for client in asking] == [["whole"]] * 48
        # Each of many connections of its own reaches some process.
        counted = []
        for _ in range(12):
            async with aiohttp.ClientSession() as session, session.get(f"{fleet.router.url}/metrics") as answer:
                text = await answer.text()
            counted += [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(ANSWERED)]
            assert len(re.findall(r"^inferq_ttft_seconds_count", text, re.MULTILINE)) == 1
        assert counted == [48] * 12


async def test_a_killed_process_takes_along_only_its_own_connections(tmp_path: Path, valkey: Server) -> None:
    """kill -9 of one of three processes under streams: the streams of the others are whole, clients of the killed one
    are served again at once, a successor accepts within a second, and what the dead one had counted stays counted."""
    async with fleet_of(tmp_path, valkey, 3, tokens_per_s=40) as fleet, clients(fleet.router.url, 24) as asking:
        pids = children(fleet.router.process.pid)
        await asyncio.gather(*(client.stream(1) for client in asking))
        before = await sample(fleet, ANSWERED)
        assert before == 24
        streams = [asyncio.ensure_future(client.stream(WORDS)) for client in asking]
        for client in asking:
            client.begun.clear()
        await asyncio.gather(*(client.begun.wait() for client in asking))
        serving = holders(pids, fleet.router.port)
        victim = serving[asking[0].port]
        os.kill(victim, signal.SIGKILL)
        killed_s = asyncio.get_running_loop().time()
        again = asking[0]
        await streams[0]
        await again.stream(1)  # its connection broke: another process takes the next at once
        assert again.ended == ["whole", "broken", "whole"]
        await all_accept(fleet, 3, limit_s=5.0)
        took_s = asyncio.get_running_loop().time() - killed_s
        assert took_s < 3.0, f"{took_s:.1f} s until all accept again"
        await asyncio.gather(*streams)
        for client in asking[1:]:
            hit = serving[client.port] == victim
            assert client.ended == ["whole", "broken" if hit else "whole"], (client, hit)
        survivors = sum(client.ended == ["whole", "whole"] for client in asking)
        assert survivors >= 8
        now_pids = children(fleet.router.process.pid)
        assert victim not in now_pids
        assert len(now_pids) == 3
        # The dead one's answers of before are still in the sum, beside those of the streams that ended after.
        assert await sample(fleet, ANSWERED) >= before + survivors + 1
        assert await sample(fleet, "inferq_router_process_restarts_total") == 1


async def test_a_signal_to_all_of_them_drains_each(tmp_path: Path, valkey: Server) -> None:
    """SIGTERM for the whole group, as a service manager or a terminal sends it: every process lets its streams finish,
    the Router ends with code 0 and nothing of it stays."""
    async with fleet_of(tmp_path, valkey, 2, tokens_per_s=40) as fleet, clients(fleet.router.url, 12) as asking:
        pids = children(fleet.router.process.pid)
        streams = [asyncio.ensure_future(client.stream(WORDS)) for client in asking]
        await asyncio.gather(*(client.begun.wait() for client in asking))
        assert set(holders(pids, fleet.router.port).values()) >= set(pids)
        os.killpg(fleet.router.process.pid, signal.SIGTERM)
        await asyncio.gather(*streams)
        assert [client.ended for client in asking] == [["whole"]] * 12
        assert await fleet.router.ended() == 0
        assert not any(map(is_alive, pids))
        assert await fleet.router.get("/healthz") == (0, b"")


async def test_a_second_signal_hurries_all_of_them(tmp_path: Path, valkey: Server) -> None:
    """Told twice, every process ends its streams with an error at once."""
    async with fleet_of(tmp_path, valkey, 2) as fleet, clients(fleet.router.url, 8) as asking:
        streams = [asyncio.ensure_future(client.stream(40 * WORDS)) for client in asking]
        await asyncio.gather(*(client.begun.wait() for client in asking))
        fleet.router.process.send(signal.SIGTERM)
        await eventually(lambda: fleet.router.process.log_text().count('"draining"') == 2, "both drain")
        fleet.router.process.send(signal.SIGTERM)
        await asyncio.gather(*streams)
        assert [client.ended for client in asking] == [["error"]] * 8
        assert await fleet.router.ended() == 0


async def test_no_process_outlives_its_parent(tmp_path: Path, valkey: Server) -> None:
    """A killed parent is a killed Router: connections break, and nobody holds the port, so that it can be started again
    at once."""
    async with fleet_of(tmp_path, valkey, 2) as fleet, clients(fleet.router.url, 8) as asking:
        pids = children(fleet.router.process.pid)
        streams = [asyncio.ensure_future(client.stream(40 * WORDS)) for client in asking]
        await asyncio.gather(*(client.begun.wait() for client in asking))
        fleet.router.process.kill()
        await asyncio.gather(*streams)
        assert [client.ended for client in asking] == [["broken"]] * 8
        await eventually(lambda: not any(map(is_alive, pids)), "all are gone", limit_s=5)
        await fleet.router.start()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    with role_starter("router.service", tmp_path) as start:
        yield start


def test_what_no_process_can_start_with_is_one_sentence(start: Callable[..., Child], own_valkey: Server) -> None:
    """A password that Redis refuses ends all processes, with code 2 and the reason said once."""
    own_valkey.ask("CONFIG", "SET", "requirepass", "right")
    child = start(
        "--processes", "3", "--port", "0", "--redis-url", own_valkey.url.replace("redis://", "redis://:wrong@")
    )
    assert child.wait(30) == 2, child.log_tail()
    said = [line for line in child.log_text().splitlines() if line.startswith("inferq: ")]
    assert len(said) == 1, said
    assert "check the user and password in INFERQ_REDIS_URL" in said[0]
    assert "Traceback" not in child.log_text()


def test_a_taken_port_is_refused_before_any_process_starts(start: Callable[..., Child], valkey: Server) -> None:
    """As with one process."""
    port = str(free_port())
    first = start("--processes", "2", "--port", port, "--redis-url", valkey.url)
    first.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 20)
    second = start("--processes", "2", "--port", port, "--redis-url", valkey.url)
    assert second.wait(20) == 2
    assert f"port {port}" in second.log_text()
