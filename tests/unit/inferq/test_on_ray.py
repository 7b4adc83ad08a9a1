"""What is to run in Ray, as settings and as a mark of them; and what is refused before Ray is asked."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.embedded.server import EmbeddedServer, running_url
from inferq.cli import app
from inferq.on_ray.plan import RayPlan, way_in_url
from inferq.ray_cluster import RaySettings
from inferq.ray_cluster.cluster import Target, connected, require_ray
from queue_schemas import CannotStart
from telemetry import explain_settings
from telemetry.environment import free_port

REDIS = "redis://:secret@127.0.0.1:6379/0"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def _plan(**settings: object) -> RayPlan:
    return RayPlan.load(RaySettings.load(**settings), redis_url=REDIS)


def test_the_routers_settings_are_their_own_but_for_address_and_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host, port and Manager come from the topology, all else as everywhere; the lame duck time where nobody set it."""
    plan = _plan(port=8001, lame_duck_ms=1234)
    assert (plan.router.port, plan.router.manager_urls, plan.router.lame_duck_ms) == (8001, ["ray:manager"], 1234)
    monkeypatch.setenv("INFERQ_ROUTER_LAME_DUCK_MS", "0")
    monkeypatch.setenv("INFERQ_ROUTER_REGION", "eu")
    plan = _plan(lame_duck_ms=1234)
    assert (plan.router.lame_duck_ms, plan.router.region) == (0, "eu")


def test_the_marks_change_with_what_they_stand_for_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of the Router is none of the Manager's; a secret counts; what only starts a head does not."""
    first = _plan()
    same = _plan(dashboard_port=1234, data_dir="elsewhere", start_limit_ms=5_000)
    assert (first.manager_digest, first.app_digest) == (same.manager_digest, same.app_digest)
    wider = _plan(max_replicas=9)
    assert first.manager_digest == wider.manager_digest
    assert first.app_digest != wider.app_digest
    monkeypatch.setenv("INFERQ_MANAGER_LEASE_MS", "16000")
    slower = _plan()
    assert (slower.app_digest, slower.manager_digest == first.manager_digest) == (first.app_digest, False)
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "one")
    one = _plan()
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "two")
    two = _plan()
    assert one.manager_digest != two.manager_digest
    assert one.app_digest != two.app_digest
    assert len({len(mark) for mark in (one.app_digest, one.manager_digest)}) == 1
    assert "secret" not in one.app_digest


def test_replicas_get_the_file_store_from_who_deploys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is that of who deploys, wherever a replica runs; another store is another application."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERQ_STORAGE_URL", "files")
    here = _plan()
    assert here.storage.url == str(tmp_path / "files")
    monkeypatch.setenv("INFERQ_STORAGE_URL", "s3://bucket/files")
    there = _plan()
    assert (there.storage.url, there.app_digest != here.app_digest) == ("s3://bucket/files", True)


def test_the_way_in_is_called_from_this_machine() -> None:
    """All addresses of a machine are reached by loopback."""
    assert way_in_url("0.0.0.0", 8000) == "http://127.0.0.1:8000"  # noqa: S104 - compared, not bound
    assert way_in_url("::", 8000) == "http://[::1]:8000"
    assert way_in_url("10.0.0.1", 8000) == "http://10.0.0.1:8000"


def test_settings_that_cannot_work_are_refused() -> None:
    """With the sentence that `inferq config` readers know."""
    with pytest.raises(CannotStart, match="min_replicas must not be more than max_replicas"):
        RaySettings.load(min_replicas=9)
    with pytest.raises(CannotStart, match="way_in"):
        RaySettings.load(way_in="window")


def test_config_shows_the_table() -> None:
    """`inferq config ray`, each with a sentence."""
    facts = explain_settings(RaySettings.load())
    assert {"address", "way_in", "min_replicas"} <= {fact.name for fact in facts}
    assert all(fact.description for fact in facts)
    assert CliRunner().invoke(app, ["config", "ray", "--json"]).exit_code == 0


def test_the_sessions_folder_is_short_and_its_own(tmp_path: Path) -> None:
    """Unix sockets below it must fit into 107 bytes, however long the data folder's path is."""
    deep = RaySettings.load(data_dir=str(tmp_path / ("x" * 200)))
    other = RaySettings.load(data_dir=str(tmp_path / "other"))
    assert len(str(deep.session_folder)) < 45
    assert deep.session_folder != other.session_folder


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_without_ray_one_sentence_says_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a traceback of an import."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    flags = ["--redis-url", REDIS] if command == "up" else []
    result = CliRunner().invoke(app, ["ray", command, "--address", "127.0.0.1:1", *flags])
    assert isinstance(result.exception, CannotStart)
    assert "pip install 'inferq[ray]'" in result.exception.message


def test_the_command_line_does_not_load_ray() -> None:
    """`inferq --version` is quick, and the variables that Ray reads when it is loaded can still be set."""
    import subprocess  # noqa: PLC0415

    code = "import sys, inferq.cli, inferq.on_ray.commands, inferq.ray_cluster.cluster as c; c.require_ray()"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('ray' in sys.modules)"], check=False, timeout=60)
    assert done.returncode == 0


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    """Ray itself would take a minute."""
    require_ray()
    port = free_port()
    for address, words in (
        (f"127.0.0.1:{port}", "no Ray cluster answers"),
        ("127.0.0.1", "not host:port"),
        ("ray://127.0.0.1:x", "not host:port"),
    ):
        with pytest.raises(CannotStart, match=words), connected(Target(address), 5.0):
            raise AssertionError("let in by nobody")


def test_up_says_at_once_what_is_in_its_way() -> None:
    """Ports that are taken, each with its flag, and no Redis: before a head is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        redis = ["--redis-url", REDIS]
        for flags, words in (
            ([*redis, "--port", port], f"port {port} on 127.0.0.1 is taken"),
            ([*redis, "--port", str(free_port()), "--dashboard-port", port], "--dashboard-port"),
            ([*redis, "--port", str(free_port()), "--dashboard-port", "0", "--head-port", port], "--head-port"),
            ([], "give --redis-url"),
        ):
            result = CliRunner().invoke(app, ["ray", "up", *flags])
            assert isinstance(result.exception, CannotStart), result.output
            assert words in result.exception.message


async def test_the_embedded_queue_of_a_running_fabric_is_lent(tmp_path: Path) -> None:
    """The URL that its owner uses, while it runs."""
    folder = tmp_path / "data" / "valkey"
    assert await running_url(folder) == ""
    async with EmbeddedServer(folder) as server:
        assert await running_url(folder) == server.url
    assert await running_url(folder) == ""


def test_without_a_cluster_status_says_so_and_down_has_nothing_to_do() -> None:
    """`down` may be repeated; `status` ends with the code 2 of every error of ours."""
    result = CliRunner().invoke(app, ["ray", "status"])
    assert isinstance(result.exception, CannotStart)
    assert "inferq ray up" in result.exception.message
    result = CliRunner().invoke(app, ["ray", "down"])
    assert (result.exit_code, result.output) == (0, "Nothing of ours runs.\n")


def test_serves_config_file_takes_settings_of_the_table_and_no_secret() -> None:
    """Serve shows the file to whoever looks at its dashboard."""
    pytest.importorskip("ray")
    from inferq.on_ray.app import build  # noqa: PLC0415 - loads Ray

    with pytest.raises(CannotStart, match="secrets belong into the nodes' environment"):
        build({"redis_url": REDIS})
    with pytest.raises(CannotStart, match="no setting wayin"):
        build({"wayin": "serve"})


@pytest.mark.parametrize(
    ("acting", "reasons", "blocked_by_other_manager", "well"),
    [
        (True, [], False, True),
        (False, ["standing by: another Manager acts"], True, True),
        (False, ["Redis cannot be reached"], False, False),
    ],
)
def test_a_manager_beside_another_is_well(
    acting: bool, reasons: list[str], blocked_by_other_manager: bool, well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it should be while a fleet moves; one without Redis is not."""
    pytest.importorskip("ray")
    from inferq.on_ray import status  # noqa: PLC0415 - loads Ray
    from manager.ray_actor import ActorFacts  # noqa: PLC0415

    class Actor:
        class facts:  # noqa: N801 - a method, as a driver sees it
            @staticmethod
            def remote() -> ActorFacts:
                return ActorFacts("digest", 7, acting, reasons)

    monkeypatch.setattr(status, "find_manager", Actor)
    monkeypatch.setattr(status.ray, "get", lambda facts, timeout: facts)
    found = status.read_manager()
    assert found is not None
    assert (found.acting, found.blocked_by_other_manager, found.well) == (acting, blocked_by_other_manager, well)
