"""Endpoints and deliveries in the store: who gets which event, once, and what is kept of it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from queue_schemas import StoreUnavailable, Tenant
from storage import ObjectStore, StorageSettings
from webhooks.deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from webhooks.delivery_store import DeliveryStore
from webhooks.endpoints import Disabled, EndpointRecord, EndpointStore, Secrets, new_endpoint_id
from webhooks.events import WebhookEvent

ALICE, BOB = Tenant("a~li/ce %2e"), Tenant("bob")


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "folder":
        yield ObjectStore.open(StorageSettings(url=str(tmp_path / "store")))
        return
    yield ObjectStore.open(StorageSettings(url="memory://inferq-webhooks"))
    fsspec.filesystem("memory").store.clear()


def endpoint(store: ObjectStore, tenant: Tenant, *events: str, now_ms: int = 1_000) -> str:
    record = EndpointRecord(
        id=new_endpoint_id(now_ms),
        tenant=tenant,
        url="https://example.com/",
        events=events,
        created_at=1,
        updated_at=1,
        enabled_at_ms=now_ms,
    )
    EndpointStore(store).create(record, Secrets.fresh(now_ms))
    return record.id


def event(object_id: str = "batch_1", at_s: int = 5, tenant: Tenant = ALICE) -> WebhookEvent:
    return WebhookEvent.of(tenant, "batch.completed", object_id, at_s)


def test_an_event_goes_to_the_endpoints_that_subscribe_to_it(store: ObjectStore) -> None:
    """To endpoints of its tenant that are enabled and name its type or all; without any, nothing is written."""
    deliveries = DeliveryStore(store)
    assert deliveries.emit(event()) == 0
    assert store.names("") == []
    wanted = endpoint(store, ALICE, "batch.completed", "batch.failed")
    everything = endpoint(store, ALICE, "*")
    endpoint(store, ALICE, "response.completed")
    endpoint(store, BOB, "*")
    store.put(EndpointStore.name(ALICE, endpoint(store, ALICE, "*"), "endpoint"), b"{damaged")
    disabled = endpoint(store, ALICE, "*")
    EndpointStore(store).disable(ALICE, disabled, Disabled(reason="HTTP 410", at_ms=2_000))
    assert deliveries.emit(event()) == 2
    assert {key.endpoint_id for key in deliveries.pending()} == {wanted, everything}
    assert {key.tenant for key in deliveries.pending()} == {ALICE}


def test_an_end_reported_twice_is_one_event(store: ObjectStore) -> None:
    """After a crash the same end makes the same event, bytes and id; what was settled meanwhile is not sent again."""
    deliveries = DeliveryStore(store)
    endpoint_id = endpoint(store, ALICE, "*")
    deliveries.emit(event())
    deliveries.emit(event())
    (key,) = deliveries.pending()
    stored = deliveries.event(key)
    assert stored == event()
    assert stored is not None
    assert stored.body() == (
        b'{"id":"%s","object":"event","type":"batch.completed","created_at":5,"data":{"id":"batch_1"}}'
        % key.event_id.encode()
    )
    deliveries.set_state(key, DeliveryState(outcome=Outcome.DELIVERED, tries=1))
    deliveries.emit(event())
    assert deliveries.pending() == []
    assert [one.state.outcome for one in deliveries.page(ALICE, endpoint_id)[0]] == ["delivered"]
    others = {event("batch_2").id, event(at_s=6).id, event(tenant=BOB).id, event().id}
    assert len(others) == 4


def test_a_crash_midway_loses_no_event(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write is the last that succeeds, emitting again leaves the event pending, once."""
    deliveries = DeliveryStore(store)
    endpoint(store, ALICE, "*")
    put = ObjectStore.put
    for written in range(2):
        left = [written]

        def dying(self: ObjectStore, name: str, data: bytes, *, private: bool = False, left: list[int] = left) -> None:
            if not left[0]:
                raise StoreUnavailable("killed")
            left[0] -= 1
            put(self, name, data, private=private)

        monkeypatch.setattr(ObjectStore, "put", dying)
        with pytest.raises(StoreUnavailable):
            deliveries.emit(event(f"batch_{written}"))
        monkeypatch.undo()
        deliveries.emit(event(f"batch_{written}"))
        assert [key.event_id for key in deliveries.pending()].count(event(f"batch_{written}").id) == 1


def test_an_endpoint_is_disabled_until_it_is_enabled_later(store: ObjectStore) -> None:
    """The mark of the notifier and the record of the Router have one writer each; the later one counts."""
    webhooks = EndpointStore(store)
    endpoint_id = endpoint(store, BOB, "*")
    webhooks.disable(BOB, endpoint_id, Disabled(reason="HTTP 410", at_ms=2_000))
    found = webhooks.get(BOB, endpoint_id)
    assert found is not None
    assert found.disabled is not None
    assert not found.subscribes_to("batch.failed")
    webhooks.update(found.record.model_copy(update={"enabled_at_ms": 3_000}))
    again = webhooks.get(BOB, endpoint_id)
    assert again is not None
    assert again.subscribes_to("batch.failed")


def test_what_is_not_an_id_reaches_no_object(store: ObjectStore) -> None:
    """Paths, other kinds of ids and other tenants' ids name nothing."""
    webhooks = EndpointStore(store)
    endpoint_id = endpoint(store, BOB, "*")
    for name in (
        "",
        "..",
        f"../{endpoint_id}",
        endpoint_id.upper(),
        "batch_" + endpoint_id[3:],
        f"{endpoint_id}/endpoint",
    ):
        assert webhooks.get(BOB, name) is None
        assert webhooks.secrets(BOB, name) is None
    assert webhooks.get(ALICE, endpoint_id) is None
    assert webhooks.secrets(ALICE, endpoint_id) is None


def test_secrets_are_for_their_owner(tmp_path: Path) -> None:
    """In a folder only the files' owner reads them; no text form of the record shows them."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))
    endpoint_id = endpoint(store, BOB, "*")
    path = tmp_path / EndpointStore.name(BOB, endpoint_id, "secrets")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = EndpointStore(store).secrets(BOB, endpoint_id)
    assert keys is not None
    assert keys.current[10:-4] not in f"{keys!r} {keys} {keys.hint}"


def test_earlier_secrets_sign_until_their_grace_ends() -> None:
    """Also when it is rotated again meanwhile; without a grace, which is for a secret that leaked, none does."""
    first = Secrets.fresh(0)
    second = first.rotated(100, 50)
    third = second.rotated(110, 100)
    assert second.in_force(149) == [*second.in_force(150), *first.in_force(0)]
    assert third.in_force(149) == [*third.in_force(999), *second.in_force(999), *first.in_force(0)]
    assert third.in_force(209) == [*third.in_force(999), *second.in_force(999)]
    assert len(third.in_force(210)) == 1
    assert len({first.current, second.current, third.current}) == 3
    assert third.rotated(120, 0).earlier == ()
    many = third
    for now_ms in range(200, 220):
        many = many.rotated(now_ms, 1_000)
    assert len(many.in_force(220)) == 4


def test_deliveries_are_listed_newest_first_in_pages(store: ObjectStore) -> None:
    """Pages follow each other without a gap."""
    deliveries = DeliveryStore(store)
    endpoint_id = endpoint(store, ALICE, "*")
    for at_s in range(1, 6):
        deliveries.emit(event(at_s=at_s))
    seen, after, more = [], "", True
    while more:
        page, more = deliveries.page(ALICE, endpoint_id, after=after, limit=2)
        seen += [one.event.created_at for one in page]
        after = page[-1].event.id
    assert seen == [5, 4, 3, 2, 1]
    assert deliveries.page(BOB, endpoint_id) == ([], False)


def test_the_log_is_trimmed_and_what_is_pending_stays(store: ObjectStore) -> None:
    """By age and by number; never what is still to be sent."""
    deliveries = DeliveryStore(store)
    endpoint_id = endpoint(store, ALICE, "*")
    for at_s in range(1, 8):
        deliveries.emit(event(at_s=at_s))
    for key in deliveries.pending()[1:]:
        attempt = Attempt(at_ms=1, took_ms=1, status=200)
        deliveries.set_state(key, DeliveryState(outcome=Outcome.DELIVERED, tries=1, attempts=(attempt,)))
    assert deliveries.trim(ALICE, endpoint_id, before_ms=3_000, max_count=100) == 1
    assert deliveries.trim(ALICE, endpoint_id, before_ms=0, max_count=3) == 2
    assert [one.event.created_at for one in deliveries.page(ALICE, endpoint_id)[0]] == [7, 6, 5, 1]


def test_a_deleted_endpoint_leaves_nothing(store: ObjectStore) -> None:
    """Its secrets and its log go with it; a mark that stays names an event that is gone."""
    webhooks, deliveries = EndpointStore(store), DeliveryStore(store)
    endpoint_id = endpoint(store, ALICE, "*")
    deliveries.emit(event())
    assert list(webhooks.all_ids()) == [(ALICE, endpoint_id)]
    webhooks.delete(ALICE, endpoint_id)
    assert webhooks.secrets(ALICE, endpoint_id) is None
    assert list(webhooks.all_ids()) == []
    (key,) = deliveries.pending()
    assert deliveries.event(key) is None
    deliveries.delete(key)
    assert deliveries.pending() == []
    assert DeliveryKey(ALICE, endpoint_id, event().id) == key
