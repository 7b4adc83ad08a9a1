"""What an operator sees: pages, metrics, logs and traces of a real fleet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fleet import MODEL, Fleet, Role
from tests.support.load import DIMENSIONS, Load
from tests.support.servers import Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(module_valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """A fleet that has served some requests."""
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey) as fleet:
        await fleet.up(workers=2, sim_embedding_dimensions=DIMENSIONS)
        load = Load(fleet.router.url, 50, 5)
        await load.run()
        assert load.wrong == []
        yield fleet


def roles(fleet: Fleet) -> list[Role]:
    """Every process of the fleet."""
    return [fleet.manager, fleet.router, *fleet.workers]


async def metrics(role: Role) -> dict[str, float]:
    """The metrics page, parsed as Prometheus would: name with labels -> value."""
    found = {}
    for family in text_string_to_metric_families(await role.metrics()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def test_every_role_has_health_readiness_and_metrics(fleet: Fleet) -> None:
    """The three pages, and metrics that Prometheus can read."""
    for role in roles(fleet):
        assert (await role.get("/healthz"))[0] == 200
        assert (await role.get("/readyz"))[0] == 200
        page = await metrics(role)
        assert any(name.startswith("inferq_") for name in page), role.name


async def test_requests_are_counted_once(fleet: Fleet) -> None:
    """What the Router counts as served is what clients got, what workers ran adds up to it."""
    router = await metrics(fleet.router)
    served = sum(
        value for name, value in router.items() if name.startswith("inferq_requests_total") and "code=200" in name
    )
    assert served >= 50
    attempts = 0.0
    for worker in fleet.workers:
        page = await metrics(worker)
        attempts += sum(value for name, value in page.items() if name.startswith("inferq_attempts_total{"))
    assert attempts == 50


async def test_waits_and_times_to_the_first_token_are_measured(fleet: Fleet) -> None:
    """Histograms have as many observations as there were requests and streams."""
    router = await metrics(fleet.router)
    assert sum(value for name, value in router.items() if name.startswith("inferq_ttft_seconds_count")) > 0
    waits = 0.0
    for worker in fleet.workers:
        page = await metrics(worker)
        waits += sum(value for name, value in page.items() if name.startswith("inferq_queue_wait_seconds_count"))
    assert waits == 50


async def test_the_pools_page_tells_autoscalers(fleet: Fleet) -> None:
    """Workers, slots, waiting and leased, the same from Router and Manager, in every lane."""
    for role in (fleet.router, fleet.manager):
        pool = await role.page(f"/fabric/v1/pools/{MODEL}")
        assert (pool["model"], pool["workers"], pool["waiting"], pool["leased"]) == (MODEL, 2, 0, 0)
        assert pool["slots"] == 64
        assert set(pool["lanes"]) == {"interactive", "background", "batch"}


async def test_the_workers_page_lists_the_fleet(fleet: Fleet) -> None:
    """Router and Manager show the same workers, active, with their engine ready."""
    pages = [await role.page("/fabric/v1/workers") for role in (fleet.router, fleet.manager)]
    for page in pages:
        assert {worker["worker_id"] for worker in page["workers"]} == {"worker-1", "worker-2"}
        assert {(worker["state"], worker["engine"]) for worker in page["workers"]} == {("active", "ready")}


async def test_the_depth_of_a_waiting_queue_is_seen(fleet: Fleet) -> None:
    """Requests for a model whose worker left wait, and the page and the metrics say how many and for how long."""
    lonely = await fleet.worker("lonely", model="lonely").start()
    await fleet.until_served(1, "lonely")
    async with fleet.session.post(f"{fleet.router.url}/fabric/v1/workers/lonely/drain") as answer:
        assert answer.status == 202
    assert await lonely.ended() == 0
    await fleet.until_served(0, "lonely")
    body = {"model": "lonely", "messages": [{"role": "user", "content": "x"}]}
    waiting = [
        asyncio.create_task(fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body).__aenter__())
        for _ in range(3)
    ]

    async def seen() -> bool:
        pool = await fleet.depth("lonely")
        return bool(pool["waiting"] == pool["outstanding"] == 3 and pool["oldest_age_ms"] > 100)

    await eventually(seen, "three wait")

    async def measured() -> bool:
        page = await metrics(fleet.manager)
        return any(
            name.startswith("inferq_jobs{") and "model=lonely" in name and "state=waiting" in name and value == 3
            for name, value in page.items()
        )

    await eventually(measured, "the metric says three")
    await fleet.worker("lonely-again", model="lonely").start()
    for answer in await asyncio.gather(*waiting):
        assert answer.status == 200
        answer.close()


async def test_log_lines_are_json_and_carry_ids(fleet: Fleet) -> None:
    """Every line of every role is a JSON object; a request can be followed by its id through Router and worker."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "sim": {"fail": "500", "times": 1}}
    url = f"{fleet.router.url}/v1/chat/completions"
    async with fleet.session.post(url, json=body, headers={"x-request-id": "follow-me-1"}) as answer:
        assert answer.headers["x-request-id"] == "follow-me-1"
    for role in roles(fleet):
        for line in role.process.log_text().splitlines():
            assert isinstance(json.loads(line), dict), line
    lines = [json.loads(line) for role in roles(fleet) for line in role.process.log_text().splitlines()]
    assert any(line.get("request_id") == "follow-me-1" for line in lines)


async def test_every_page_of_ours_is_documented(fleet: Fleet) -> None:
    """The OpenAPI document of Router and Manager names the fabric's paths and the models'."""
    for role, paths in (
        (fleet.router, {"/v1/models", "/fabric/v1/pools", "/fabric/v1/workers"}),
        (fleet.manager, {"/fabric/v1/pools", "/fabric/v1/workers"}),
    ):
        document = await role.page("/openapi.json")
        assert paths <= set(document["paths"])
