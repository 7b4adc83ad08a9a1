"""What other programs are started with."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from telemetry import environment
from telemetry.environment import HeldPorts, free_port
from telemetry.http.server import bind_socket


def test_a_free_port_is_given_to_no_outgoing_connection() -> None:
    """[H51] It lies below the kernel's ephemeral ports, and the same is not given twice in a row."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(200)]
    assert max(ports) < first_ephemeral
    assert len(set(ports)) == len(ports)


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """[H51] The next candidate is tried."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        taken = server.getsockname()[1]
        other = free_port()
        environment._recent.clear()
        candidates = iter([taken, other])
        monkeypatch.setattr(environment.random, "randrange", lambda *_: next(candidates))
        assert free_port() == other


@pytest.mark.parametrize("text", ["", "garbage", "1024 60999"])
def test_without_a_known_range_any_free_port_will_do(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other systems have no such file, and a range may begin too low to leave room."""
    file = tmp_path / "range"
    file.write_text(text)
    monkeypatch.setattr(environment, "_EPHEMERAL_PORTS", file)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ports are not held")
def test_a_held_port_is_its_servers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """[H51] Nobody is given it meanwhile; a server of ours listens there, ends, and listens again."""
    with HeldPorts() as ports:
        held = ports.take()
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", held), 1)
            with bind_socket("127.0.0.1", held):
                socket.create_connection(("127.0.0.1", held), 1).close()
        other = ports.take()
        environment._recent.clear()
        candidates = iter([held, other, free := free_port()])
        monkeypatch.setattr(environment.random, "randrange", lambda *_: next(candidates))
        environment._recent.clear()
        with HeldPorts() as others:
            assert others.take() == free
    with socket.socket() as anybody:
        anybody.bind(("127.0.0.1", held))
