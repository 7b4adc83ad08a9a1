"""The dispatcher over a real store and real sockets: everything arrives, in its time, whoever else hangs or dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_schemas import StoreUnavailable, Tenant
from storage import ObjectStore, StorageSettings
from telemetry import MetricsRegistry, render_metrics
from tests.support.receiver import HANG, Received, receiving, status
from tests.support.waiting import eventually
from webhooks.core import max_tries
from webhooks.core.url_rules import UrlRules
from webhooks.deliveries import DeliveryKey, DeliveryState
from webhooks.delivery_store import DeliveryStore
from webhooks.dispatcher import Dispatcher
from webhooks.endpoints import Disabled, EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import WebhookEvent
from webhooks.metrics import NotifierMetrics
from webhooks.sender import Sender
from webhooks.settings import NotifierSettings

ALICE = Tenant("alice")
SETTINGS = NotifierSettings(attempt_timeout_ms=400, scan_interval_ms=20, max_endpoint_pending=3, keep_deliveries=2)


class Bench:
    """A store, a clock that a test turns, and couriers over them."""

    def __init__(self, folder: Path) -> None:
        self.store = ObjectStore.open(StorageSettings(url=str(folder)))
        self.webhooks, self.deliveries = EndpointStore(self.store), DeliveryStore(self.store)
        self.now_s = 1_000.0
        self.metrics = MetricsRegistry("notifier")
        self.dispatcher = self.another(self.metrics)

    def another(self, metrics: MetricsRegistry | None = None, settings: NotifierSettings = SETTINGS) -> Dispatcher:
        sender = Sender(UrlRules.allowing(["127.0.0.0/8"], allow_http=True), settings.attempt_timeout_ms / 1000)
        figures = NotifierMetrics(metrics or MetricsRegistry("notifier"))
        return Dispatcher(self.store, sender, settings, figures, now_s=lambda: self.now_s)

    def endpoint(self, url: str, tenant: Tenant = ALICE) -> str:
        at_ms = int(self.now_s * 1000)
        record = EndpointRecord(
            id=new_endpoint_id(at_ms),
            tenant=tenant,
            url=url,
            events=("*",),
            created_at=1,
            updated_at=1,
            enabled_at_ms=at_ms,
        )
        self.webhooks.create(record, Secrets.fresh(at_ms))
        return record.id

    def emit(self, name: str = "batch_1", tenant: Tenant = ALICE) -> str:
        event = WebhookEvent.of(tenant, "batch.completed", name, int(self.now_s))
        assert self.deliveries.emit(event) > 0
        return event.id

    def log(self, endpoint_id: str) -> list[tuple[str, list[int | None]]]:
        page, _ = self.deliveries.page(ALICE, endpoint_id)
        return [(str(one.state.outcome), [attempt.status for attempt in one.state.attempts]) for one in page]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path / "store")


async def test_an_event_is_delivered_once_and_logged(bench: Bench) -> None:
    """Signed with the endpoint's secret; then nothing is pending any more."""
    async with receiving() as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)
        event_id = bench.emit()
        assert await bench.dispatcher.deliver(1.0) == 1
        assert await bench.dispatcher.deliver(1.0) == 0
    assert receiver.ids == [event_id]
    assert receiver.got[0].headers["webhook-timestamp"] == "1000"
    assert bench.log(endpoint_id) == [("delivered", [200])]
    assert bench.deliveries.pending() == []
    text = render_metrics(bench.metrics)[0].decode()
    assert 'inferq_webhook_attempts_total{result="delivered"} 1.0' in text
    assert "inferq_webhook_deliveries_pending 0.0" in text


async def test_what_fails_is_sent_again_later_under_the_same_id(bench: Bench) -> None:
    """Behind the waits of the schedule and what the receiver asks for, until it is taken."""
    answers = iter([status("500 No"), status("503 Busy", "retry-after: 100"), status("200 OK")])
    async with receiving(lambda _: next(answers)) as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)
        event_id = bench.emit()
        for begun, later_s in ((1, 0), (0, 4), (1, 6.1), (0, 90), (1, 111)):
            bench.now_s += later_s
            assert await bench.dispatcher.deliver(1.0) == begun
    assert receiver.ids == [event_id] * 3
    assert bench.log(endpoint_id) == [("delivered", [500, 503, 200])]


async def test_a_mark_that_came_back_sends_nothing_again(bench: Bench) -> None:
    """Of an event that was settled: whoever tells an end twice may write its mark after it was taken away."""
    async with receiving() as receiver, bench.dispatcher.running():
        bench.endpoint(receiver.url)
        bench.emit()
        (key,) = bench.deliveries.pending()
        await bench.dispatcher.deliver(1.0)
        bench.store.put(f"sending/t-alice~{key.endpoint_id}~{key.event_id}", b"")
        assert bench.deliveries.pending() == [key]
        assert await bench.dispatcher.deliver(1.0) == 0
        assert (len(receiver.got), bench.deliveries.pending()) == (1, [])


async def test_gone_disables_the_endpoint(bench: Bench) -> None:
    """What waits for it is given up, and later events are not for it, until it is enabled."""
    async with receiving(lambda _: status("410 Gone")) as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)
        bench.emit("batch_1")
        await bench.dispatcher.deliver(1.0)
        late = WebhookEvent.of(ALICE, "batch.failed", "batch_2", 1)
        bench.deliveries.add(DeliveryKey(ALICE, endpoint_id, late.id), late)
        await bench.dispatcher.deliver(1.0)
    found = bench.webhooks.get(ALICE, endpoint_id)
    assert found is not None
    assert found.disabled == Disabled(reason="it answered HTTP 410 (Gone)", at_ms=1_000_000)
    assert len(receiver.got) == 1
    assert bench.log(endpoint_id) == [("given_up", [410]), ("given_up", [None])]
    assert bench.deliveries.pending() == []


async def test_an_endpoint_that_takes_nothing_for_days_is_disabled(bench: Bench) -> None:
    """When a delivery is given up; one that takes something in between, or was just enabled, gets its time anew."""
    answer = [status("500 No")]
    async with receiving(lambda _: answer[0]) as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)

        async def sample() -> bool:
            """Whether the endpoint is enabled behind an attempt that is the only one of its delivery."""
            event = WebhookEvent.sample(ALICE, "batch.completed", int(bench.now_s * 1000))
            bench.deliveries.add(DeliveryKey(ALICE, endpoint_id, event.id), event)
            await bench.dispatcher.deliver(1.0)
            found = bench.webhooks.get(ALICE, endpoint_id)
            return found is not None and found.active

        assert await sample()
        bench.now_s += 4 * 86_400
        assert await sample()
        answer[0] = status("200 OK")
        assert await sample()
        answer[0] = status("500 No")
        bench.now_s += 2 * 86_400
        assert await sample()
        bench.now_s += 5 * 86_400 + 1
        assert not await sample()
        found = bench.webhooks.get(ALICE, endpoint_id)
        assert found is not None
        assert found.disabled is not None
        assert found.disabled.reason == "every delivery failed for 5 days"
        bench.now_s += 86_400
        bench.webhooks.update(found.record.model_copy(update={"enabled_at_ms": int(bench.now_s * 1000)}))
        assert await sample()


async def test_a_hanging_endpoint_holds_up_nobody(bench: Bench) -> None:
    """Its attempts run on behind the call; those of others, and of later calls, are done meanwhile."""
    dispatcher = bench.another(settings=SETTINGS.model_copy(update={"attempt_timeout_ms": 30_000}))
    async with receiving(lambda _: HANG) as slow, receiving() as quick, dispatcher.running():
        bench.endpoint(slow.url, Tenant("bob"))
        bench.endpoint(quick.url)
        for number in range(12):
            bench.emit(f"batch_{number}", Tenant("bob"))
        await dispatcher.deliver(0.0)
        ids = [bench.emit(f"batch_{number}") for number in range(30)]
        async with asyncio.timeout(20):
            while len(receiver_ids := quick.ids) < 30:
                await dispatcher.deliver(0.05)
        assert sorted(receiver_ids) == sorted(ids)
        assert slow.connections == SETTINGS.endpoint_concurrency
        for task in dispatcher._running.values():
            task.cancel()


async def test_whoever_dies_in_an_attempt_costs_that_attempt(bench: Bench) -> None:
    """Another process leaves the claim alone while it lasts, then sends the event again under the same id."""
    async with receiving(lambda _: HANG) as receiver:
        endpoint_id = bench.endpoint(receiver.url)
        event_id = bench.emit()
        dying = bench.another()
        await dying.deliver(0.0)
        await eventually(lambda: receiver.got, "the first attempt is out")
        for task in dying._running.values():
            task.cancel()
        receiver.answer = lambda _: status("200 OK")
        async with bench.dispatcher.running():
            assert await bench.dispatcher.deliver(0.1) == 0
            bench.now_s += 2.5
            assert await bench.dispatcher.deliver(1.0) == 1
    assert receiver.ids == [event_id] * 2
    assert bench.log(endpoint_id) == [("delivered", [200])]


async def test_what_breaks_every_attempt_comes_to_an_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an error of ours is tried for ever; the delivery is given up and says why."""
    begun = 0

    async def broken(*_: object) -> None:
        nonlocal begun
        begun += 1
        raise ZeroDivisionError

    monkeypatch.setattr(Sender, "send", broken)
    async with bench.dispatcher.running():
        endpoint_id = bench.endpoint("http://127.0.0.1:9/")
        bench.emit()
        (key,) = bench.deliveries.pending()
        bench.deliveries.set_state(key, DeliveryState(tries=max_tries(once=False) - 2))
        for _ in range(5):
            await bench.dispatcher.deliver(1.0)
            bench.now_s += 8 * 3600 + 60
    assert begun == 2
    assert bench.log(endpoint_id) == [("given_up", [None])]


async def test_a_store_that_fails_at_the_wrong_moment_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of an attempt cannot be written down: the event is sent again once its claim has ended."""
    advance, fail = DeliveryStore.set_state, []

    def failing(self: DeliveryStore, key: DeliveryKey, state: object) -> None:
        if fail and fail.pop():
            raise StoreUnavailable("as ordered")
        advance(self, key, state)  # type: ignore[arg-type]

    monkeypatch.setattr(DeliveryStore, "set_state", failing)
    async with receiving() as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)
        bench.emit()
        fail[:] = [True, False]
        await bench.dispatcher.deliver(1.0)
        assert bench.log(endpoint_id) == [("pending", [])]
        bench.now_s += 2.5
        await bench.dispatcher.deliver(1.0)
    assert receiver.ids[0] == receiver.ids[1]
    assert bench.log(endpoint_id) == [("delivered", [200])]


async def test_a_damaged_record_keeps_no_other_from_its_turn(bench: Bench) -> None:
    """It is looked at again later; the rest is delivered."""
    async with receiving() as receiver, bench.dispatcher.running():
        endpoint_id = bench.endpoint(receiver.url)
        damaged, whole = bench.emit("batch_1"), bench.emit("batch_2")
        bench.store.put(f"{EndpointStore.name(ALICE, endpoint_id, 'deliveries')}/{damaged}/state", b"{")
        bench.store.put("sending/stray", b"")
        await bench.dispatcher.deliver(1.0)
    assert receiver.ids == [whole]
    assert [key.event_id for key in bench.deliveries.pending()] == [damaged]


async def test_a_deleted_endpoint_gets_nothing_more_and_leaves_nothing(bench: Bench) -> None:
    """Before its attempt, and during it."""

    def delete(_: Received) -> bytes:
        bench.webhooks.delete(ALICE, during)
        return status("410 Gone")

    async with receiving(delete) as receiver, bench.dispatcher.running():
        before, during = bench.endpoint(receiver.url), bench.endpoint(receiver.url)
        event = WebhookEvent.of(ALICE, "batch.completed", "batch_1", 1)
        bench.deliveries.emit(event)
        bench.webhooks.delete(ALICE, before)
        await bench.dispatcher.deliver(1.0)
        assert len(receiver.got) == 1
        assert bench.deliveries.pending() == []
        assert bench.webhooks.get(ALICE, during) is None
        bench.now_s += 7_200
        await bench.dispatcher.tidy()
    assert list(bench.webhooks.all_ids()) == []


async def test_too_much_for_one_endpoint_is_given_up_and_logs_are_trimmed(bench: Bench) -> None:
    """The oldest beyond the bound go, and say why; of what is settled the newest stay."""
    async with bench.dispatcher.running():
        endpoint_id = bench.endpoint("http://127.0.0.1:9/")
        for number in range(5):
            bench.now_s += 1
            bench.emit(f"batch_{number}")
        await bench.dispatcher.tidy()
        assert len(bench.deliveries.pending()) == 3
        page, _ = bench.deliveries.page(ALICE, endpoint_id)
        assert [one.state.outcome for one in page] == ["pending"] * 3
        assert "inferq_webhook_deliveries_given_up_total 2.0" in render_metrics(bench.metrics)[0].decode()
        bench.now_s += 8 * 86_400
        await bench.dispatcher.tidy()
        assert len(bench.deliveries.page(ALICE, endpoint_id)[0]) == 3
