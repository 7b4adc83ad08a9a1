"""The ``openai`` package for Node, as npm has it, against a real fleet (``make test-node``: needs node, npm and its
registry)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from queue_schemas import Tenant
from tests.support.batches import BatchStorage, add_batcher
from tests.support.fleet import MODEL, Fleet
from tests.support.servers import Server
from webhooks.core import signed_headers
from webhooks.endpoints import Secrets
from webhooks.events import WebhookEvent

HERE = Path(__file__).parent
pytestmark = pytest.mark.node


async def _run(*command: str, folder: Path, limit_s: float, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | environment, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(limit_s):
        output, _ = await process.communicate()
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}: {output.decode()}"
    return output.decode()


async def test_batches_with_the_node_sdk(tmp_path: Path, own_valkey: Server) -> None:
    """Upload, create, wait, read, list and be refused: with the SDK's types, as in Python."""
    for name in ("package.json", "package-lock.json", "batches.mjs"):
        shutil.copy(HERE / name, tmp_path)
    await _run("npm", "ci", "--no-audit", "--no-fund", folder=tmp_path, limit_s=90)
    (tmp_path / "fleet").mkdir()
    async with Fleet(tmp_path / "fleet", own_valkey) as fleet:
        batcher = add_batcher(fleet, BatchStorage(fleet.folder / ".inferq" / "store"))
        batcher.process.start()
        await fleet.up(workers=1)
        await batcher.ready()
        url = f"{fleet.router.url}/v1"
        text = await _run(
            "node", "batches.mjs", folder=tmp_path, limit_s=60,
            OPENAI_BASE_URL=url, OPENAI_API_KEY="any", MODEL=MODEL,
        )  # fmt: skip
    seen: dict[str, Any] = json.loads(text)
    assert (seen["first_status"], seen["status"]) == ("validating", "completed")
    assert seen["counts"] == {"total": 10, "completed": 10, "failed": 0}
    assert seen["metadata"] == {"from": "node"}
    assert seen["answers"] == {f"line-{n}": f"text of line-{n}" for n in range(10)}
    assert seen["failed"] == ["failed", [1]]
    assert seen["listed"] == [True, True, 2]
    assert seen["unknown"] == ["NotFoundError", 404, "batch_id"]
    assert seen["ended"][:2] == ["ConflictError", 409]
    assert seen["bad"] == ["BadRequestError", 400, "completion_window"]
    assert seen["deleted"] is True


async def test_webhooks_with_the_node_sdk(tmp_path: Path) -> None:
    """What is signed here is unwrapped there: with the secret, with the one before it, and with no other."""
    for name in ("package.json", "package-lock.json", "webhooks.mjs"):
        shutil.copy(HERE / name, tmp_path)
    await _run("npm", "ci", "--no-audit", "--no-fund", folder=tmp_path, limit_s=90)
    event = WebhookEvent.of(Tenant("acme"), "response.incomplete", "resp_1", 7)
    old = Secrets.fresh(0)
    new = old.rotated(0, 60_000)
    headers = signed_headers(event.id, int(time.time()), event.body(), new.in_force(1))
    sent = {"body": event.body().decode(), "headers": headers}
    given = [sent | {"secret": keys.current} for keys in (old, new, Secrets.fresh(0))]
    text = await _run("node", "webhooks.mjs", json.dumps(given), folder=tmp_path, limit_s=20)
    assert json.loads(text) == ["response.incomplete", "response.incomplete", "InvalidWebhookSignatureError"]


async def test_background_responses_with_the_node_sdk(tmp_path: Path, own_valkey: Server) -> None:
    """Created, polled, streamed and gone on with, cancelled, deleted, refused: with the SDK's types, as in Python."""
    for name in ("package.json", "package-lock.json", "responses.mjs"):
        shutil.copy(HERE / name, tmp_path)
    await _run("npm", "ci", "--no-audit", "--no-fund", folder=tmp_path, limit_s=90)
    (tmp_path / "fleet").mkdir()
    async with Fleet(tmp_path / "fleet", own_valkey) as fleet:
        await fleet.up(workers=1)
        text = await _run(
            "node", "responses.mjs", folder=tmp_path, limit_s=60,
            OPENAI_BASE_URL=f"{fleet.router.url}/v1", OPENAI_API_KEY="any", MODEL=MODEL,
        )  # fmt: skip
    seen: dict[str, Any] = json.loads(text)
    assert seen["polled"] == ["queued", "completed", {"from": "node"}, "Tell me."]
    assert seen["streamed"] == [True, True, "response.completed"]
    assert seen["items"] == ["message"]
    assert seen["cancelled"] == ["cancelled", "cancelled"]
    assert seen["deleted"][:2] == [True, 404]
    assert seen["refused"] == [True, 400, "previous_response_id"]
