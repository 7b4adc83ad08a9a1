"""Trace requests through the queue (OpenTelemetry; W3C Trace Context in the job's envelope).

Off by default, and then every call here costs one comparison. :func:`configure_tracing` switches it on; it needs the
``otel`` extra, everything else only the OpenTelemetry API. A Router opens :func:`span_for_request` and puts
:func:`inject` into ``Job.traceparent``; a Worker goes on with :func:`span_from`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from queue_schemas import CannotStart
from queue_schemas.addresses import is_loopback

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Attribute = str | int | float | bool
_PROPAGATOR = TraceContextTextMapPropagator()


class Span(Protocol):
    """What a traced block may add to its span."""

    def set(self, key: str, value: Attribute) -> None:
        """Add an attribute."""

    def event(self, name: str) -> None:
        """Note that something happened now (a claim, the first token)."""

    def fail(self, reason: str) -> None:
        """Mark the span as failed."""


class _NoSpan:
    """The span of a process that does not trace: one object for all, doing nothing."""

    __slots__ = ()

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        return None

    def set(self, key: str, value: Attribute) -> None:
        return None

    def event(self, name: str) -> None:
        return None

    def fail(self, reason: str) -> None:
        return None


class _LiveSpan:
    __slots__ = ("_block", "_span")

    def __init__(self, name: str, kind: SpanKind, parent: Context | None, attributes: Mapping[str, Attribute]) -> None:
        tracer = _tracing.tracer if _tracing is not None else trace.NoOpTracer()
        self._span = tracer.start_span(name, context=parent, kind=kind, attributes=dict(attributes))
        self._block = trace.use_span(self._span, end_on_exit=True)

    def __enter__(self) -> Span:
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, where)

    def set(self, key: str, value: Attribute) -> None:
        self._span.set_attribute(key, value)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def fail(self, reason: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, reason))


class _Tracing:
    """A provider of our own: the process's global one belongs to the program that embeds a role."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("inferq")


_NO_SPAN = _NoSpan()
_tracing: _Tracing | None = None


def configure_tracing(role: str, endpoint: str, *, exporter: SpanExporter | None = None) -> None:
    """Send the spans of this process to the OTLP/HTTP collector at ``endpoint`` (its base URL); empty: stay off.

    ``exporter`` replaces the OTLP one. Raises ``CannotStart`` if the ``otel`` extra is not installed.
    """
    global _tracing  # noqa: PLW0603 - one per process, as the context that carries spans is
    shutdown_tracing()
    if not endpoint and exporter is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor  # noqa: PLC0415
        from requests import Session  # noqa: PLC0415 - the exporter's own client
    except ImportError as error:
        raise CannotStart(
            "tracing was asked for (INFERQ_TELEMETRY_OTLP_ENDPOINT) but its packages are missing: "
            "install inferq[otel], or leave the setting empty"
        ) from error

    provider = TracerProvider(resource=Resource.create({"service.name": f"inferq-{role}"}))
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        url = endpoint.rstrip("/")
        if not url.endswith("/v1/traces"):
            url += "/v1/traces"
        session = Session()
        # A collector beside us is never reached by way of a proxy; one elsewhere may be.
        session.trust_env = not is_loopback(urlsplit(url).hostname or "")
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, session=session)))
    _tracing = _Tracing(provider)


def shutdown_tracing() -> None:
    """Send what is still held and switch tracing off. Blocks for as long as the exporter's own limits."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is not None:
        tracing.provider.shutdown()


def tracing_enabled() -> bool:
    """Whether spans are recorded, for a caller that would have to work to describe one."""
    return _tracing is not None


def span_for_request(
    name: str, traceparent: str = "", attributes: Mapping[str, Attribute] | None = None
) -> AbstractContextManager[Span]:
    """A server span for a client's request, below the client's own span if it sent a ``traceparent``."""
    if _tracing is None:
        return _NO_SPAN
    return _LiveSpan(name, SpanKind.SERVER, _parent(traceparent), attributes or {})


def span_from(
    traceparent: str, name: str, attributes: Mapping[str, Attribute] | None = None
) -> AbstractContextManager[Span]:
    """A consumer span that goes on where ``traceparent``, out of a job's envelope, left off."""
    if _tracing is None:
        return _NO_SPAN
    return _LiveSpan(name, SpanKind.CONSUMER, _parent(traceparent), attributes or {})


def span(name: str, attributes: Mapping[str, Attribute] | None = None) -> AbstractContextManager[Span]:
    """A span below the running one."""
    if _tracing is None:
        return _NO_SPAN
    return _LiveSpan(name, SpanKind.INTERNAL, None, attributes or {})


def inject(incoming: str = "") -> str:
    """The ``traceparent`` to hand on: of the running span, or the caller's own ``incoming`` one when tracing is off."""
    if _tracing is None:
        return incoming
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", incoming)


def _parent(traceparent: str) -> Context | None:
    # An empty context, not None: a request without a trace begins one, whatever the task it runs in was doing.
    return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context()) if traceparent else Context()
