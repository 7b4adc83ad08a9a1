"""Calls to the Manager's Ray actor: unchanged, and to the actor that has its name now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from queue_schemas import RAY_MANAGER, RAY_NAMESPACE, AuthenticationFailed, CannotStart, ManagerUnavailable
from router.composition import open_manager
from router.fleet.manager_client import HttpManager
from router.fleet.ray_manager import RayManager
from telemetry.http.fabric_calls import FabricCall

CALL = FabricCall("POST", "/fabric/v1/workers", "a=b", "t0ken", b"{}", "req_1")
Answer = tuple[int, list[tuple[str, str]], bytes]


class Actor:
    """An actor's handle: ``answer.remote(...)`` is a call of ``act``."""

    def __init__(self, act: Callable[..., Awaitable[Answer]]) -> None:
        self.answer = self
        self.remote = act


class Cluster:
    """The names of a Ray cluster in memory."""

    def __init__(self) -> None:
        self.actor: Actor | None = None
        self.looked_up = 0

    def get_actor(self, name: str, namespace: str) -> Actor:
        assert (name, namespace) == (RAY_MANAGER, RAY_NAMESPACE)
        self.looked_up += 1
        if self.actor is None:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return self.actor


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_actor", made.get_actor)
    return made


def answering(status: int = 200, body: bytes = b"{}") -> Actor:
    async def act(*_call: Any) -> Answer:
        return status, [("Content-Type", "application/json"), ("x-request-id", "req_1"), ("Retry-After", "2")], body

    return Actor(act)


def failing(error: BaseException) -> Actor:
    async def act(*_call: Any) -> Answer:
        raise error

    return Actor(act)


def hanging() -> Actor:
    async def act(*_call: Any) -> Answer:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    return Actor(act)


async def test_a_call_reaches_the_actor_unchanged(cluster: Cluster) -> None:
    """Method, path, query, body, token and request id; of the answer what concerns only the way is left out."""
    seen: list[Any] = []

    async def act(*call: Any) -> Answer:
        seen.append(call)
        return await answering(409, b"taken").remote()

    cluster.actor = Actor(act)
    answer = await RayManager(RAY_MANAGER, "", 1_000).forward(CALL)
    assert (answer.status, answer.body) == (409, b"taken")
    assert answer.headers == (("content-type", "application/json"), ("retry-after", "2"))
    assert seen == [("POST", "/fabric/v1/workers", "a=b", CALL.headers, b"{}")]
    assert ("x-inferq-join-token", "t0ken") in CALL.headers
    assert ("x-request-id", "req_1") in CALL.headers


async def test_the_actor_is_looked_up_once(cluster: Cluster) -> None:
    """Ray's control store is not asked for every call."""
    cluster.actor = answering()
    manager = RayManager(RAY_MANAGER, "", 1_000)
    for _ in range(3):
        await manager.forward(CALL)
    assert cluster.looked_up == 1


async def test_an_actor_that_was_replaced_is_found_again(cluster: Cluster) -> None:
    """The one that was known is dead for good: one call fails, the next one meets the new actor of that name."""
    cluster.actor = failing(ray.exceptions.ActorDiedError())
    manager = RayManager(RAY_MANAGER, "", 1_000)
    with pytest.raises(ManagerUnavailable, match="ray:manager cannot be reached"):
        await manager.forward(CALL)
    cluster.actor = answering()
    assert (await manager.forward(CALL)).status == 200


@pytest.mark.parametrize("actor", [hanging(), failing(ray.exceptions.ActorUnavailableError("x", None)), None])
async def test_an_actor_that_does_not_answer_is_unavailable(cluster: Cluster, actor: Actor | None) -> None:
    """StreamStall beyond the limit, an actor that restarts, no actor at all: 503 that says when to come again."""
    cluster.actor = actor
    with pytest.raises(ManagerUnavailable, match=r"cannot be reached .*try again shortly") as raised:
        await RayManager(RAY_MANAGER, "", 50).forward(CALL)
    assert raised.value.retry_after_s == 2


async def test_it_returns_where_redis_is(cluster: Cluster) -> None:
    """As over HTTP: the address, a refused join token, an answer that is none."""
    manager = RayManager(RAY_MANAGER, "t0ken", 1_000)
    cluster.actor = answering(200, b'{"broker_url": "redis://here", "shards": 2}')
    assert (await manager.broker_address()).broker_url == "redis://here"
    for answer, error, words in (
        (answering(401), AuthenticationFailed, "refuses our join token"),
        (answering(503), ManagerUnavailable, "does not say where Redis is"),
        (answering(200, b"<html>"), ManagerUnavailable, "is not a Manager"),
    ):
        cluster.actor, again = answer, RayManager(RAY_MANAGER, "t0ken", 1_000)
        with pytest.raises(error, match=words):
            await again.broker_address()


def test_it_cannot_start_outside_of_ray() -> None:
    """A Router of its own process has no actors: the sentence says what to do instead."""
    with pytest.raises(
        CannotStart, match="this process is in none: use `inferq ray up`, or give the Manager's http://"
    ):
        open_manager("ray:manager", "", 1_000)


def test_the_setting_chooses_the_client(cluster: Cluster) -> None:
    """``ray:NAME`` is an actor, anything else must be a URL."""
    assert isinstance(open_manager("ray:manager", "", 1_000), RayManager)
    assert isinstance(open_manager("http://127.0.0.1:9000", "", 1_000), HttpManager)
    with pytest.raises(CannotStart, match="write it like http://localhost:9000, or ray:manager"):
        open_manager("manager", "", 1_000)
