"""What is measured, and one measurement: a load on a system while its CPU time is watched."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .loadgen import Load, Result
from .processes import cpu_seconds
from .systems import MODEL, System

EXTRA_LIMIT_S = 120.0
"""Beyond the time of its load, how long a load generator may take."""


class LoadFailed(Exception):
    """The load generator met an answer that it did not expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load. ``per`` says what CPU time is divided by; ``ttft_ms`` is what the engine itself takes."""

    name: str
    clients: int
    seconds: float
    stream: bool = False
    per: str = "request"
    ttft_ms: float = 0.0
    min_tokens: int = 32
    max_tokens: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioGroup:
    """Scenarios that share an engine, which is started with ``engine_options``."""

    engine_options: tuple[str, ...]
    scenarios: tuple[Scenario, ...]


TTFT_MS = 20.0
SCENARIO_GROUPS = (
    ScenarioGroup(
        engine_options=("--instant", "--prefix-cache-blocks", "0"),
        scenarios=(
            Scenario(name="1 client", clients=1, seconds=2.0),
            Scenario(name="64 clients", clients=64, seconds=3.0),
        ),
    ),
    ScenarioGroup(
        engine_options=(
            *("--ttft-ms", str(TTFT_MS), "--prefill-us-per-token", "0", "--tokens-per-s", "50"),
            *("--prefix-cache-blocks", "0"),
        ),
        scenarios=(
            Scenario(
                name="32 streams",
                clients=32,
                seconds=5.0,
                stream=True,
                per="token",
                ttft_ms=TTFT_MS,
                min_tokens=32,
                max_tokens=96,
            ),
        ),
    ),
    ScenarioGroup(
        engine_options=(
            *("--ttft-ms", str(TTFT_MS), "--prefill-us-per-token", "0", "--tokens-per-s", "20"),
            *("--prefix-cache-blocks", "0"),
        ),
        scenarios=(
            Scenario(
                name="256 streams",
                clients=256,
                seconds=5.0,
                stream=True,
                per="token",
                ttft_ms=TTFT_MS,
                min_tokens=32,
                max_tokens=96,
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One load on one system, in round ``number``. ``cpu_us`` is the system's CPU time per request or token,
    ``cpu_us_of`` the same by process."""

    number: int
    system: str
    scenario: str
    cpu_us: float
    cpu_us_of: Mapping[str, float] = field(default_factory=dict)
    load: Result


async def measured(scenario: Scenario, system: System, number: int = 0, seconds: float | None = None) -> Measurement:
    """Put the load of ``scenario`` on ``system`` once, in round ``number``."""
    load = Load(
        port=system.port,
        model=MODEL,
        clients=scenario.clients,
        seconds=seconds or scenario.seconds,
        stream=scenario.stream,
        min_tokens=scenario.min_tokens,
        max_tokens=scenario.max_tokens,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.loadgen", json.dumps(asdict(load))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(load.warmup_s + load.seconds + EXTRA_LIMIT_S):
            assert process.stdout is not None
            if await process.stdout.readline() != b"ready\n":
                raise LoadFailed(f"{scenario.name} on {system.name}: {await _why(process)}")
            before = _cpu_by_name(system)
            out, errors = await process.communicate(b"go\n")
            after = _cpu_by_name(system)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise LoadFailed(f"{scenario.name} on {system.name}: {errors.decode()[-2000:]}")
    result = Result(**json.loads(out))
    units = result.tokens if scenario.per == "token" else result.requests
    spent = {name: (after[name] - before[name]) * 1e6 / units for name in after}
    return Measurement(
        number=number,
        system=system.name,
        scenario=scenario.name,
        cpu_us=sum(spent.values()),
        cpu_us_of=spent,
        load=result,
    )


async def _why(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    return (await process.stderr.read()).decode()[-2000:]


def _cpu_by_name(system: System) -> dict[str, float]:
    return {name: sum(cpu_seconds([pid]).values()) for name, pid in system.pids.items()}
