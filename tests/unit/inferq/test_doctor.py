"""`inferq doctor` finds what is wrong and says how to fix it."""

from __future__ import annotations

import json
import resource
import socket
import sys
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from inferq.chat.views import choose_model
from inferq.doctor import DoctorTarget, Finding, Level, examine, host
from inferq.doctor.cli import show_findings
from inferq.doctor.fabric import check_fabric
from inferq.doctor.queue import about_clock
from inferq.fleet.client import FleetClient
from telemetry.environment import free_port
from tests.support.servers import Server


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine's owner, and ports that nobody uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFERQ_CONFIG", raising=False)
    monkeypatch.setenv("INFERQ_CACHE_DIR", str(tmp_path / "cache"))
    for role in ("ROUTER", "MANAGER"):
        monkeypatch.setenv(f"INFERQ_{role}_PORT", str(free_port()))


async def _examined(tmp_path: Path, redis_url: str = "", engine_url: str = "") -> dict[str, list[Finding]]:
    client = FleetClient(f"http://127.0.0.1:{free_port()}")
    found: dict[str, list[Finding]] = {}
    for finding in await examine(DoctorTarget(redis_url, client, tmp_path / "data", engine_url)):
        found.setdefault(finding.check, []).append(finding)
    return found


async def test_a_good_server_is_named_with_all_that_matters(tmp_path: Path, valkey: Server) -> None:
    """Kind, version, role, persistence, eviction, round trip and clock."""
    found = await _examined(tmp_path, valkey.url)
    assert [finding.level for finding in found["queue"] + found["clock"]] == [Level.OK] * 3
    text = found["queue"][0].text
    assert text.startswith("valkey 9.")
    assert "append-only file" in text
    assert "noeviction" in text


async def test_a_server_that_evicts_is_a_failure_with_its_cure(tmp_path: Path, own_valkey: Server) -> None:
    """Redis would drop waiting jobs."""
    own_valkey.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    finding = (await _examined(tmp_path, own_valkey.url))["queue"][0]
    assert finding.level is Level.FAILURE
    assert "set maxmemory-policy noeviction" in finding.text


async def test_a_server_that_must_keep_work_on_its_disk_is_asked(
    tmp_path: Path, own_valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With durability = disk it has to be able to say what is there."""
    monkeypatch.setenv("INFERQ_ROUTER_DURABILITY", "disk")
    texts = [finding.text for finding in (await _examined(tmp_path, own_valkey.url))["queue"]]
    assert any("says when a write is on its disk" in text for text in texts)
    own_valkey.ask("CONFIG", "SET", "appendfsync", "no")
    (finding,) = (await _examined(tmp_path, own_valkey.url))["queue"]
    assert finding.level is Level.FAILURE
    assert "set appendfsync everysec or always there" in finding.text


async def test_a_server_without_a_log_is_a_warning_with_its_cure(tmp_path: Path, own_valkey: Server) -> None:
    """A restart would lose what waits; some may want it so."""
    own_valkey.ask("CONFIG", "SET", "appendonly", "no")
    warnings = [f for f in (await _examined(tmp_path, own_valkey.url))["queue"] if f.level is Level.WARNING]
    assert [warning.fix for warning in warnings] == ["set appendonly yes"]


async def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    """And what to look at."""
    finding = (await _examined(tmp_path, f"redis://127.0.0.1:{free_port()}/0"))["queue"][0]
    assert finding.level is Level.FAILURE
    assert "INFERQ_REDIS_URL" in finding.fix


async def test_without_a_url_the_embedded_server_is_looked_at(tmp_path: Path) -> None:
    """Its binary is there and its folder can be written."""
    assert [finding.level for finding in (await _examined(tmp_path))["queue"]] == [Level.OK]


async def test_a_port_that_somebody_else_uses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flag that chooses another."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        monkeypatch.setenv("INFERQ_ROUTER_PORT", str(port))
        finding = (await _examined(tmp_path))["ports"][0]
    assert finding.level is Level.WARNING
    assert str(port) in finding.text
    assert "--router-port" in finding.fix


async def test_an_engine_that_does_not_answer_is_a_failure(tmp_path: Path) -> None:
    """When one was named."""
    finding = (await _examined(tmp_path, engine_url=f"http://127.0.0.1:{free_port()}"))["engine"][0]
    assert finding.level is Level.FAILURE


async def test_a_wrong_setting_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names it."""
    monkeypatch.setenv("INFERQ_MANAGER_LEASE_MS", "soon")
    finding = (await _examined(tmp_path))["settings"][0]
    assert finding.level is Level.FAILURE
    assert "lease_ms" in finding.text


async def test_few_files_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that raises the limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    finding = (await _examined(tmp_path))["files"][0]
    assert finding.level is Level.WARNING
    assert "ulimit -n" in finding.fix


async def test_a_full_disk_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue's log could not grow."""
    monkeypatch.setattr(host, "MIN_DISK_BYTES", 1 << 62)
    assert (await _examined(tmp_path))["disk"][0].level is Level.FAILURE


async def test_a_python_that_is_untested_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may work."""
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert (await _examined(tmp_path))["python"][0].level is Level.WARNING


@pytest.mark.parametrize(
    ("server_ms", "level"), [(10_005, Level.OK), (10_900, Level.OK), (12_000, Level.WARNING), (7_000, Level.WARNING)]
)
def test_a_clock_is_judged_by_what_the_round_trip_cannot_explain(server_ms: int, level: Level) -> None:
    """A slow answer is no skew."""
    assert about_clock(server_ms, 10_000, 10_010).level is level


def test_the_exit_code_says_whether_something_must_be_mended(capsys: pytest.CaptureFixture[str]) -> None:
    """1 for a failure, 0 for warnings."""
    warning = Finding("disk", Level.WARNING, "little", "free some")
    assert show_findings([warning], as_json=True) == 0
    assert show_findings([warning, Finding("queue", Level.FAILURE, "gone", "start it")], as_json=True) == 1
    shown = capsys.readouterr().out
    last = json.loads(shown[shown.rindex('{\n  "ok"') :])
    assert last["ok"] is False
    assert [finding["level"] for finding in last["findings"]] == ["warning", "failure"]


async def test_the_file_store_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is to be made is not made by looking; one that is there takes an object; else what is wrong."""
    (finding,) = (await _examined(tmp_path))["store"]
    assert (finding.level, (tmp_path / "data").exists()) == (Level.OK, False)
    (tmp_path / "data" / "store").mkdir(parents=True)
    (finding,) = (await _examined(tmp_path))["store"]
    assert finding.text.endswith("takes, gives back and removes an object")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INFERQ_STORAGE_URL", str(tmp_path / "file"))
    (finding,) = (await _examined(tmp_path))["store"]
    assert finding.level is Level.FAILURE
    assert "INFERQ_STORAGE_URL" in finding.fix


async def test_the_configured_managers_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[A7] Each of several Managers is named with what it does; that none acts is a warning."""
    assert "managers" not in await _examined(tmp_path)
    monkeypatch.setenv("INFERQ_ROUTER_MANAGER_URLS", f"http://127.0.0.1:{free_port()},http://127.0.0.1:{free_port()}")
    (finding,) = (await _examined(tmp_path))["managers"]
    assert finding.level is Level.WARNING
    assert finding.text.startswith("none of the configured Managers acts")
    assert finding.text.count("does not answer") == 2


@pytest.mark.parametrize(("named", "level"), [(True, Level.FAILURE), (False, Level.WARNING)])
async def test_a_router_that_is_not_there_is_no_good_news(tmp_path: Path, named: bool, level: Level) -> None:
    """[F8] Nobody listens, or something else does: a failure where somebody named it, else a warning."""
    nothing = FleetClient(f"http://127.0.0.1:{free_port()}")
    (found,) = await check_fabric(DoctorTarget("", nothing, tmp_path, router_named=named))
    assert (found.level, "no Router answers at" in found.text, "--router-url" in found.fix) == (level, True, True)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="node_cpu 1")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as server:
        other = FleetClient(str(server.make_url("")))
        (found,) = await check_fabric(DoctorTarget("", other, tmp_path, router_named=named))
        assert (found.level, "is not an inferq Router" in found.text) == (level, True)
        (found,) = await check_fabric(
            DoctorTarget("", FleetClient(str(server.make_url("/x"))), tmp_path, router_named=named)
        )
        assert (found.level, "is not an inferq Router" in found.text) == (level, True)


async def test_the_default_model_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """[F8] Of several models the first is taken and named on standard error; a single one needs no word."""

    class Serving(FleetClient):
        def __init__(self, *names: str) -> None:
            super().__init__("http://127.0.0.1:1")
            self.names = list(names)

        async def models(self) -> list[str]:
            return self.names

    assert await choose_model(Serving("a", "b")) == "a"
    said = capsys.readouterr()
    assert (said.out, "Using a, the first of 2 models" in said.err, "b" in said.err) == ("", True, True)
    assert await choose_model(Serving("a")) == "a"
    assert capsys.readouterr().err == ""
