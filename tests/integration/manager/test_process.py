"""The Manager as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from broker import Broker
from telemetry.environment import free_port
from tests.support.processes import Child, answers, role_starter
from tests.support.servers import Server

Start = Callable[..., Child]
FAST = ("--leader-lease-ms", "600", "--sweep-interval-ms", "50", "--lease-ms", "1000")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``python -m manager.service`` with these flags, in a folder of its own."""
    with role_starter("manager.service", tmp_path) as start:
        yield start


def _register(port: int, worker_id: str = "w") -> httpx.Response:
    body = {"worker_id": worker_id, "session_id": f"{worker_id}.0000000000000001", "models": ["m"], "slots": 1}
    return httpx.post(f"http://127.0.0.1:{port}/fabric/v1/workers", json=body, timeout=5)


def test_without_redis_it_brings_its_own(start: Start, tmp_path: Path) -> None:
    """The embedded server starts, a worker registers and is told its address, though no password without a join token;
    after a restart it is still known."""
    port = free_port()
    manager = start("--port", str(port), *FAST)
    manager.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)
    answer = _register(port)
    assert answer.status_code == 200
    assert answer.json()["broker_url"].startswith("redis://127.0.0.1:")
    workers = f"http://127.0.0.1:{port}/fabric/v1/workers"
    assert manager.terminate() == 0
    again = start("--port", str(port), *FAST)
    again.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)
    assert [worker["worker_id"] for worker in httpx.get(workers).json()["workers"]] == ["w"]
    assert (tmp_path / ".inferq" / "valkey").is_dir()
    assert again.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly(start: Start, valkey: Server, broker: Broker, number: signal.Signals) -> None:
    """Exit code 0, the acting lease handed back at once, every line of the log JSON with its role."""
    port = free_port()
    manager = start("--port", str(port), "--redis-url", valkey.url)
    manager.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)
    manager.send(number)
    assert manager.wait(15) == 0
    assert await broker.fleet.acquire_leader_lease("other", 1_000) is not None
    lines = [json.loads(line) for line in manager.log_text().splitlines()]
    assert {line["role"] for line in lines} == {"manager"}


def test_a_killed_manager_is_replaced_when_its_lease_ran_out(start: Start, valkey: Server) -> None:
    """After a kill -9 the next one waits out the lease, then knows the fleet."""
    port, other_port = free_port(), free_port()
    manager = start("--port", str(port), "--redis-url", valkey.url, *FAST)
    manager.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)
    _register(port)
    manager.until(lambda: bool(valkey.ask("HLEN", "iq:workers")), 10)
    manager.kill()
    other = start("--port", str(other_port), "--redis-url", valkey.url, *FAST)
    other.until(lambda: answers(f"http://127.0.0.1:{other_port}/readyz"), 30)
    listed = httpx.get(f"http://127.0.0.1:{other_port}/fabric/v1/workers").json()
    assert [worker["worker_id"] for worker in listed["workers"]] == ["w"]
    assert listed["term"] == 2


def test_started_before_redis_it_waits(start: Start, own_valkey: Server) -> None:
    """It is alive and says what is missing; when Redis comes it is ready."""
    own_valkey.kill()
    port = free_port()
    manager = start("--port", str(port), "--redis-url", own_valkey.url)

    def says_why() -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2)
        except httpx.TransportError:
            return False
        return answer.status_code == 503 and "cannot be reached" in answer.json()["reasons"][0]

    manager.until(says_why, 30)
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert _register(port).status_code == 503
    own_valkey.start()
    manager.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)


def test_what_cannot_work_is_refused_in_a_sentence(start: Start, valkey: Server, tmp_path: Path) -> None:
    """A taken port, a public address without a token, a wrong file, a wrong value: exit code 2 and one line."""
    url = ("--redis-url", valkey.url)
    everywhere = "0.0.0.0"  # noqa: S104 - refused before it is bound
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[manager]\nprot = 1\n")
    for child, sentence in (
        (start("--port", str(valkey.port), *url), f"port {valkey.port} on 127.0.0.1 is taken by another process"),
        (start("--host", everywhere, *url), f"refusing to listen on {everywhere}"),
        (start(*url, INFERQ_CONFIG=str(wrong)), "unknown setting in [manager] prot"),
        (start("--port", "x", *url), "the settings of manager are wrong: port"),
        (start("--port", "0", "--redis-url", "http://nowhere"), "inferq: "),
    ):
        assert child.wait(30) == 2, child.log_tail()
        last = child.log_text().splitlines()[-1]
        assert sentence in last, child.log_tail()
        assert "Traceback" not in child.log_text()
        assert '"listening"' not in child.log_text()


def test_a_redis_that_refuses_the_password_ends_it(start: Start, own_valkey: Server) -> None:
    """A wrong password is not waited for: exit code 2 and where to look."""
    own_valkey.ask("CONFIG", "SET", "requirepass", "right")
    wrong = own_valkey.url.replace("redis://", "redis://:wrong@")
    manager = start("--port", "0", "--redis-url", wrong)
    assert manager.wait(30) == 2, manager.log_tail()
    assert "check the user and password in INFERQ_REDIS_URL" in manager.log_text().splitlines()[-1]


def test_a_public_address_with_a_token_is_served(start: Start, valkey: Server) -> None:
    """With a join token every address may be bound, and workers must show it."""
    port = free_port()
    everywhere = "0.0.0.0"  # noqa: S104 - what is tested
    manager = start("--host", everywhere, "--port", str(port), "--redis-url", valkey.url, INFERQ_JOIN_TOKEN="t0ken")
    manager.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 30)
    assert _register(port).status_code == 401
