"""Feed a live fleet and all decoders until the time is over, then check that the fleet serves as before."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from queue_schemas import JOIN_TOKEN_HEADER
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually

from .decoders import DECODERS, Target
from .live_edges import API_KEY, JOIN_TOKEN, TENANT, LiveEdge, LiveEdges
from .mutations import Mutator

MAX_GROWTH_BYTES = 48 << 20
"""How much the memory of one process may grow after the first third of a run."""
SLOW_S = 2.0
"""Limit for one input, on a busy machine."""
_DECODER_SLICE_S = 0.02
_PAUSE_S = 0.1
_MAX_FINDINGS = 20
_ROUTER: Mapping[str, object] = {
    "background_retention_ms": 2_000, "idempotency_retention_ms": 2_000, "resumable_retention_ms": 2_000,
    "resume_grace_ms": 500,
    "background_deadline_ms": 5_000, "default_deadline_ms": 10_000,
    "max_tenant_files": 200, "max_tenant_file_bytes": 1 << 24,
    "max_tenant_jobs": 2_000,
}  # fmt: skip


@dataclass
class Outcome:
    """The inputs fed to each edge, the findings, and each process's memory at first, after a third and at last."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    memory: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add_finding(self, edge: str, what: str) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(f"{edge}: {what}")

    def add(self, other: Outcome) -> None:
        """Add the outcome of another process."""
        self.counts += other.counts
        self.findings += other.findings
        self.memory |= other.memory

    def table(self) -> str:
        """Inputs by edge, memory by process."""
        lines = [f"{count:>10,}  {edge}" for edge, count in self.counts.most_common()]
        lines.append(f"{self.total:>10,}  in all")
        lines += [
            f"{name}: {first >> 20} MiB at first, {after_third >> 20} after a third, {last >> 20} at last"
            for name, (first, after_third, last) in self.memory.items()
        ]
        return "\n".join(lines)


async def run_fuzz(folder: Path, *, seconds: float, seed: int) -> Outcome:
    """Feed every edge for ``seconds``, then check the fleet."""
    outcome = Outcome()
    server = Server(server_binary(), folder).start()
    digest = hashlib.sha256(API_KEY.encode()).hexdigest()
    env = {
        "INFERQ_JOIN_TOKEN": JOIN_TOKEN,
        "INFERQ_ROUTER_API_KEYS": f"{digest}:{TENANT}",
        "INFERQ_STORAGE_URL": str(folder / "store"),
    }
    try:
        async with Fleet(folder, server, router=_ROUTER, env=env) as fleet:
            fleet.session.headers.update({"authorization": f"Bearer {API_KEY}", JOIN_TOKEN_HEADER: JOIN_TOKEN})
            await fleet.up(workers=2, sim_ttft_ms=0, sim_tokens_per_s=0)
            edges = LiveEdges(fleet)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as decoders:
                decoding = asyncio.get_running_loop().run_in_executor(decoders, decode, seconds, seed)
                try:
                    await _feed(fleet, edges, outcome, seconds=seconds, seed=seed)
                finally:
                    await edges.close()
                    outcome.add(await decoding)
            await _check_afterwards(fleet, outcome)
    finally:
        server.stop()
    return outcome


def decode(seconds: float, seed: int) -> Outcome:
    """Feed the decoders in turn for ``seconds``; runs in its own process."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns about refused input
    outcome = Outcome()
    begun = time.monotonic()
    mutators = {name: Mutator(f"{seed} {name}") for name in DECODERS}
    first = after_third = 0
    while time.monotonic() < begun + seconds:
        for name, target in DECODERS.items():
            _decode_for_a_while(name, target, mutators[name], outcome)
        first = first or _resident_bytes(os.getpid())
        if not after_third and time.monotonic() > begun + seconds / 3:
            after_third = _resident_bytes(os.getpid())
    gc.collect()
    last = _resident_bytes(os.getpid())
    outcome.memory["decoders"] = (first, after_third or last, last)
    return outcome


def _decode_for_a_while(name: str, target: Target, mutator: Mutator, outcome: Outcome) -> None:
    until = time.monotonic() + _DECODER_SLICE_S
    while (began := time.monotonic()) < until:
        try:
            target(mutator)
        except Exception:  # noqa: BLE001 - every exception is a finding
            outcome.add_finding(name, traceback.format_exc(limit=-3))
        outcome.counts[name] += 1
        if time.monotonic() - began > SLOW_S:
            outcome.add_finding(name, f"an input took {time.monotonic() - began:.1f} s")


async def _feed(fleet: Fleet, edges: LiveEdges, outcome: Outcome, *, seconds: float, seed: int) -> None:
    roles = (fleet.router, fleet.manager, *fleet.workers)
    begun = time.monotonic()
    pids = {role.name: role.process.pid for role in roles}
    first, after_third = _memory(roles), None
    stopped = asyncio.Event()

    async def keep_feeding(name: str, edge: LiveEdge, number: int) -> None:
        mutator = Mutator(f"{seed} {name} {number}")
        while not stopped.is_set():
            try:
                outcome.counts[name] += await edge.feed(mutator)
            except Exception:  # noqa: BLE001 - every exception is a finding
                outcome.add_finding(name, traceback.format_exc(limit=-2))
                await asyncio.sleep(_PAUSE_S)

    async with asyncio.TaskGroup() as tasks:
        for name, edge in edges.by_name.items():
            for number in range(edge.tasks):
                tasks.create_task(keep_feeding(name, edge, number))
        while not stopped.is_set():
            await asyncio.sleep(_PAUSE_S)
            if after_third is None and time.monotonic() > begun + seconds / 3:
                after_third = _memory(roles)
            dead = [role for role in roles if not role.process.running or role.process.pid != pids[role.name]]
            for role in dead:
                outcome.add_finding(role.name, f"the process ended\n{role.process.log_tail(20)}")
            if dead or time.monotonic() >= begun + seconds:
                stopped.set()
    last = _memory(roles)
    outcome.memory |= {name: (first[name], (after_third or last)[name], last[name]) for name in last}


async def _check_afterwards(fleet: Fleet, outcome: Outcome) -> None:
    """Memory is flat, the same processes answer plain and streamed requests, and no log has a traceback."""
    for name, (_, after_third, last) in outcome.memory.items():
        if last - after_third > MAX_GROWTH_BYTES:
            outcome.add_finding(name, f"its memory grew from {after_third >> 20} to {last >> 20} MiB")
    for role in (fleet.router, fleet.manager, *fleet.workers):
        if "Traceback (most recent call last)" in (log := role.process.log_text()):
            outcome.add_finding(
                role.name, "a traceback in its log: " + log[log.index("Traceback (most") - 1_500 :][:4_000]
            )
    try:
        await eventually(lambda: _serves(fleet, stream=False), "a chat is answered", limit_s=20.0, every_s=0.2)
        await eventually(lambda: _serves(fleet, stream=True), "a stream is answered", limit_s=20.0, every_s=0.2)
    except AssertionError as error:
        outcome.add_finding("afterwards", str(error))


async def _serves(fleet: Fleet, *, stream: bool) -> bool:
    body = {"model": "sim", "messages": [{"role": "user", "content": "still there"}], "stream": stream}
    try:
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
            text = await answer.text()
    except aiohttp.ClientError:
        return False
    return answer.status == 200 and ("[DONE]" in text if stream else "still there" in text)


def _memory(roles: Sequence[Role]) -> dict[str, int]:
    """The resident bytes of each process that runs."""
    return {role.name: _resident_bytes(role.process.pid) for role in roles if role.process.running}


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
