"""One listening socket for several processes: found, shared, inherited from the dead, and refused to outsiders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_schemas import CannotStart
from router.http import shared_listener as module
from router.http.shared_listener import SharedListener
from telemetry.environment import free_port
from tests.support.processes import Child
from tests.support.sockets import listeners

HOST = "127.0.0.1"
_HOLDER = """
import asyncio, sys
from pathlib import Path
from router.http.shared_listener import SharedListener

async def hold():
    async with SharedListener(sys.argv[1], "127.0.0.1", int(sys.argv[2]), folder=Path(sys.argv[3])):
        Path(sys.argv[4]).touch()
        await asyncio.sleep(60)

asyncio.run(hold())
"""


@contextlib.contextmanager
def holder(tmp_path: Path, fabric: str, port: int, folder: Path) -> Iterator[Child]:
    """Another process that shares the listener and accepts nothing."""
    held = tmp_path / "held"
    child = Child("holder", [sys.executable, "-c", _HOLDER, fabric, port, folder, held], tmp_path / "holder.log")
    child.start()
    try:
        child.until(held.exists, 20)
        yield child
    finally:
        child.kill()


async def accept_one(shared: SharedListener) -> socket.socket:
    async with asyncio.timeout(5):
        accepted, _ = await asyncio.get_running_loop().sock_accept(shared.listener)
    return accepted


async def test_a_killed_holders_waiting_connections_are_served_by_the_other(tmp_path: Path) -> None:
    """Two processes share one socket. The one that bound it is killed: its port stays open, and connections that
    waited while both were there are accepted by the other."""
    port, folder = free_port(), tmp_path / "listeners"
    with holder(tmp_path, "f", port, folder) as other:
        async with SharedListener("f", HOST, port, folder=folder) as shared:
            assert shared.listener.getsockname() == (HOST, port)
            assert port in listeners(other.pid)
            with socket.create_connection((HOST, port), 5) as before:
                other.kill()
                with socket.create_connection((HOST, port), 5) as after, await accept_one(shared) as first:
                    assert first.getpeername() == before.getsockname()
                    with await accept_one(shared) as second:
                        assert second.getpeername() == after.getsockname()


async def test_sharing_the_socket_does_not_make_it_blocking(tmp_path: Path) -> None:
    """Whether a socket blocks is one flag of all who share it: the second's arrival must not stop the first's loop."""
    port = free_port()
    async with (
        SharedListener("f", HOST, port, folder=tmp_path / "d") as first,
        SharedListener("f", HOST, port, folder=tmp_path / "d"),
    ):
        assert os.get_blocking(first.listener.fileno()) is False


async def test_a_leaving_router_does_not_close_the_socket_of_others(tmp_path: Path) -> None:
    """The one that bound the port leaves; the port is open as long as one is there, and free afterwards."""
    port = free_port()
    first, second = (
        SharedListener("f", HOST, port, folder=tmp_path / "d"),
        SharedListener("f", HOST, port, folder=tmp_path / "d"),
    )
    async with first:
        await second.__aenter__()
    with socket.create_connection((HOST, port), 5), await accept_one(second):
        pass
    await second.__aexit__(None, None, None)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), 5)
    async with SharedListener("f", HOST, port, folder=tmp_path / "d"):
        pass


async def test_a_closed_listener_is_not_handed_over_but_still_accepts(tmp_path: Path) -> None:
    """After ``close`` the socket is not handed over, and ``listener`` stays open for the server that uses it."""
    port, folder = free_port(), tmp_path / "listeners"
    async with SharedListener("f", HOST, port, folder=folder) as shared:
        shared.close()
        shared.close()
        assert [path.name for path in folder.iterdir()] == [f"f-{port}.lock"]
        with socket.create_connection((HOST, port), 5), await accept_one(shared):
            pass
        with pytest.raises(CannotStart, match="is taken by another process"):
            await SharedListener("f", HOST, port, folder=folder).__aenter__()


async def test_the_unix_socket_of_a_killed_router_is_removed(tmp_path: Path) -> None:
    """Its socket file leads nowhere: the next one removes it and binds the port."""
    port, folder = free_port(), tmp_path / "listeners"
    with holder(tmp_path, "f", port, folder) as other:
        other.kill()
    (left,) = folder.glob(f"f-{port}.*[!k]")
    async with SharedListener("f", HOST, port, folder=folder):
        assert not left.exists()


async def test_another_fabrics_port_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """The port of another Ray cluster's Routers is taken, as anybody's is."""
    port, folder = free_port(), tmp_path / "listeners"
    async with SharedListener("one", HOST, port, folder=folder):
        with pytest.raises(CannotStart, match=f"port {port} on {HOST} is taken by another process"):
            await SharedListener("two", HOST, port, folder=folder).__aenter__()


async def test_another_address_of_the_same_port_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """Who is to listen on another host is not handed a socket that listens where it was before."""
    port, folder = free_port(), tmp_path / "listeners"
    async with SharedListener("f", HOST, port, folder=folder):
        with pytest.raises(CannotStart, match=f"listen on {HOST}, port {port}, .* is configured for 127.0.0.2"):
            await SharedListener("f", "127.0.0.2", port, folder=folder).__aenter__()
        async with SharedListener("f", "localhost", port, folder=folder):
            pass


async def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """A folder that others may enter, or a link to one, could hand us anybody's socket."""
    folder = tmp_path / "listeners"
    folder.mkdir(mode=0o755)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for foreign in (folder, link):
        with pytest.raises(CannotStart, match="only this user can enter"):
            await SharedListener("f", HOST, free_port(), folder=foreign).__aenter__()


async def test_a_hanging_router_delays_the_next_one_without_stopping_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process that shares the listener answers nobody: another one is asked, within the limit."""
    monkeypatch.setattr(module, "HAND_OVER_TIMEOUT_S", 0.1)
    port, folder = free_port(), tmp_path / "listeners"
    with holder(tmp_path, "f", port, folder) as hung:
        async with SharedListener("f", HOST, port, folder=folder):
            hung.pause()
            async with SharedListener("f", HOST, port, folder=folder) as third:
                assert third.listener.getsockname() == (HOST, port)


async def test_waiting_for_the_lock_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the lock that a hanging Router holds, within the timeout."""
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    port, folder = free_port(), tmp_path / "listeners"
    async with SharedListener("f", HOST, port, folder=folder) as shared:
        with shared._locked(), pytest.raises(CannotStart, match=f"has been opening port {port}"):
            await SharedListener("f", HOST, port, folder=folder).__aenter__()
