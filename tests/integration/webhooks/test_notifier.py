"""The notifier's process over a real Redis: what it delivers, what outlives its death, and Redis's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from openai import OpenAI

from tests.support.fleet import Fleet
from tests.support.receiver import HANG, OK, Received, receiving
from tests.support.servers import Server
from tests.support.waiting import eventually
from tests.support.webhooks import ACME, WebhookStorage, add_notifier


async def test_events_are_delivered_signed_and_counted(tmp_path: Path, valkey: Server) -> None:
    """RQ's worker runs the rounds; a receiver that hangs holds up nobody; what the pages tell is true."""
    rack = WebhookStorage(tmp_path / "store")
    client = OpenAI(api_key="none", base_url="http://127.0.0.1:1")
    async with Fleet(tmp_path, valkey) as fleet, receiving() as receiver, receiving(lambda _: HANG) as slow:
        endpoint_id, _ = rack.endpoint(receiver.url), rack.endpoint(slow.url)
        notifier = add_notifier(fleet, rack.folder)
        notifier.process.start()
        ids = {rack.emit(f"batch_{number}") for number in range(12)}
        await eventually(lambda: set(receiver.ids) == ids, "every event has come", limit_s=20)
        keys = rack.webhooks.secrets(ACME, endpoint_id)
        assert keys is not None
        for request in receiver.got:
            event = client.webhooks.unwrap(request.body, request.headers, secret=keys.current)
            assert event.id == request.headers["webhook-id"]
        await eventually(lambda: set(rack.outcomes(endpoint_id)) == {"delivered"}, "it is written down")
        await notifier.ready()

        async def counted() -> bool:
            text = await notifier.metrics()
            delivered = 'inferq_webhook_attempts_total{result="delivered"} 12.0' in text
            return delivered and "inferq_webhook_deliveries_pending 12.0" in text

        # The notifier counts what it has written down a moment after it is in the store.
        await eventually(counted, "12 are delivered, 12 pending")
        assert notifier.process.terminate() == 0
        assert keys.current[10:40] not in notifier.process.log_text()


async def test_a_notifier_that_is_killed_loses_no_event(tmp_path: Path, valkey: Server) -> None:
    """SIGKILL while attempts run: whoever comes next sends again what was not answered, under the same id, and nothing
    else twice. An emptied Redis in between changes nothing."""
    rack = WebhookStorage(tmp_path / "store")
    answers: dict[str, bytes] = {}

    def answer(request: Received) -> bytes:
        return answers.get(request.headers["webhook-id"], OK)

    async with Fleet(tmp_path, valkey) as fleet, receiving(answer) as receiver:
        endpoint_id = rack.endpoint(receiver.url)
        quick = [rack.emit(f"quick_{number}") for number in range(5)]
        first = add_notifier(fleet, rack.folder, attempt_timeout_ms=2_500)
        first.process.start()
        await eventually(
            lambda: rack.outcomes(endpoint_id) == ["delivered"] * 5, "what is answered is done", limit_s=20
        )
        hanging = [rack.emit(f"hanging_{number}") for number in range(3)]
        answers |= dict.fromkeys(hanging, HANG)
        await eventually(lambda: set(hanging) <= set(receiver.ids), "attempts hang", limit_s=20)
        first.process.kill()
        answers.clear()
        valkey.ask("FLUSHALL")
        second = add_notifier(fleet, rack.folder, "notifier-2")
        second.process.start()
        await eventually(lambda: rack.outcomes(endpoint_id) == ["delivered"] * 8, "all is delivered", limit_s=20)
    sent = Counter(receiver.ids)
    assert sent == dict.fromkeys(quick, 1) | dict.fromkeys(hanging, 2)


async def test_two_notifiers_send_nothing_twice(tmp_path: Path, valkey: Server) -> None:
    """RqJobs are run by one at a time, and what one has claimed the other leaves alone."""
    rack = WebhookStorage(tmp_path / "store")
    async with Fleet(tmp_path, valkey) as fleet, receiving() as receiver:
        endpoint_id = rack.endpoint(receiver.url)
        for name in ("notifier-1", "notifier-2"):
            add_notifier(fleet, rack.folder, name, scan_interval_ms=20, attempt_timeout_ms=10_000).process.start()
        ids = [rack.emit(f"batch_{number}") for number in range(20)]
        await eventually(lambda: rack.outcomes(endpoint_id) == ["delivered"] * 20, "all is delivered", limit_s=20)
    assert sorted(receiver.ids) == sorted(ids)
