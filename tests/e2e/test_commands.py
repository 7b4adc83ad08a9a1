"""The commands that talk to a running fabric, as a shell calls them."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from telemetry.environment import free_port
from tests.support.command_line import inferq
from tests.support.fleet import ROOT, Fleet
from tests.support.processes import Child, environment
from tests.support.waiting import eventually


async def test_chat_queues_workers_and_doctor_tell_of_a_running_fabric(fleet: Fleet, tmp_path: Path) -> None:
    """One question, a conversation, the pools, the fleet and a check-up, for people and as JSON."""
    await fleet.up(workers=2)
    at = ("--router-url", fleet.router.url)

    code, output, _ = await inferq(tmp_path, "chat", "hello there", *at)
    assert (code, output) == (0, "hello there\n")

    code, output, _ = await inferq(tmp_path, "chat", "hello there", "--json", *at)
    answer = json.loads(output)
    assert (code, answer["text"], answer["finish_reason"]) == (0, "hello there", "stop")
    assert answer["request_id"].startswith("req_")

    code, output, _ = await inferq(tmp_path, "chat", *at, typed="first\n/clear\nsecond\n/quit\nnever\n")
    assert (code, output.split()) == (0, ["first", "second"])

    code, output, _ = await inferq(tmp_path, "queues", "--json", *at)
    (pool,) = json.loads(output)
    assert (code, pool["model"], pool["waiting"], pool["workers"]) == (0, "sim", 0, 2)
    code, output, _ = await inferq(tmp_path, "queues", *at)
    assert (code, output.split()[:2]) == (0, ["MODEL", "LANE"])

    code, output, _ = await inferq(tmp_path, "workers", "--json", *at)
    assert code == 0
    assert [worker["worker_id"] for worker in json.loads(output)["workers"]] == ["worker-1", "worker-2"]

    asked = {"model": "sim", "messages": [{"role": "user", "content": "in the background"}]}
    background = {"x-inferq-background": "true"}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=asked, headers=background) as taken:
        job_id = (await taken.json())["id"]
    code, output, _ = await inferq(tmp_path, "jobs", "show", job_id, "--wait", *at)
    assert (code, json.loads(output)["choices"][0]["message"]["content"]) == (0, "in the background")
    code, output, _ = await inferq(tmp_path, "jobs", "list", "--json", *at)
    assert (code, [(job["id"], job["status"]) for job in json.loads(output)]) == (0, [(job_id, "completed")])

    code, output, _ = await inferq(tmp_path, "doctor", "--json", "--redis-url", fleet.server.url, *at)
    report = json.loads(output)
    assert (code, report["ok"]) == (0, True)
    assert "2 of 2 workers take work" in [finding["text"] for finding in report["findings"]]


async def test_queues_can_be_watched_until_ctrl_c(fleet: Fleet, tmp_path: Path) -> None:
    """A line of JSON for each look, and a clean end."""
    await fleet.up(workers=1)
    clean = environment()
    args = [sys.executable, "-m", "inferq", "queues", "--watch", "--interval", "0.1", "--json"]
    args += ["--router-url", fleet.router.url]
    watch = Child("watch", args, tmp_path / "watch.log", env=clean | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    watch.start()
    try:
        await eventually(lambda: watch.log_text().count("\n") >= 3, "three looks", limit_s=60)
        watch.send(signal.SIGINT)
        await eventually(lambda: not watch.running, "the watch ends")
    finally:
        watch.kill_group()
    assert watch.returncode == 130
    assert all(json.loads(line)[0]["model"] == "sim" for line in watch.log_text().splitlines()[:3])


async def test_the_demo_uses_a_running_fabric(fleet: Fleet, tmp_path: Path) -> None:
    """A chat, a streamed chat and twenty answers, each to its own prompt."""
    await fleet.up(workers=1)
    code, output, _ = await inferq(tmp_path, "demo", "--json", "--router-url", fleet.router.url)
    shown: dict[str, Any] = json.loads(output)
    assert code == 0
    assert shown["chat"]["text"] == "What is the capital of France?"
    assert shown["stream"]["finish_reason"] in {"stop", "length"}
    assert len(shown["together"]) == 20
    assert len({answer["text"] for answer in shown["together"]}) == 20


async def test_the_demo_brings_its_own_fabric_and_takes_it_away(tmp_path: Path) -> None:
    """Where none runs: simulated engines, free ports, a summary for people, and no process left."""
    nobody = f"http://127.0.0.1:{free_port()}"
    code, output, errors = await inferq(tmp_path, "demo", "--engine", "sim", "--router-url", nobody)
    assert code == 0, errors
    assert "20 answers, none lost" in output
    assert "starting one for the demo" in errors
    assert _processes_of(tmp_path) == []


async def test_the_demos_own_fabric_takes_the_ports_it_is_given(tmp_path: Path) -> None:
    """All three of `make demo ROUTER_PORT=... MANAGER_PORT=... WORKER_PORT=...`: with one taken, it says which."""
    router, manager = free_port(), free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = taken.getsockname()[1]
        ports = ("--router-port", str(router), "--manager-port", str(manager), "--worker-port", str(worker))
        code, _, errors = await inferq(tmp_path, "demo", "--engine", "sim", *ports)
    assert code == 2
    assert f"No fabric answers at http://127.0.0.1:{router}" in errors
    assert f"{worker}" in errors and "--worker-port" in errors
    code, output, errors = await inferq(tmp_path, "demo", "--engine", "sim", *ports)
    assert code == 0, errors
    assert "20 answers, none lost" in output
    logs = {log.stem: log.read_text() for log in (tmp_path / ".inferq" / "demo" / "logs").glob("*.log")}
    for role, port in (("router", router), ("manager", manager), ("worker-1", worker)):
        assert str(port) in logs[role], f"{role} did not take port {port}"


def _processes_of(folder: Path) -> list[str]:
    """The command lines that name ``folder``."""
    found = []
    for page in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = page.read_text("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


async def test_dead_letters_are_listed_shown_asked_again_and_removed(fleet: Fleet, tmp_path: Path) -> None:
    """What was given up is asked again once the fault is gone, byte for byte, and leaves the list only then."""
    await fleet.up(workers=1)
    at = ("--router-url", fleet.router.url)
    # The engine fails three times: as often as the request is started.
    broken = {"fail": "close_midstream", "after_tokens": 1, "times": 3}
    for text in ("first words", "other words"):
        body = {"model": "sim", "messages": [{"role": "user", "content": text}], "sim": broken}
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 502, await answer.text()

    code, output, _ = await inferq(tmp_path, "dead", "list", "--json", *at)
    first, second = json.loads(output)
    assert (code, first["model"], first["attempts"]) == (0, "sim", 3)
    code, output, _ = await inferq(tmp_path, "dead", "list", *at)
    assert code == 0
    assert first["id"] in output

    code, output, _ = await inferq(tmp_path, "dead", "show", first["id"], *at)
    assert code == 0
    assert "first words" in output

    code, output, _ = await inferq(tmp_path, "dead", "replay", first["id"], *at)
    assert code == 0
    assert json.loads(output)["choices"][0]["message"]["content"] == "first words"
    code, _, errors = await inferq(tmp_path, "dead", "replay", first["id"], *at)
    assert code == 2
    assert "no dead letter" in errors

    code, _, errors = await inferq(tmp_path, "dead", "purge", *at)
    assert code == 2
    assert "--all" in errors
    code, output, _ = await inferq(tmp_path, "dead", "purge", second["id"], *at)
    assert (code, output) == (0, "1 removed\n")
    code, output, _ = await inferq(tmp_path, "dead", "purge", "--all", *at)
    assert (code, output) == (0, "0 removed\n")
