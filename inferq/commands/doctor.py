"""``inferq doctor``: looks at what the fabric needs, and says how to mend what it finds."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import aiohttp
from rich.markup import escape
from rich.table import Table

from broker import Broker, BrokerSettings, ServerFacts
from inferq.client import FabricClient, FabricRefused
from inferq.console import out, print_json
from inferq.vllm_setup import DEFAULT_MODEL, SetupFailed, find_default_model, find_vllm, plan_setup
from inferq.vllm_setup.environment import read_host
from manager.settings import ManagerSettings
from queue_schemas import CannotStart, InferqError
from router.settings import RouterSettings
from worker.settings import WorkerSettings

LEAST_FILES = 4096
LEAST_DISK_BYTES, COMFORTABLE_DISK_BYTES = 1 << 30, 5 << 30
MOST_SKEW_MS = 1_000
SLOW_PING_MS = 20.0
_CHECK_LIMIT_S = 15.0
_ASK_LIMIT_S = 3.0


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found; ``mend`` says what to do about it, and is empty when all is well."""

    check: str
    level: Level
    text: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Examined:
    """What is looked at."""

    redis_url: str
    client: FabricClient
    data_dir: Path
    engine_url: str = ""


async def examine(examined: Examined) -> list[Finding]:
    """Every finding, in the order in which a person would want to read them. Never raises for what it finds."""
    checks: list[tuple[str, Callable[[], Awaitable[Sequence[Finding]]]]] = [
        ("python", _python),
        ("settings", _settings),
        ("queue", lambda: _queue(examined)),
        ("ports", _ports),
        ("engine", lambda: _engine(examined)),
        ("files", _files),
        ("disk", lambda: _disk(examined)),
        ("fabric", lambda: _fabric(examined)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            async with asyncio.timeout(_CHECK_LIMIT_S):
                findings += await check()
        except CannotStart:
            continue  # a setting is wrong, which the look at the settings has told
        except TimeoutError:
            findings.append(
                Finding(name, Level.FAILURE, f"no result within {_CHECK_LIMIT_S:.0f} s", "look at the host")
            )
    return findings


def show_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print them; the exit code: 1 if something must be mended."""
    worst = any(finding.level is Level.FAILURE for finding in findings)
    if as_json:
        print_json({"ok": not worst, "findings": [asdict(finding) for finding in findings]})
        return int(worst)
    marks = {Level.OK: "[green]ok[/green]", Level.WARNING: "[yellow]look[/yellow]", Level.FAILURE: "[red]mend[/red]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        text = escape(finding.text) + (f"\n[dim]-> {escape(finding.mend)}[/dim]" if finding.mend else "")
        table.add_row(marks[finding.level], finding.check, text)
    out.print(table)
    return int(worst)


async def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", Level.WARNING, f"Python {version} is untested", "use Python 3.11 to 3.13")]
    return [Finding("python", Level.OK, f"Python {version}")]


async def _settings() -> list[Finding]:
    from .settings import read_facts  # noqa: PLC0415 - the roles' settings are loaded here only

    try:
        facts = read_facts()
    except CannotStart as error:
        return [Finding("settings", Level.FAILURE, error.message, "correct it; `inferq config` shows every setting")]
    changed = sum(1 for fact in facts if fact.origin != "default")
    return [Finding("settings", Level.OK, f"{len(facts)} settings read, {changed} of them not at their default")]


async def _queue(examined: Examined) -> list[Finding]:
    if not examined.redis_url:
        return _embedded(examined)
    settings = BrokerSettings.load(redis_url=examined.redis_url, retry_limit_ms=2_000)
    try:
        broker = await Broker.connect(settings)
    except InferqError as error:
        mend = "check INFERQ_REDIS_URL, the server and the network between"
        return [Finding("queue", Level.FAILURE, error.message, mend if error.retryable else "")]
    try:
        ping_ms = min([await broker.ping() for _ in range(5)])
        before_ms = time.time_ns() // 1_000_000
        facts = await broker.facts()
        after_ms = time.time_ns() // 1_000_000
    except InferqError as error:
        return [Finding("queue", Level.FAILURE, error.message, "look at the log of the Redis server")]
    finally:
        await broker.close()
    return [*_about_server(facts, ping_ms), about_clock(facts.server_time_ms, before_ms, after_ms)]


def _about_server(facts: ServerFacts, ping_ms: float) -> list[Finding]:
    kept = f"append-only file, fsync {facts.appendfsync or 'unknown'}" if facts.appendonly else "not persistent"
    policy = facts.maxmemory_policy or "unknown"
    text = f"{facts.kind} {facts.version}, {facts.role}, {kept}, maxmemory-policy {policy}"
    findings = [Finding("queue", Level.OK, text)]
    for concern in facts.concerns:
        what, _, mend = concern.rpartition("; ")
        findings.append(Finding("queue", Level.WARNING, what or concern, mend if what else ""))
    slow = ping_ms > SLOW_PING_MS
    mend = "run it closer: each request needs four round trips or so" if slow else ""
    findings.append(Finding("queue", Level.WARNING if slow else Level.OK, f"a round trip takes {ping_ms:.1f} ms", mend))
    return findings


def about_clock(server_ms: int, before_ms: int, after_ms: int) -> Finding:
    """How far this machine's clock is from the server's, which was asked between ``before_ms`` and ``after_ms``."""
    skew_ms = 0 if before_ms <= server_ms <= after_ms else min(abs(server_ms - before_ms), abs(server_ms - after_ms))
    if skew_ms > MOST_SKEW_MS:
        text = f"this machine's clock is {skew_ms / 1000:.1f} s off the queue server's"
        mend = "run NTP on both; deadlines and leases do not depend on it, timestamps in logs and answers do"
        return Finding("clock", Level.WARNING, text, mend)
    return Finding("clock", Level.OK, f"within {max(skew_ms, after_ms - before_ms)} ms of the queue server's")


def _embedded(examined: Examined) -> list[Finding]:
    from broker.embedded import find_binary  # noqa: PLC0415 - needs a POSIX system

    try:
        find_binary()
    except InferqError as error:
        return [Finding("queue", Level.FAILURE, error.message, "set INFERQ_REDIS_URL")]
    folder = _nearest(examined.data_dir)
    if not os.access(folder, os.W_OK):
        return [Finding("queue", Level.FAILURE, f"{folder} is not writable", "choose another --data-dir")]
    return [Finding("queue", Level.OK, "no INFERQ_REDIS_URL: the embedded Valkey is used; good for one machine")]


async def _ports() -> list[Finding]:
    roles = (("router", RouterSettings.load()), ("manager", ManagerSettings.load()))
    wanted = [(name, settings.host, settings.port) for name, settings in roles]
    fields = WorkerSettings.model_fields
    wanted.append(("worker", str(fields["host"].default), int(fields["port"].default)))
    findings = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_LIMIT_S)) as session:
        for name, host, port in wanted:
            findings.append(await _port(session, name, host, port))
    return findings


async def _port(session: aiohttp.ClientSession, name: str, host: str, port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.strerror
        else:
            return Finding("ports", Level.OK, f"{port} is free for the {name}")
    try:
        async with session.get(f"http://{host}:{port}/metrics") as answer:
            ours = b"inferq_" in await answer.read()
    except (aiohttp.ClientError, TimeoutError):
        ours = False
    if ours:
        return Finding("ports", Level.OK, f"{port} is served by an inferq process (the {name}'s port)")
    mend = f"stop what listens there, or start with another port (`inferq up --{name}-port`)"
    return Finding("ports", Level.WARNING, f"{port} is not free for the {name}: {taken}", mend)


async def _engine(examined: Examined) -> list[Finding]:
    if examined.engine_url:
        return [await _attached(examined.engine_url)]
    own = shutil.which("vllm")
    if own is not None:
        return [Finding("engine", Level.OK, f"vLLM on PATH: {own}")]
    prepared = find_vllm()
    if prepared is not None:
        model = "with" if find_default_model() else "without"
        return [Finding("engine", Level.OK, f"vLLM for the {prepared.kind} is prepared, {model} {DEFAULT_MODEL}")]
    try:
        plan_setup(read_host(), "")
    except SetupFailed as error:
        return [Finding("engine", Level.WARNING, error.message.partition("\n")[0], "use --engine sim or --engine-url")]
    return [Finding("engine", Level.OK, "vLLM is not prepared yet: `inferq up` or `inferq setup` does it")]


async def _attached(url: str) -> Finding:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_LIMIT_S)) as session,
            session.get(f"{url.rstrip('/')}/v1/models") as answer,
        ):
            status = answer.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        mend = "start that server, or correct --engine-url"
        return Finding("engine", Level.FAILURE, f"{url} does not answer ({error or 'time-out'})", mend)
    if status != 200:
        mend = "give the base URL of an OpenAI-compatible server, and its key as INFERQ_WORKER_ENGINE_API_KEY"
        return Finding("engine", Level.FAILURE, f"{url}/v1/models answers {status}", mend)
    return Finding("engine", Level.OK, f"{url} answers")


async def _files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        mend = f"raise it: ulimit -n {max(LEAST_FILES, 65_536)} (systemd: LimitNOFILE); each client takes one"
        return [Finding("files", Level.WARNING, f"this process may open {soft} files (at most {hard})", mend)]
    return [Finding("files", Level.OK, f"this process may open {soft} files")]


async def _disk(examined: Examined) -> list[Finding]:
    folder = _nearest(examined.data_dir)
    free = shutil.disk_usage(folder).free
    text = f"{free / (1 << 30):.1f} GiB are free at {folder}"
    mend = "free some: the queue's append-only file and the logs live there"
    if free < LEAST_DISK_BYTES:
        return [Finding("disk", Level.FAILURE, text, mend)]
    return [
        Finding("disk", Level.WARNING, text, mend) if free < COMFORTABLE_DISK_BYTES else Finding("disk", Level.OK, text)
    ]


async def _fabric(examined: Examined) -> list[Finding]:
    async with examined.client as client:
        if not await client.health():
            return [Finding("fabric", Level.OK, f"no Router runs at {client.url}")]
        try:
            fleet, pools = await client.workers(), await client.pools()
        except FabricRefused as refused:
            return [Finding("fabric", Level.WARNING, refused.message, "look at the Manager")]
    working = [worker for worker in fleet.workers if worker.takes_work]
    findings = [Finding("fabric", Level.OK, f"{len(working)} of {len(fleet.workers)} workers take work")]
    findings += [
        Finding(
            "fabric",
            Level.WARNING,
            f"{worker.worker_id} is {worker.state}, engine {worker.engine}",
            worker.engine_detail,
        )
        for worker in fleet.workers
        if not worker.takes_work
    ]
    findings += [
        Finding(
            "fabric",
            Level.WARNING,
            f"{pool.waiting} requests wait for {pool.model}, which no worker serves",
            "start one",
        )
        for pool in pools
        if pool.waiting and not pool.workers
    ]
    return findings


def _nearest(folder: Path) -> Path:
    """``folder``, or its nearest ancestor that exists."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
