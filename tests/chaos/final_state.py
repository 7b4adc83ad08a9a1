"""Record the state after a run: what is left on the queue, in the logs and among the dead letters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from queue_schemas import InferqError, Job
from queue_schemas.keys import ShardKeys
from tests.support.queue import live_counts
from tests.support.waiting import eventually

from . import logs
from .fleet import DUPLICATE, FENCED, ChaosFleet
from .stream_garbage import ATTEMPTS

QUIET_LIMIT_S = 30.0
_KEYS = ShardKeys(0)
_PAGES = ("/metrics", "/v1/models", "/fabric/v1/workers", "/fabric/v1/pools", "/status")
_STATES = ("done", "failed", "cancelled", "expired", "dead")


async def record(fleet: ChaosFleet) -> None:
    """Wait until nothing waits or runs any more, then add the state to the history."""
    _let_dead_routers_expire(fleet)
    with contextlib.suppress(AssertionError):
        await eventually(lambda: _is_empty(fleet), "the queue is empty", limit_s=QUIET_LIMIT_S, every_s=0.1)
    fleet.history.add("final", left={name: value for name, value in (await _left(fleet)).items() if value})
    for dead_letter in _dead_letters(fleet):
        fleet.history.add("dead_letter", **dead_letter)
    fleet.history.add("canaries", seen=await _canaries(fleet))
    logs.add_log_entries(fleet.history, fleet.roles)
    fleet.history.add("counts", counts=_counts(fleet))


def _let_dead_routers_expire(fleet: ChaosFleet) -> None:
    """Expire the reply streams of killed Routers now, instead of after a minute."""
    alive = {logs.session_of(router) for router in fleet.routers}
    for key in _keys(fleet, "reply:*"):
        if key.rpartition("reply:")[2] not in alive:
            fleet.server.ask("PEXPIRE", key, "1")


async def _is_empty(fleet: ChaosFleet) -> bool:
    return not any((await _left(fleet)).values())


async def _left(fleet: ChaosFleet) -> dict[str, Any]:
    ask = fleet.server.ask
    budget = {k.decode(): int(v) for k, v in ask("HGETALL", _KEYS.budget).items()}
    pages = [await worker.get("/status") for worker in fleet.workers]
    return {
        "ended by itself": [role.name for role in fleet.roles if not role.process.running],
        # Dead dead_letters keep their bytes, and so do answers that are kept for a key.
        "budget": {
            name: value
            for name, value in budget.items()
            if value and name != "dead:bytes" and not name.endswith(":persisted")
        },
        "waiting or leased": live_counts(ask("HGETALL", _KEYS.counters)),
        "queues": [key for pattern in ("q:*", "retry:*", "suspects:*") for key in _keys(fleet, pattern)],
        "leases": _keys(fleet, "leases:*"),
        "deadlines": int(ask("ZCARD", _KEYS.deadlines)),
        "lost": int(ask("ZCARD", _KEYS.lost)),
        "running": sum(json.loads(page)["running"] for status, page in pages if status == 200),
    }


def _keys(fleet: ChaosFleet, pattern: str) -> list[str]:
    return [key.decode() for key in fleet.server.ask("KEYS", _KEYS.prefix.replace("{", "[{]") + pattern)]


def _dead_letters(fleet: ChaosFleet) -> list[dict[str, Any]]:
    dead_letters = []
    fields: Mapping[bytes, bytes]
    for entry, fields in fleet.server.ask("XRANGE", _KEYS.dead, "-", "+"):
        request_id, allowed = "", ATTEMPTS
        with contextlib.suppress(InferqError):
            job = Job.unpack(fleet.server.ask("GET", _KEYS.dead_request(entry.decode())))
            request_id, allowed = job.request_id, job.max_attempts
        dead_letters.append(
            {
                "request_id": request_id,
                "attempts": int(fields[b"attempts"]),
                "allowed": allowed,
                "cause": fields[b"cause"].decode("utf-8", "replace"),
            }
        )
    return dead_letters


async def _canaries(fleet: ChaosFleet) -> list[str]:
    """Where a tenant's secret leaked: the logs and the pages of every role."""
    seen = [f"the log of {role.name}" for role in fleet.roles if logs.shows_canary(role)]
    for role in fleet.roles:
        for page in _PAGES:
            _, body = await role.get(page)
            if b"canary." in body:
                seen.append(f"{role.name}{page}")
    return seen


def _counts(fleet: ChaosFleet) -> dict[str, int]:
    counts: dict[str, int] = dict(logs.count(fleet.roles))
    links = (*fleet.worker_links, *fleet.router_links)
    answers = sum(link.seen[FENCED] for link in links)
    counts["fenced"] = answers + counts.get("declared dead", 0)
    counts["duplicate"] = sum(link.seen[DUPLICATE] for link in links)
    counts["replies lost"] = sum(link.replies_lost for link in links)
    totals = {k.decode(): int(v) for k, v in fleet.server.ask("HGETALL", _KEYS.counters).items()}
    for event in ("requeued", "lost", "enqueued", "yielded", *_STATES):
        counts[event] = sum(n for name, n in totals.items() if name.endswith(f":{event}"))
    counts["recovered"] = counts["requeued"] + counts["lost"]
    return counts
