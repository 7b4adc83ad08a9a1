"""How much of what was written the client has not taken, and since when it takes nothing or too little."""

from __future__ import annotations

from .limits import ConnectionLimits


class UnreadBytes:
    """What one connection has not taken. What the kernel took counts as taken."""

    __slots__ = ("_limits", "_moved_s", "_taken_bytes", "_window_bytes", "_window_s", "written_bytes")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self.written_bytes = 0
        self._taken_bytes = -1
        """When last looked; -1: there was nothing to take."""
        self._window_bytes = 0
        self._moved_s = self._window_s = 0.0

    def check(self, unread_bytes: int, now_s: float) -> str:
        """Why the connection is to be dropped, empty if it is not."""
        taken_bytes = self.written_bytes - unread_bytes
        if not unread_bytes or self._taken_bytes < 0:
            self._taken_bytes = taken_bytes if unread_bytes else -1
            self._window_bytes, self._moved_s, self._window_s = taken_bytes, now_s, now_s
            return ""
        if taken_bytes > self._taken_bytes:
            self._taken_bytes, self._moved_s = taken_bytes, now_s
        limits, elapsed_s = self._limits, now_s - self._window_s
        if now_s - self._moved_s >= limits.write_idle_timeout_s:
            return "stalled"
        if elapsed_s >= limits.write_idle_timeout_s:
            if taken_bytes - self._window_bytes < limits.min_transfer_bytes_per_s * elapsed_s:
                return "slow"
            self._window_bytes, self._window_s = taken_bytes, now_s
        return ""
