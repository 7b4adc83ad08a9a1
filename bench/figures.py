"""What a run found, as medians over its rounds with their spread, ratios within a round, and the aims."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .jobs.inferq import BATCH, LONE, MANY_MODELS, MANY_TENANTS, ONE_TENANT, JobStats
from .windows import SCENARIOS, Measurement, Scenario


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several values, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A line of the table: what it is called, and how it is read off a window."""

    key: str
    name: str
    scenario: str
    read: Callable[[Measurement, Scenario], float]
    digits: int = 0


FIGURES = (
    Figure(key="p50_1", name="p50, 1 client, us", scenario="1 client", read=lambda m, _: m.load.latency_us["p50"]),
    Figure(key="rate_64", name="req/s, 64 clients", scenario="64 clients", read=lambda m, _: m.requests_per_s),
    Figure(key="cpu_64", name="CPU us/request, 64 clients", scenario="64 clients", read=lambda m, _: m.cpu_us),
    Figure(
        key="ttft_32",
        name="added TTFT p50, 32 streams, us",
        scenario="32 streams",
        read=lambda m, scenario: m.load.first_us["p50"] - scenario.delay_us,
    ),
    Figure(key="cpu_32", name="CPU us/token, 32 streams", scenario="32 streams", read=lambda m, _: m.cpu_us, digits=1),
    Figure(
        key="ceiling",
        name="token ceiling, 16 instant streams, tok/s",
        scenario="16 instant streams",
        read=lambda m, _: m.tokens_per_s,
    ),
    Figure(
        key="cpu_256", name="CPU us/token, 256 streams", scenario="256 streams", read=lambda m, _: m.cpu_us, digits=1
    ),
)
BASE = "proxy"
"""The system that ratios are to."""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that was measured. ``server``: by round, what :func:`bench.jobs.inferq.server_costs` found."""

    windows: list[Measurement] = field(default_factory=list)
    jobs: list[JobStats] = field(default_factory=list)
    server: list[Mapping[str, Any]] = field(default_factory=list)
    memory_mib: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    max_foreign: float = 0.0

    def by_round(self, figure: Figure, system: str) -> dict[int, float]:
        """The values of a figure by round."""
        scenario = next(one for one in SCENARIOS if one.name == figure.scenario)
        return {
            one.number: figure.read(one, scenario)
            for one in self.windows
            if (one.scenario, one.system) == (figure.scenario, system)
        }

    def figure(self, figure: Figure, system: str) -> Spread | None:
        values = self.by_round(figure, system)
        return Spread.of(list(values.values())) if values else None

    def ratio(self, figure: Figure, ours: str = "inferq", theirs: str = BASE) -> Spread | None:
        """Of two systems, within each round: other load slows both sides."""
        mine, base = self.by_round(figure, ours), self.by_round(figure, theirs)
        both = sorted(number for number in mine.keys() & base.keys() if base[number])
        return Spread.of([mine[number] / base[number] for number in both]) if both else None

    def jobs_of(self, name: str) -> list[JobStats]:
        return [one for one in self.jobs if one.name == name]

    def systems(self) -> list[str]:
        return list(dict.fromkeys(one.system for one in self.windows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One aim and what was found. ``limit`` is the most allowed, or the least where ``at_least``."""

    name: str
    found: Spread | None
    limit: float
    at_least: bool = False
    stretch: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.found is None:
            return None
        return self.found.median >= self.limit if self.at_least else self.found.median <= self.limit


def aims(run: Run) -> list[Aim]:
    """Every aim of docs/performance.md."""
    by_key = {figure.key: figure for figure in FIGURES}

    def ratio(key: str, theirs: str = BASE) -> Spread | None:
        return run.ratio(by_key[key], theirs=theirs)

    def stretch(key: str, theirs: str, limit: float) -> str:
        found = ratio(key, theirs)
        reached = (
            "not measured" if found is None else f"{found.median:.2f}, {'met' if found.median <= limit else 'not met'}"
        )
        return f"to {theirs} <= {limit:g}: {reached}"

    def server(read: Callable[[Mapping[str, Any]], float]) -> Spread | None:
        return Spread.of([read(one) for one in run.server]) if run.server else None

    submits = [one.submit_per_s / one.xadd_per_s for one in run.jobs_of("inferq") if one.xadd_per_s]
    memory = run.memory_mib.get("inferq")
    return [
        Aim(
            name="CPU per plain request, 64 clients, to proxy", found=ratio("cpu_64"), limit=0.6,
            stretch=stretch("cpu_64", "vllm-router", 2.5),
        ),
        Aim(name="p50 at one client, to proxy", found=ratio("p50_1"), limit=1.3, stretch=stretch("p50_1", BASE, 1.0)),
        Aim(name="added TTFT p50, 32 streams, to proxy", found=ratio("ttft_32"), limit=0.8),
        Aim(name="CPU per token, 32 streams, to proxy", found=ratio("cpu_32"), limit=0.8),
        Aim(
            name="CPU per token, 256 streams, to proxy", found=ratio("cpu_256"), limit=0.6,
            stretch=stretch("cpu_256", "vllm-router", 1.0),
        ),
        Aim(
            name="submit, of pipelined XADD", found=Spread.of(submits) if submits else None, limit=0.6, at_least=True
        ),
        Aim(name="Redis commands, lone job", found=server(lambda one: one[LONE].commands), limit=30),
        Aim(name="Redis commands a job, batch of 64", found=server(lambda one: one[BATCH].commands), limit=10),
        Aim(
            name="Redis CPU a job, 1,000 models on a worker to one",
            found=server(lambda one: one[MANY_MODELS].cpu_us / one[LONE].cpu_us), limit=1.2,
        ),
        Aim(
            name="Redis CPU a job, 1,000 tenants waiting to one",
            found=server(lambda one: one[MANY_TENANTS].cpu_us / one[ONE_TENANT].cpu_us), limit=1.2,
        ),
        Aim(
            name="memory, Router + Worker + Manager + queue, MiB",
            found=None if memory is None else Spread.of([memory]), limit=150,
        ),
    ]  # fmt: skip


def machine() -> dict[str, Any]:
    """The machine that this ran on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }
