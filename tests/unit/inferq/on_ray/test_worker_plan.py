"""The workers of `inferq ray up`, from its options and settings to what their autoscaler is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inferq.autoscale.drivers.worker_command import worker_args, worker_mark
from inferq.autoscale.settings import AutoscaleSettings
from inferq.cli import app
from inferq.on_ray import commands
from inferq.on_ray.plan import RayPlan
from inferq.ray_cluster import RaySettings
from queue_schemas import CannotStart

REDIS = "redis://127.0.0.1:6379/0"
HEAD = "10.0.0.1"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def plan(**settings: object) -> RayPlan:
    return RayPlan.load(RaySettings.load(**settings), redis_url=REDIS)


def pool(**settings: object) -> AutoscaleSettings:
    found = plan(**settings).pool(HEAD)
    assert found is not None
    return found


def test_without_a_model_workers_are_left_alone() -> None:
    """`inferq ray up` may be run again for the Routers' sake. Workers of no model are a mistake."""
    assert (plan().pool_name, plan().pool(HEAD)) == ("", None)
    with pytest.raises(CannotStart, match="say what the workers serve: --model"):
        plan(workers=2)


def test_the_size_is_fixed_unless_more_are_allowed() -> None:
    """One worker, so many, or between two numbers; none at all is no pool."""
    assert (pool(model="m").min, pool(model="m").max) == (1, 1)
    assert (pool(model="m", workers=3).min, pool(model="m", workers=3).max) == (3, 3)
    between = pool(model="m", workers=0, max_workers=4)
    assert (between.min, between.max, between.driver) == (0, 4, "ray")
    assert plan(model="m", workers=0).pool(HEAD) is None
    with pytest.raises(CannotStart, match="max_workers must be 0, or at least workers"):
        plan(model="m", workers=3, max_workers=2)


def test_workers_are_started_as_inferq_worker_is() -> None:
    """With the model, the further options, and room on the node. The pool has the name that clients use."""
    given = pool(
        model="/models/qwen", gpus_per_worker=2, worker_args=["--served-model-name", "qwen", "--vllm-args=--dtype half"]
    )
    assert (given.pool, given.ray_cpus, given.ray_gpus) == ("qwen", 1.0, 2.0)
    args = worker_args(given, "w-1")
    assert args[:4] == ["--model", "/models/qwen", "--served-model-name", "qwen"]
    assert args[-2:] == ["--manager-url", "http://127.0.0.1:8000"]


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"host": "10.1.2.3"}, "http://10.1.2.3:8000"),
        ({"host": "0.0.0.0", "port": 8001}, "http://10.0.0.1:8001"),  # noqa: S104 - a setting, nothing is bound
        ({"host": "0.0.0.0", "node_host": "10.9.9.9"}, "http://10.9.9.9:8000"),  # noqa: S104
        ({"host": "0.0.0.0", "advertise_urls": "http://inferq-router:8000"}, "http://inferq-router:8000"),  # noqa: S104
    ],
)
def test_workers_learn_an_address_of_the_router_that_other_nodes_reach(settings: Mapping[str, Any], url: str) -> None:
    """A wildcard address is nobody's: the head's stands for it, unless another is named."""
    assert pool(model="m", **settings).manager_urls == [url]


def test_a_secret_is_no_option_of_a_worker() -> None:
    """Options show in process lists, and in Serve's dashboard."""
    for flag in ("--join-token", "--engine-api-key=x"):
        with pytest.raises(CannotStart, match=r"INFERQ_(JOIN_TOKEN|WORKER_ENGINE_API_KEY) in the nodes' environment"):
            pool(model="m", worker_args=[flag, "secret"])


def test_options_that_no_worker_knows_are_refused_here() -> None:
    """Not on each node, again and again."""
    with pytest.raises(CannotStart, match="has no such option"):
        pool(model="m", worker_args=["--slotz", "4"])
    with pytest.raises(CannotStart, match="slots"):
        pool(model="m", worker_args=["--slots", "0"])


def test_another_mark_means_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever they are started with, the token included; not of how many there are. It holds no secret."""
    first = pool(model="m")
    assert worker_mark(first) == worker_mark(pool(model="m", workers=7, max_workers=9))
    others = [pool(model="m", worker_args=["--slots", "4"]), pool(model="m", gpus_per_worker=1), pool(model="n")]
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "secret")
    others.append(pool(model="m"))
    assert len({worker_mark(one) for one in [first, *others]}) == 5
    assert plan().pool_digest(first) != plan().pool_digest(pool(model="m", workers=2))
    assert "secret" not in worker_mark(others[-1])


def test_the_options_of_the_command_are_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows -- is for the workers, whatever it looks like."""
    seen: dict[str, object] = {}

    def bring_up(asked: Mapping[str, object], **_: object) -> int:
        seen.update(RaySettings.load(**asked).model_dump())
        return 0

    monkeypatch.setattr(commands, "ray_up", bring_up)
    line = "ray up --model m --workers 2 --max-workers 3 --cpus-per-worker 0.5 --gpus-per-worker 1"
    line += " --advertise-url http://a:1 --advertise-url http://b:2 -- --engine sim --port 0"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    assert {name: seen[name] for name in ("model", "workers", "max_workers", "cpus_per_worker", "gpus_per_worker")} == {
        "model": "m",
        "workers": 2,
        "max_workers": 3,
        "cpus_per_worker": 0.5,
        "gpus_per_worker": 1.0,
    }
    assert seen["advertise_urls"] == ["http://a:1", "http://b:2"]
    assert seen["worker_args"] == ["--engine", "sim", "--port", "0"]
