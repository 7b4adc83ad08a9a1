"""One window: a load on a system while its CPU time, and that of the rest of the machine, is watched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .native import load_generator
from .processes import Snapshot, foreign_cores, snapshot
from .systems import MODEL, System

EXTRA_LIMIT_S = 120.0
"""Beyond the time of its load, how long a load generator may take."""
MAX_TRIES = 3
"""How often a window is measured before the quietest try is taken."""
TTFT_US = 20_000


class LoadFailed(Exception):
    """The load generator met an answer that it did not expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load. ``per`` says what CPU time is divided by; ``delay_us`` and ``interval_us`` are what the engine takes to
    its first token, and from token to token; 0 for both is no time at all."""

    name: str
    clients: int
    seconds: float
    warmup_s: float = 1.0
    stream: bool = False
    per: str = "request"
    delay_us: int = 0
    interval_us: int = 0
    tokens: tuple[int, int] = (32, 32)
    prompt_bytes: int = 1000
    models: int = 1


SCENARIOS = (
    Scenario(name="1 client", clients=1, seconds=2.0),
    Scenario(name="64 clients", clients=64, seconds=3.0),
    Scenario(
        name="32 streams", clients=32, seconds=4.0, warmup_s=2.0, stream=True, per="token",
        delay_us=TTFT_US, interval_us=20_000, tokens=(32, 96),
    ),
    Scenario(
        name="256 streams", clients=256, seconds=4.0, warmup_s=4.0, stream=True, per="token",
        delay_us=TTFT_US, interval_us=50_000, tokens=(32, 96),
    ),
    Scenario(
        name="16 instant streams", clients=16, seconds=3.0, stream=True, per="token", tokens=(512, 512)
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the load generator saw within a window: times in microseconds, as p50, p90 and p99."""

    requests: int
    tokens: int
    seconds: float
    cpu_s: float
    latency_us: Mapping[str, float]
    first_us: Mapping[str, float]
    gap_us: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One window, of round ``number``. ``cpu_us`` is the system's CPU time per request or token, ``cpu_us_of`` the
    same by process; ``foreign``, ``engine`` and ``generator`` the cores that everything else on the machine, the engine
    and the load generator used; ``tries`` how often it was measured to get there."""

    number: int
    system: str
    scenario: str
    load: Load
    foreign: float
    engine: float = 0.0
    generator: float = 0.0
    cpu_us_of: Mapping[str, float] = field(default_factory=dict)
    tries: int = 1

    @property
    def cpu_us(self) -> float:
        return sum(self.cpu_us_of.values())

    @property
    def requests_per_s(self) -> float:
        return self.load.requests / self.load.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.load.tokens / self.load.seconds


async def quiet_window(
    scenario: Scenario, system: System, number: int = 0, *, speed: float = 1.0, max_foreign: float = float("inf")
) -> Measurement:
    """:func:`measured`, again up to ``MAX_TRIES`` times while the rest of the machine used more than ``max_foreign``
    cores; the quietest try counts."""
    tries: list[Measurement] = []
    while not tries or (len(tries) < MAX_TRIES and min(one.foreign for one in tries) > max_foreign):
        tries.append(await measured(scenario, system, number, speed=speed, attempt=len(tries)))
    return replace(min(tries, key=lambda one: one.foreign), tries=len(tries))


async def measured(
    scenario: Scenario, system: System, number: int = 0, *, speed: float = 1.0, attempt: int = 0
) -> Measurement:
    """Put the load of ``scenario`` on ``system`` once, in round ``number``; ``speed`` divides the window's length."""
    process = await asyncio.create_subprocess_exec(
        *_command(scenario, system, speed, seed=1 + 1000 * number + attempt),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(scenario.warmup_s + scenario.seconds + EXTRA_LIMIT_S):
            begun = await process.stdout.readline()
            before = snapshot()
            ended = await process.stdout.readline()
            after = snapshot()
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if (begun, ended, process.returncode) != (b"begin\n", b"end\n", 0):
        raise LoadFailed(f"{scenario.name} on {system.name}: {errors.decode('utf-8', 'replace')[-2000:]}")
    load = Load(**json.loads(out))
    units = load.tokens if scenario.per == "token" else load.requests
    if not units:
        raise LoadFailed(f"{scenario.name} on {system.name}: not one answer came within the window")
    return Measurement(
        number=number,
        system=system.name,
        scenario=scenario.name,
        load=load,
        foreign=foreign_cores(before, after),
        engine=(after.cpu_s(system.engine_pid) - before.cpu_s(system.engine_pid)) / load.seconds,
        generator=(after.cpu_s(process.pid) - before.cpu_s(process.pid)) / load.seconds,
        cpu_us_of=cpu_us_by_name(system.pids, before, after, units),
    )


def cpu_us_by_name(pids: Mapping[str, int], before: Snapshot, after: Snapshot, units: int) -> dict[str, float]:
    """Microseconds of CPU a unit of work between two moments, of each of ``pids`` with what it started."""
    return {name: (after.cpu_s(pid) - before.cpu_s(pid)) * 1e6 / units for name, pid in pids.items()}


def _command(scenario: Scenario, system: System, speed: float, seed: int) -> list[str]:
    options: dict[str, object] = {
        "port": system.port,
        "clients": scenario.clients,
        "seconds": scenario.seconds / speed,
        "warmup": max(scenario.warmup_s / speed, 0.5),
        "stream": int(scenario.stream),
        "min-tokens": scenario.tokens[0],
        "max-tokens": scenario.tokens[1],
        "delay-us": scenario.delay_us,
        "interval-us": scenario.interval_us,
        "prompt-bytes": scenario.prompt_bytes,
        "model": MODEL,
        "models": scenario.models,
        "seed": seed,
    }
    return [str(load_generator()), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
