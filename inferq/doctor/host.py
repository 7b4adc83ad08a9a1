"""This machine: Python, settings, ports, limits, disk."""

from __future__ import annotations

import resource
import shutil
import socket
import sys
from pathlib import Path

import aiohttp

from inferq.commands.settings import read_facts
from manager.settings import ManagerSettings
from queue_schemas import CannotStart
from router.settings import RouterSettings
from telemetry.files import absolute_path
from telemetry.http.fleet_session import fleet_session
from worker.settings import WorkerSettings

from .findings import ASK_LIMIT_S, DoctorTarget, Finding, Level

MIN_FILES = 4096
MIN_DISK_BYTES, COMFORTABLE_DISK_BYTES = 1 << 30, 5 << 30


async def check_python() -> list[Finding]:
    """Check the version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", Level.WARNING, f"Python {version} is untested", "use Python 3.11 to 3.13")]
    return [Finding("python", Level.OK, f"Python {version}")]


async def check_settings() -> list[Finding]:
    """Check that every setting can be read."""
    try:
        facts = read_facts()
    except CannotStart as error:
        return [Finding("settings", Level.FAILURE, error.message, "correct it; `inferq config` shows every setting")]
    changed = sum(1 for fact in facts if fact.origin != "default")
    return [Finding("settings", Level.OK, f"{len(facts)} settings read, {changed} of them not at their default")]


async def check_ports() -> list[Finding]:
    """Check that the ports of all roles are free, or taken by them."""
    roles = (("router", RouterSettings.load()), ("manager", ManagerSettings.load()))
    wanted = [(name, settings.host, settings.port) for name, settings in roles]
    fields = WorkerSettings.model_fields
    wanted.append(("worker", str(fields["host"].default), int(fields["port"].default)))
    findings = []
    async with fleet_session(ASK_LIMIT_S) as session:
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
    fix = f"stop what listens there, or start with another port (`inferq up --{name}-port`)"
    return Finding("ports", Level.WARNING, f"{port} is not free for the {name}: {taken}", fix)


async def check_files() -> list[Finding]:
    """Check how many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        fix = f"raise it: ulimit -n {max(MIN_FILES, 65_536)} (systemd: LimitNOFILE); each client takes one"
        return [Finding("files", Level.WARNING, f"this process may open {soft} files (at most {hard})", fix)]
    return [Finding("files", Level.OK, f"this process may open {soft} files")]


async def check_disk(examined: DoctorTarget) -> list[Finding]:
    """Check the room on the disk of the data folder."""
    folder = nearest_folder(examined.data_dir)
    free = shutil.disk_usage(folder).free
    text = f"{free / (1 << 30):.1f} GiB are free at {folder}"
    fix = "free some: the queue's append-only file and the logs live there"
    if free < MIN_DISK_BYTES:
        return [Finding("disk", Level.FAILURE, text, fix)]
    return [
        Finding("disk", Level.WARNING, text, fix) if free < COMFORTABLE_DISK_BYTES else Finding("disk", Level.OK, text)
    ]


def nearest_folder(folder: Path) -> Path:
    """``folder``, or its nearest ancestor that exists."""
    folder = absolute_path(folder)
    while not folder.exists():
        folder = folder.parent
    return folder
