"""One request and its answer: what happens to both however they end."""

from __future__ import annotations

from collections.abc import Awaitable

from queue_schemas import BodyTooLarge, InferqError, RequestTimeout
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.response_writer import ResponseWriter
from ..metrics import RouterMetrics
from .open_request import OpenRequest
from .service import InferenceService

log = get_logger(__name__)


class Exchange:
    """A request on ``path`` and the writer of its answer."""

    __slots__ = ("_metrics", "_service", "path", "request", "request_id", "writer")

    def __init__(
        self,
        service: InferenceService,
        metrics: RouterMetrics,
        request: OpenRequest,
        writer: ResponseWriter,
        path: str,
        request_id: str,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self.request = request
        self.writer = writer
        self.path = path
        self.request_id = request_id

    async def run(self, work: Awaitable[None]) -> int:
        """Await ``work``, which answers the request, and answer with the error if it fails. Returns the status."""
        connection = self.request.connection
        try:
            await work
        except InferqError as error:
            connection.unwatch()
            log.debug("refused", request_id=self.request_id, code=error.code, message=error.message)
            unread = isinstance(error, (BodyTooLarge, RequestTimeout))
            merger = self.request.merger
            await self.writer.fail(error, close=unread, mid_event=merger is not None and merger.mid_event)
        except ClientGone:
            self._metrics.disconnects.labels(self.request.disconnect_reason).inc()
        except Exception:
            connection.unwatch()
            log.exception("request_failed", request_id=self.request_id, path=self.path)
            await self.writer.fail(InferqError(f"something went wrong here; the log has it under {self.request_id}"))
        finally:
            connection.unwatch()
            self._service.leave(self.request, self.request_id)
        await connection.closed()
        self._metrics.answered(self.path, self.writer.status)
        return self.writer.status

    def end(self) -> None:
        """The answer was written to its end without :meth:`run`."""
        self._service.leave(self.request, self.request_id)
        self._metrics.answered(self.path, self.writer.status)
