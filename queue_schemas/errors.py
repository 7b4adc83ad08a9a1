"""The tree of all errors, each with its HTTP status, wire code and whether a retry helps.

::

    InferqError
    +-- BadRequest                 400  invalid_request        the request cannot be understood
    |   +-- BadMessage             400  bad_message            a wire message breaks the contract
    |   +-- UnsupportedVersion     400  unsupported_version    a wire message of another major version
    |   +-- BodyTooLarge           413  request_too_large
    |   +-- HeadTooLarge           431  headers_too_large      the request's headers
    |   +-- UnsupportedEncoding    415  unsupported_encoding   a Content-Encoding that is not decoded here
    |   +-- UnsupportedMediaType   415  unsupported_media_type the body is of a type that is not read here
    |   +-- RangeNotSatisfiable    416  range_not_satisfiable  the file ends before the range that is asked for
    |   +-- IdempotencyKeyReused   422  idempotency_key_reused the key belongs to another request
    +-- AuthenticationFailed       401  invalid_api_key
    +-- PermissionRefused          403  permission_denied
    +-- ModelNotFound              404  model_not_found
    +-- JobNotFound                404  job_not_found          no such job, or not the caller's, or not kept any more
    +-- PathNotFound               404  unknown_path
    +-- NotFound                   404  not_found              no such file, batch, job, ... of this tenant
    +-- MethodNotAllowed           405  method_not_allowed
    +-- VersionRefused             505  http_version_not_supported
    +-- RequestTimeout             408  request_timeout        the request's body did not arrive in time
    +-- UnknownWorker              410  unknown_worker         register again
    +-- WorkerIdTaken              409  worker_id_taken
    +-- Conflict                   409  conflict               the state of what is named does not allow it
    +-- OverCapacity               429  over_capacity          a budget is used up
    |   +-- WaitTooLong            429  wait_too_long          it would not be started in time (says when)
    +-- NoWorker                   503  no_worker              no worker serves the model now
    +-- BrokerUnavailable          503  broker_unavailable     Redis cannot be reached
    |   +-- NotOnDisk              503  not_on_disk            Redis took it, and its disk did not confirm it in time
    +-- BrokerFull                 503  broker_full            Redis refuses writes (memory or disk is full)
    +-- NoNotifier                 503  no_notifier            nothing delivers webhooks now
    +-- StoreUnavailable           503  store_unavailable      the file store cannot be reached
    +-- StoreFull                  507  store_full             the file store has no room
    +-- ManagerUnavailable         503  manager_unavailable
    +-- ShuttingDown               503  shutting_down
    +-- DeadlineExceeded           504  deadline_exceeded      the job's time ran out
    +-- AttemptsExhausted          502  attempts_exhausted     every attempt failed: the job is a dead letter
    +-- StreamBroken               502  stream_broken          a stream that had begun cannot be continued safely
    +-- EngineFailed               502  engine_failed          the engine broke the connection or its protocol
    +-- JobCancelled               499  cancelled
    +-- BrokerUnsuitable           500  broker_unsuitable      the Redis server cannot carry the queue (says why)
    +-- CannotStart                500  cannot_start           a setting, a file or an address keeps us from starting
    +-- Fenced                     409  fenced                 the caller was declared dead and holds nothing

A client sees the OpenAI error object (:meth:`InferqError.body`): the message says what to do next. Of errors about the
fabric's own parts it sees :attr:`InferqError.public`, which names no address: ``message`` has it, for the logs.
``retryable`` says whether the same call may succeed later; ``retry_after_s`` is what the ``Retry-After`` header then
says.
"""

from __future__ import annotations

import json
from typing import ClassVar

from .addresses import hide_addresses


class InferqError(Exception):
    """The root. Subclasses fix ``status`` (HTTP), ``code`` (wire), ``type`` (OpenAI's) and ``retryable``."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False
    inner: ClassVar[bool] = False
    """Whether it is about a part of the fabric, so that ``message`` may name where that is."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None, public: str = ""
    ) -> None:
        """``public``: the message for clients, instead of ``message``."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self._public = public
        self.details: dict[str, int] = {}

    @property
    def public(self) -> str:
        """The message for clients: without addresses, ports, folders or names of the fabric's parts."""
        return self._public or (hide_addresses(self.message) if self.inner else self.message)

    def body(self) -> bytes:
        """The OpenAI error object as JSON: ``{"error": {"message", "type", "param", "code"}}``."""
        error = {"message": self.public, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": {**error, **self.details}}, ensure_ascii=False).encode("utf-8", "replace")


class BadRequest(InferqError):
    """The request cannot be understood."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class BadMessage(BadRequest):
    """A wire message breaks the contract."""

    code = "bad_message"


class UnsupportedVersion(BadRequest):
    """A wire message has another major version."""

    code = "unsupported_version"


class BodyTooLarge(BadRequest):
    """The request's body exceeds the limit on its size."""

    status = 413
    code = "request_too_large"


class HeadTooLarge(BadRequest):
    """The request's headers exceed the limit on their size."""

    status = 431
    code = "headers_too_large"


class UnsupportedEncoding(BadRequest):
    """The body has a Content-Encoding that the Router does not decode."""

    status = 415
    code = "unsupported_encoding"


class UnsupportedMediaType(BadRequest):
    """The body has a media type that the path does not accept."""

    status = 415
    code = "unsupported_media_type"


class RangeNotSatisfiable(BadRequest):
    """The requested range starts beyond the end of the file."""

    status = 416
    code = "range_not_satisfiable"


class IdempotencyKeyReused(BadRequest):
    """The idempotency key belongs to another request."""

    status = 422
    code = "idempotency_key_reused"


class AuthenticationFailed(InferqError):
    """The API key or token is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionRefused(InferqError):
    """The caller is known but may not do this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class ModelNotFound(InferqError):
    """No pool serves a model of this name."""

    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class JobNotFound(InferqError):
    """No job of this tenant has this id, or its retention has ended."""

    status = 404
    code = "job_not_found"
    type = "invalid_request_error"


class PathNotFound(InferqError):
    """No route has this path."""

    status = 404
    code = "unknown_path"
    type = "invalid_request_error"


class NotFound(InferqError):
    """No file, batch, endpoint or other object of this tenant has this id."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class MethodNotAllowed(InferqError):
    """The path exists, but not for this HTTP method."""

    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"


class VersionRefused(InferqError):
    """The request uses a version of HTTP that the server does not speak."""

    status = 505
    code = "http_version_not_supported"
    type = "invalid_request_error"


class RequestTimeout(InferqError):
    """The request's body did not arrive in time."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"
    retryable = True


class UnknownWorker(InferqError):
    """The Manager does not know this worker session; it must register again."""

    status = 410
    code = "unknown_worker"
    type = "invalid_request_error"


class WorkerIdTaken(InferqError):
    """Another live worker has registered under this id."""

    status = 409
    code = "worker_id_taken"
    type = "invalid_request_error"


class Conflict(InferqError):
    """The current state of the object does not allow the operation."""

    status = 409
    code = "conflict"
    type = "invalid_request_error"


class OverCapacity(InferqError):
    """A budget or quota of the tenant or the queue is used up."""

    status = 429
    code = "over_capacity"
    type = "rate_limit_error"
    retryable = True


class WaitTooLong(OverCapacity):
    """A request was not taken in: it would wait for longer than its deadline allows, or may not wait at all."""

    code = "wait_too_long"


class NoWorker(InferqError):
    """No worker serves the model now."""

    status = 503
    code = "no_worker"
    retryable = True


class BrokerUnavailable(InferqError):
    """Redis cannot be reached."""

    status = 503
    code = "broker_unavailable"
    retryable = True
    inner = True


class NotOnDisk(BrokerUnavailable):
    """Redis accepted the write, but its disk did not confirm it in time."""

    code = "not_on_disk"


class BrokerFull(InferqError):
    """Redis refuses writes because its memory or disk is full."""

    status = 503
    code = "broker_full"
    retryable = True
    inner = True


class NoNotifier(InferqError):
    """No notifier runs, so nothing delivers webhooks."""

    status = 503
    code = "no_notifier"
    retryable = True


class StoreUnavailable(InferqError):
    """The file store cannot be reached."""

    status = 503
    code = "store_unavailable"
    retryable = True
    inner = True


class StoreFull(InferqError):
    """The file store has no space left."""

    status = 507
    code = "store_full"
    retryable = True
    inner = True


class ManagerUnavailable(InferqError):
    """No Manager answers."""

    status = 503
    code = "manager_unavailable"
    retryable = True
    inner = True


class ShuttingDown(InferqError):
    """The process is draining and accepts no new work."""

    status = 503
    code = "shutting_down"
    retryable = True


class DeadlineExceeded(InferqError):
    """The job's deadline passed before it finished."""

    status = 504
    code = "deadline_exceeded"
    retryable = True


class AttemptsExhausted(InferqError):
    """Every attempt failed, and the job became a dead letter."""

    status = 502
    code = "attempts_exhausted"


class StreamBroken(InferqError):
    """A stream that had begun cannot be continued without a gap or a repeat."""

    status = 502
    code = "stream_broken"
    retryable = True


class EngineFailed(InferqError):
    """The engine broke the connection or its protocol."""

    status = 502
    code = "engine_failed"
    retryable = True
    inner = True


class JobCancelled(InferqError):
    """The job was cancelled by its client or its tenant."""

    status = 499
    code = "cancelled"


class BrokerUnsuitable(InferqError):
    """The Redis server cannot carry the queue; the message says why."""

    code = "broker_unsuitable"
    inner = True


class CannotStart(InferqError):
    """A setting, a file or an address keeps the process from starting."""

    code = "cannot_start"
    inner = True


class Fenced(InferqError):
    """The caller's session was declared dead and holds no leases."""

    status = 409
    code = "fenced"
