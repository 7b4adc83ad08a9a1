"""Traces follow a request through the queue; without an endpoint tracing is off."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from telemetry import (
    configure_tracing,
    inject,
    shutdown_tracing,
    span,
    span_for_request,
    span_from,
    tracing_enabled,
)

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    configure_tracing("router", "", exporter=exporter)
    yield exporter
    shutdown_tracing()


def test_off_by_default_and_the_clients_trace_passes_through() -> None:
    """Without configuration no span is made, one object serves all calls, and the caller's traceparent is kept."""
    assert not tracing_enabled()
    with span_for_request("chat", CLIENT) as one, span_from(CLIENT, "job") as other, span("claim") as third:
        one.set("model", "m")
        one.event("queued")
        one.fail("no")
        assert one is other is third
        assert inject(CLIENT) == CLIENT
        assert inject() == ""


def test_an_empty_endpoint_leaves_tracing_off() -> None:
    """Configuring without an endpoint changes nothing."""
    configure_tracing("router", "")
    assert not tracing_enabled()


def test_a_trace_follows_the_request_through_the_queue(exporter: InMemorySpanExporter) -> None:
    """The worker's span is a child of the router's, whose parent is the client's own span."""
    with span_for_request("chat", CLIENT, {"model": "m"}) as request:
        request.event("queued")
        traceparent = inject()
    with span_from(traceparent, "run") as run:
        run.set("attempt", 1)
        with span("engine"):
            pass
    spans = {finished.name: finished for finished in exporter.get_finished_spans()}
    chat, run_span, engine = spans["chat"], spans["run"], spans["engine"]
    assert chat.parent is not None and f"{chat.parent.span_id:016x}" == "b7ad6b7169203331"
    assert run_span.parent is not None and run_span.parent.span_id == chat.context.span_id
    assert engine.parent is not None and engine.parent.span_id == run_span.context.span_id
    assert len({finished.context.trace_id for finished in spans.values()}) == 1
    assert dict(run_span.attributes or {}) == {"attempt": 1}


def test_a_request_without_a_trace_begins_one(exporter: InMemorySpanExporter) -> None:
    """A malformed or missing traceparent starts a new trace, even inside another span."""
    with span("unrelated"), span_for_request("chat", "nonsense"):
        pass
    chat = next(finished for finished in exporter.get_finished_spans() if finished.name == "chat")
    assert chat.parent is None


def test_a_failure_shows_in_the_span(exporter: InMemorySpanExporter) -> None:
    """An exception inside the block marks the span as failed and goes on."""
    with pytest.raises(ValueError, match="broken"), span("work"):
        raise ValueError("broken")
    assert not exporter.get_finished_spans()[0].status.is_ok
