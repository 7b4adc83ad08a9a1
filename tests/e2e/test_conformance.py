"""``inferq conformance``: our worker, the examples and a Router keep every rule; each rule finds who breaks it."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from inferq.conformance.commands import check_worker_rules
from inferq.conformance.router_kit import router_kit
from inferq.conformance.router_rules import ROUTER_RULES
from inferq.conformance.scorecard import Result, check_rule
from inferq.conformance.worker_kit import worker_kit
from inferq.conformance.worker_rules import WORKER_RULES
from tests.support.example_worker import WORKERS, example_command
from tests.support.fleet import Fleet
from tests.support.servers import Server

PARTS = 4
"""How many workers of a kind are checked at a time, by a part of the rules each."""


async def scorecard(command: Sequence[str], folder: Path) -> list[Result]:
    """What comes of all rules; the worker's output is in ``folder``."""

    async def part(number: int) -> list[Result]:
        chosen = [rule for place, rule in enumerate(WORKER_RULES) if place % PARTS == number]
        kit = worker_kit(command, log=folder / f"worker-{number}.log", patience=2.0)
        return [result async for result in check_worker_rules(chosen, kit)]

    found = await asyncio.gather(*map(part, range(PARTS)))
    return [result for results in found for result in results]


@pytest.mark.parametrize("kind", ["ours", "python", "node", "go"])
async def test_a_worker_keeps_every_rule(tmp_path: Path, kind: str) -> None:
    """All that is checked holds; only what a worker leaves out (offers) may be left unchecked."""
    command = [sys.executable, "-m", "inferq", "worker"] if kind == "ours" else example_command(kind, tmp_path)
    results = await scorecard(command, tmp_path)
    assert [f"{one.name}: {one.problem}" for one in results if one.problem and one.checked] == []
    assert len(results) == len(WORKER_RULES)
    assert {one.name for one in results if not one.checked} <= ({"delivered-twice"} if kind != "ours" else set())


async def test_a_router_keeps_every_rule(tmp_path: Path, own_valkey: Server) -> None:
    """With credentials, so that each rule is checked; liars among the workers included."""
    file = tmp_path / "workers.toml"
    digest = hashlib.sha256(b"a key").hexdigest()
    file.write_text(f'[kit]\nsha256 = ["{digest}"]\nmodels = ["kit-model"]\nworkers = 4\n')
    async with Fleet(
        tmp_path, own_valkey, manager={"lease_ms": 1_500}, router={"worker_credentials_file": file},
        env={"INFERQ_JOIN_TOKEN": "token"},
    ) as fleet:  # fmt: skip
        for role in (fleet.manager, fleet.router):
            role.process.start()
        await asyncio.gather(fleet.manager.ready(), fleet.router.ready())
        results = []
        async with router_kit(
            fleet.router.url, key="a key", join_token="", api_key="", name="kit", model="kit-model"
        ) as kit:
            for rule in ROUTER_RULES:
                results.append(await check_rule(rule, kit))
                await kit.calm_down()
    assert [f"{one.name}: {one.problem}" for one in results if one.problem] == []


BREAKS = {
    "join": ('"again": again', '"again": True'),
    "heartbeat": ("self.ping.wait(interval_s)", "self.ping.wait(9 * interval_s)"),
    "running": ('"running": running', '"running": 0'),
    "ping": ('told["kind"] == "ping"', 'told["kind"] == "pong"'),
    "unknown-worker": ("self.join(again=True)", "self.join(again=False)"),
    "fenced-session": ('if refusal.args != ("fenced",):', "if refusal.args:"),
    "refused-credential": ("answer.status in (401, 429)", "answer.status == 429"),
    "claim-numbers": ("self.turn += len(jobs)", "self.turn += 0"),
    "slots": ("SLOTS - len(self.attempts)", "SLOTS"),
    "free-slot": ("hold_s = 0.3 if", "hold_s = 20.0 if"),
    "repeated-claim": ("if claim and not failed:", "if claim:"),
    "reconcile": ("                if failed:\n", "                if failed and not failed:\n"),
    "abort": ('running.stop("aborted")', "pass"),
    "messages": ('self.after = told["id"]', 'self.after = "0"'),
    "unknown-messages": ('elif told["kind"] == "drain":', 'elif told["kind"] != "wake":'),
    "first-piece": ("if end > 1:", "if end > 400:"),
    "plain-answer": ('"content_type": kind', '"content_type": "text/plain"'),
    "body": ('job["body"].encode()', 'job["body"].strip().encode()'),
    "refusal": ('"done" if answer.status < 400 else "failed"', '"done"'),
    "bytes": ('"data": [data.decode()]', '"data": [data.decode(errors="replace")]'),
    "large-answer": ("PIECE_BYTES = 4 << 20", "PIECE_BYTES = 64 << 20"),
    "stream": ("answer.read1(1 << 16)", "answer.read()"),
    "many-streams": ('"lease": self.lease,', '"lease": next(iter(self.session.attempts)),'),
    "prefix": ('self.head = {"status": answer.status,', 'self.head = {"status": answer.status, "continued": True,'),
    "repeated-output": ('found = ask(f"/{self.session.id}/{name}"', 'found = ask_once(f"/{self.session.id}/{name}"'),
    "repeated-settle": ('found = ask(f"/{self.session.id}/{name}"', 'found = ask_once(f"/{self.session.id}/{name}"'),
    "full": ('if found == "ok":', 'if found in ("ok", "full"):'),
    "broken-stream": (
        'return f"the engine broke off: {type(error).__name__}: {error}"',
        'return "" if self.tell("settle", {**self.piece(b""), "outcome": "done"}) else ""',
    ),
    "garbage": ("json.loads(whole)", "pass"),
    "engine-error": ("if answer.status >= 500 and", "if answer.status >= 900 and"),
    "last-error": ('job["attempt"] < job["max_attempts"]', 'job["attempt"] < 9'),
    "fenced-attempt": ('if found == "ok":', 'if found in ("ok", "fenced"):'),
    "gone": ('self.stop("handed_back" if found == "gone" else found)', "self.stop(found)"),
    "router-restart": ("                failed = True\n", "                self.over.set()\n"),
    "router-leaves": ("time.sleep(0.3)", "time.sleep(0.0)"),
    "malformed-answers": ("except (Unanswered, *BROKEN) as error:\n", "except Unanswered as error:\n"),
    "slow-link": ("timeout=15.0 + hold_s", "timeout=0.01"),
    "sigterm": ("lambda *_: stopping.set()", "lambda *_: os._exit(0)"),
    "drain": ('elif told["kind"] == "drain":', 'elif told["kind"] == "drained":'),
}
"""What is broken in the worker in Python for each rule."""
OFFERS_ONLY = {"delivered-twice"}


def broken_worker(folder: Path, rule: str) -> list[str]:
    """The worker in Python, broken so that it does not keep ``rule``."""
    source = (WORKERS / "worker.py").read_text()
    old, new = BREAKS[rule]
    assert old in source, f"{rule}: the worker in Python has no {old!r} any more"
    broken = folder / f"{rule}.py"
    broken.write_text(source.replace(old, new))
    return [sys.executable, str(broken)]


def test_there_is_a_broken_worker_for_each_rule() -> None:
    """No rule is there that nobody was seen to break."""
    assert BREAKS.keys() | OFFERS_ONLY == {rule.name for rule in WORKER_RULES}


@pytest.mark.parametrize("part", range(4))
async def test_each_rule_finds_a_worker_that_breaks_it(tmp_path: Path, part: int) -> None:
    """A worker that was broken on purpose for a rule is found by it."""
    rules = [rule for place, rule in enumerate(WORKER_RULES) if place % 4 == part and rule.name in BREAKS]

    async def problem(place: int) -> str:
        rule = rules[place]
        kit = worker_kit(broken_worker(tmp_path, rule.name), log=tmp_path / f"{rule.name}.log", patience=0.3)
        return "".join([result.problem async for result in check_worker_rules([rule], kit)])

    problems = await asyncio.gather(*map(problem, range(len(rules))))
    assert [rule.name for rule, found in zip(rules, problems, strict=True) if not found] == []


async def test_a_job_that_is_handed_over_twice_is_run_twice_by_a_worker_that_forgets(tmp_path: Path) -> None:
    """The rule for workers that make offers finds ours, where it does not look whether a job runs already."""
    program = tmp_path / "forgetful.py"
    program.write_text(
        "import sys\nfrom worker.attempts import Attempts\nfrom worker.service import main\n"
        "Attempts.has = lambda self, attempt_id: False\nsys.exit(main([]))\n"
    )
    [rule] = [rule for rule in WORKER_RULES if rule.name == "delivered-twice"]
    kit = worker_kit([sys.executable, str(program)], log=tmp_path / "worker.log")
    [result] = [result async for result in check_worker_rules([rule], kit)]
    assert "was run 2 times" in result.problem
