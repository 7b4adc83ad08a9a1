"""A live fleet that is told well-typed nonsense: over HTTP, and in the streams of Redis."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from queue_schemas import new_job_id
from queue_schemas.keys import MANAGER
from tests.support.extremes import Call, control_calls, control_entries, reply_entries
from tests.support.fleet import MODEL, Fleet
from tests.support.waiting import eventually

CALLS, ENTRIES = 120, 120
LIMIT_S = 10.0
bounded = settings(
    derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
)


async def answer(fleet: Fleet) -> tuple[int, Any]:
    """What a client gets."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as response:
        page = await response.json()
        return response.status, page["choices"][0]["message"]["content"] if "choices" in page else page


async def serves_as_before(fleet: Fleet) -> None:
    """Requests are answered by the same worker process, and no role has a bug to tell of."""
    await eventually(lambda: _registered(fleet), "the worker is registered and active", limit_s=LIMIT_S)
    assert await answer(fleet) == (200, "hello")
    roles = (fleet.manager, fleet.router, *fleet.workers)
    assert all(role.process.running for role in roles)
    assert "Traceback" not in "".join(role.process.log_text() for role in roles)


async def _registered(fleet: Fleet) -> bool:
    mine = await fleet.workers[0].page("/status")
    listed = (await fleet.manager.page("/fabric/v1/workers"))["workers"]
    return mine["ready"] and any(
        worker["session_id"] == mine["session_id"] and worker["models"] == [MODEL] for worker in listed
    )


async def test_extreme_messages_end_nothing(fleet: Fleet) -> None:
    """[A2] Registrations, heartbeats and other calls in the live worker's name, and entries of its control stream and
    of the Router's reply stream, with extreme values: what is out of bounds is refused by name, terms stay, and the
    fleet serves on, also once its Manager starts again on the same data."""
    await fleet.up(workers=1)
    status = await fleet.workers[0].page("/status")
    session_id, term = status["session_id"], int(fleet.server.ask("HGET", MANAGER, "term"))
    running = {"slots": 32, "models": [MODEL], "engine": "ready", "running": 0, "term": term}
    answered = Counter[int]()

    @settings(bounded, max_examples=CALLS)
    @given(control_calls("worker-1", session_id, running), st.booleans())
    def call(made: Call, by_router: bool) -> None:
        url = (fleet.router if by_router else fleet.manager).url + made.path
        # Not by requests' own encoder: it knows no number of 400 digits.
        body = None if made.body is None else json.dumps(made.body).replace("\ud800", "")
        response = requests.request(
            made.method, url, data=body, headers={"content-type": "application/json"} if body else {}, timeout=LIMIT_S
        )
        answered[response.status_code] += 1
        assert response.status_code in (200, 202, 204, 400, 404, 405, 409, 410, 413, 503), response.text
        if response.status_code == 400:
            assert response.json()["error"]["message"]

    def enter() -> None:
        streams = {kind: fleet.server.ask("KEYS", f"*:{kind}:*")[0] for kind in ("ctl", "reply")}
        jobs = [new_job_id(0) for _ in range(2)]

        @settings(bounded, max_examples=ENTRIES)
        @given(st.one_of(
            control_entries(jobs).map(lambda entry: ("ctl", entry)),
            reply_entries(jobs).map(lambda entry: ("reply", entry)),
        ))  # fmt: skip
        def add(made: tuple[str, dict[str, bytes]]) -> None:
            kind, entry = made
            fields = [part for pair in entry.items() for part in pair]
            fleet.server.ask("XADD", streams[kind], "NOMKSTREAM", "*", *fields)

        add()

    await asyncio.to_thread(call)
    assert answered[400] > CALLS / 10
    assert answered[200] > 5
    await serves_as_before(fleet)
    assert int(fleet.server.ask("HGET", MANAGER, "term")) == term
    await asyncio.to_thread(enter)
    await serves_as_before(fleet)
    fleet.manager.process.kill()
    await fleet.manager.start()
    await serves_as_before(fleet)
    assert (await fleet.workers[0].page("/status"))["session_id"] == session_id


async def test_a_fleet_comes_back_from_a_poisoned_store(fleet: Fleet) -> None:
    """[A2] Redis holds a term that an older version took from a message: a Manager acts on it at once, and the worker,
    which follows that term, follows the new one as the same run."""
    await fleet.up(workers=1)
    before = (await fleet.workers[0].page("/status"))["session_id"]
    fleet.manager.process.kill()
    fleet.server.ask("HSET", MANAGER, "term", str(2**63), "until", "0")
    await fleet.manager.start()
    await serves_as_before(fleet)
    status = await fleet.workers[0].page("/status")
    assert status["session_id"] == before
    assert status["assignment"][0] == int(fleet.server.ask("HGET", MANAGER, "term")) == 1
