"""The scripts with a text of theirs replaced: by a clock that tests move, or by nothing where a guard was.

A text must occur exactly once, so that a rewrite cannot rot unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from broker.redis.scripts import Script

SHARED = (files("broker") / "lua" / "_shared.lua").read_text("utf-8")
CLOCK = "clock"
"""Key of the clock that stands instead of the server's."""


class Rewrite(NamedTuple):
    """``text`` of ``part`` (a script, or ``_shared``) is replaced."""

    part: str
    text: str
    replacement: str


CLOCK_OF_TESTS = Rewrite(
    "_shared",
    "local function now_ms(at_least)\n",
    "local function now_ms()\n"
    f"  local time = call('HMGET', '{CLOCK}', 's', 'us')\n"
    "  if time then return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) end\n"
    "  local at_least = nil\n",
)


def rewritten(scripts: Mapping[str, Script], *rewrites: Rewrite) -> dict[str, Script]:
    """All scripts, rewritten. What is not a script of the shared text stays as it is."""
    parted = {name: list(script.source.partition(SHARED)) for name, script in scripts.items()}
    parted = {name: parts for name, parts in parted.items() if parts[1]}
    for part, text, replacement in rewrites:
        assert part == "_shared" or part in parted, f"there is no script {part}"
        at = 1 if part == "_shared" else 2
        for name, parts in parted.items():
            if part in ("_shared", name):
                found = parts[at].count(text)
                assert found == 1, f"{part} has {found} times {text!r}: adapt the rewrite"
                parts[at] = parts[at].replace(text, replacement)
    return dict(scripts) | {name: _script(name, "".join(parts)) for name, parts in parted.items()}


def _script(name: str, source: str) -> Script:
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


async def set_clock(client: Any, now_ms: int) -> None:
    """What ``CLOCK_OF_TESTS`` reads."""
    await client.hset(CLOCK, mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})
