"""Webhook endpoints as a Router makes and shows them, the file store below in a folder; nothing is sent here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai.types.webhooks import (
    DeletedWebhookEndpoint,
    WebhookEndpoint,
    WebhookEndpointTestResult,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
)

from queue_schemas import BadRequest, Tenant
from router import RouterApp
from router.webhooks import endpoint_tests
from router.webhooks.rules import read_new_endpoint, read_rotation
from tests.support.waiting import eventually
from tests.unit.router.fakes import Answer, Client, FakeQueue, router
from webhooks.core.url_rules import UrlRules
from webhooks.deliveries import Attempt, DeliveryKey, DeliveryState, Outcome
from webhooks.endpoints import Disabled
from webhooks.events import WebhookEvent

ACME, RIVAL = Tenant("acme"), Tenant("rival")
ALL = "/v1/webhook_endpoints"
HOOK = {"url": "https://hooks.example.com/a?token=1", "event_types": ["batch.completed"], "name": "mine"}


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterApp]:
    """A Router with two tenants and room for three endpoints each."""
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("INFERQ_WEBHOOKS_MAX_TENANT_ENDPOINTS", "3")
    keys = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in (ACME, RIVAL))
    async with router(FakeQueue("m"), api_keys=keys) as app:
        yield app


async def ask(
    app: RouterApp,
    method: str,
    path: str = "",
    body: Any = None,
    *,
    key: str = ACME,
    retry: int = 0,
    once: str = "",
    lost: bool = False,
) -> Answer:
    """``once`` is an idempotency key; ``lost``: the client is gone before its answer comes."""
    data = b"" if body is None else body if isinstance(body, bytes) else orjson.dumps(body)
    headers = {"authorization": f"Bearer {key}", "x-stainless-retry-count": str(retry)}
    client = Client(app)
    answer = client.begin(method, ALL + path, [data], headers | ({"idempotency-key": once} if once else {}))
    if lost:
        client.gone.set()
    await answer.done()
    await app.services.store.close(1.0)  # what is done once an answer has been sent is done
    return answer


async def create(app: RouterApp, *, key: str = ACME, **fields: Any) -> dict[str, Any]:
    answer = await ask(app, "POST", "", HOOK | fields, key=key)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


async def test_an_endpoint_parses_as_the_sdks_endpoint(app: RouterApp) -> None:
    """Its secret is in the answer that makes it, and in no other."""
    made = WebhookEndpointWithSecret.model_validate(await create(app))
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    shown = (await ask(app, "GET", f"/{made.id}")).json()
    WebhookEndpoint.model_validate(shown)
    assert WebhookEndpoint.model_fields.keys() <= shown.keys()
    for method, path in (("GET", f"/{made.id}"), ("GET", ""), ("POST", f"/{made.id}")):
        answer = await ask(app, method, path, {} if method == "POST" else None)
        assert answer.status == 200
        assert made.signing_secret[10:-4] not in answer.body.decode()
    types = WebhookEventTypeList.model_validate(
        (await Client(app).request("GET", "/v1/webhook_event_types", b"", {"authorization": f"Bearer {ACME}"})).json()
    )
    assert len(types.data) == 8


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"url": None}, "url", "is missing"),
        ({"url": 7}, "url", "must be text"),
        ({"url": "http://hooks.example.com"}, "url", "is not https"),
        ({"url": "https://169.254.169.254/latest"}, "url", "not on the public internet"),
        ({"url": "https://user:pw@example.com"}, "url", "user name"),
        ({"event_types": None}, "event_types", "is missing"),
        ({"event_types": []}, "event_types", "empty"),
        ({"event_types": "batch.completed"}, "event_types", "not text"),
        ({"event_types": ["eval.run.failed"]}, "event_types", "is no event type here"),
        ({"event_types": [{}]}, "event_types", "is no event type here"),
        ({"event_types": ["*", "batch.failed"]}, "event_types", "is no event type here"),
        ({"name": 7}, "name", "must be text"),
        ({"name": "a\nb"}, "name", "printable"),
        ({"name": "a" * 201}, "name", "200"),
        ({"secret": "x"}, "secret", "is no field here"),
    ],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    """The field at fault, and a sentence."""
    with pytest.raises(BadRequest, match=words) as refused:
        read_new_endpoint(orjson.dumps(HOOK | fields), UrlRules())
    assert refused.value.param == param


async def test_a_refused_endpoint_is_not_created(app: RouterApp) -> None:
    """Status 400 with the error object."""
    answer = await ask(app, "POST", "", HOOK | {"url": "https://127.0.0.1/"})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "url", "invalid_request")
    assert (await ask(app, "GET")).json()["data"] == []


async def test_a_body_that_is_no_object_is_refused(app: RouterApp) -> None:
    """Wherever one is read, but for a rotation without any."""
    endpoint_id = (await create(app))["id"]
    for body in (b"", b"{", b"[]", b"\xff", b"null"):
        for path in ("", f"/{endpoint_id}", f"/{endpoint_id}/test", f"/{endpoint_id}/rotate_secret"):
            answer = await ask(app, "POST", path, body)
            assert answer.status == (200 if not body and path.endswith("secret") else 400), path


async def test_another_tenants_endpoint_is_not_found(app: RouterApp) -> None:
    """To others it is not there, by any method; without a key nobody gets in."""
    endpoint_id = (await create(app))["id"]
    for method, path, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "", {"name": "x"}),
        ("POST", "/rotate_secret", {}),
        ("POST", "/test", {"event_type": "batch.completed"}),
        ("GET", "/deliveries", None),
    ):
        assert (await ask(app, method, f"/{endpoint_id}{path}", body, key=RIVAL)).status == 404
        assert (await ask(app, method, f"/{endpoint_id}{path}", body, key="nobody")).status == 401
        for wrong in ("we_1", "..%2f..", f"{endpoint_id}x", endpoint_id.upper(), "batch_" + "0" * 32):
            assert (await ask(app, method, f"/{wrong}{path}", body)).status == 404
    assert (await ask(app, "GET", key=RIVAL)).json()["data"] == []
    assert (await ask(app, "GET", f"/{endpoint_id}")).status == 200


async def test_endpoints_are_limited_listed_in_pages_and_deleted(app: RouterApp) -> None:
    """Newest first; the fourth is refused until one is gone."""
    ids = [(await create(app, name=str(number)))["id"] for number in range(3)]
    assert (await ask(app, "POST", "", HOOK)).status == 429
    assert (await ask(app, "POST", "", HOOK, key=RIVAL)).status == 200
    first = (await ask(app, "GET", "?limit=2")).json()
    rest = (await ask(app, "GET", f"?after={first['last_id']}")).json()
    assert [one["id"] for one in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    gone = DeletedWebhookEndpoint.model_validate((await ask(app, "DELETE", f"/{ids[0]}")).json())
    assert (gone.id, gone.deleted) == (ids[0], True)
    assert (await ask(app, "DELETE", f"/{ids[0]}")).status == 404
    await create(app)


async def test_a_repeated_request_creates_nothing_twice(app: RouterApp) -> None:
    """[D2] The SDK repeats a request whose answer was lost: it gets the endpoint, or the secret, that the first one
    made. The same request anew makes another one."""
    made = (await ask(app, "POST", "", HOOK, lost=True)).json()
    again = (await ask(app, "POST", "", HOOK, retry=1)).json()
    assert (again["id"], again["signing_secret"]) == (made["id"], made["signing_secret"])
    assert (await ask(app, "POST", "", HOOK, retry=1)).json()["id"] != made["id"]
    path = f"/{made['id']}/rotate_secret"
    keep = {"keep_old_secret_active_for_24_hours": True}
    rotated = (await ask(app, "POST", path, keep, lost=True)).json()["signing_secret"]
    assert (await ask(app, "POST", path, keep, retry=1)).json()["signing_secret"] == rotated
    assert (await ask(app, "POST", path, keep)).json()["signing_secret"] not in {rotated, made["signing_secret"]}


async def test_a_rotation_right_after_the_creation_makes_a_new_secret(app: RouterApp) -> None:
    """[D2] A retry count says nothing about what happened: no rotation did, so this is the first one. Nor is a retry of
    a rotation that was answered another one's repetition."""
    made = await create(app)
    path, secrets = f"/{made['id']}/rotate_secret", {made["signing_secret"]}
    for retry in (1, 1, 2):
        answer = await ask(app, "POST", path, {}, retry=retry)
        assert answer.status == 200
        assert answer.json()["signing_secret"] not in secrets
        secrets.add(answer.json()["signing_secret"])


async def test_one_idempotency_key_makes_one_change_of_an_endpoint(app: RouterApp) -> None:
    """[D1] Creating, rotating and testing take an idempotency key: the same request is a replay, another one gets 422,
    also one of another kind."""
    made = (await ask(app, "POST", "", HOOK, once="a")).json()
    assert (await ask(app, "POST", "", HOOK, once="a")).json()["id"] == made["id"]
    one = f"/{made['id']}"
    rotated = (await ask(app, "POST", f"{one}/rotate_secret", {"keep_old_secret_s": 60}, once="b")).json()
    again = (await ask(app, "POST", f"{one}/rotate_secret", {"keep_old_secret_s": 60}, once="b")).json()
    assert again["signing_secret"] == rotated["signing_secret"] != made["signing_secret"]
    for path, body, key in (
        ("", HOOK | {"name": "other"}, "a"),
        (f"{one}/rotate_secret", {}, "a"),
        (f"{one}/rotate_secret", {"keep_old_secret_s": 61}, "b"),
        (f"{one}/test", {"event_type": "batch.completed"}, "b"),
    ):
        refused = await ask(app, "POST", path, body, once=key)
        assert (refused.status, refused.error["code"]) == (422, "idempotency_key_reused"), path
    await ask(app, "POST", f"{one}/rotate_secret", {})
    late = await ask(app, "POST", f"{one}/rotate_secret", {"keep_old_secret_s": 60}, once="b")
    assert (late.status, late.error["code"], late.headers["x-should-retry"]) == (409, "conflict", "false")


async def test_a_test_with_a_key_is_sent_once(app: RouterApp) -> None:
    """[D1] Its repetition tells what became of the first one."""
    endpoint_id = (await create(app))["id"]
    body, deliveries = {"event_type": "batch.completed"}, app.services.store.deliveries
    asking = asyncio.create_task(ask(app, "POST", f"/{endpoint_id}/test", body, once="t"))
    (key,) = await eventually(deliveries.pending, "the sample waits")
    attempt = Attempt(at_ms=1, took_ms=3, status=204)
    deliveries.set_state(key, DeliveryState(outcome=Outcome.DELIVERED, tries=1, attempts=(attempt,)))
    first, again = await asking, await ask(app, "POST", f"/{endpoint_id}/test", body, once="t")
    assert (first.status, first.json()) == (200, again.json())
    assert len((await ask(app, "GET", f"/{endpoint_id}/deliveries")).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "kept_s"),
    [
        ({}, 0),
        ({"keep_old_secret_active_for_24_hours": False}, 0),
        ({"keep_old_secret_active_for_24_hours": True}, 86_400),
        ({"keep_old_secret_s": 60}, 60),
        ({"keep_old_secret_active_for_24_hours": 1}, None),
        ({"keep_old_secret_s": -1}, None),
        ({"keep_old_secret_s": 604_801}, None),
        ({"keep_old_secret_s": True}, None),
    ],
)
def test_a_rotation_says_how_long_the_old_secret_is_kept(body: dict[str, Any], kept_s: int | None) -> None:
    """The vendor's switch is a day; ours names the seconds."""
    if kept_s is not None:
        assert read_rotation(orjson.dumps(body)) == kept_s
        return
    with pytest.raises(BadRequest, match="must be"):
        read_rotation(orjson.dumps(body))


async def test_a_rotation_keeps_the_old_secret_for_as_long_as_asked(app: RouterApp) -> None:
    """The new one is in the answer; both are in force until then."""
    made = await create(app)
    answer = await ask(app, "POST", f"/{made['id']}/rotate_secret", {"keep_old_secret_s": 60})
    keys = app.services.store.endpoints.secrets(ACME, made["id"])
    assert keys is not None
    assert answer.json()["signing_secret"] == keys.current != made["signing_secret"]
    assert [(one.secret, one.until_ms - keys.made_at_ms) for one in keys.earlier] == [(made["signing_secret"], 60_000)]


async def test_an_endpoint_is_changed_disabled_and_enabled(app: RouterApp) -> None:
    """Only what is asked changes; an endpoint that the notifier disabled is enabled again by its owner."""
    made = await create(app)
    path = f"/{made['id']}"
    same = (await ask(app, "POST", path, {"url": HOOK["url"]})).json()
    assert same["updated_at"] == made["updated_at"]
    changed = (await ask(app, "POST", path, {"event_types": ["*"], "name": "new"})).json()
    assert (changed["url"], changed["event_types"], changed["name"]) == (HOOK["url"], ["*"], "new")
    assert (await ask(app, "POST", path, {"url": "https://10.0.0.1/"})).error["param"] == "url"
    assert (await ask(app, "POST", path, {"enabled": 1})).error["param"] == "enabled"
    paused = (await ask(app, "POST", path, {"enabled": False})).json()
    assert (paused["status"], paused["disabled_reason"]) == ("disabled", "by its owner")
    assert (await ask(app, "POST", path, {"enabled": True})).json()["status"] == "enabled"
    app.services.store.endpoints.disable(ACME, made["id"], Disabled(reason="HTTP 410", at_ms=2**52))
    shown = (await ask(app, "GET", path)).json()
    assert (shown["status"], shown["disabled_reason"]) == ("disabled", "HTTP 410")
    refused = await ask(app, "POST", f"{path}/test", {"event_type": "batch.completed"})
    assert (await ask(app, "POST", path, {"enabled": True})).json()["status"] == "enabled"
    assert (refused.status, refused.headers["x-should-retry"]) == (409, "false")


async def test_deliveries_are_shown(app: RouterApp) -> None:
    """What was sent, when, and what came back."""
    endpoint_id = (await create(app))["id"]
    event = WebhookEvent.of(ACME, "batch.completed", "batch_1", 7)
    key = DeliveryKey(ACME, endpoint_id, event.id)
    app.services.store.deliveries.add(key, event)
    attempts = (Attempt(at_ms=8_000, took_ms=9, error="no answer"), Attempt(at_ms=9_000, took_ms=3, status=500))
    app.services.store.deliveries.set_state(key, DeliveryState(tries=2, next_at_ms=60_000, attempts=attempts))
    page = (await ask(app, "GET", f"/{endpoint_id}/deliveries")).json()
    (one,) = page["data"]
    assert (one["id"], one["status"], one["next_attempt_at"]) == (event.id, "pending", 60)
    assert (one["event_type"], one["created_at"], one["data"]) == ("batch.completed", 7, {"id": "batch_1"})
    assert [attempt["status_code"] for attempt in one["attempts"]] == [None, 500]
    assert [attempt["error"] for attempt in one["attempts"]] == ["no answer", None]


async def test_a_test_reports_what_the_endpoint_answered(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status; that nothing answered; or that nobody sends, and then the sample is not sent later."""
    endpoint_id = (await create(app))["id"]
    deliveries = app.services.store.deliveries
    assert (await ask(app, "POST", f"/{endpoint_id}/test", {"event_type": "x"})).error["param"] == "event_type"

    async def tested(attempt: Attempt | None) -> Answer:
        asking = asyncio.create_task(ask(app, "POST", f"/{endpoint_id}/test", {"event_type": "response.failed"}))
        (key,) = await eventually(deliveries.pending, "the sample waits")
        event = deliveries.event(key)
        assert event is not None
        assert (event.type, event.object_id, event.once) == ("response.failed", "resp_test", True)
        if attempt is not None:
            deliveries.set_state(key, DeliveryState(outcome=Outcome.DELIVERED, tries=1, attempts=(attempt,)))
        return await asking

    result = WebhookEndpointTestResult.model_validate((await tested(Attempt(at_ms=1, took_ms=1, status=404))).json())
    assert (result.status_code, result.event_type, result.webhook_endpoint_id) == (404, "response.failed", endpoint_id)
    unanswered = await tested(Attempt(at_ms=1, took_ms=1, error="no connection"))
    assert (unanswered.status, "no connection" in unanswered.error["message"]) == (400, True)
    monkeypatch.setattr(endpoint_tests, "_TIMEOUT_S", 0.3)
    nobody = await tested(None)
    assert (nobody.status, nobody.error["code"]) == (503, "no_notifier")
    assert deliveries.pending() == []


async def test_concurrent_tests_of_one_tenant_are_limited(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth at once is refused; when the others are over there is room again."""
    monkeypatch.setattr(endpoint_tests, "_TIMEOUT_S", 0.5)
    endpoint_id = (await create(app))["id"]
    body = {"event_type": "batch.completed"}
    answers = await asyncio.gather(*(ask(app, "POST", f"/{endpoint_id}/test", body) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [429, 503, 503, 503, 503]
    assert (await ask(app, "POST", f"/{endpoint_id}/test", body)).status == 503


async def test_no_log_line_contains_a_secret(app: RouterApp, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    """Neither of its making nor of its rotation."""
    caplog.set_level(logging.DEBUG)
    made = await create(app)
    rotated = (await ask(app, "POST", f"/{made['id']}/rotate_secret", {"keep_old_secret_s": 9})).json()
    out = capsys.readouterr()
    for secret in (made["signing_secret"], rotated["signing_secret"]):
        assert secret[8:30] not in f"{caplog.text}{out.out}{out.err}"
