"""Join a Lua script and its libraries to one text in which a call builds only the functions that it needs.

Every call of a script runs its text from the top and makes each function of it anew: 60 functions cost as much as 25
commands. So what the script does not use is left out. What it seldom uses is made at the first use: functions that a
header names (``-- rarely: retry_or_end``), and what only they use.

A statement begins in the first column. Those of libraries only define; those of the script itself run in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_RARELY = re.compile(r"^-- rarely: (.+)$", re.MULTILINE)
_CONTINUES = re.compile(r"\s|(?:end|else|elseif|until)\b|[})]")
_DEFINES = re.compile(r"local (?:function (\w+)|([\w, ]+?)(?: =|$))", re.MULTILINE)
_STRING = re.compile(r"'[^'\n]*'")
_NAME = re.compile(r"(?<![\w.:])[A-Za-z_]\w*")
_BUILDER = """
local rare_functions
rarely = function(name)
  if not rare_functions then
{definitions}
    rare_functions = {{ {names} }}
  end
  return rare_functions[name]
end"""


@dataclass(frozen=True, slots=True)
class _Statement:
    text: str
    defines: tuple[str, ...]
    mentions: frozenset[str]
    is_function: bool
    runs: bool
    """Whether it belongs to the script itself and does more than to define a function."""


def link(name: str, parts: Mapping[str, str]) -> str:
    """The text of script ``name`` from ``parts``: its libraries, each behind those that it uses, and itself at the end.

    Raises ``ValueError`` where a function that is seldom used might be called before it can be made.
    """
    rare = {found.strip() for text in parts.values() for names in _RARELY.findall(text) for found in names.split(",")}
    flags = [text for part, text in parts.items() if part == "flags"]
    statements = [found for part, text in parts.items() if part != "flags" for found in _statements(text, part == name)]
    running = [at for at, statement in enumerate(statements) if statement.runs]
    often = _needed(statements, running, without=rare)
    entries = [
        at
        for at, statement in enumerate(statements)
        if statement.is_function
        and rare.intersection(statement.defines)
        and any(statements[user].mentions.intersection(statement.defines) for user in often)
    ]
    seldom = _needed(statements, entries, without=set()) - often
    texts = [*flags, "local rarely"] if entries else flags
    for at, statement in enumerate(statements):
        if at in entries:
            function = statement.defines[0]
            texts.append(f"local function {function}(...) return rarely('{function}')(...) end")
        elif at in often:
            texts.append(statement.text)
        if entries and at == max(seldom):
            texts.append(_builder(statements, sorted(seldom), entries))
            early = _needed(statements, [place for place in running if place < at], without=rare)
            named = {function for entry in entries for function in statements[entry].defines}
            if any(statements[place].mentions & named for place in early):
                raise ValueError(f"{name} uses a function that is rarely used before all of these are defined")
    return "\n".join(texts) + "\n"


def _statements(text: str, is_script: bool) -> Iterator[_Statement]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    starts = [at for at, line in enumerate(lines) if not _CONTINUES.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        statement = "\n".join(lines[start:end])
        found = _DEFINES.match(statement)
        is_function = bool(found and found[1])
        defines = tuple(name.strip() for name in (found[1] or found[2]).split(",")) if found else ()
        mentions = frozenset(_NAME.findall(_STRING.sub("", statement).replace("..", " ")))
        yield _Statement(statement, defines, mentions, is_function, is_script and not is_function)


def _needed(statements: list[_Statement], roots: Iterable[int], *, without: set[str]) -> set[int]:
    """The statements at ``roots`` and those that define what they mention, except the functions ``without``."""
    defined: dict[str, list[int]] = {}
    for at, statement in enumerate(statements):
        for name in statement.defines:
            if not (statement.is_function and name in without):
                defined.setdefault(name, []).append(at)
    needed: set[int] = set()
    waiting = list(roots)
    while waiting:
        at = waiting.pop()
        if at not in needed:
            needed.add(at)
            waiting += (place for name in statements[at].mentions for place in defined.get(name, ()))
    return needed


def _builder(statements: list[_Statement], seldom: list[int], entries: list[int]) -> str:
    names = ", ".join(f"{name} = {name}" for entry in entries for name in statements[entry].defines)
    return _BUILDER.format(definitions="\n".join(statements[at].text for at in seldom), names=names)
