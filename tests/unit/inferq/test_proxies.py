"""Loopback and the fleet are never asked by way of a proxy, whatever the environment says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferq.doctor.fabric import check_engine
from inferq.doctor.findings import DoctorTarget, Level
from inferq.fleet.client import FleetClient
from inferq.ray_cluster.usage import direct_environment, usage_environment
from telemetry.http.fabric_calls import FabricCall, FabricHttp
from telemetry.http.fleet_session import direct_opener, fleet_session
from tests.support.recording_proxy import RecordingProxy

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
CHECKS = {
    name: service["healthcheck"]["test"][3]
    for name, service in COMPOSE.items()
    if service.get("healthcheck", {}).get("test", ["", ""])[1].startswith("python")
}


class Pages(BaseHTTPRequestHandler):
    """All the pages that the tests ask for."""

    def do_GET(self) -> None:
        known = not self.path.endswith("/other")
        page = {"pools": [], "data": [], "ready": True, "model": "m", "outstanding": 7}
        body = json.dumps(page).encode()
        self.send_response(200 if known else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_words: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    """A proxy that every variable names, and that nobody asks until the test ends."""
    with RecordingProxy() as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        yield proxy
        assert proxy.asked == []


@pytest.fixture
def url() -> Iterator[str]:
    """Where those pages are."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_proxy_is_seen_by_who_heeds_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests rely on: Python's own client does ask it."""
    with RecordingProxy() as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match="502"):
            # A client of its own: the module's keeps what the environment said when it was first asked.
            urllib.request.build_opener().open(f"{url}/healthz")
        assert proxy.asked == [f"GET {url}/healthz HTTP/1.1"]


async def test_the_fleets_clients_ask_directly(proxy: RecordingProxy, url: str) -> None:
    """[G2] Commands, doctor, calls that are passed on, and the look at a Router in Ray."""
    async with FleetClient(url) as client:
        assert await client.pools() == []
    async with fleet_session(5) as session, session.get(f"{url}/x") as answer:
        assert answer.status == 200
    http = FabricHttp(5)
    assert (await http.forward(url, FabricCall("POST", "/fabric/v1/workers", body=b"{}"))).status == 200
    await http.close()
    with direct_opener().open(f"{url}/readyz", timeout=5) as page:
        assert page.status == 200
    (finding, *_) = await check_engine(DoctorTarget("", FleetClient(url), Path(), engine_url=url))
    assert finding.level is Level.OK


@pytest.mark.parametrize("service", sorted(CHECKS))
def test_composes_health_checks_ask_directly(service: str, proxy: RecordingProxy, url: str) -> None:
    """[G2] Docker hands the host's proxy settings to containers; a container's own loopback is not behind them."""
    host, _, rest = CHECKS[service].partition("http://127.0.0.1:")
    port, _, path = rest.partition("/")
    assert port.isdigit()
    done = subprocess.run(
        [sys.executable, "-c", f"{host}{url}/{path}"], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rays_statistics_are_off_unless_the_user_says_on() -> None:
    """[G12] Off, and led nowhere, for all that gets this environment; a user's own word is left as it is."""
    off = usage_environment({})
    assert off["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not off["RAY_USAGE_STATS_REPORT_URL"].startswith("http")
    assert usage_environment({"RAY_USAGE_STATS_ENABLED": "1"}) == {"RAY_USAGE_STATS_ENABLED": "1"}


def test_what_a_proxy_is_kept_from_is_added_to_what_the_user_says() -> None:
    """[G2] Ray's gRPC asks a proxy for loopback, too, unless told otherwise."""
    made = direct_environment("10.0.0.5", environ={"NO_PROXY": "corp.example, localhost"})
    assert made["no_proxy"] == made["NO_PROXY"] == "corp.example,localhost,127.0.0.1,::1,10.0.0.5"
