"""What is decided about webhooks: signatures, waits, turns, and what an attempt makes of a delivery."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import InvalidWebhookSignatureError, OpenAI

from queue_schemas import Tenant
from webhooks.core import WAITS_S, Limits, begin, choose_next, conclude, max_tries, signed_headers, wait_s
from webhooks.deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from webhooks.endpoints import Secrets
from webhooks.events import EVENT_TYPES, WebhookEvent

CLIENT = OpenAI(api_key="none", base_url="http://127.0.0.1:1")


def test_the_signature_is_that_of_the_specification() -> None:
    """The test vector of the reference libraries of Standard Webhooks."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, b'{"test": 2432232314}', [key])
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_the_sdk_unwraps_every_event(event_type: str) -> None:
    """``client.webhooks.unwrap`` gives the vendor's own type for each."""
    event = WebhookEvent.of(Tenant("t"), event_type, "batch_1", 1_700_000_000)
    keys = Secrets.fresh(0)
    headers = signed_headers(event.id, int(time.time()), event.body(), keys.in_force(0))
    unwrapped = CLIENT.webhooks.unwrap(event.body(), headers, secret=keys.current)
    assert type(unwrapped).__name__.lower() == f"{event_type.replace('.', '')}webhookevent"
    assert (unwrapped.id, unwrapped.type, unwrapped.created_at) == (event.id, event_type, 1_700_000_000)
    assert unwrapped.data.id == "batch_1"  # type: ignore[union-attr]
    assert unwrapped.object == "event"


def test_a_rotated_secret_and_the_one_before_both_verify_until_the_grace_ends() -> None:
    """Receivers may change over at any moment within it; behind it the old secret opens nothing."""
    event = WebhookEvent.of(Tenant("t"), "batch.failed", "batch_1", 1)
    old = Secrets.fresh(0)
    new = old.rotated(0, 10_000)
    within = signed_headers(event.id, int(time.time()), event.body(), new.in_force(9_999))
    for secret in (old.current, new.current):
        CLIENT.webhooks.unwrap(event.body(), within, secret=secret)
    behind = signed_headers(event.id, int(time.time()), event.body(), new.in_force(10_000))
    CLIENT.webhooks.unwrap(event.body(), behind, secret=new.current)
    with pytest.raises(InvalidWebhookSignatureError):
        CLIENT.webhooks.unwrap(event.body(), behind, secret=old.current)
    with pytest.raises(InvalidWebhookSignatureError):
        CLIENT.webhooks.unwrap(event.body() + b" ", within, secret=new.current)


@given(st.integers(0, 1_000), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 1e9))
def test_every_wait_has_bounds_and_the_attempts_an_end(tries: int, draw: float, asked_s: float | None) -> None:
    """Total: a wait between its step and a fifth more, or what was asked within six hours; or none, for good."""
    wait = wait_s(tries, draw, asked_s)
    if tries > len(WAITS_S):
        assert wait is None
        return
    assert wait is not None
    step = WAITS_S[max(tries, 1) - 1]
    assert step <= wait <= max(step * 1.2, min(asked_s or 0, 21_600))
    assert wait >= min(asked_s or 0, 21_600)


def test_waits_grow_and_make_about_a_day() -> None:
    """Each wait is longer than the one before with any jitter; together they take 20 to 27 hours."""
    for tries in range(1, len(WAITS_S)):
        assert wait_s(tries, 0.999, None) < wait_s(tries + 1, 0.0, None)  # type: ignore[operator]
    assert 20 * 3600 < sum(WAITS_S) < sum(WAITS_S) * 1.2 < 27 * 3600


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_is_success(status: int) -> None:
    """The body does not matter."""
    state = conclude(begin(DeliveryState(), 0, 10), Attempt(at_ms=0, took_ms=3, status=status), once=False, draw=0)
    assert (state.outcome, state.tries, len(state.attempts)) == (Outcome.DELIVERED, 1, 1)


@pytest.mark.parametrize("status", [None, 100, 301, 302, 400, 401, 404, 429, 500, 503])
def test_anything_else_is_tried_again_until_the_end(status: int | None) -> None:
    """Redirects included; the number of attempts is that of the schedule, and the log of them is bounded."""
    state, now_ms, made = DeliveryState(), 0, 0
    while not state.settled:
        state = begin(state, now_ms, 10_000)
        assert state.next_at_ms == now_ms + 10_000
        state = conclude(state, Attempt(at_ms=now_ms, took_ms=5, status=status), once=False, draw=0.5)
        assert state.settled or state.next_at_ms > now_ms
        now_ms, made = state.next_at_ms, made + 1
    assert (state.outcome, made) == (Outcome.GIVEN_UP, max_tries(once=False))


def test_gone_ends_it_and_a_test_is_sent_once() -> None:
    """410 says that nobody will ever take it; a sample is not worth a second attempt."""
    begun = begin(DeliveryState(), 0, 10)
    assert conclude(begun, Attempt(at_ms=0, took_ms=1, status=410), once=False, draw=0).outcome is Outcome.GIVEN_UP
    assert conclude(begun, Attempt(at_ms=0, took_ms=1, status=500), once=True, draw=0).outcome is Outcome.GIVEN_UP


def test_attempts_that_a_crash_cut_short_wait_ever_longer() -> None:
    """The first is made up for at once; what kills its sender each time does so a limited number of times, in a day."""
    state, now_ms, waits = DeliveryState(), 0, []
    for _ in range(max_tries(once=False)):
        state = begin(state, now_ms, 10_000)
        waits.append(state.next_at_ms - now_ms - 10_000)
        now_ms = state.next_at_ms
    assert waits == [0, *(1_000 * wait for wait in WAITS_S)]
    assert conclude(state, Attempt(at_ms=0, took_ms=1, status=500), once=False, draw=0).settled


def key(tenant: str, endpoint: str, number: int) -> DeliveryKey:
    return DeliveryKey(Tenant(tenant), endpoint, f"evt_{number:032x}")


def test_no_endpoint_and_no_tenant_takes_all_the_room() -> None:
    """What waits longest goes first, within the limits of its endpoint, its tenant and the whole."""
    limits = Limits(endpoint=2, tenant=3, all=5)
    flood = {key("a", f"we_{number % 3}", number): number for number in range(50)}
    others = {key("b", "we_9", 100): 90, key("c", "we_8", 101): 80, key("c", "we_8", 102): 5_000}
    turns = choose_next(flood | others, [], 1_000, limits)
    assert [one.tenant for one in turns] == ["a", "a", "a", "c", "b"]
    assert choose_next(flood | others, turns, 1_000, limits) == []
    running = [key("a", "we_0", 0)]
    assert key("a", "we_0", 0) not in choose_next(flood, running, 1_000, limits)
    assert [one.endpoint_id for one in choose_next(flood, running, 1_000, limits)] == ["we_1", "we_2"]


def test_nothing_is_begun_before_its_time() -> None:
    """A delivery that waits for its next attempt takes no turn."""
    assert choose_next({key("a", "we_1", 1): 1_001}, [], 1_000, Limits(1, 1, 1)) == []
