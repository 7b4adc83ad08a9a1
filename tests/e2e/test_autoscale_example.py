"""The example autoscaler: from no worker up and back to none, and no request pays for it with its life."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.support.fleet import ROOT, Fleet
from tests.support.processes import Child, environment
from tests.support.servers import Server
from tests.support.waiting import eventually

MODEL = "scaled"
REQUESTS = 60
MAX_WORKERS = 2
_SCRIPT = ROOT / "examples" / "autoscale_by_queue_depth.py"


def _autoscaler(fleet: Fleet, folder: Path) -> Child:
    worker = [sys.executable, "-m", "worker.service", "--manager-url", fleet.router.url, "--engine", "sim"]
    worker += ["--model", MODEL, "--slots", "4", "--sim-mode", "echo", "--sim-ttft-ms", "100"]
    rule = ["--router-url", fleet.router.url, "--model", MODEL, "--max-workers", str(MAX_WORKERS), "--per-worker", "10"]
    rule += ["--interval-s", "0.1", "--cooldown-s", "0.5"]
    clean = environment()
    args = [sys.executable, str(_SCRIPT), *rule, "--", *worker]
    return Child("autoscaler", args, folder / "autoscaler.log", env=clean | {"PYTHONPATH": str(ROOT)}, cwd=folder)


async def test_from_zero_workers_up_and_back_while_every_request_is_answered(
    tmp_path: Path, own_valkey: Server
) -> None:
    """Requests for a declared model wait until workers come; all are answered; then the workers go again."""
    async with Fleet(tmp_path, own_valkey, router={"pools": MODEL}) as fleet:
        for role in (fleet.manager, fleet.router):
            await role.start()

        async def ask(number: int) -> str:
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"request {number}"}]}
            async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return str((await answer.json())["choices"][0]["message"]["content"])

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(number)) for number in range(REQUESTS)]
            await eventually(lambda: _waiting(fleet), "every request waits, at zero workers", limit_s=20)
            script = _autoscaler(fleet, tmp_path)
            script.start()
            seen: set[int] = set()
            try:
                await eventually(lambda: _all_done(fleet, asked, seen), "every request is answered", limit_s=60)
                await eventually(lambda: _workers(fleet, 0), "the workers are gone again", limit_s=30)
                script.send(signal.SIGTERM)
                await eventually(lambda: not script.running, "the script ends", limit_s=30)
            except AssertionError:
                print(script.log_tail())
                raise
            finally:
                script.terminate(limit_s=90)  # a kill would leave its workers behind
        assert [task.result() for task in asked] == [f"request {number}" for number in range(REQUESTS)]
        assert max(seen) == MAX_WORKERS, f"workers seen: {seen}"
        assert script.returncode == 0
        log = script.log_text()
        assert f"0 -> {MAX_WORKERS} workers" in log
        assert "1 -> 0 workers" in log


async def _waiting(fleet: Fleet) -> bool:
    depth = await fleet.depth(MODEL)
    return bool(depth["waiting"] == REQUESTS and depth["workers"] == 0)


async def _all_done(fleet: Fleet, asked: list[asyncio.Task[str]], seen: set[int]) -> bool:
    seen.add((await fleet.depth(MODEL))["workers"])
    return all(task.done() for task in asked)


async def _workers(fleet: Fleet, count: int) -> bool:
    return bool((await fleet.depth(MODEL))["workers"] == count)
