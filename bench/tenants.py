"""Fleets for the benches of tenants: Routers with API keys on one queue, and a worker on a simulated engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from telemetry.environment import free_port

from .processes import new_folder, running, until_answers
from .systems import MODEL, queue_and_manager


@dataclass(frozen=True, slots=True)
class Fleet:
    """The Routers' clients, and where the worker shows its metrics. A tenant's key is its name."""

    routers: Sequence[aiohttp.ClientSession]
    worker_url: str


@asynccontextmanager
async def fleet(
    folder: Path,
    tenants: dict[str, float],
    *,
    routers: int = 1,
    slots: int = 8,
    tokens_per_s: float = 100.0,
    router_options: Sequence[str] = (),
) -> AsyncIterator[Fleet]:
    """A fleet that serves ``tenants``, by their weights."""
    keys = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in tenants)
    limits = json.dumps({name: {"weight": weight} for name, weight in tenants.items()})
    engine_port, worker_port, log = free_port(), free_port(), new_folder(folder) / "engine.log"
    simulated = ("--port", str(engine_port), "--model", MODEL, "--mode", "text", "--ttft-ms", "5")
    speed = ("--tokens-per-s", str(tokens_per_s), "--max-num-seqs", str(2 * slots))
    quiet = ("--log-level", "error")
    async with AsyncExitStack() as exits:
        await exits.enter_async_context(running("worker.engines.simulated", (*simulated, *speed), log))
        await until_answers(f"http://127.0.0.1:{engine_port}/health", log)
        queue, _, manager_url = await exits.enter_async_context(queue_and_manager(folder))
        joined = ("--manager-url", manager_url, "--redis-url", queue.url, *quiet)
        sessions = []
        for number in range(routers):
            port, router_log = free_port(), folder / f"router-{number}.log"
            options = ("--port", str(port), "--api-keys", keys, "--tenant-limits", limits, "--pools", MODEL)
            await exits.enter_async_context(running("router.service", (*options, *joined, *router_options), router_log))
            await until_answers(f"http://127.0.0.1:{port}/readyz", router_log)
            session = aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=aiohttp.TCPConnector(limit=0))
            sessions.append(await exits.enter_async_context(session))
        worker_log = folder / "worker.log"
        serving = ("--port", str(worker_port), "--slots", str(slots), "--engine-url", f"http://127.0.0.1:{engine_port}")
        fixed = ("--worker-id", "bench", "--engine-load-interval-ms", "0")
        await exits.enter_async_context(running("worker.service", (*serving, *fixed, *joined), worker_log))
        await until_answers(f"http://127.0.0.1:{worker_port}/readyz", worker_log)
        yield Fleet(sessions, f"http://127.0.0.1:{worker_port}")


def chat(rng: random.Random, words: tuple[int, int], tokens: tuple[int, int]) -> dict[str, Any]:
    """A chat with a prompt of so many words, whose answer has exactly so many tokens."""
    prompt = " ".join("word" for _ in range(rng.randint(*words)))
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{rng.random()} {prompt}"}],
        "max_tokens": rng.randint(*tokens),
        "ignore_eos": True,
    }


async def ask(
    session: aiohttp.ClientSession, tenant: str, body: dict[str, Any], **headers: str
) -> tuple[int, dict[str, Any]]:
    """The status of the answer to ``body``, and what it says."""
    given = {"authorization": f"Bearer {tenant}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with session.post("/v1/chat/completions", json=body, headers=given) as answer:
        return answer.status, dict(await answer.json())


async def at_random_times(rng: random.Random, rate: float, seconds: float) -> AsyncIterator[int]:
    """Numbers, ``rate`` a second, at random times from now on for so long."""
    loop = asyncio.get_running_loop()
    begun, due, number = loop.time(), 0.0, 0
    while (due := due + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begun + due - loop.time()))
        yield number
        number += 1
