"""``inferq conformance worker`` and ``inferq conformance router``: check, and print a scorecard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path

from queue_schemas import CannotStart

from ..console import err, out, print_json
from .router_kit import router_kit
from .router_rules import ROUTER_RULES
from .scorecard import Broken, Kit, Result, Rule, check_rule, selected, show, summary
from .worker_kit import START_LIMIT_S, WorkerKit, worker_kit
from .worker_rules import WORKER_RULES


def check_worker(
    command: Sequence[str],
    *,
    listen: str,
    only: Sequence[str],
    log: Path | None,
    patience: float,
    as_json: bool,
) -> int:
    """Check the worker that ``command`` starts, or that somebody starts for the Router at ``listen``. The exit code: 1
    if a rule is broken."""
    rules = _selected(WORKER_RULES, only)
    host, _, port = listen.rpartition(":")
    if not command and not listen:
        raise CannotStart("say how the worker is started (behind --), or where it finds the Router: --listen HOST:PORT")
    if listen and not port.isdecimal():
        raise CannotStart(f"--listen {listen}: write it like 127.0.0.1:18000")
    results: list[Result] = []

    async def check() -> None:
        kit = worker_kit(command, host or "127.0.0.1", int(port or 0), log=log, patience=patience)
        async for result in check_worker_rules(rules, kit):
            results.append(result)
            if not as_json:
                show(result, out)

    asyncio.run(check())
    return _report(results, as_json=as_json)


async def check_worker_rules(
    rules: Sequence[Rule[WorkerKit]], opened: AbstractAsyncContextManager[WorkerKit]
) -> AsyncIterator[Result]:
    """What comes of each rule, one after the other; no more once a worker does not come."""
    async with opened as kit:
        if not kit.command:
            err.print(f"start the worker, within {START_LIMIT_S:.0f} s, with")
            for name, value in kit.environment.items():
                err.print(f"  {name}={value}", soft_wrap=True)
        for rule in rules:
            try:
                await kit.ready()
            except Broken as error:
                yield Result(rule.name, rule.sentence, str(error), START_LIMIT_S)
                return
            yield await _check_one(rule, kit)


async def _check_one(rule: Rule[WorkerKit], kit: WorkerKit) -> Result:
    result = await check_rule(rule, kit)
    if not result.problem and kit.router.seen.faults:
        result = Result(rule.name, rule.sentence, kit.router.seen.faults[0], result.seconds)
    await kit.calm_down()
    if result.problem and kit.command:
        await kit.kill()  # the next rule has a worker that nothing has disturbed
    return result


def check_router(
    url: str,
    *,
    key: str,
    join_token: str,
    api_key: str,
    names: tuple[str, str],
    only: Sequence[str],
    as_json: bool,
) -> int:
    """Check the Router at ``url`` with scripted workers; ``names``: how they and their model are called, empty for
    names of the kit's own. The exit code: 1 if a rule is broken."""
    rules = _selected(ROUTER_RULES, only)
    name, model = names

    async def check() -> list[Result]:
        results = []
        async with router_kit(url, key=key, join_token=join_token, api_key=api_key, name=name, model=model) as kit:
            for rule in rules:
                results.append(await check_rule(rule, kit))
                await kit.calm_down()
                if not as_json:
                    show(results[-1], out)
        return results

    return _report(asyncio.run(check()), as_json=as_json)


def _selected(rules: Sequence[Rule[Kit]], only: Sequence[str]) -> list[Rule[Kit]]:
    try:
        return selected(rules, only)
    except ValueError as error:
        raise CannotStart(str(error)) from error


def _report(results: Sequence[Result], *, as_json: bool) -> int:
    if as_json:
        print_json({"rules": [asdict(one) for one in results], "summary": summary(results)}, line=True)
    else:
        out.print(summary(results))
    return 1 if any(one.problem and one.checked for one in results) else 0
