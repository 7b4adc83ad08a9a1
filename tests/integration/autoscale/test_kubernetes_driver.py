"""The Kubernetes driver against a small API server over real HTTP and HTTPS."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inferq.autoscale.drivers.kubernetes import DELETION_COST, KubernetesDriver
from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.settings import AutoscaleSettings
from queue_schemas import CannotStart
from tests.integration.autoscale.api_server import NAME, NAMESPACE, TOKEN, ApiServer


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """The folder of a pod's service account."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "namespace").write_text(NAMESPACE)
    return tmp_path


@pytest.fixture(params=["deployment", "statefulset"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[ApiServer]:
    async with ApiServer(request.param) as server:
        yield server


@pytest.fixture
async def driver(server: ApiServer, account: Path) -> AsyncIterator[KubernetesDriver]:
    driver = KubernetesDriver(settings(server, account))
    yield driver
    await driver.close()


def make_certificate(folder: Path, name: str) -> None:
    """One that signs itself, for loopback."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.crt"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def settings(server: ApiServer, account: Path, **more: object) -> AutoscaleSettings:
    quick: dict[str, object] = {"pool": "m", "driver": "kubernetes", "driver_timeout": "5s"}
    quick |= {"kubernetes_target": f"{server.kind}/{NAME}", "kubernetes_api_url": server.url}
    return AutoscaleSettings.load(**(quick | {"kubernetes_account_dir": str(account)} | more))


async def test_it_scales_from_zero_and_never_down_by_asking_for_few(
    server: ApiServer, driver: KubernetesDriver
) -> None:
    """The workers are the pods, by name: the host's name in a pod, which is the worker's id."""
    assert await driver.workers() == frozenset()
    await driver.scale_to(3)
    assert await driver.workers() == {f"{NAME}-0", f"{NAME}-1", f"{NAME}-2"}
    await driver.scale_to(2)
    assert server.replicas == 3


async def test_the_chosen_pods_go_and_are_no_workers_while_they_terminate(
    server: ApiServer, driver: KubernetesDriver
) -> None:
    """A Deployment's by their deletion cost, a StatefulSet's by their ordinal, whoever is chosen. Repeated, nothing
    more goes."""
    await driver.scale_to(4)
    wanted = driver.removable([f"{NAME}-1", f"{NAME}-3", f"{NAME}-0", f"{NAME}-2"], 2)
    assert set(wanted) == ({f"{NAME}-1", f"{NAME}-3"} if server.kind == "deployment" else {f"{NAME}-3", f"{NAME}-2"})
    await driver.remove(wanted)
    assert server.replicas == 2
    assert await driver.workers() == {f"{NAME}-{n}" for n in range(4)} - set(wanted)
    await driver.remove(wanted)
    assert server.replicas == 2
    marked = {name for name, pod in server.pods.items() if DELETION_COST in pod["metadata"]["annotations"]}
    assert marked == (set(wanted) if server.kind == "deployment" else set())
    server.gone()
    await driver.scale_to(3)
    assert len(await driver.workers()) == 3


async def test_pods_that_are_asked_for_and_cannot_come_are_not_asked_for_again(
    server: ApiServer, driver: KubernetesDriver
) -> None:
    """A full quota: the replicas stay, and do not grow with each try."""
    server.creates_pods = False
    for _ in range(3):
        await driver.scale_to(2)
    assert (server.replicas, await driver.workers()) == (2, frozenset())


async def test_a_slow_controller_makes_no_more_pods_go(server: ApiServer, driver: KubernetesDriver) -> None:
    """Two are to go, and one of them is told again before its deletion has begun: neither more go, nor one comes
    back."""
    await driver.scale_to(3)
    server.deletes_pods = False
    for leaving in ([f"{NAME}-2", f"{NAME}-1"], [f"{NAME}-2", f"{NAME}-1"], [f"{NAME}-1"]):
        await driver.remove(leaving)
        assert (server.replicas, len(await driver.workers())) == (1, 3)


async def test_a_pod_that_stayed_goes_first_no_more(account: Path) -> None:
    """It was marked, and somebody else scaled before the replicas were lowered: another one that is chosen later goes
    instead of it."""
    async with ApiServer("deployment") as server:
        driver = KubernetesDriver(settings(server, account))
        await driver.scale_to(3)
        server.pods[f"{NAME}-0"]["metadata"]["annotations"][DELETION_COST] = "-1000"
        await driver.remove([f"{NAME}-2"])
        assert await driver.workers() == {f"{NAME}-0", f"{NAME}-1"}
        assert DELETION_COST not in server.pods[f"{NAME}-0"]["metadata"]["annotations"]
        await driver.close()


async def test_pods_that_are_over_are_no_workers(server: ApiServer, driver: KubernetesDriver) -> None:
    """An evicted pod stays listed for a while."""
    await driver.scale_to(2)
    server.pods[f"{NAME}-1"]["status"]["phase"] = "Failed"
    assert await driver.workers() == {f"{NAME}-0"}


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "give it the Role"), (404, "correct --kubernetes-target"), (500, "later"), (302, "later")],
)
async def test_a_refusal_says_what_to_correct(
    server: ApiServer, driver: KubernetesDriver, status: int, said: str
) -> None:
    """With the API server's own words."""
    server.refusals = [status]
    with pytest.raises(DriverFailed, match=f"{status}.*as the test wants.*{said}"):
        await driver.workers()
    assert await driver.workers() == frozenset()


async def test_another_who_scales_at_the_same_time_wins(server: ApiServer, driver: KubernetesDriver) -> None:
    """The call fails, and what was decided on is read again."""
    read = server._scale

    def then_changed() -> object:
        answer = read()
        server.replicas, server.version = 7, server.version + 1
        server._scale = read  # type: ignore[method-assign]
        return answer

    server._scale = then_changed  # type: ignore[method-assign,assignment]
    with pytest.raises(DriverFailed, match="somebody else scaled it"):
        await driver.scale_to(2)
    assert server.replicas == 7


@pytest.mark.parametrize("garbage", [b"hello", b"[]", b'{"spec": {"replicas": "3"}, "status": {"selector": "a"}}'])
async def test_what_is_no_api_server_is_said(server: ApiServer, driver: KubernetesDriver, garbage: bytes) -> None:
    """Whatever answers."""
    server.garbage = garbage
    with pytest.raises(DriverFailed):
        await driver.scale_to(2)


async def test_a_new_token_is_read(server: ApiServer, driver: KubernetesDriver, account: Path) -> None:
    """Kubelets replace tokens before they expire."""
    server.tokens = {"another"}
    with pytest.raises(DriverFailed, match="token is refused"):
        await driver.workers()
    (account / "token").write_text("another")
    assert await driver.workers() == frozenset()


async def test_an_api_server_that_is_away_is_said(account: Path) -> None:
    """It is asked again later."""
    async with ApiServer("deployment") as server:
        one = KubernetesDriver(settings(server, account))
    with pytest.raises(DriverFailed, match="does not answer"):
        await one.workers()
    await one.close()


async def test_the_token_goes_only_to_a_server_with_the_clusters_certificate(tmp_path: Path, account: Path) -> None:
    """Over TLS, trusted by the service account's ca.crt alone; never unencrypted to another machine."""
    for name in ("ours", "theirs"):
        make_certificate(tmp_path, name)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "ours.crt", tmp_path / "ours.key")
    async with ApiServer("deployment", tls) as server:
        for trusted, reached in (("ours", True), ("theirs", False)):
            (account / "ca.crt").write_bytes((tmp_path / f"{trusted}.crt").read_bytes())
            one = KubernetesDriver(settings(server, account))
            if reached:
                assert await one.workers() == frozenset()
            else:
                server.calls.clear()
                with pytest.raises(DriverFailed, match="does not answer"):
                    await one.workers()
                assert server.calls == []
            await one.close()
        with pytest.raises(CannotStart, match="begin with https"):
            KubernetesDriver(settings(server, account, kubernetes_api_url="http://10.0.0.1:443"))


async def test_outside_a_cluster_it_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No service account, no address, no target."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    target = {"pool": "m", "driver": "kubernetes", "kubernetes_target": "deployment/w"}
    away = AutoscaleSettings.load(**target, kubernetes_account_dir=str(tmp_path))
    with pytest.raises(CannotStart, match="--kubernetes-api-url"):
        KubernetesDriver(away)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(CannotStart, match="namespace cannot be read"):
        KubernetesDriver(away)
    with pytest.raises(CannotStart, match="deployment/NAME or statefulset/NAME"):
        AutoscaleSettings.load(pool="m", driver="kubernetes", kubernetes_target="pod/w")
