"""The queue's server: what it is, how it keeps its data, how far away it is."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from broker import Broker, BrokerSettings, ServerFacts
from queue_schemas import CannotStart, InferqError
from router import RouterSettings
from telemetry.files import absolute_path

from .findings import DoctorTarget, Finding, Level
from .host import nearest_folder

MAX_SKEW_MS = 1_000
SLOW_PING_MS = 20.0
MAX_SCANNED_BYTES = 256 << 20


async def check_queue(examined: DoctorTarget) -> list[Finding]:
    """Check the queue's Redis."""
    if not examined.redis_url:
        return await _embedded(examined)
    settings = BrokerSettings.load(redis_url=examined.redis_url, retry_limit_ms=2_000)
    durability = RouterSettings.load().durability
    try:
        broker = await Broker.connect(settings, durability=durability)
    except InferqError as error:
        fix = "check INFERQ_REDIS_URL, the server and the network between"
        return [Finding("queue", Level.FAILURE, error.message, fix if error.retryable else "")]
    try:
        ping_ms = min([await broker.ping() for _ in range(5)])
        before_ms = time.time_ns() // 1_000_000
        facts = await broker.facts()
        after_ms = time.time_ns() // 1_000_000
    except InferqError as error:
        return [Finding("queue", Level.FAILURE, error.message, "look at the log of the Redis server")]
    finally:
        await broker.close()
    findings = _about_server(facts, ping_ms)
    if durability == "disk":
        findings.append(Finding("queue", Level.OK, "it says when a write is on its disk, as durability = disk needs"))
    return [*findings, about_clock(facts.server_time_ms, before_ms, after_ms)]


def _about_server(facts: ServerFacts, ping_ms: float) -> list[Finding]:
    kept = f"append-only file, fsync {facts.appendfsync or 'unknown'}" if facts.appendonly else "not persistent"
    policy = facts.maxmemory_policy or "unknown"
    text = f"{facts.kind} {facts.version}, {facts.role}, {kept}, maxmemory-policy {policy}"
    findings = [Finding("queue", Level.OK, text)]
    for concern in facts.concerns:
        what, _, fix = concern.rpartition("; ")
        findings.append(Finding("queue", Level.WARNING, what or concern, fix if what else ""))
    slow = ping_ms > SLOW_PING_MS
    fix = "run it closer: each request needs four round trips or so" if slow else ""
    findings.append(Finding("queue", Level.WARNING if slow else Level.OK, f"a round trip takes {ping_ms:.1f} ms", fix))
    return findings


def about_clock(server_ms: int, before_ms: int, after_ms: int) -> Finding:
    """How far this machine's clock is from the server's, which was asked between ``before_ms`` and ``after_ms``."""
    skew_ms = 0 if before_ms <= server_ms <= after_ms else min(abs(server_ms - before_ms), abs(server_ms - after_ms))
    if skew_ms > MAX_SKEW_MS:
        text = f"this machine's clock is {skew_ms / 1000:.1f} s off the queue server's"
        fix = "run NTP on both; deadlines and leases do not depend on it, timestamps in logs and answers do"
        return Finding("clock", Level.WARNING, text, fix)
    return Finding("clock", Level.OK, f"within {max(skew_ms, after_ms - before_ms)} ms of the queue server's")


async def _embedded(examined: DoctorTarget) -> list[Finding]:
    from broker.embedded.server import find_binary  # noqa: PLC0415 - needs a POSIX system

    try:
        binary = find_binary()
    except InferqError as error:
        return [Finding("queue", Level.FAILURE, error.message, "set INFERQ_REDIS_URL")]
    folder = nearest_folder(examined.data_dir)
    if not os.access(folder, os.W_OK):
        return [Finding("queue", Level.FAILURE, f"{folder} is not writable", "choose another --data-dir")]
    used = Finding("queue", Level.OK, "no INFERQ_REDIS_URL: the embedded Valkey is used; good for one machine")
    return [used, *await asyncio.to_thread(_look_at_log, absolute_path(examined.data_dir) / "valkey", binary)]


def _look_at_log(folder: Path, binary: Path) -> list[Finding]:
    """Whether the embedded queue's data can be read, where no server has them open."""
    from broker.embedded.data_folder import DataFolder  # noqa: PLC0415 - needs a POSIX system
    from broker.embedded.queue_log import QueueLog  # noqa: PLC0415

    files = QueueLog(folder / "aof")
    if not files.folder.is_dir() or DataFolder(folder).in_use:
        return []
    if problem := files.manifest_problem or files.base_problem(binary):
        return [Finding("queue", Level.FAILURE, f"the embedded queue's {problem}", files.restore_advice)]
    if files.size > MAX_SCANNED_BYTES:
        text = f"the embedded queue's append-only file has {files.size} bytes: too many to be looked through here"
        return [Finding("queue", Level.OK, text)]
    damage = files.find_damage()
    if damage is None:
        return [Finding("queue", Level.OK, f"the embedded queue's data ({files.size} bytes) can be read")]
    text = files.describe(damage)
    if files.is_repaired_by_valkey(damage):
        fix = f"the next start cuts off {damage.bytes_cut} bytes there and keeps the file as it was, too"
        return [Finding("queue", Level.WARNING, text, fix)]
    return [Finding("queue", Level.FAILURE, text, files.remedy)]


def repair_queue(data_dir: Path) -> str:
    """Cut the embedded queue's file at its first damage; what was done, as a sentence. Raises ``CannotStart``."""
    from broker.embedded.data_folder import DataFolder  # noqa: PLC0415 - needs a POSIX system
    from broker.embedded.queue_log import QueueLog  # noqa: PLC0415
    from broker.embedded.server import find_binary  # noqa: PLC0415

    folder = DataFolder(absolute_path(data_dir) / "valkey")
    files = QueueLog(folder.path / "aof")
    if not files.folder.is_dir():
        raise CannotStart(f"there is no embedded queue in {folder.path}: check --data-dir")
    folder.acquire()
    try:
        restored = files.restore_manifest()
        repaired = files.repair(find_binary(), cut_commands=True)
    finally:
        folder.release()
    if repaired is None:
        return restored or "the embedded queue's data can be read: nothing was changed"
    return f"cut off {repaired.bytes_cut} bytes of {repaired.path}; as it was it is kept as {repaired.backup}"
