"""The process driver with real processes: started, ended, killed, adopted; and what fails soon is not started again at
once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.drivers.process import ProcessDriver
from inferq.autoscale.drivers.worker_command import id_prefix, pool_name
from inferq.autoscale.settings import AutoscaleSettings
from inferq.processes import boot_id, start_of
from queue_schemas import CannotStart, check_worker_id
from tests.support.waiting import eventually

STAYS = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(600)"
IGNORES = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
FAILS = "import sys; print('no GPU is free', file=sys.stderr); sys.exit(3)"

Open = Callable[..., ProcessDriver]


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens drivers on one folder; in the end all that they started is killed."""
    opened: list[ProcessDriver] = []

    def start(program: str = STAYS, *, clock: Callable[[], float] = lambda: 0.0, **more: object) -> ProcessDriver:
        quick: dict[str, object] = {"pool": "Org/Model", "data_dir": str(tmp_path), "stop_timeout": 1_000}
        settings = AutoscaleSettings.load(**(quick | more))
        opened.append(ProcessDriver(settings, (sys.executable, "-c", program), clock))
        return opened[-1]

    yield start
    for one in opened:
        for process in one._processes.values():
            if process.runs:
                os.killpg(process.pid, signal.SIGKILL)
        await one.close()


def log_of(tmp_path: Path, worker_id: str) -> str:
    return (tmp_path / "logs" / f"{worker_id}.log").read_text()


async def test_workers_are_started_with_options_of_their_own_and_ended(driver: Open, tmp_path: Path) -> None:
    """Each has an id, a free port, the operator's options and the model; SIGTERM ends it."""
    one = driver(args=["--slots", "4"], manager_urls=["http://r:1", "http://m:2"])
    await one.scale_to(2)
    first, second = sorted(await one.workers())
    assert (first[-2:], second[-2:]) == ("-1", "-2")
    expected = ["--slots", "4", "--worker-id", first, "--port", "0", "--manager-url", "http://r:1"]
    expected += ["--manager-url", "http://m:2", "--model", "Org/Model"]
    await eventually(lambda: log_of(tmp_path, first) == f"{expected}\n", "it was started so")
    await one.scale_to(2)
    assert await one.workers() == {first, second}
    await one.remove([first, "unknown"])
    await eventually(lambda: _are(one, {second}), "it has ended")
    await one.scale_to(2)
    assert max(await one.workers()).endswith("-3"), "no id is used twice"


async def test_options_of_the_operator_stand(driver: Open, tmp_path: Path) -> None:
    """A model by another name, or an engine that runs already; other Managers."""
    one = driver(args=["--engine-url=http://e:8000", "--manager-url", "http://other:1"])
    await one.scale_to(1)
    (worker_id,) = await one.workers()
    await eventually(lambda: log_of(tmp_path, worker_id), "it was started")
    assert "--model" not in log_of(tmp_path, worker_id)
    assert log_of(tmp_path, worker_id).count("--manager-url") == 1


async def test_one_that_does_not_end_is_killed(driver: Open, tmp_path: Path) -> None:
    """With its process group, after ``stop_timeout``."""
    now = [0.0]
    one = driver(IGNORES, clock=lambda: now[0])
    await one.scale_to(1)
    (worker_id,) = await one.workers()
    await eventually(lambda: log_of(tmp_path, worker_id), "it ignores SIGTERM")
    await one.remove([worker_id])
    now[0] = 0.9
    assert await one.workers() == {worker_id}
    now[0] = 1.1
    await eventually(lambda: _are(one, set()), "it is killed")


async def test_workers_outlive_the_driver_and_are_adopted(driver: Open, tmp_path: Path) -> None:
    """By the next one on the same folder, which can end them. One that ended meanwhile is forgotten."""
    one = driver()
    await one.scale_to(2)
    first, second = sorted(await one.workers())
    await one.close()
    os.kill(one._processes[first].pid, signal.SIGKILL)
    await eventually(lambda: not one._processes[first].runs, "it is dead")
    other = driver()
    assert await other.workers() == {second}
    await other.scale_to(2)
    assert max(await other.workers()).endswith("-3")
    await other.remove([second])
    await eventually(lambda: _without(other, second), "an adopted worker ends")


async def test_a_record_of_the_past_names_nobody(driver: Open, tmp_path: Path) -> None:
    """The process ids of another boot, or of processes that ended, are other programs' by now."""
    record = tmp_path / "autoscale" / f"{pool_name('Org/Model')}.json"
    record.parent.mkdir()
    for boot, started in (("another", start_of(os.getpid())), (boot_id(), 1)):
        workers = {"w": {"pid": os.getpid(), "started": started}}
        record.write_text(json.dumps({"boot": boot, "count": 7, "workers": workers}))
        one = driver()
        assert await one.workers() == frozenset()
        await one.close()
    record.write_text("{")
    with pytest.raises(CannotStart, match="cannot be read"):
        driver()


async def test_two_drivers_do_not_share_a_folder(driver: Open) -> None:
    """For the same pool."""
    driver()
    with pytest.raises(CannotStart, match="another autoscaler of this machine"):
        driver()
    driver(pool="Org/Other")


async def test_workers_that_fail_soon_are_not_started_again_at_once(driver: Open) -> None:
    """The pause grows, and is told with the worker's last words."""
    now = [0.0]
    one = driver(FAILS, clock=lambda: now[0])
    for failures in (1, 2, 3):
        await one.scale_to(1)
        await eventually(lambda: _are(one, set()), "it has failed")
        with pytest.raises(DriverFailed, match="no GPU is free"):
            await one.scale_to(1)
        now[0] += 2.0**failures
        if failures == 1:
            one._pauses.check(now[0])


async def test_what_cannot_be_started_is_said(driver: Open, tmp_path: Path) -> None:
    """And is no worker."""
    one = ProcessDriver(AutoscaleSettings.load(pool="x", data_dir=str(tmp_path)), ("/nowhere/at/all",))
    with pytest.raises(DriverFailed, match="cannot be started"):
        await one.scale_to(1)
    assert await one.workers() == frozenset()
    await one.close()


async def _are(driver: ProcessDriver, worker_ids: set[str]) -> bool:
    return await driver.workers() == worker_ids


async def _without(driver: ProcessDriver, worker_id: str) -> bool:
    return worker_id not in await driver.workers()


def test_names_of_workers_and_files_differ_for_each_pool() -> None:
    """And are worker ids, with room for a number, whatever the model is called."""
    pools = ["m", "M", "org/m", "org-m", "x" * 200, "x" * 201, "ä{}:*", "öö"]
    assert len({pool_name(pool) for pool in pools}) == len(pools)
    for pool in pools:
        assert len(check_worker_id(f"{id_prefix(pool, 'a.host-name.of.some.length')}-{10**6}")) <= 63
