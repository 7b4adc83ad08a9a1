"""A trace follows a request through the queue, where an operator asked for it; where nobody did, nothing is sent."""

from __future__ import annotations

import gzip
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.fleet import Fleet
from tests.support.servers import Server

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@dataclass
class Collector:
    """Receives spans over OTLP/HTTP."""

    url: str = ""
    spans: list[tuple[str, str, str]] = field(default_factory=list)
    """(service, trace id, name) of each span."""

    async def receive(self, request: web.Request) -> web.Response:
        """``POST /v1/traces``."""
        body = await request.read()
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span.trace_id.hex(), span.name) for span in scope.spans]
        return web.Response(body=b"", content_type="application/x-protobuf")


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """A collector on loopback."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/{path:.*}", collector.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.url = site.name
    assert site._server is not None
    collector.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    yield collector
    await runner.cleanup()


async def one_chat(fleet: Fleet) -> None:
    """A chat under the caller's trace, then an orderly end, which flushes what is left to send."""
    body = {"model": "sim", "messages": [{"role": "user", "content": "x"}]}
    url = f"{fleet.router.url}/v1/chat/completions"
    async with fleet.session.post(url, json=body, headers={"traceparent": CALLER}) as answer:
        assert answer.status == 200
    for role in (fleet.router, *fleet.workers):
        role.process.send(signal.SIGTERM)
    for role in (fleet.router, *fleet.workers):
        assert await role.ended() == 0


async def test_a_trace_follows_a_request_through_the_queue(
    tmp_path: Path, own_valkey: Server, collector: Collector
) -> None:
    """Router and worker report spans of one trace, the caller's."""
    async with Fleet(tmp_path, own_valkey, env={"INFERQ_TELEMETRY_OTLP_ENDPOINT": collector.url}) as fleet:
        await one_chat(await fleet.up(workers=1))
    services = {service for service, trace_id, _ in collector.spans if trace_id == TRACE_ID}
    assert len(services) == 2, collector.spans
    assert any("router" in service for service in services) and any("worker" in service for service in services)


async def test_nothing_is_traced_unless_asked_for(tmp_path: Path, own_valkey: Server, collector: Collector) -> None:
    """Off by default: even where the OpenTelemetry SDK's own variables point at a collector, nothing arrives."""
    async with Fleet(tmp_path, own_valkey, env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}) as fleet:
        await one_chat(await fleet.up(workers=1))
    assert collector.spans == []
