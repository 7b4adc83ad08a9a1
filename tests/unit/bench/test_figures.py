"""A window with much foreign load is repeated a few times; ratios are taken within rounds; aims are judged by them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import growth, windows
from bench.figures import FIGURES, Run, Spread, aims
from bench.growth import Point
from bench.jobs.inferq import BATCH, LONE, MANY_MODELS, MANY_TENANTS, ONE_TENANT, JobStats, ServerCost
from bench.processes import DidNotStart, foreign_cores, running_program, snapshot, until_answers
from bench.report import DOCS, as_json, fill, markdown, notes
from bench.windows import MAX_TRIES, SCENARIOS, Load, Measurement, System
from telemetry.environment import free_port

_SPIN = "end=$(($(date +%s%N) + 500000000)); while [ $(date +%s%N) -lt $end ]; do :; done"


def window(system: str, scenario: str, number: int = 0, cpu_us: float = 1.0, foreign: float = 0.0) -> Measurement:
    times = {"p50": 20_500.0, "p90": 21_000.0, "p99": 22_000.0}
    load = Load(requests=100, tokens=3200, seconds=1.0, cpu_s=0.1, latency_us=times, first_us=times, gap_us=times)
    return Measurement(
        number=number, system=system, scenario=scenario, load=load, foreign=foreign, cpu_us_of={"all": cpu_us}
    )


@pytest.mark.parametrize(
    ("foreign", "tries", "chosen"),
    [([0.1], 1, 0.1), ([0.5, 0.1], 2, 0.1), ([0.5, 0.3, 0.4, 0.0], MAX_TRIES, 0.3)],
)
async def test_a_loud_window_is_repeated_a_few_times(
    monkeypatch: pytest.MonkeyPatch, foreign: list[float], tries: int, chosen: float
) -> None:
    """Up to a limit; then the quietest counts, with its load on record."""
    left = iter(foreign)

    async def measured(*_: object, **__: object) -> Measurement:
        return window("inferq", "64 clients", foreign=next(left))

    monkeypatch.setattr(windows, "measured", measured)
    one = await windows.quiet_window(SCENARIOS[1], System("inferq", 1, {}), max_foreign=0.15)
    assert (one.tries, one.foreign) == (tries, chosen)


def test_a_ratio_is_taken_within_rounds() -> None:
    """Each round's load is on both sides: 2 and 3, not the ratio of medians."""
    run = Run()
    for number, (base, ours) in enumerate([(100, 200), (300, 900)]):
        run.windows += [
            window("proxy", "64 clients", number, base),
            window("inferq", "64 clients", number, ours),
        ]
    cpu = next(figure for figure in FIGURES if figure.key == "cpu_64")
    assert run.ratio(cpu) == Spread(2.5, 2.0, 3.0)
    assert run.figure(cpu, "proxy") == Spread(200, 100, 300)


def whole_run() -> Run:
    run = Run(max_foreign=0.15, left_out=["litellm is left out: no network"], memory_mib={"inferq": 140, "proxy": 60})
    for scenario in SCENARIOS:
        for system, cpu in (("direct", 0.0), ("vllm-router", 20.0), ("proxy", 100.0), ("inferq", 50.0)):
            run.windows.append(window(system, scenario.name, cpu_us=cpu, foreign=0.4 if system == "direct" else 0))
    run.jobs.append(
        JobStats(
            name="inferq",
            number=0,
            submit_per_s=500,
            drain_per_s=1,
            cpu_us_of={"worker": 1},
            foreign=0,
            xadd_per_s=1000,
        )
    )
    costs = {name: ServerCost(commands=10, cpu_us=30) for name in (BATCH, ONE_TENANT, MANY_TENANTS, MANY_MODELS)}
    run.server.append({LONE: ServerCost(commands=31, cpu_us=20), **costs})
    return run


def test_aims_are_judged() -> None:
    """At most, or at least; a stretch goal beside another system."""
    judged = {aim.name: aim for aim in aims(whole_run())}
    assert judged["CPU per plain request, 64 clients, to proxy"].met
    assert judged["CPU per plain request, 64 clients, to proxy"].stretch == "to vllm-router <= 2.5: 2.50, met"
    assert judged["submit, of pipelined XADD"].met is False
    assert judged["Redis commands, lone job"].met is False
    assert judged["Redis commands a job, batch of 64"].met
    assert judged["Redis CPU a job, 1,000 models on a worker to one"].met is False
    assert judged["Redis CPU a job, 1,000 tenants waiting to one"].met
    assert all(aim.met is None for aim in aims(Run()))


def test_a_report_tells_what_to_distrust() -> None:
    """Loud windows and systems left out are named; every table is there."""
    run = whole_run()
    said = "\n".join(notes(run))
    assert "5 stayed above 0.15: their figures are not to be trusted" in said
    assert "litellm is left out: no network" in said
    text = markdown(run, {"commit": "abc"})
    for title in ("Systems", "The aim", "Where inferq's CPU goes", "Job queues", "What a job costs"):
        assert f"### {title}" in text
    assert "| CPU us/request, 64 clients | 0 | 20 | 100 | 50 | 0.50 |" in text
    assert as_json(run)["windows"]


def test_foreign_load_is_seen() -> None:
    """A process that is not ours counts as foreign, one of ours as ours."""
    before = snapshot()
    # Its parent ends at once, so that it is nobody's child.
    subprocess.run(["setsid", "sh", "-c", f"({_SPIN}) >/dev/null 2>&1 &"], check=True)
    time.sleep(0.6)
    between = snapshot()
    assert foreign_cores(before, between) > 0.2
    subprocess.run(["sh", "-c", _SPIN], check=True)
    after = snapshot()
    assert after.cpu_s(os.getpid()) - between.cpu_s(os.getpid()) > 0.1


def test_the_document_is_filled(tmp_path: Path) -> None:
    """Its tables are replaced, what is around them stays; one without a place for them is refused."""
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n<!-- bench -->\nold\n<!-- /bench -->\nend\n")
    fill(document, "bench", "new")
    fill(document, "bench", "newer")
    assert document.read_text() == "# Performance\n<!-- bench -->\n\nnewer\n\n<!-- /bench -->\nend\n"
    with pytest.raises(ValueError, match="no place for growth"):
        fill(document, "growth", "new")
    for name in ("bench", "growth"):
        assert f"<!-- {name} -->\n" in DOCS.read_text()
        assert f"<!-- /{name} -->" in DOCS.read_text()


def test_growth_is_a_table_and_a_file(tmp_path: Path) -> None:
    """A row for each value of an axis; workers of one window count together."""
    one = replace(window("inferq", "8 workers"), cpu_us_of={"router": 5.0, "worker": 1.0, "worker-1": 2.0})
    points = [Point("workers", 2, *figure) for figure in growth._of_window(one, "request")]
    (sheet,) = growth.sheets(points)
    assert sheet.columns == ["workers", "CPU us/request", "of it router", "of it worker", "p50, us", "foreign cores"]
    assert sheet.rows == [["2", "8.0", "5.0", "3.0", "20,500.0", "0.00"]]
    growth.write_csv(points, tmp_path / "growth.csv")
    assert (tmp_path / "growth.csv").read_text().splitlines()[1] == "workers,2,CPU us/request,8.0,0.0"


async def test_a_process_that_ends_at_its_start_is_not_waited_for(tmp_path: Path) -> None:
    """What it said is the reason."""
    log = tmp_path / "log"
    async with running_program(["sh", "-c", "echo port taken; exit 3"], log) as pid:
        with pytest.raises(DidNotStart, match="port taken"):
            await asyncio.wait_for(until_answers(f"http://127.0.0.1:{free_port()}/", log, pid=pid), 20)
