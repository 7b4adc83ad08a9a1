"""The example driver under ``inferq autoscale``: from no worker up and back to none, and no request pays for it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.support.fleet import ROOT, Fleet
from tests.support.processes import Child, environment
from tests.support.servers import Server
from tests.support.waiting import eventually

MODEL = "org/scaled"
REQUESTS = 40
MAX_WORKERS = 2
_SCRIPT = ROOT / "examples" / "autoscale_by_queue_depth.py"


def _autoscaler(fleet: Fleet, folder: Path) -> Child:
    worker = [sys.executable, "-m", "worker.service", "--manager-url", fleet.router.url, "--engine", "sim"]
    worker += ["--model", MODEL, "--slots", "4", "--sim-mode", "echo", "--sim-ttft-ms", "100"]
    rules = ["--pool", MODEL, "--max", str(MAX_WORKERS), "--scale-in-after", "1s", "--interval-ms", "100"]
    rules += ["--manager-url", fleet.router.url, "--worker-slots", "4", "--port", "0", "--driver", "command"]
    script = [sys.executable, str(_SCRIPT), str(folder / "workers"), "--", *worker]
    args = [sys.executable, "-m", "inferq", "autoscale", *rules, "--", *script]
    clean = environment() | {"PYTHONPATH": str(ROOT)}
    return Child("autoscaler", args, folder / "autoscaler.log", env=clean, cwd=folder)


async def test_from_zero_workers_up_and_back_while_every_request_is_answered(
    tmp_path: Path, own_valkey: Server
) -> None:
    """Requests wait until workers come; all are answered; then the workers go again, drained."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        for role in (fleet.manager, fleet.router):
            await role.start()
        autoscaler = _autoscaler(fleet, tmp_path)
        autoscaler.start()

        async def ask(number: int) -> str:
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"request {number}"}]}
            async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return str((await answer.json())["choices"][0]["message"]["content"])

        seen: set[int] = set()
        try:
            await eventually(lambda: _listed(fleet), "the model is listed", limit_s=30)
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(ask(number)) for number in range(REQUESTS)]
                await eventually(lambda: _all_done(fleet, asked, seen), "every request is answered", limit_s=60)
            await eventually(
                lambda: not list((tmp_path / "workers").glob("*.pid")), "the workers have ended", limit_s=40
            )
            autoscaler.send(signal.SIGTERM)
            await eventually(lambda: not autoscaler.running, "the autoscaler ends", limit_s=30)
        except BaseException:
            print(autoscaler.log_tail())
            raise
        finally:
            autoscaler.kill()
            for file in (tmp_path / "workers").glob("*.pid"):
                os.killpg(int(file.read_text()), signal.SIGKILL)
        assert [task.result() for task in asked] == [f"request {number}" for number in range(REQUESTS)]
        assert max(seen) == MAX_WORKERS, f"workers seen: {seen}"
        assert autoscaler.returncode == 0
        assert len(list((tmp_path / "workers").glob("*.log"))) == MAX_WORKERS


async def _listed(fleet: Fleet) -> bool:
    return MODEL in [one["id"] for one in (await fleet.router.page("/v1/models"))["data"]]


async def _all_done(fleet: Fleet, asked: list[asyncio.Task[str]], seen: set[int]) -> bool:
    seen.add((await fleet.depth(MODEL))["workers"])
    return all(task.done() for task in asked)
