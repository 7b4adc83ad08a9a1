"""The command driver with real programs: what it tells them, and those that fail, hang, lie or talk too much."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from inferq.autoscale.drivers.command import CommandDriver
from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.settings import AutoscaleSettings
from inferq.processes import start_of
from queue_schemas import CannotStart
from tests.support.waiting import eventually


def driver(program: str, *args: str, timeout_ms: int = 20_000) -> CommandDriver:
    command = [sys.executable, "-c", program, *args]
    return CommandDriver(AutoscaleSettings.load(pool="m", driver="command", args=command, driver_timeout=timeout_ms))


async def test_a_program_is_told_each_step(tmp_path: Path) -> None:
    """One JSON object on its standard input; its answer names the workers."""
    seen = tmp_path / "seen"
    one = driver(
        "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n'); print('{\"workers\": [\"a\", \"b\"]}')",
        str(seen),
    )
    assert await one.workers() == {"a", "b"}
    await one.scale_to(3)
    await one.remove(["b"])
    orders = [json.loads(line) for line in seen.read_text().splitlines()]
    same = {"version": 1, "pool": "m"}
    assert orders == [
        same | {"action": "list"},
        same | {"action": "scale_to", "count": 3},
        same | {"action": "remove", "workers": ["b"]},
    ]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('the cloud is full')", "ended with code 1: the cloud is full"),
        ("import sys; sys.exit(4)", "ended with code 4: it said nothing"),
        ("print('hello')", "must answer"),
        ("print('[]')", "must answer"),
        ("print('{\"workers\": 3}')", "must answer"),
        ('print(\'{"workers": ["../x"]}\')', "names a worker wrongly"),
        ("print('x' * (3 << 20))", "wrote more than"),
        ("import os; os.kill(os.getpid(), 9)", "ended with code -9"),
    ],
)
async def test_a_program_that_fails_or_lies_is_quoted(program: str, said: str) -> None:
    """And its step counts as failed."""
    with pytest.raises(DriverFailed, match=said):
        await driver(program).workers()


async def test_a_program_that_hangs_is_killed(tmp_path: Path) -> None:
    """Within ``driver_timeout``, with what it has started."""
    program = "import os, subprocess, sys, time; from pathlib import Path\n"
    program += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    program += "Path(sys.argv[1]).write_text(f'{os.getpid()} {child.pid}'); time.sleep(600)"
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(DriverFailed, match=r"did not end within 2 s and was killed"):
        await driver(program, str(pids), timeout_ms=2_000).workers()
    assert time.monotonic() - began < 20
    for pid in pids.read_text().split():
        await eventually(lambda pid=int(pid): start_of(pid) is None, "it is killed")  # type: ignore[misc]


async def test_workers_that_hold_the_programs_pipes_hold_up_nobody() -> None:
    """A program may leave its standard output to what it starts in the background."""
    program = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(5)'])\n"
    program += 'print(\'{"workers": ["w"]}\')'
    began = time.monotonic()
    assert await driver(program).workers() == {"w"}
    assert time.monotonic() - began < 5


async def test_a_program_that_is_not_there_is_said() -> None:
    """So is one that is not named."""
    settings = AutoscaleSettings.load(pool="m", driver="command", args=["/nowhere/at/all"])
    with pytest.raises(DriverFailed, match="cannot be started"):
        await CommandDriver(settings).workers()
    with pytest.raises(CannotStart, match="say what to run"):
        AutoscaleSettings.load(pool="m", driver="command")
