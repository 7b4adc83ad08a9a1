"""What tests of models and adapters ask of a fleet."""

from __future__ import annotations

import json
from typing import Any

from queue_schemas import FABRIC_PREFIX
from tests.support.fleet import Fleet
from tests.support.sse import read_data


async def answered(fleet: Fleet, model: str, tokens: int = 5) -> str:
    """A whole answer of ``model``, as text."""
    body = {"model": model, "max_tokens": tokens, "stream": True, "messages": [{"role": "user", "content": "go on"}]}
    text, finished = "", False
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for data in read_data(answer):
            if data != "[DONE]":
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                finished = finished or any(choice["finish_reason"] for choice in chunk["choices"])
    assert finished
    return text


async def fleet_now(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """The workers as the Manager lists them."""
    workers = (await fleet.manager.page(f"{FABRIC_PREFIX}/workers"))["workers"]
    return {worker["worker_id"]: worker for worker in workers}
