"""The manifests of deploy/ray start what they say. KubeRay itself does not run here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from inferq.autoscale.settings import AutoscaleSettings
from inferq.cli import app
from inferq.commands.settings import TABLES
from inferq.on_ray import commands
from inferq.on_ray.plan import RayPlan
from inferq.ray_cluster import RaySettings
from worker.service import read_settings as read_worker_settings

FOLDER = Path(__file__).parents[4] / "deploy" / "ray"
CLUSTERS = ("raycluster.yaml", "rayservice.yaml")
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Of KubeRay's ray.io/v1, as far as the manifests use it."""
CLUSTER = {"rayVersion", "authOptions", "gcsFaultToleranceOptions", "headGroupSpec", "workerGroupSpecs"}
SERVICE = {"upgradeStrategy", "excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def objects(name: str) -> dict[str, Any]:
    """The objects of a file by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / name).read_text())}


def cluster_of(name: str) -> dict[str, Any]:
    """The spec of the RayCluster of a file."""
    found = objects(name)
    spec: dict[str, Any] = found["RayCluster"]["spec"] if "RayCluster" in found else serve_spec()["rayClusterConfig"]
    return spec


def serve_spec() -> dict[str, Any]:
    spec: dict[str, Any] = objects("rayservice.yaml")["RayService"]["spec"]
    return spec


def groups(name: str) -> dict[str, Any]:
    return {group["groupName"]: group for group in cluster_of(name)["workerGroupSpecs"]}


def containers(value: object) -> Iterator[dict[str, Any]]:
    """All containers below ``value``."""
    if isinstance(value, Mapping):
        yield from value.get("containers", ())
        for part in value.values():
            yield from containers(part)
    elif isinstance(value, list):
        for part in value:
            yield from containers(part)


def application_args(config: Any) -> dict[str, Any]:
    [application] = config["applications"]
    assert application["import_path"] == "inferq.on_ray.app:build"
    args: dict[str, Any] = application["args"]
    return args


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch) -> RaySettings:
    """What a manifest makes of table ``[ray]``: by the arguments of its Job, or of its Serve application."""
    if name == "rayservice.yaml":
        return RaySettings.load(**application_args(yaml.safe_load(serve_spec()["serveConfigV2"])))
    [container] = containers(objects(name)["Job"])
    for variable in container["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    seen: list[RaySettings] = []
    monkeypatch.setattr(commands, "ray_up", lambda asked, **_: seen.append(RaySettings.load(**asked)) or 0)
    result = CliRunner().invoke(app, container["args"])
    assert result.exit_code == 0, result.output
    [settings] = seen
    return settings


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_objects_have_the_fields_of_kuberay(name: str) -> None:
    """An unknown field is dropped there in silence."""
    cluster = cluster_of(name)
    assert set(cluster) == CLUSTER
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    assert [set(group) for group in cluster["workerGroupSpecs"]] == [GROUP, GROUP]
    assert set(serve_spec()) == SERVICE
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Kubernetes wants text"


@pytest.mark.parametrize("name", CLUSTERS)
def test_routers_and_workers_have_the_groups_made_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds room in its own, for as many as there may be, and none in the other's."""
    own = settings_of(name, monkeypatch)
    pool = RayPlan.load(own, redis_url="redis://127.0.0.1").pool("")
    assert pool is not None
    routers, gpus = groups(name)["routers"], groups(name)["gpus"]
    room = int(routers["rayStartParams"]["num-cpus"]) * routers["maxReplicas"]
    assert own.max_replicas * own.replica_cpus <= room
    assert own.replica_cpus > int(gpus["rayStartParams"]["num-cpus"]) == own.cpus_per_worker == 0
    assert own.replica_cpus > int(cluster_of(name)["headGroupSpec"]["rayStartParams"]["num-cpus"])
    [container] = containers(gpus)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == own.gpus_per_worker  # KubeRay's num-gpus
    assert pool.max <= gpus["maxReplicas"]


def test_both_manifests_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins with one may go on with the other."""
    first, second = (settings_of(name, monkeypatch).model_dump() for name in CLUSTERS)
    differing = {name for name, value in first.items() if second[name] != value}
    assert differing == {"address", "worker_args"}  # an argument of the command, and = where the other has a space
    assert first["worker_args"] == ["--drain-timeout-ms=60000"]
    assert second["worker_args"] == ["--drain-timeout-ms", "60000"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_have_the_time_that_leaving_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook is a command that there is, and ends before the kubelet's patience: workers drain within it."""
    own = settings_of(name, monkeypatch)
    worker, _ = read_worker_settings(["--model", own.model, *own.worker_args])
    leave_ms = AutoscaleSettings.load().stop_timeout
    assert worker.drain_timeout_ms + worker.engine_stop_timeout_ms < leave_ms
    seen: list[object] = []
    monkeypatch.setattr(commands, "ray_leave", lambda asked, node: seen.append((asked["address"], node)) or 0)
    for group in groups(name).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] * 1000 > leave_ms + 30_000
        [container] = containers(group)
        program, *args = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "inferq"
        assert CliRunner().invoke(app, args).exit_code == 0
    assert seen == [("auto", "")] * 2


@pytest.mark.parametrize("name", CLUSTERS)
def test_workers_reach_the_service_of_the_routers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which leads to pods with a Router that is ready."""
    own, service = settings_of(name, monkeypatch), objects(name)["Service"]
    [port] = service["spec"]["ports"]
    assert own.advertise_urls == [f"http://{service['metadata']['name']}:{port['port']}"]
    [container] = containers(groups(name)[service["spec"]["selector"]["ray.io/group"]])
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": own.port}
    assert (own.host, port["targetPort"], own.way_in) == ("0.0.0.0", own.port, "replica")  # noqa: S104


@pytest.mark.parametrize("name", CLUSTERS)
def test_variables_are_settings_and_secrets_come_from_secrets(name: str) -> None:
    """Each is one that `inferq config` shows."""
    known = {table.variable(field) for table in TABLES.values() for field in table.model_fields}
    found = [
        variable for container in containers(list(objects(name).values())) for variable in container.get("env", ())
    ]
    assert {"INFERQ_REDIS_URL", "INFERQ_JOIN_TOKEN", "INFERQ_ROUTER_API_KEYS"} <= {one["name"] for one in found}
    for variable in found:
        if variable["name"].startswith("INFERQ_"):
            assert variable["name"] in known
        open_ones = {"INFERQ_RAY_REPLICA_CPUS", "RAY_AUTH_MODE"}
        assert (variable["name"] in open_ones) != ("secretKeyRef" in variable.get("valueFrom", {}))


def test_serves_own_config_file_has_settings_of_the_table() -> None:
    """deploy/ray/serve.yaml."""
    assert RaySettings.load(**application_args(yaml.safe_load((FOLDER / "serve.yaml").read_text()))).way_in == "replica"
