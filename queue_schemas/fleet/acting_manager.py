"""The acting Manager's address in Redis, with a proof that a member of the fleet wrote it.

The record stands beside the leader lease. Anyone who can write to Redis could put another address there, and Routers
send the join token to the address they read. So the acting Manager adds a proof made with the join token and bound to
its own id: it cannot be made without the token, and is worthless beside another holder of the lease.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..addresses import is_loopback
from ..errors import BadMessage
from .messages import MAX_URL_LENGTH, check_worker_url

RAY_SCHEME = "ray:"
"""``ray:NAME`` in place of a Manager's URL: the actor of that name in the Ray cluster."""
_RAY_URL = re.compile(r"ray:[A-Za-z0-9_.-]{1,100}")
_SALT = b"inferq: where the acting Manager is"


@dataclass(frozen=True, slots=True)
class ActingManager:
    """The leader lease as Redis has it. ``renewal_count`` rises while a Manager acts and is 0 if none does. ``url`` is
    empty where the
    Manager says none. Trust none of it before :meth:`proven`."""

    manager_id: str = ""
    renewal_count: int = 0
    url: str = ""
    proof: str = ""

    def proven(self, join_token: str) -> bool:
        """Whether a member of the fleet with this join token wrote ``url`` for ``manager_id``."""
        if not self.renewal_count or not self.url or not is_manager_url(self.url):
            return False
        expected = prove_address(join_token, self.manager_id, self.url)
        return hmac.compare_digest(expected.encode(), self.proof.encode("utf-8", "replace"))


def prove_address(join_token: str, manager_id: str, url: str) -> str:
    """What the Manager ``manager_id`` writes beside ``url``: an HMAC under a key derived from the join token."""
    return hmac.new(_key(join_token), f"{manager_id}\n{url}".encode(), hashlib.sha256).hexdigest()


@functools.lru_cache(maxsize=4)
def _key(join_token: str) -> bytes:
    """Derived slowly (RFC 7914), so that a weak token cannot be guessed quickly by who reads a proof in Redis."""
    return hashlib.scrypt(join_token.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=32)


def check_manager_url(value: str) -> str:
    """``value`` if it may be where a Manager is reached: ``http://host:port``, https, or ``ray:NAME``; else
    ``BadMessage``. Everybody who reads Redis sees it: no credentials, no query."""
    if not is_manager_url(value):
        raise BadMessage(
            "a Manager's URL must be written like http://host:port (or ray:manager within Ray): "
            "no user, password, query or fragment"
        )
    return value


def is_manager_url(value: str) -> bool:
    """Whether ``value`` is written as the address of a Manager must be."""
    if len(value) > MAX_URL_LENGTH:
        return False
    if value.startswith(RAY_SCHEME):
        return _RAY_URL.fullmatch(value) is not None
    try:
        check_worker_url(value)
    except BadMessage:
        return False
    return True


def why_not_followed(acting: ActingManager, join_token: str, known: Sequence[str]) -> str:
    """Why a process configured with the Managers' addresses ``known`` must not call ``acting``; empty if it may.

    A loopback address means another place on every machine: only a process configured with one calls one.
    """
    if not acting.proven(join_token):
        return "it is not proven with our join token: give all the same INFERQ_JOIN_TOKEN"
    if _is_local(acting.url) and not any(_is_local(one) for one in known):
        return "that is another machine's loopback address: set advertise_url there"
    return ""


def _is_local(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")
