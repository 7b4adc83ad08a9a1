"""``inferq autoscale`` on a real fleet: from no worker up and back to none, and no request pays for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from telemetry.environment import free_port
from tests.support.adapters import make_adapters
from tests.support.batches import BatchStorage, add_batcher, line
from tests.support.fleet import ROOT, Fleet
from tests.support.processes import Child, environment
from tests.support.servers import Server
from tests.support.waiting import eventually

MODEL = "scaled"
REQUESTS = 240
"""One worker would need nine seconds for them: time for all to start, also on a busy machine."""
MAX_WORKERS = 3
_WORKER = ["--engine", "sim", "--slots", "4", "--sim-mode", "echo", "--sim-ttft-ms", "150"]
_RULES = {"max": MAX_WORKERS, "worker-slots": 4, "scale-in-after": "1s", "interval-ms": 100, "port": 0}


@pytest.fixture
async def fleet(tmp_path: Path, own_valkey: Server) -> AsyncIterator[Fleet]:
    """A Manager and a Router that know no model, and refuse what no worker serves."""
    async with Fleet(tmp_path, own_valkey, router={"on_no_worker": "refuse"}) as fleet:
        await fleet.manager.start()
        await fleet.router.start()
        yield fleet


@contextmanager
def autoscaler(
    fleet: Fleet, name: str = "autoscaler", worker_options: Sequence[str] = (), **more: object
) -> Iterator[Child]:
    """The autoscaler's process, running; at the end it and its workers are gone."""
    rules = {**_RULES, "pool": MODEL, "manager-url": fleet.router.url, "data-dir": fleet.folder / name} | more
    flags = [part for flag, value in rules.items() for part in (f"--{flag}", str(value))]
    args = [sys.executable, "-m", "inferq", "autoscale", *flags, "--", *_WORKER, *worker_options]
    env = environment() | {"PYTHONPATH": str(ROOT), "INFERQ_LOG_FORMAT": "json"}
    child = Child(name, args, fleet.folder / f"{name}.log", env=env, cwd=fleet.folder)
    child.start()
    try:
        yield child
    except BaseException:
        print(child.log_tail(40))
        raise
    finally:
        child.kill()
        for pid in worker_pids(fleet.folder / name):
            os.killpg(pid, signal.SIGKILL)


def worker_pids(data_dir: Path) -> list[int]:
    """Of the workers that the process driver's record names and that run."""
    record = data_dir / "autoscale" / f"{MODEL}.json"
    found = json.loads(record.read_text())["workers"].values() if record.exists() else []
    return [one["pid"] for one in found if Path(f"/proc/{one['pid']}").exists()]


async def ask(fleet: Fleet, number: int, model: str = MODEL) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": f"request {number}"}]}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["choices"][0]["message"]["content"])


async def listed(fleet: Fleet, model: str = MODEL) -> bool:
    """Whether the Router lists a model, which the autoscaler declares."""
    return model in [one["id"] for one in (await fleet.router.page("/v1/models"))["data"]]


async def workers(fleet: Fleet) -> int:
    return int((await fleet.depth(MODEL))["workers"])


async def test_a_burst_is_served_from_zero_and_the_fleet_goes_back_to_zero(fleet: Fleet) -> None:
    """The pool is listed at zero workers and its requests are held, although others would be refused. Three workers
    come, answer all, and leave one after the other; SIGTERM ends the autoscaler."""
    port = free_port()
    with autoscaler(fleet, port=port) as child:
        await eventually(lambda: listed(fleet), "the pool is listed at zero workers", limit_s=30)
        await eventually(lambda: _page(fleet, port, "/readyz"), "it scales", limit_s=10)
        assert (await fleet.depth(MODEL))["replicas_wanted"] == 0
        assert f'inferq_replicas_wanted{{model="{MODEL}"}} 0.0' in await fleet.router.metrics()
        seen: set[int] = set()

        async def all_done(asked: list[asyncio.Task[str]]) -> bool:
            seen.add(await workers(fleet))
            return all(task.done() for task in asked)

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(fleet, number)) for number in range(REQUESTS)]
            await eventually(lambda: all_done(asked), "every request is answered", limit_s=60)
        assert [task.result() for task in asked] == [f"request {number}" for number in range(REQUESTS)]
        assert max(seen) == MAX_WORKERS, f"workers seen: {seen}"
        metrics = await _page(fleet, port, "/metrics")
        assert "inferq_autoscaler_acting 1.0" in metrics
        assert 'inferq_autoscaler_scalings_total{direction="out"} 3.0' in metrics
        await eventually(lambda: _are(fleet, 0), "the workers are gone again", limit_s=40)
        await eventually(lambda: not worker_pids(fleet.folder / "autoscaler"), "their processes have ended", limit_s=20)
        child.send(signal.SIGTERM)
        await eventually(lambda: not child.running, "the autoscaler ends", limit_s=20)
        assert child.returncode == 0


async def test_no_request_fails_while_the_fleet_shrinks_under_load(fleet: Fleet) -> None:
    """Three workers that all have work become one while requests go on: what a drained worker runs it finishes."""
    with autoscaler(fleet):
        await eventually(lambda: listed(fleet), "the pool is listed at zero workers", limit_s=30)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(fleet, number)) for number in range(REQUESTS)]
            await eventually(lambda: _are(fleet, MAX_WORKERS), "all workers serve", limit_s=40)

            async def shrunk() -> bool:
                asked.append(group.create_task(ask(fleet, len(asked))))
                return await workers(fleet) == 1

            await eventually(shrunk, "one worker is left", limit_s=40, every_s=0.1)
        assert [task.result() for task in asked] == [f"request {number}" for number in range(len(asked))]
        assert len(asked) > REQUESTS + 10, "requests came while it shrank"


async def test_a_batch_wakes_the_fleet_from_zero(fleet: Fleet) -> None:
    """One worker comes, although each line would fill a slot: nobody waits for a batch within seconds."""
    storage = BatchStorage(fleet.folder / ".inferq" / "store")
    batcher = await add_batcher(fleet, storage).start()
    with autoscaler(fleet):
        await eventually(lambda: listed(fleet), "the pool is listed at zero workers", limit_s=30)
        batch_id = storage.run([line(number, model=MODEL) for number in range(30)])
        batch = await storage.ended(batch_id, limit_s=60)
        progress = batch.progress
        assert (progress.status, progress.completed, progress.failed) == ("completed", 30, 0)
        assert len(_logs(fleet)) == 1, "one worker is enough"
        await eventually(lambda: _are(fleet, 0), "the worker is gone again", limit_s=40)
    batcher.process.terminate()


async def test_a_request_for_an_adapter_wakes_the_fleet_from_zero(fleet: Fleet) -> None:
    """It is held, though no worker has ever named the adapter; the worker that comes loads it, answers, and goes."""
    folder = make_adapters(fleet.folder / "adapters", ["tuned"])
    options = ["--adapters-dir", str(folder), "--max-adapters", "2"]
    with autoscaler(fleet, worker_options=options, adapters="tuned"):
        await eventually(lambda: listed(fleet, "tuned"), "the adapter is listed at zero workers", limit_s=30)
        assert await asyncio.wait_for(ask(fleet, 1, "tuned"), 60) == "request 1"
        await eventually(lambda: _are(fleet, 0), "the worker is gone again", limit_s=40)


async def test_the_next_autoscaler_adopts_the_workers_of_a_killed_one(fleet: Fleet) -> None:
    """They run on meanwhile, one and the same process; a killed worker is replaced."""
    with autoscaler(fleet, min=2) as child:
        await eventually(lambda: _are(fleet, 2), "both workers serve", limit_s=40)
        before = worker_pids(fleet.folder / "autoscaler")
        child.kill()
        assert await ask(fleet, 7) == "request 7"
        child.start()
        await eventually(lambda: "workers_adopted" in child.log_text(), "they are adopted", limit_s=30)
        assert worker_pids(fleet.folder / "autoscaler") == before
        os.kill(before[0], signal.SIGKILL)

        def replaced() -> bool:
            now = worker_pids(fleet.folder / "autoscaler")
            return len(now) == 2 and before[0] not in now and before[1] in now

        await eventually(replaced, "the killed worker is replaced", limit_s=60)


async def test_one_of_two_autoscalers_acts_and_the_other_takes_over(fleet: Fleet) -> None:
    """The second starts nothing while the first acts. When the first ends, the second counts its workers, which are
    not its own, and starts none beside them."""
    with autoscaler(fleet, "first", min=1) as first:
        await eventually(lambda: _are(fleet, 1), "its worker serves", limit_s=40)
        with autoscaler(fleet, "second", min=1) as second:
            await eventually(lambda: "another autoscaler acts" in second.log_text(), "it stands by", limit_s=30)
            first.send(signal.SIGTERM)
            await eventually(lambda: not first.running, "the first ends", limit_s=20)
            assert len(worker_pids(fleet.folder / "first")) == 1, "its worker runs on"
            assert await ask(fleet, 3) == "request 3"
            for pid in worker_pids(fleet.folder / "first"):
                os.killpg(pid, signal.SIGKILL)
            await eventually(lambda: worker_pids(fleet.folder / "second"), "the second acts", limit_s=60)
            assert await ask(fleet, 4) == "request 4"


async def _page(fleet: Fleet, port: int, path: str) -> str:
    """A page of the autoscaler; empty unless it answers 200."""
    async with fleet.session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return await answer.text() if answer.status == 200 else ""


def _logs(fleet: Fleet) -> list[str]:
    return [path.name for path in (fleet.folder / "autoscaler" / "logs").glob("*.log")]


async def _are(fleet: Fleet, count: int) -> bool:
    return await listed(fleet) and await workers(fleet) == count
