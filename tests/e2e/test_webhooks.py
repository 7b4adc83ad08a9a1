"""Webhooks of batches and background responses, end to end: the unmodified ``openai`` SDK on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from inferq.client import RequestFailed
from inferq.webhooks import views as commands
from inferq.webhooks.client import WebhookClient
from tests.support.batches import BatchStorage, add_batcher
from tests.support.command_line import inferq
from tests.support.fleet import MODEL, Fleet
from tests.support.receiver import OK, Received, Receiver, receiving, status
from tests.support.servers import Server
from tests.support.waiting import eventually
from tests.support.webhooks import add_notifier

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY, RIVAL = "sk-of-acme", "sk-of-rival"
ALL: Any = ["batch.completed", "batch.failed", "response.completed", "response.incomplete", "response.cancelled"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(module_valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One fleet for all: two tenants, a worker, a batcher, a notifier that may send to loopback."""
    keys = ",".join(f"{hashlib.sha256(key.encode()).hexdigest()}:{key[6:]}" for key in (KEY, RIVAL))
    router = {"api_keys": keys, "webhooks_allow_http": True, "webhooks_allow_private": "127.0.0.0/8"}
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey, router=router) as fleet:
        fleet.session.headers["authorization"] = f"Bearer {KEY}"
        shelf = BatchStorage(fleet.folder / ".inferq" / "store")
        services = [add_batcher(fleet, shelf), add_notifier(fleet, shelf.folder)]
        for service in services:
            service.process.start()
        await fleet.up(workers=1, sim_mode="text", sim_answer_tokens=8)
        for service in services:
            await service.ready()
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """The SDK as its users make it, but for the retries, which would hide errors."""
    async with AsyncOpenAI(base_url=f"{fleet.router.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def told(client: AsyncOpenAI, receiver: Receiver, secret: str, object_id: str) -> list[str]:
    """The types of the events that came of one object, each of which the SDK must accept."""

    def came() -> list[Received]:
        return [request for request in receiver.got if json.loads(request.body)["data"]["id"] == object_id]

    found = await eventually(came, f"an event of {object_id} has come", limit_s=20)
    return [client.webhooks.unwrap(request.body, request.headers, secret=secret).type for request in found]


async def test_finished_batches_and_responses_send_webhooks(client: AsyncOpenAI, receiver: Receiver) -> None:
    """Batches and background responses, however they end, each once; of another tenant's, nothing."""
    endpoint = await client.webhooks.create(url=receiver.url, event_types=ALL, name="ours")
    secret = endpoint.signing_secret
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    good = json.dumps(line | {"body": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}}).encode()
    batches = []
    for content in (good, b"not json"):
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        batches.append(batch.id)
    whole = await client.responses.create(model=MODEL, input="hi", background=True)
    cut = await client.responses.create(model=MODEL, input="hi", background=True, max_output_tokens=2)
    async with AsyncOpenAI(base_url=str(client.base_url), api_key=RIVAL, max_retries=0) as rival:
        others = await rival.responses.create(model=MODEL, input="hi", background=True)
    assert await told(client, receiver, secret, batches[0]) == ["batch.completed"]
    assert await told(client, receiver, secret, batches[1]) == ["batch.failed"]
    assert await told(client, receiver, secret, whole.id) == ["response.completed"]
    assert await told(client, receiver, secret, cut.id) == ["response.incomplete"]
    assert not [request for request in receiver.got if others.id.encode() in request.body]
    await client.webhooks.delete(endpoint.id)


async def test_an_endpoint_is_kept_with_the_sdk(client: AsyncOpenAI, receiver: Receiver) -> None:
    """Made, listed, changed, rotated, tested and deleted with the SDK's own methods."""
    hooks = client.webhooks
    made = await hooks.create(url=receiver.url, event_types=ALL, name="ours")
    assert [one.id async for one in await hooks.list()] == [made.id]
    assert (await hooks.retrieve(made.id)).signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    assert (await hooks.update(made.id, name="theirs", event_types=ALL[:1])).name == "theirs"
    assert set(ALL) <= set((await hooks.event_types.list()).data)
    rotated = await hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    before = len(receiver.got)
    assert (await hooks.test(made.id, event_type="batch.expired")).status_code == 200
    sample = receiver.got[before]
    for secret in (made.signing_secret, rotated.signing_secret):
        assert hooks.unwrap(sample.body, sample.headers, secret=secret).type == "batch.expired"
    receiver.answer = lambda _: status("410 Gone")
    assert (await hooks.test(made.id, event_type="batch.failed")).status_code == 410
    receiver.answer = lambda _: OK
    with pytest.raises(openai.ConflictError, match="disabled"):
        await hooks.test(made.id, event_type="batch.failed")
    with pytest.raises(openai.BadRequestError, match="public internet"):
        await hooks.create(url="https://10.0.0.7/", event_types=ALL, name="inside")
    assert (await hooks.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await hooks.retrieve(made.id)


async def test_endpoints_on_the_command_line(
    fleet: Fleet, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    """The secret is all that `add` writes to standard output, and is in nothing else; what was sent is listed."""
    at = ("--router-url", fleet.router.url, "--api-key", KEY)
    code, secret, said = await inferq(fleet.folder, "webhooks", "add", receiver.url, "--events", "batch.failed", *at)
    assert (code, secret[:6], len(secret.split())) == (0, "whsec_", 1), said

    def client() -> WebhookClient:
        return WebhookClient(fleet.router.url, api_key=KEY)

    assert await commands.list_endpoints(client(), as_json=True) == 0
    (endpoint,) = json.loads(listed := capsys.readouterr().out)
    assert (endpoint["event_types"], secret.strip() in listed) == (["batch.failed"], False)
    name = endpoint["id"]
    assert await commands.test_endpoint(client(), name, "batch.failed", as_json=False) == 0
    assert await commands.set_enabled(client(), name, enabled=False, as_json=False) == 0
    assert await commands.set_enabled(client(), name, enabled=True, as_json=False) == 0
    assert await commands.list_endpoints(client(), as_json=False) == 0
    assert await commands.list_deliveries(client(), name, 5, as_json=False) == 0
    shown = capsys.readouterr().out
    for words in ("answered with HTTP 200", "status: disabled", "by its owner", "status: enabled", name, "delivered"):
        assert words in shown, words
    assert await commands.rotate_secret(client(), name, 60, as_json=False) == 0
    fresh = capsys.readouterr()
    assert (fresh.out[:6], "stays valid for 60 s" in fresh.err, secret.strip() in fresh.out) == ("whsec_", True, False)
    for wrong in ("nothing", "../x"):
        with pytest.raises(RequestFailed, match=r"no webhook endpoint|not the id of an endpoint"):
            await commands.show_endpoint(client(), wrong, as_json=False)
    assert await commands.remove_endpoint(client(), name, as_json=True) == 0
