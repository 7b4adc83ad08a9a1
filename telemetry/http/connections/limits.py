"""The limits of a server's connections: what each may send, in which time, and how long it may leave answers unread."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
KEEP_ALIVE_S = 75.0
"""Longer than the 60 s of common load balancers, so that it is they who close an idle connection."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Every limit of one server. ``settings_prefix``: how the environment variables of those that a user may set begin;
    empty where they are fixed."""

    head_timeout_s: float = 10.0
    """How long a request's head may take to arrive, and a new connection to send its first."""
    head_bytes: int = 64 * KIB
    header_count: int = 256
    keep_alive_s: float = KEEP_ALIVE_S
    """How long a connection may be idle between requests."""
    body_idle_timeout_s: float = 30.0
    """How long a request's body may be silent. Bytes are counted over such a time, too, for the least rate."""
    write_idle_timeout_s: float = 120.0
    """How long a client may take nothing of an answer that waits for it."""
    min_transfer_bytes_per_s: int = KIB
    """Least rate of a body that arrives and of an answer that is read, once the idle timeout has passed."""
    framing_bytes: int = 64 * KIB
    """Bytes of a body that are no content (chunk sizes, extensions, trailers), beside ``framing_ratio`` for each that
    is."""
    framing_ratio: int = 8
    pipelined_requests: int = 32
    pipelined_bytes: int = 64 * KIB
    """How much is read ahead behind a request that is not answered yet; beyond it that answer is the connection's
    last."""
    linger_bytes: int = 64 * KIB * KIB
    linger_s: float = 10.0
    """How much, and for how long, is read and discarded of what a request still sends after its answer: a connection
    that is closed on a client that sends is reset, and the client may never see the answer."""
    max_connections: int = 16_384
    settings_prefix: str = ""

    @property
    def sweep_s(self) -> float:
        """How often the limits in time are checked."""
        shortest = min(self.head_timeout_s, self.body_idle_timeout_s, self.write_idle_timeout_s, self.linger_s)
        return min(1.0, max(0.01, shortest / 4))

    def setting(self, name: str) -> str:
        """How a message names the setting ``name``; nothing where it is no setting."""
        return f" (setting {self.settings_prefix}{name.upper()})" if self.settings_prefix else ""
