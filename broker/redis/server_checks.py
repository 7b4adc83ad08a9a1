"""Read what a Redis server says of itself, and check that it can hold the queue: for start-up and health checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from queue_schemas import BrokerUnavailable, BrokerUnsuitable
from queue_schemas.keys import META

from .calls import Caller, pairs
from .failures import FAILURES, UNREACHABLE, as_inferq_error

CONTRACT = "2"
"""Version of the keys and scripts; a fabric of another one must not share the data. Raise it whenever the scripts
before cannot read what these write, or the reverse: a record with more fields is no job to them, and is dropped."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says of itself. ``concerns`` are sentences about what is allowed but unwise."""

    kind: str
    version: str
    role: str
    maxmemory_policy: str
    appendonly: bool
    appendfsync: str
    has_waitaof: bool
    """Whether the server can say when a write is on its disk."""
    server_time_ms: int
    concerns: tuple[str, ...] = field(default=())


_OLDEST = {"redis": (7, 0), "valkey": (8, 0)}


async def read_facts(caller: Caller, key: str = META) -> ServerFacts:
    """Ask the server that holds ``key``, once. Raises ``BrokerUnavailable`` or ``BrokerUnsuitable``."""
    info = _parse_info(await caller.once(key, "INFO"))
    kind = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info.get("redis_version", "0")
    seconds, micros = await caller.once(key, "TIME")
    appendonly = info.get("aof_enabled") == "1"
    appendfsync = await _config(caller, key, "appendfsync") if appendonly else ""
    policy = info.get("maxmemory_policy") or await _config(caller, key, "maxmemory-policy")
    concerns = []
    if not appendonly:
        concerns.append("the append-only file is off: a restart of Redis loses waiting jobs; set appendonly yes")
    elif appendfsync == "no":
        concerns.append("appendfsync is no: a crash of the machine can lose many seconds; set appendfsync everysec")
    if info.get("aof_last_write_status", "ok") != "ok":
        concerns.append("the last write of the append-only file failed: check the disk of the Redis server")
    return ServerFacts(
        kind,
        version,
        info.get("role", "master"),
        policy,
        appendonly,
        appendfsync,
        kind == "valkey" or _version(version) >= (7, 2),
        int(seconds) * 1000 + int(micros) // 1000,
        tuple(concerns),
    )


def require_suitable(facts: ServerFacts) -> None:
    """Raise ``BrokerUnsuitable``, saying how to correct it, unless the server can carry the queue."""
    oldest = _OLDEST[facts.kind]
    if _version(facts.version) < oldest:
        wanted = ".".join(map(str, oldest))
        raise BrokerUnsuitable(
            f"{facts.kind} {facts.version} is too old for the queue; use {facts.kind} {wanted} or newer"
        )
    if facts.role not in ("master", "primary"):
        raise BrokerUnsuitable(
            "this Redis is a read-only replica; point INFERQ_REDIS_URL at the primary, or at Sentinel"
        )
    if facts.maxmemory_policy not in ("", "noeviction"):
        raise BrokerUnsuitable(
            f"maxmemory-policy is {facts.maxmemory_policy}: Redis would evict waiting jobs; "
            "set maxmemory-policy noeviction"
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


async def check_deployment(caller: Caller, shards: int) -> None:
    """Write the deployment's constants at the first start, compare them at every other. Raises ``BrokerUnsuitable``."""
    for name, value in (("shards", str(shards)), ("contract", CONTRACT)):
        # Read first: a server whose memory is full takes no write, and must still be joined by those who empty it.
        held = await caller.command(META, "HGET", META, name)
        if held is None:
            await caller.command(META, "HSETNX", META, name, value)
            held = await caller.command(META, "HGET", META, name)
        found = held.decode()
        if found != value:
            other = f"set {name} to {found}" if name == "shards" else "run the version of inferq that made it"
            raise BrokerUnsuitable(
                f"the data in this Redis was made with {name}={found}, this process has {name}={value}; "
                f"{other}, or drain the fleet and use an empty Redis"
            )


async def read_run_id(caller: Caller, key: str) -> str:
    """The run id of the server that holds ``key``, which changes at every restart; empty if it does not report
    it. One try; raises ``BrokerUnavailable``."""
    caller.round_trips += 1
    try:
        info = await caller.link.command(key, "INFO", "server")
    except UNREACHABLE as error:
        raise as_inferq_error(error) from error
    except FAILURES:
        return ""
    return _parse_info(info).get("run_id", "")


async def _config(caller: Caller, key: str, name: str) -> str:
    """One CONFIG value; empty where the server does not let us read it (managed services)."""
    try:
        reply = await caller.once(key, "CONFIG", "GET", name)
    except (BrokerUnsuitable, BrokerUnavailable):
        return ""
    values = {_text(k): _text(v) for k, v in pairs(reply)}
    return values.get(name, "")


def _parse_info(reply: Any) -> dict[str, str]:
    if isinstance(reply, dict):
        return {_text(name): _text(value) for name, value in reply.items()}
    lines = (line.partition(":") for line in _text(reply).splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
