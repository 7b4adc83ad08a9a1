"""Read environment variables as settings: an empty one is unset, and Kubernetes' service links are ignored.

Kubernetes gives every container variables for each Service of its namespace. A Service named ``inferq-router`` makes
``INFERQ_ROUTER_PORT=tcp://10.0.0.1:18000``, which is also the name of a setting.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable

_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+", re.ASCII)
_OF_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
_OF_COMMANDS = frozenset({"INFERQ_ROUTER_URL"})
"""Variables of the commands' options that are named like settings."""
_told: set[str] = set()


def read_variable(name: str) -> str | None:
    """The value of ``name``; None if it is unset, empty, or a link to a Kubernetes Service, which is said once."""
    value = os.environ.get(name)
    return value if is_given(name, value) else None


def is_given(name: str, value: str | None) -> bool:
    """Whether ``value`` of variable ``name`` sets anything; see :func:`read_variable`."""
    if value is None or not value.strip():
        return False
    if name.endswith("_PORT") and _LINK.fullmatch(value.strip()):
        _tell(name, f"{name}={value} is ignored: it is Kubernetes' link to a Service of that name, not a setting")
        return False
    return True


def drop_blank() -> None:
    """Unset every variable of ours that is empty or blank, for options that are not read by way of settings."""
    for name, value in list(os.environ.items()):
        if name.startswith("INFERQ_") and not value.strip():
            del os.environ[name]


def warn_of_misspelt(prefix: str, known: Iterable[str]) -> None:
    """Say once of each variable that begins with ``prefix``, is none of ``known`` and is spelt nearly like one."""
    names = set(known)
    for name in sorted(os.environ):
        if not name.startswith(prefix) or name in names or name in _OF_COMMANDS or _OF_SERVICE.search(name):
            continue
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
        if near:
            _tell(name, f"{name} is not a setting: is it {near[0]} that you mean?")


def _tell(name: str, sentence: str) -> None:
    if name not in _told:
        _told.add(name)
        sys.stderr.write(f"inferq: {sentence}\n")
