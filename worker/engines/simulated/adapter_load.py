"""Load one LoRA adapter in a simulated engine: take as long as that takes, and fail if so ordered."""

from __future__ import annotations

from collections.abc import Callable

from .api import wire
from .api.wire import Reply
from .failures import Failure, FailureKind
from .run import HANG_LIMIT_S, ConnectionClosed, EngineCore, EngineCrashed


class AdapterLoad:
    """One load under way, which takes ``load_s``; ``loaded`` has the adapter served and gives the answer.

    Await :meth:`reply`, once. It raises :class:`~.run.EngineCrashed` and :class:`~.run.ConnectionClosed` where such a
    failure was ordered.
    """

    def __init__(self, engine: EngineCore, load_s: float, failure: Failure | None, loaded: Callable[[], Reply]) -> None:
        self._engine = engine
        self._load_s = load_s
        self._failure = failure
        self._loaded = loaded

    async def reply(self) -> Reply:
        """The answer to the request."""
        engine, failure = self._engine, self._failure
        slow_s = failure.delay_ms / 1e3 if failure is not None and failure.kind is FailureKind.SLOW else 0.0
        await engine.until(engine.clock() + max(self._load_s, slow_s))
        match failure.kind if failure is not None else FailureKind.SLOW:
            case FailureKind.SLOW:
                return self._loaded()
            case FailureKind.CRASH:
                raise EngineCrashed
            case FailureKind.HANG:
                await engine.until(engine.clock() + HANG_LIMIT_S)
                raise ConnectionClosed
            case FailureKind.CLOSE_MIDSTREAM:
                raise ConnectionClosed
            case FailureKind.GARBAGE:
                return Reply(200, wire.JSON, wire.GARBAGE)
            case FailureKind.NEVER_READY:
                status = 503
            case FailureKind.ERROR:
                status = failure.status if failure is not None else 500
        error = wire.error_object("A failure that was ordered.", "InternalServerError", status)
        return Reply(status, wire.JSON, error)
