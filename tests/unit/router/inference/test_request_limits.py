"""What a Router refuses to send to an engine: media from any host, and more than its tenant may ask for."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from queue_schemas import CannotStart
from router import RouterSettings
from tests.unit.router.fakes import Client, FakeQueue, router

IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": [IMAGE]}]}
RESPONSE = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]}


@pytest.mark.parametrize(
    ("path", "fields", "headers"),
    [
        ("/v1/chat/completions", CHAT, {}),
        ("/v1/chat/completions", CHAT | {"stream": True}, {}),
        ("/v1/chat/completions", CHAT, {"x-inferq-background": "true"}),
        ("/v1/chat/completions", CHAT, {"idempotency-key": "a"}),
        (
            "/v1/messages",
            {"model": "m", "messages": [{"content": [{"source": {"type": "url", "url": "http://x"}}]}]},
            {},
        ),
        ("/v1/responses", RESPONSE, {}),
        ("/v1/responses", RESPONSE | {"background": True}, {}),
        ("/v1/own", CHAT, {}),
    ],
)
async def test_media_by_url_is_refused(path: str, fields: dict[str, Any], headers: dict[str, str]) -> None:
    """[E1] On every path and in every mode: 400 that names the setting, and nothing is queued."""
    queue = FakeQueue("m")
    async with router(queue, extra_paths=["/v1/own"]) as app:
        answer = await Client(app).post(fields, path, headers).done()
    assert answer.status == 400
    assert "media_domains" in answer.body.decode()
    assert queue.enqueued.empty()


async def test_media_of_an_allowed_host_passes() -> None:
    """[E1] The body untouched."""
    queue = FakeQueue("m")
    body = b'{"model":"m","messages":[{"content":[{"image_url":"https://images.example.com/a.png"}]}]}'
    async with router(queue, media_domains=["images.example.com"]) as app:
        answer = Client(app).post(body)
        job = await queue.job()
        assert job.body == body
        queue.answer(job, b"{}")
        assert (await answer.done()).status == 200


async def test_a_tenant_has_limits_of_its_own() -> None:
    """[E2] 100,000 choices are refused for all; a setting raises the limit of one tenant."""
    queue = FakeQueue("m")
    keys = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in ("acme", "rival"))
    limits = '{"acme": {"max_choices": 200}}'
    async with router(queue, api_keys=keys, tenant_limits=limits) as app:
        client = Client(app)
        for who, n, passes in (("rival", 128, True), ("rival", 129, False), ("acme", 200, True), ("acme", 201, False)):
            fields = {"model": "m", "messages": [], "n": n}
            answer = client.post(fields, headers={"authorization": f"Bearer {who}"})
            if passes:
                queue.answer(await queue.job(), b"{}")
            await answer.done()
            assert answer.status == (200 if passes else 400), (who, n)
            assert passes or "max_choices" in answer.error["message"]


@pytest.mark.parametrize("wrong", ['{"a": {"max_choice": 1}}', '{"a": {"max_choices": 0}}', "[1]", "{"])
def test_wrong_limits_are_refused_at_the_start(wrong: str) -> None:
    """[E2] With the field at fault."""
    with pytest.raises(CannotStart, match="tenant_limits"):
        RouterSettings.load(tenant_limits=wrong)


def test_the_settings_are_shared_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """[E1] One variable for Routers, batchers and workers."""
    monkeypatch.setenv("INFERQ_MEDIA_DOMAINS", "a.example,b.example")
    monkeypatch.setenv("INFERQ_TENANT_LIMITS", '{"acme": {"max_entries": 5000}}')
    settings = RouterSettings.load()
    assert settings.media_domains == ["a.example", "b.example"]
    assert settings.limits_of("acme").entries == 5000
    assert settings.limits_of("rival").entries == 2048
