"""When all is over: what is left on the queue, in the logs and among the dead letters goes into the history."""

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
from .junk import ATTEMPTS
from .stage import DUPLICATE, FENCED, Stage

QUIET_LIMIT_S = 30.0
_KEYS = ShardKeys(0)
_PAGES = ("/metrics", "/v1/models", "/fabric/v1/workers", "/fabric/v1/pools", "/status")
_STATES = ("done", "failed", "cancelled", "expired", "dead")


async def look(stage: Stage) -> None:
    """Wait until nothing waits or runs any more, and write down what was found."""
    _let_dead_routers_expire(stage)
    with contextlib.suppress(AssertionError):
        await eventually(lambda: _is_empty(stage), "the queue is empty", limit_s=QUIET_LIMIT_S, every_s=0.1)
    stage.history.add("final", left={name: value for name, value in (await _left(stage)).items() if value})
    for letter in _letters(stage):
        stage.history.add("letter", **letter)
    stage.history.add("canaries", seen=await _canaries(stage))
    logs.add_said(stage.history, stage.roles)
    stage.history.add("counts", counts=_counts(stage))


def _let_dead_routers_expire(stage: Stage) -> None:
    """The reply streams of killed Routers live for a minute; that much time is passed over."""
    alive = {logs.session_of(router) for router in stage.routers}
    for key in _keys(stage, "reply:*"):
        if key.rpartition("reply:")[2] not in alive:
            stage.server.ask("PEXPIRE", key, "1")


async def _is_empty(stage: Stage) -> bool:
    return not any((await _left(stage)).values())


async def _left(stage: Stage) -> dict[str, Any]:
    ask = stage.server.ask
    budget = {k.decode(): int(v) for k, v in ask("HGETALL", _KEYS.budget).items()}
    pages = [await worker.get("/status") for worker in stage.workers]
    return {
        "ended by itself": [role.name for role in stage.roles if not role.process.running],
        # Dead letters keep their bytes, and so do answers that are kept for a key.
        "budget": {
            name: value
            for name, value in budget.items()
            if value and name != "dead:bytes" and not name.endswith(":persisted")
        },
        "waiting or leased": live_counts(ask("HGETALL", _KEYS.counters)),
        "queues": [key for pattern in ("q:*", "retry:*", "suspects:*") for key in _keys(stage, pattern)],
        "leases": _keys(stage, "leases:*"),
        "deadlines": int(ask("ZCARD", _KEYS.deadlines)),
        "lost": int(ask("ZCARD", _KEYS.lost)),
        "running": sum(json.loads(page)["running"] for status, page in pages if status == 200),
    }


def _keys(stage: Stage, pattern: str) -> list[str]:
    return [key.decode() for key in stage.server.ask("KEYS", _KEYS.prefix.replace("{", "[{]") + pattern)]


def _letters(stage: Stage) -> list[dict[str, Any]]:
    letters = []
    fields: Mapping[bytes, bytes]
    for entry, fields in stage.server.ask("XRANGE", _KEYS.dead, "-", "+"):
        request_id, allowed = "", ATTEMPTS
        with contextlib.suppress(InferqError):
            job = Job.unpack(stage.server.ask("GET", _KEYS.dead_request(entry.decode())))
            request_id, allowed = job.request_id, job.max_attempts
        letters.append(
            {
                "request_id": request_id,
                "attempts": int(fields[b"attempts"]),
                "allowed": allowed,
                "cause": fields[b"cause"].decode("utf-8", "replace"),
            }
        )
    return letters


async def _canaries(stage: Stage) -> list[str]:
    """Where a tenant's secret can be seen that should be seen nowhere: logs, and the pages of every role."""
    seen = [f"the log of {role.name}" for role in stage.roles if logs.shows_canary(role)]
    for role in stage.roles:
        for page in _PAGES:
            _, body = await role.get(page)
            if b"canary." in body:
                seen.append(f"{role.name}{page}")
    return seen


def _counts(stage: Stage) -> dict[str, int]:
    counts: dict[str, int] = dict(logs.count(stage.roles))
    links = (*stage.worker_links, *stage.router_links)
    answers = sum(link.seen[FENCED] for link in links)
    counts["fenced"] = answers + counts.get("declared dead", 0)
    counts["duplicate"] = sum(link.seen[DUPLICATE] for link in links)
    counts["replies lost"] = sum(link.replies_lost for link in links)
    totals = {k.decode(): int(v) for k, v in stage.server.ask("HGETALL", _KEYS.counters).items()}
    for event in ("requeued", "lost", "enqueued", *_STATES):
        counts[event] = sum(n for name, n in totals.items() if name.endswith(f":{event}"))
    counts["recovered"] = counts["requeued"] + counts["lost"]
    return counts
