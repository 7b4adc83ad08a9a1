"""Rules, and the scorecard of who was checked by them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.markup import escape

Kit = TypeVar("Kit")
RULE_LIMIT_S = 60.0


class Broken(Exception):
    """A rule is broken: the message says how."""


class NotChecked(Exception):
    """A rule could not be checked: the message says why."""


@dataclass(frozen=True, slots=True)
class Rule(Generic[Kit]):
    """One thing that must hold. ``check`` raises ``Broken`` if it does not."""

    name: str
    sentence: str
    check: Callable[[Kit], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a rule; ``problem`` is empty if it holds. ``checked``: whether it could be found out."""

    name: str
    sentence: str
    problem: str
    seconds: float
    checked: bool = True


async def check_rule(rule: Rule[Kit], kit: Kit) -> Result:
    """Check one rule, for ``RULE_LIMIT_S`` at most."""
    began = time.monotonic()
    problem, checked = "", True
    try:
        async with asyncio.timeout(RULE_LIMIT_S):
            await rule.check(kit)
    except Broken as error:
        problem = str(error)
    except NotChecked as error:
        problem, checked = str(error), False
    except TimeoutError:
        problem = f"it was not through after {RULE_LIMIT_S:.0f} s"
    return Result(rule.name, rule.sentence, problem, time.monotonic() - began, checked)


def selected(rules: Sequence[Rule[Kit]], names: Sequence[str]) -> list[Rule[Kit]]:
    """The rules of these names; all of them without names. Raises ``ValueError`` for a name that is none."""
    unknown = sorted(set(names) - {rule.name for rule in rules})
    if unknown:
        raise ValueError(f"there is no rule {', '.join(unknown)}; rules: {', '.join(rule.name for rule in rules)}")
    return [rule for rule in rules if not names or rule.name in names]


def show(result: Result, console: Console) -> None:
    """One line of the scorecard, and why where a rule is broken."""
    mark = "[green]ok[/]" if not result.problem else "[red]BROKEN[/]" if result.checked else "[yellow]not checked[/]"
    rule = f"{escape(result.name)}: {escape(result.sentence)}"
    console.print(f"{mark:<24} {rule} ({result.seconds:.1f} s)", soft_wrap=True)
    if result.problem:
        console.print(f"             {escape(result.problem)}", soft_wrap=True)


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    broken = sum(1 for one in results if one.problem and one.checked)
    unchecked = sum(1 for one in results if not one.checked)
    kept = len(results) - broken - unchecked
    return f"{kept} of {len(results)} rules hold, {broken} broken, {unchecked} not checked"
