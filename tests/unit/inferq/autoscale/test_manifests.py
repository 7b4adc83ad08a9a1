"""The manifests of deploy/kubernetes start what they say, and allow what the driver calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from inferq.autoscale.service import read_settings
from queue_schemas import FABRIC_PREFIX, PoolDepth
from worker.service import read_settings as read_worker_settings

FOLDER = Path(__file__).parents[4] / "deploy" / "kubernetes"


def objects(name: str) -> dict[tuple[str, str], Any]:
    """The objects of a file by kind and name."""
    found = [one for one in yaml.safe_load_all((FOLDER / name).read_text()) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def arguments(deployment: Any) -> list[str]:
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


def test_the_autoscaler_starts_with_the_arguments_of_its_deployment() -> None:
    """And scales the Deployment beside it, whose pods have the time that a drain takes."""
    found = objects("autoscaler.yaml")
    name, *args = arguments(found["Deployment", "inferq-autoscaler"])
    settings, _ = read_settings(args)
    assert (name, settings.driver, settings.max, settings.scale_in_after) == ("autoscale", "kubernetes", 8, 300_000)
    kind, _, target = settings.kubernetes_target.partition("/")
    workers = found[kind.capitalize(), target]
    assert "replicas" not in workers["spec"]
    role, *worker_args = arguments(workers)
    worker, _ = read_worker_settings(worker_args)
    assert (role, worker.model) == ("worker", settings.pool)
    grace_ms = workers["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] * 1000
    assert grace_ms > worker.drain_timeout_ms + worker.engine_stop_timeout_ms


def test_the_role_allows_what_the_driver_calls_and_no_more() -> None:
    """Reads and patches of scales, lists and marks of pods."""
    rules = objects("autoscaler.yaml")["Role", "inferq-autoscaler"]["rules"]
    allowed = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    scales = {("apps", f"{kind}s/scale", verb) for kind in ("deployment", "statefulset") for verb in ("get", "patch")}
    assert allowed == scales | {("", "pods", "list"), ("", "pods", "patch")}


def test_keda_reads_what_routers_show() -> None:
    """One replica for each that is wanted."""
    [trigger] = objects("keda.yaml")["ScaledObject", "inferq-workers"]["spec"]["triggers"]
    metadata = trigger["metadata"]
    assert metadata["valueLocation"] in PoolDepth.model_fields
    assert f"{FABRIC_PREFIX}/pools/" in metadata["url"]
    assert metadata["targetValue"] == "1"
    [metric] = objects("hpa.yaml")["HorizontalPodAutoscaler", "inferq-workers"]["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == "inferq_replicas_wanted"


@pytest.mark.parametrize("written", [("2s", 2_000), ("500ms", 500), ("1.5m", 90_000), ("1h", 3_600_000)])
def test_durations_are_written_with_their_unit(written: tuple[str, int]) -> None:
    """As in ``--target-wait 2s``."""
    settings, _ = read_settings(["--pool", "m", "--target-wait", written[0]])
    assert settings.target_wait == written[1]


def test_what_follows_two_dashes_is_the_drivers() -> None:
    """Whatever it looks like, another ``--`` included."""
    settings, _ = read_settings(["--pool", "m", "--max", "3", "--", "--engine", "sim", "--", "--max", "a b"])
    assert (settings.max, settings.args) == (3, ["--engine", "sim", "--", "--max", "a b"])
