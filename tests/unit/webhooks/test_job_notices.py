"""Ends of background responses become events: each once, of the right kind, for tenants that want to know."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from openai_api.response_jobs import ResponseStatus
from queue_schemas import (
    BrokerUnavailable,
    FinishedJob,
    JobId,
    Lane,
    PersistedJob,
    Pool,
    State,
    StoreUnavailable,
    Tenant,
)
from storage import ObjectStore, StorageSettings
from telemetry import MetricsRegistry
from tests.support.waiting import eventually
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.job_notices import ResponseNotices
from webhooks.metrics import NotifierMetrics

ACME, RIVAL = Tenant("acme"), Tenant("rival")


class Queue:
    """Notices as the queue's server keeps them; each response ended as ``status`` says."""

    def __init__(self, *notices: FinishedJob, status: ResponseStatus = "completed") -> None:
        self.notices = list(notices)
        self.status = status
        self.asked: list[str] = []
        self.gone = False
        self.persisted_jobs = self.output = self

    async def read_finished(self, limit: int = 100) -> list[FinishedJob]:
        return self.notices[:limit]

    async def acknowledge_finished(self, notice_ids: list[str]) -> int:
        self.notices = [notice for notice in self.notices if notice.id not in notice_ids]
        return len(notice_ids)

    async def get(self, job_id: str) -> PersistedJob | None:
        return None if self.gone else kept(job_id)

    async def response_status(self, job_id: JobId, state: State) -> ResponseStatus:
        self.asked.append(job_id)
        return self.status


def kept(job_id: str) -> PersistedJob:
    return PersistedJob(
        id=JobId(job_id),
        tenant=ACME,
        model=Pool("m"),
        lane=Lane.BACKGROUND,
        state=State.DONE,
        epoch=1,
        attempts=1,
        now_ms=1,
        created_ms=1,
        deadline_ms=2,
    )


def notice(number: int, tenant: Tenant = ACME, *, state: State = State.DONE, word: str = "response") -> FinishedJob:
    return FinishedJob(f"0:{number}-0", JobId(f"0-{number:032x}"), tenant, state, word, 7_000 + number)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.store = ObjectStore.open(StorageSettings(url=str(folder)))
        self.ends = ResponseNotices(self.store, NotifierMetrics(MetricsRegistry("notifier")))

    def endpoint(self, *events: str) -> str:
        endpoint_id = new_endpoint_id(1)
        record = EndpointRecord(
            id=endpoint_id, tenant=ACME, url="u", events=events, created_at=1, updated_at=1, enabled_at_ms=1
        )
        EndpointStore(self.store).create(record, Secrets.fresh(1))
        return endpoint_id

    def told(self) -> list[tuple[str, str, int]]:
        deliveries = DeliveryStore(self.store)
        events = [deliveries.event(key) for key in deliveries.pending()]
        return [(event.type, event.object_id, event.created_at) for event in events if event is not None]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_an_end_is_an_event_and_its_notice_is_forgotten(bench: Bench) -> None:
    """The id and the time are the response's; the same notice again, after a crash, is the same event."""
    bench.endpoint("*")
    queue = Queue(notice(1), status="incomplete")
    assert await bench.ends.take(queue) == 1
    queue.notices = [notice(1)]
    assert await bench.ends.take(queue) == 1
    assert bench.told() == [("response.incomplete", f"resp_0-{1:032x}", 7)]
    assert queue.notices == []


async def test_without_subscribers_nothing_is_read_or_written(bench: Bench) -> None:
    """Tenants without endpoints, endpoints for other events, notices of other kinds: forgotten, without a trace."""
    bench.endpoint("response.failed")
    queue = Queue(notice(1, RIVAL), notice(2, word="other"), notice(3))
    await bench.ends.take(queue)
    assert (queue.notices, bench.told(), queue.asked) == ([], [], [notice(3).job_id])


async def test_a_deleted_response_is_not_reported_as_failed(bench: Bench) -> None:
    """Nothing is left of it to tell; one that was cancelled before says so all the same."""
    bench.endpoint("*")
    queue = Queue(notice(1), notice(2, state=State.CANCELLED), status="cancelled")
    queue.gone = True
    await bench.ends.take(queue)
    assert [told[0] for told in bench.told()] == ["response.cancelled"]


async def test_what_could_not_be_written_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails keeps the notice where it is, and those behind it; what was dealt with is forgotten."""
    bench.endpoint("*")
    queue = Queue(notice(1), notice(2), notice(3))
    emit, left = DeliveryStore.emit, [1]

    def failing(self: DeliveryStore, event: object) -> int:
        if not left[0]:
            raise StoreUnavailable("as ordered")
        left[0] -= 1
        return emit(self, event)  # type: ignore[arg-type]

    monkeypatch.setattr(DeliveryStore, "emit", failing)
    with pytest.raises(StoreUnavailable):
        await bench.ends.take(queue)
    assert [one.id for one in queue.notices] == [notice(2).id, notice(3).id]
    monkeypatch.undo()
    await bench.ends.take(queue)
    assert len(bench.told()) == 3


async def test_endpoints_are_asked_for_once_a_look(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is not asked for each of a hundred responses; a new endpoint hears of the very next one."""
    asked: list[Tenant] = []
    of = EndpointStore.of
    monkeypatch.setattr(EndpointStore, "of", lambda self, tenant: asked.append(tenant) or of(self, tenant))
    queue = Queue(notice(1), notice(2))
    await bench.ends.take(queue)
    assert asked == [ACME]
    bench.endpoint("*")
    queue.notices = [notice(3)]
    await bench.ends.take(queue)
    assert [told[1] for told in bench.told()] == [f"resp_0-{3:032x}"]


async def test_a_tenant_that_can_have_no_endpoints_holds_up_nobody(bench: Bench) -> None:
    """Its name is too long for the store: its notice is passed over, those behind it are taken."""
    bench.endpoint("*")
    queue = Queue(notice(1, Tenant("x" * 250)), notice(2))
    assert await bench.ends.take(queue) == 2
    assert [told[1] for told in bench.told()] == [f"resp_0-{2:032x}"]
    assert queue.notices == []


async def test_a_queue_that_is_away_is_asked_again(bench: Bench) -> None:
    """And says so meanwhile."""
    bench.endpoint("*")

    class Away(Queue):
        failures = 2

        async def read_finished(self, limit: int = 100) -> list[FinishedJob]:
            if self.failures:
                self.failures -= 1
                raise BrokerUnavailable("Redis is away")
            assert bench.ends.fault == "Redis is away"
            return await super().read_finished(limit)

    queue = Away(notice(1))
    running = asyncio.create_task(bench.ends.run(lambda: queue, 0.01))
    await eventually(bench.told, "the end is told")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
