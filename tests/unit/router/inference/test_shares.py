"""What a Router says of a request's share of its model: its cost, its tenant's weight, how urgent it may be."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from queue_schemas import BANDS, CannotStart, Job
from router import RouterSettings
from scheduling.cost import estimate_cost
from tests.unit.router.fakes import Client, FakeQueue, router

CHAT = "/v1/chat/completions"
LIMITS = '{"acme": {"weight": 4, "highest_band": 2}, "small": {"weight": 0.5}}'
KEYS = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in ("acme", "small", "other"))


async def queued(tenant: str, **fields: Any) -> Job:
    """The job of a chat with these fields."""
    queue = FakeQueue("m")
    async with router(queue, api_keys=KEYS, tenant_limits=LIMITS) as app:
        body = json.dumps({"model": "m", "messages": [], **fields}).encode()
        answer = Client(app).post(body, headers={"authorization": f"Bearer {tenant}"})
        job = await queue.job()
        queue.answer(job, b"{}")
        assert (await answer.done()).status == 200
        return job


async def test_a_job_says_what_it_costs() -> None:
    """By the estimate that the queue and the simulator share."""
    fields: dict[str, Any] = {"model": "m", "messages": [], "max_tokens": 700}
    body = json.dumps(fields).encode()
    assert (await queued("other", max_tokens=700)).cost_estimate == estimate_cost(CHAT, body, fields) > 1_400


@pytest.mark.parametrize(("tenant", "weight"), [("acme", 4.0), ("small", 0.5), ("other", 1.0)])
async def test_a_job_has_its_tenants_weight(tenant: str, weight: float) -> None:
    """And so has its envelope, as a worker reads it."""
    assert Job.unpack((await queued(tenant)).pack()).weight == weight


@pytest.mark.parametrize(("tenant", "priority", "band"), [("acme", -100, 2), ("acme", 5, 3), ("other", -100, 0)])
async def test_a_request_is_as_urgent_as_its_tenant_may_be(tenant: str, priority: int, band: int) -> None:
    """One that calls all its requests urgent gets ahead of nobody."""
    assert (await queued(tenant, priority=priority)).band == band


@pytest.mark.parametrize(
    "wrong", ['{"weight": 0}', '{"weight": -1}', '{"weight": 1e9}', f'{{"highest_band": {BANDS}}}']
)
def test_wrong_shares_are_refused_at_the_start(wrong: str) -> None:
    with pytest.raises(CannotStart, match="tenant_limits"):
        RouterSettings.load(tenant_limits=f'{{"acme": {wrong}}}')
