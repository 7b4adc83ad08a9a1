"""Tells every feature whether this Router takes new work: it is accepting, leaving (a lame duck) or draining."""

from __future__ import annotations

from queue_schemas import ShuttingDown

RETRY_AFTER_SHUTDOWN_S = 2


class Lifecycle:
    """The stage of one Router. :class:`router.shutdown.GracefulShutdown` moves it on; it never goes back.

    ``leaving``: it still serves, but asks clients and load balancers to go elsewhere. ``draining``: it refuses new
    work and lets open work finish.
    """

    def __init__(self) -> None:
        self.leaving = False
        self.draining = False

    @property
    def shutting_down(self) -> bool:
        """Whether clients should go elsewhere."""
        return self.leaving or self.draining

    @property
    def not_ready_reasons(self) -> list[str]:
        """Why the Router is not ready, as /readyz says it; empty while it accepts work."""
        return ["the router is shutting down"] if self.shutting_down else []

    def ensure_accepting(self) -> None:
        """Raise ``ShuttingDown`` once the Router drains."""
        if self.draining:
            raise ShuttingDown(
                "this router is shutting down; send the request to another one, or again",
                retry_after_s=RETRY_AFTER_SHUTDOWN_S,
            )
