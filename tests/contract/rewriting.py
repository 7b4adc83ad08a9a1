"""The scripts with a text of theirs replaced: by a clock that tests move, or by nothing where a guard was.

A text must occur exactly once, so that a rewrite cannot rot unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from broker.redis.scripts import Script

CLOCK = "clock"
"""Key of the clock that stands instead of the server's."""


class Rewrite(NamedTuple):
    """``text`` of ``part`` (a script or a library) is replaced, in every script that has the part."""

    part: str
    text: str
    replacement: str


CLOCK_OF_TESTS = Rewrite(
    "clock",
    "local function now_ms(at_least)\n",
    "local function now_ms()\n"
    f"  local time = call('HMGET', '{CLOCK}', 's', 'us')\n"
    "  if time then return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) end\n"
    "  local at_least = nil\n",
)


def rewritten(scripts: Mapping[str, Script], *rewrites: Rewrite) -> dict[str, Script]:
    """All scripts, rewritten."""
    parted = {name: dict(script.parts) for name, script in scripts.items()}
    for part, text, replacement in rewrites:
        having = [parts for parts in parted.values() if part in parts]
        assert having, f"there is no script or library {part}"
        for parts in having:
            found = parts[part].count(text)
            assert found == 1, f"{part} has {found} times {text!r}: adapt the rewrite"
            parts[part] = parts[part].replace(text, replacement)
    return {name: Script.of(name, parts) for name, parts in parted.items()}


async def set_clock(client: Any, now_ms: int) -> None:
    """What ``CLOCK_OF_TESTS`` reads."""
    await client.hset(CLOCK, mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})
