"""How much of a request's body has arrived, in how many bytes on the wire, and how fast."""

from __future__ import annotations

from queue_schemas import BodyTooLarge, RequestTimeout

from .limits import ConnectionLimits


class ReceivedBody:
    """Counts what one connection receives. The checks return why the rest of the body is refused, or None."""

    __slots__ = ("_body_bytes", "_limits", "_window_bytes", "_window_s", "received_s", "wire_bytes")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self.wire_bytes = 0
        """Received since the last head: content, chunk sizes, trailers."""
        self.received_s = 0.0
        """When bytes came last."""
        self._body_bytes = self._window_bytes = 0
        self._window_s = 0.0

    def begin(self) -> None:
        """The body of a request begins."""
        self.wire_bytes = self._body_bytes = self._window_bytes = 0
        self._window_s = self.received_s

    def receive(self, size: int, now_s: float) -> None:
        """``size`` bytes came, whatever they are."""
        self.received_s = now_s
        self.wire_bytes += size

    def add(self, size: int) -> None:
        """``size`` of the bytes that came are content of the body."""
        self._body_bytes += size
        self._window_bytes += size

    def restart_clock(self, now_s: float) -> None:
        """Until now the client was not the one to act."""
        self.received_s = self._window_s = now_s
        self._window_bytes = 0

    def check_framing(self) -> BodyTooLarge | None:
        """Whether chunk sizes, extensions and trailers are out of proportion to the content."""
        limits = self._limits
        framing = self.wire_bytes - self._body_bytes
        if framing <= limits.framing_bytes + limits.framing_ratio * self._body_bytes:
            return None
        return BodyTooLarge("chunk sizes, chunk extensions or trailers are larger than the body: send it plainly")

    def check_rate(self, now_s: float) -> RequestTimeout | None:
        """Whether the body has been silent, or slow, for too long."""
        limits = self._limits
        idle_s, rate = limits.body_idle_timeout_s, limits.min_transfer_bytes_per_s
        if now_s - self.received_s >= idle_s:
            name = limits.setting("body_idle_timeout_ms")
            return RequestTimeout(
                f"nothing came of the request's body for {idle_s * 1000:g} ms{name}: send it again, without a pause"
            )
        elapsed_s, size = now_s - self._window_s, self._window_bytes
        if elapsed_s < idle_s:
            return None
        self._window_s, self._window_bytes = now_s, 0
        if size >= rate * elapsed_s:
            return None
        name = limits.setting("min_transfer_bytes_per_s")
        return RequestTimeout(
            f"the request's body came more slowly than {rate} bytes a second{name}: send it again, faster"
        )
