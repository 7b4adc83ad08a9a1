"""The Lua scripts of ``broker/lua``, each composed with the libraries that it uses, and addressed by content.

A script or library says ``-- uses: fence, queue`` in its header. Libraries are the files of ``lua/lib``, and some that
are generated: ``transitions`` from :mod:`queue_schemas.lifecycle`, ``lanes`` from :mod:`queue_schemas.lanes`,
``<decision>_rules`` from the constants of a module of :mod:`scheduling`, and ``record_format``. Scripts are called by
the SHA-1 of their text (EVALSHA), so two versions can share a server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType, ModuleType

from queue_schemas.lanes import BAND_CYCLE, LANE_CYCLE, band_order, lane_order, region_first
from queue_schemas.lifecycle import TERMINAL, TRANSITIONS
from scheduling import affinity, arrivals, prediction

from ..lua.linker import link

_REFUSED_IN_FULL_MEMORY = frozenset({"enqueue"})
"""What takes in more work. Finishing must work when the server's memory is full."""
_RULES: Mapping[str, tuple[ModuleType, tuple[str, ...]]] = {
    "affinity": (affinity, ("DIGEST_CHARS", "SLOT_CHARS", "MAX_DIGESTS", "MAX_HOLDERS", "LOOKAHEAD", "PATIENCE_JOBS")),
    "arrivals": (arrivals, ("WINDOW_MS", "LOOK_MS")),
    "prediction": (
        prediction,
        ("RATE_JOBS", "FADE_MS", "KNOWN_JOBS", "MAX_WAIT_MS", "LANE_CYCLE", "BAND_STEP", "BAND_CYCLE"),
    ),
}
"""Constants that scripts share with the functions that say the same."""
_USES = re.compile(r"^-- uses: (.+)$", re.MULTILINE)


RECORD = (
    *("state", "epoch", "aid", "attempts", "max", "owner", "pool", "lane", "band", "tenant", "reply", "persisted"),
    *("deadline", "size", "at", "queue", "entry", "resume", "cost", "weight", "charged", "predicted"),
)
"""What the record of every job says, in one field of words; none of them has a space."""
_TOMBSTONE_WORDS = 3


@dataclass(frozen=True, slots=True)
class Script:
    """One script. ``parts``: its libraries and its own text, by name. ``sha`` is the SHA-1 of ``source``, as the server
    computes it."""

    name: str
    parts: Mapping[str, str]
    source: str
    sha: str

    @classmethod
    def of(cls, name: str, parts: Mapping[str, str]) -> Script:
        """The script made of ``parts``, in their order: its own text stands at the end."""
        source = _link(name, tuple(parts.items()))
        return cls(name, parts, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@lru_cache(256)
def _link(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    return link(name, dict(parts))


@cache
def load_scripts(*, flags: bool) -> Mapping[str, Script]:
    """All scripts by name. ``flags``: with the ``#!lua`` line that real servers honour and fakeredis refuses."""
    folder = files("broker") / "lua"
    generated = {"transitions": _transitions(), "lanes": _lanes(), "record_format": _record_format()}
    generated |= {f"{rules}_rules": _constants(*source) for rules, source in _RULES.items()}
    libraries = _texts(folder / "lib") | generated
    scripts = {}
    for name, text in _texts(folder).items():
        parts = compose(name, text, libraries)
        if flags:
            parts = {"flags": f"#!lua{'' if name in _REFUSED_IN_FULL_MEMORY else ' flags=allow-oom'}"} | parts
        scripts[name] = Script.of(name, parts)
    return MappingProxyType(scripts)


def compose(name: str, text: str, libraries: Mapping[str, str]) -> dict[str, str]:
    """The parts of a script: each library that it uses, itself or by another one, before those that use it. Raises
    ``ValueError`` for a library that does not exist, or that needs itself."""
    parts: dict[str, str] = {}

    def add(part: str, source: str, users: tuple[str, ...]) -> None:
        for used in _used(source):
            if used in (*users, part):
                raise ValueError(f"{' -> '.join((*users, part, used))}: libraries of broker/lua/lib need each other")
            if used not in libraries:
                raise ValueError(f"{part} uses {used}, which is no library; there are {', '.join(sorted(libraries))}")
            if used not in parts:
                add(used, libraries[used], (*users, part))
        parts[part] = source

    add(name, text, ())
    return parts


def _used(source: str) -> list[str]:
    found = _USES.search(source)
    return [name.strip() for name in found[1].split(",")] if found else []


def _texts(folder: Traversable) -> dict[str, str]:
    return {
        entry.name.removesuffix(".lua"): entry.read_text("utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".lua")
    }


def _transitions() -> str:
    """The lifecycle's table in Lua: ``TRANSITIONS['queued leased']``, ``TERMINAL['done']``."""
    moves = ", ".join(
        f"['{state} {following}'] = true" for state, after in TRANSITIONS.items() for following in sorted(after)
    )
    ends = ", ".join(f"{state} = true" for state in sorted(TERMINAL))
    return f"local TRANSITIONS = {{ {moves} }}\nlocal TERMINAL = {{ {ends} }}\n"


def _record_format() -> str:
    """Packing a job's record and reading it, in Lua: ``pack_record(job)``, ``parse_record(id, record)`` (or nil), and
    ``LACKING``, which makes a record of a tombstone."""
    names, pattern = ", ".join(RECORD), " ".join(["(%S*)"] * len(RECORD))
    packed = " .. ' ' .. ".join(f"job.{name}" for name in RECORD)
    read = ", ".join(f"{name} = {name}" for name in RECORD)
    lacking = " " * (len(RECORD) - _TOMBSTONE_WORDS)
    return (
        f"local LACKING = '{lacking}'\n"
        f"local function pack_record(job)\n  return {packed}\nend\n"
        f"local function parse_record(id, record)\n  local {names} = string.match(record, '^{pattern}$')\n"
        f"  return state and {{ id = id, {read} }}\nend\n"
    )


def _constants(module: ModuleType, names: Sequence[str]) -> str:
    """Constants of a decision, in Lua."""
    return "".join(f"local {name} = {getattr(module, name)}\n" for name in names)


def _lanes() -> str:
    """The orders in which claims look for jobs, in Lua: by turn, from index 1."""
    lanes = ", ".join("{ " + ", ".join(f"'{lane}'" for lane in lane_order(turn)) + " }" for turn in range(LANE_CYCLE))
    bands = ", ".join("{ " + ", ".join(map(str, band_order(turn))) + " }" for turn in range(BAND_CYCLE))
    regions = ", ".join(str(region_first(turn)).lower() for turn in range(2 * LANE_CYCLE))
    return (
        f"local LANE_ORDERS = {{ {lanes} }}\nlocal BAND_ORDERS = {{ {bands} }}\nlocal REGION_FIRST = {{ {regions} }}\n"
    )
