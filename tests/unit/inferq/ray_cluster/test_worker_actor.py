"""The actor that keeps a worker's process running, outside any cluster."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.waiting import eventually

pytest.importorskip("ray")

from inferq.ray_cluster import workers
from inferq.ray_cluster.workers import LastWords, WorkerActor, listening_args


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors that were killed: each ends itself once its worker has."""
    gone: list[Any] = []
    monkeypatch.setattr(workers.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="itself"))
    monkeypatch.setattr(workers.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(workers.ray, "kill", lambda actor, no_restart: gone.append((actor, no_restart)))
    return gone


async def test_a_worker_that_refuses_to_start_is_not_tried_again_and_its_reason_is_kept(killed: list[Any]) -> None:
    """In its own words; and a stop then ends the actor, as there is nobody to drain."""
    actor = WorkerActor(["--model", "m", "--port", "0", "--vllm-command", "/not/there"], {})
    await eventually(lambda: not actor.state()[0], "it gives up", limit_s=30)
    assert actor.state()[1].startswith("there is no executable /not/there: correct --vllm-command")
    assert killed == []
    actor.stop()
    assert killed == [("itself", True)]


async def test_a_worker_that_is_stopped_takes_its_actor_along(killed: list[Any]) -> None:
    """Its resources are free at once."""
    args = ["--engine", "sim", "--port", "0", "--manager-url", "http://127.0.0.1:9"]
    actor = WorkerActor(args, {"INFERQ_JOIN_TOKEN": "secret"})
    await eventually(lambda: actor.state()[0], "it runs")
    actor.stop()
    await eventually(lambda: killed == [("itself", True)], "the actor ends", limit_s=30)


def test_the_last_words_are_the_last_line_that_is_no_log_record(capsys: pytest.CaptureFixture[str]) -> None:
    """All lines are passed on."""
    said = (
        b'inferq: the first\n{"event": "record"}\nTraceback (most recent call last):\n  File "x"\nValueError: bad\n{}\n'
    )
    assert LastWords(io.BytesIO(said)).read() == "ValueError: bad"
    assert capsys.readouterr().err == said.decode()


@pytest.mark.parametrize(
    ("args", "address", "token", "added"),
    [
        ([], "10.0.0.2", "secret", ["--host", "10.0.0.2"]),
        ([], "10.0.0.2", "", []),
        ([], "127.0.0.1", "secret", []),
        (["--host=0.0.0.0"], "10.0.0.2", "secret", []),
    ],
)
def test_a_worker_is_reachable_where_a_token_guards_it(
    args: list[str], address: str, token: str, added: list[str]
) -> None:
    """At its node's address, so that its end is found at once; elsewhere it stays on loopback, and its lease tells."""
    assert listening_args(args, address, {"INFERQ_JOIN_TOKEN": token}) == added
