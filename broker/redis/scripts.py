"""The Lua scripts: loaded from ``lua/``, addressed by content (EVALSHA), so that two versions can share a server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_REFUSED_IN_FULL_MEMORY = frozenset({"enqueue"})
"""What takes in more work. Finishing must work when the server's memory is full."""
_WITHOUT_SHARED = frozenset({"act_as_manager"})


@dataclass(frozen=True, slots=True)
class Script:
    """One script. ``sha`` is the SHA-1 of ``source``, as the server computes it."""

    name: str
    source: str
    sha: str


def load_scripts(*, flags: bool) -> dict[str, Script]:
    """All scripts by name. ``flags``: with the ``#!lua`` line that real servers honour and fakeredis refuses."""
    folder = files("broker") / "lua"
    shared = (folder / "_shared.lua").read_text("utf-8")
    scripts = {}
    for entry in folder.iterdir():
        name = entry.name.removesuffix(".lua")
        if name.startswith("_") or name == entry.name:
            continue
        body = entry.read_text("utf-8")
        source = body if name in _WITHOUT_SHARED else f"{shared}\n{body}"
        if flags:
            source = f"#!lua{'' if name in _REFUSED_IN_FULL_MEMORY else ' flags=allow-oom'}\n{source}"
        scripts[name] = Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
    return scripts
