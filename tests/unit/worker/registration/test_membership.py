"""Membership: registering, heartbeats, and coming back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from queue_schemas import (
    Assignment,
    AuthenticationFailed,
    Heartbeat,
    HeartbeatAnswer,
    ManagerUnavailable,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
    WorkerStatus,
)
from telemetry import MetricsRegistry
from telemetry.backoff import Backoff
from tests.support.waiting import eventually
from worker.metrics import WorkerMetrics
from worker.registration import membership as module
from worker.registration.manager_client import ManagerClient
from worker.registration.membership import Membership

SESSION_ID = "w1.0123456789abcdef"


class ScriptedManager:
    """Answers calls from a script: an exception is raised, anything else means yes."""

    def __init__(self, registrations: list[Exception | None], heartbeats: list[Exception | bool | None]) -> None:
        self.registrations = registrations
        self.heartbeats = heartbeats
        self.registered: list[Registration] = []
        self.received: list[Heartbeat] = []
        self.turns = 0
        self.places = ["http://manager"]

    @property
    def url(self) -> str:
        return self.places[0]

    @property
    def urls(self) -> frozenset[str]:
        return frozenset(self.places)

    def turn(self) -> None:
        self.turns += 1
        self.places.append(self.places.pop(0))

    async def register(self, registration: Registration) -> RegistrationAnswer:
        self.registered.append(registration)
        answer = self.registrations.pop(0) if self.registrations else None
        if answer is not None:
            raise answer
        assignment = Assignment(term=1, version=len(self.registered))
        return RegistrationAnswer(
            broker_url="redis://r", shards=1, lease_ms=15_000, heartbeat_interval_ms=100, assignment=assignment
        )

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        self.received.append(heartbeat)
        answer = self.heartbeats.pop(0) if self.heartbeats else None
        if isinstance(answer, Exception):
            raise answer
        return HeartbeatAnswer(assignment=Assignment(term=1, version=100), drain=answer is True)

    async def deregister(self, worker_id: str, session_id: SessionId) -> None: ...


class Scene:
    def __init__(self, manager: ScriptedManager) -> None:
        self.manager = manager
        self.assigned: list[int] = []
        self.drained = 0
        self.membership = Membership(
            cast(ManagerClient, manager),
            "w1",
            url="http://w1",
            region="",
            loadable=(),
            metrics=WorkerMetrics(MetricsRegistry("worker")),
            status=lambda: WorkerStatus(session_id=SESSION_ID, slots=4, running=2),
            assigned=self._assign,
            drain=self._drain,
        )

    def _drain(self) -> None:
        self.drained += 1

    def _assign(self, assignment: Assignment, *, registered: bool) -> None:
        self.assigned.append(assignment.version)

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        await self.membership.register(first=True)
        task = asyncio.create_task(self.membership.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TAKEN_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(module, "_CONNECTION_BACKOFF", Backoff(0.015, 15.0))
    monkeypatch.setattr(module, "_MIN_GAP_S", 0.01)


def scene(registrations: list[Any] | None = None, heartbeats: list[Any] | None = None) -> Scene:
    return Scene(ScriptedManager(registrations or [], heartbeats or []))


async def test_it_tries_all_urls_until_a_manager_accepts() -> None:
    """Nobody there: the next URL, for as long as it takes."""
    one = scene([ManagerUnavailable("no")] * 3)
    await one.membership.register(first=True)
    assert one.manager.turns == 3
    assert one.assigned == [4]
    assert one.membership.registered


async def test_a_taken_id_is_given_up_with_a_sentence() -> None:
    """A few tries for a predecessor that is about to be found dead, then an error that says what to do."""
    one = scene([WorkerIdTaken("alive")] * 3)
    await one.membership.register(first=True)
    two = scene([WorkerIdTaken("alive")] * 50)
    with pytest.raises(WorkerIdTaken, match="another --worker-id"):
        await two.membership.register(first=True)
    assert len(two.manager.registered) == 7


async def test_a_wrong_token_is_fatal_at_first_and_waited_out_later() -> None:
    """At the start nobody will mend it; a running worker outlives a Manager that is set up wrongly for a while."""
    with pytest.raises(AuthenticationFailed):
        await scene([AuthenticationFailed("wrong")]).membership.register(first=True)
    await scene([AuthenticationFailed("wrong")]).membership.register(first=False)


async def test_a_start_ends_only_when_every_url_was_tried() -> None:
    """One of two Managers refuses the token: the other is asked before the start is given up."""
    one = scene([AuthenticationFailed("wrong")])
    one.manager.places.append("http://other")
    await one.membership.register(first=True)
    assert one.membership.registered
    two = scene([AuthenticationFailed("wrong"), AuthenticationFailed("wrong here, too")])
    two.manager.places.append("http://other")
    with pytest.raises(AuthenticationFailed):
        await two.membership.register(first=True)


async def test_a_start_waits_for_a_manager_behind_a_router_that_refuses() -> None:
    """[A1] A Router with API keys and no join token refuses workers: one that may also ask the Manager waits for it."""
    one = scene([AuthenticationFailed("no token here"), ManagerUnavailable("away"), AuthenticationFailed("no"), None])
    one.manager.places.append("http://other")
    await one.membership.register(first=True)
    assert one.membership.registered


async def test_answers_that_make_no_sense_end_nothing() -> None:
    """A Manager that answers a heartbeat with "taken", and a registration with "unknown", is left for the next."""
    one = scene([None, UnknownWorker("who"), None], [WorkerIdTaken("no")])
    async with one.beating():
        await eventually(lambda: len(one.manager.registered) == 3 and one.membership.registered, "it is back")
    assert one.manager.turns == 2


async def test_each_reason_is_logged_once() -> None:
    """Two URLs that take turns at failing do not fill the log."""
    one = scene([ManagerUnavailable("frozen"), ManagerUnavailable("standing by")] * 4)
    with capture_logs() as lines:
        await one.membership.register(first=True)
    assert [line["reason"] for line in lines if "reason" in line] == ["frozen", "standing by"]


async def test_an_unknown_worker_registers_again_as_the_same_incarnation() -> None:
    """A Manager that forgot us hears the same session id, with what runs: nothing is dropped."""
    one = scene(heartbeats=[None, UnknownWorker("who")])
    async with one.beating():
        await eventually(lambda: len(one.manager.registered) == 2, "it registers again")
    assert {r.session_id for r in one.manager.registered} == {SESSION_ID}
    assert one.manager.registered[1].running == 2
    assert one.manager.turns == 0


async def test_a_manager_that_does_not_answer_is_left_for_the_next() -> None:
    """A lost heartbeat turns to the next URL and registers there."""
    one = scene(heartbeats=[ManagerUnavailable("gone")])
    async with one.beating():
        await eventually(lambda: len(one.manager.registered) == 2, "it registers again")
        await eventually(lambda: one.membership.registered, "it is registered again")
    assert one.manager.turns == 1


async def test_heartbeats_bring_assignments_and_drains() -> None:
    """What the answer says is handed on."""
    one = scene(heartbeats=[True])
    async with one.beating():
        await eventually(lambda: one.drained, "it is told to drain")
    assert 100 in one.assigned


async def test_a_change_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat does not wait for its time when there is news."""
    one = scene()
    await one.membership.register(first=True)
    one.membership._heartbeat_s = 60
    task = asyncio.create_task(one.membership.run())
    one.membership.notify()
    await eventually(lambda: one.manager.received, "the change is reported")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
