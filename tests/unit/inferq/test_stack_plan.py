"""Which processes `inferq up` starts, and when it starts one again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from inferq.commands.up import with_batcher
from inferq.stack import StackOptions, plan_stack
from inferq.stack.plan import choose_engine
from queue_schemas import CannotStart
from telemetry.backoff import EXIT_REFUSED, MAX_IN_A_ROW, MAX_PAUSE_S, STEADY_S, Restarts

_BATCHES = ("INFERQ_BATCHES_PORT", "INFERQ_NOTIFIER_PORT", "INFERQ_BROKER_RQ_REDIS_URL", "INFERQ_STORAGE_URL")


free = itertools.count(40_001).__next__


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine's owner."""
    monkeypatch.chdir(tmp_path)
    for name in ("INFERQ_ROUTER_PORT", "INFERQ_WORKER_PORT", "INFERQ_MANAGER_PORT", "INFERQ_CONFIG", *_BATCHES):
        monkeypatch.delenv(name, raising=False)


def test_the_ports_that_users_know_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manager 9000, Router 18000, workers from 7000 up; batcher and notifier have free ones, unless given one."""
    options = StackOptions(engine="sim", model="sim", workers=3)
    plan = plan_stack(options, itertools.count(1234).__next__)
    assert [role.port for role in plan.roles] == [9000, 18000, 1234, 1235, 7000, 7001, 7002]
    monkeypatch.setenv("INFERQ_BATCHES_PORT", "7501")
    monkeypatch.setenv("INFERQ_NOTIFIER_PORT", "7601")
    assert [role.port for role in plan_stack(options, lambda: 1234).services] == [7501, 7601]
    assert [role.name for role in plan.workers] == ["worker-1", "worker-2", "worker-3"]


def test_a_setting_of_a_role_is_the_default_of_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and inferq.toml count as for the role itself; a flag wins."""
    monkeypatch.setenv("INFERQ_ROUTER_PORT", "18001")
    assert plan_stack(StackOptions(engine="sim", model="sim"), free).router.port == 18001
    assert plan_stack(StackOptions(engine="sim", model="sim", router_port=18002), free).router.port == 18002


def test_port_0_is_a_free_one_for_each() -> None:
    """No two roles share it, and every role is told the others' real ports."""
    ports = itertools.count(50_001)
    options = StackOptions(engine="sim", model="sim", workers=2, router_port=0, manager_port=0, worker_port=0)
    plan = plan_stack(options, lambda: next(ports))
    assert len({role.port for role in plan.roles}) == 6
    assert plan.manager.url in plan.router.flags
    assert all(plan.router.url in worker.flags and plan.manager.url in worker.flags for worker in plan.workers)


def test_router_and_batcher_share_a_store_in_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a setting names another, which both then read themselves."""
    options = StackOptions(engine="sim", model="sim", data_dir=Path("/data"))
    plan = plan_stack(options, free)
    for role in (plan.router, *plan.services):
        assert role.flags[-2:] == ("--storage-url", "/data/store")
    monkeypatch.setenv("INFERQ_STORAGE_URL", "s3://bucket/x")
    plan = plan_stack(options, free)
    assert not any("--storage-url" in role.flags for role in plan.roles)


def test_a_queue_that_rq_cannot_use_leaves_the_batcher_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else runs; with a Redis for RQ alone it runs too."""
    options = StackOptions(engine="sim", model="sim")
    assert with_batcher(options, "").batcher
    assert with_batcher(options, "redis://127.0.0.1:1").batcher
    without = with_batcher(options, "redis+cluster://127.0.0.1:1")
    assert plan_stack(without, free).services == ()
    monkeypatch.setenv("INFERQ_BROKER_RQ_REDIS_URL", "redis://127.0.0.1:1")
    assert with_batcher(options, "redis+cluster://127.0.0.1:1").batcher


def test_two_roles_on_one_port_are_refused() -> None:
    """The sentence names both and the flags that part them."""
    with pytest.raises(CannotStart, match="--router-port or --worker-port"):
        plan_stack(StackOptions(engine="sim", model="sim", router_port=7000), free)


def test_arguments_for_vllm_arrive_whole() -> None:
    """Also those with spaces."""
    options = StackOptions(engine="vllm", model="m", vllm_args=("--override", '{"a": 1}'), engine_threads=3)
    worker = plan_stack(options, free).workers[0]
    assert "--vllm-args=--override '{\"a\": 1}'" in worker.flags
    assert worker.environment == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("engine", "url", "chosen"),
    [(None, None, "vllm"), (None, "http://e", "url"), ("sim", None, "sim"), ("url", "http://e", "url")],
)
def test_the_engine_that_is_meant(engine: str | None, url: str | None, chosen: str) -> None:
    """A URL means the server there; nothing means vLLM."""
    assert choose_engine(engine, url) == chosen


@pytest.mark.parametrize(("engine", "url"), [("sim", "http://e"), ("tensorrt", None)])
def test_engines_that_contradict_or_do_not_exist_are_refused(engine: str, url: str | None) -> None:
    """With a sentence, not by taking one of them."""
    with pytest.raises(CannotStart):
        choose_engine(engine, url)


def test_pauses_grow_and_end() -> None:
    """A role that keeps ending is given up after a while, not before."""
    state, pauses = Restarts(), []
    while True:
        state, pause = state.ended(1, 0.1, ready=True)
        if pause is None:
            break
        pauses.append(pause)
    assert len(pauses) == MAX_IN_A_ROW - 1
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_PAUSE_S


def test_a_steady_run_earns_a_fresh_start() -> None:
    """What crashes once a day is started again at once, however often."""
    state = Restarts()
    for _ in range(5 * MAX_IN_A_ROW):
        state, pause = state.ended(1, STEADY_S + 1, ready=True)
        assert pause is not None
        assert pause < 1


def test_what_refuses_to_start_is_not_tried_again() -> None:
    """Exit code 2 before it ever served: its user must correct something. After it served, it may have been bad
    luck."""
    assert Restarts().ended(EXIT_REFUSED, 0.1, ready=False)[1] is None
    assert Restarts().ended(EXIT_REFUSED, 0.1, ready=True)[1] is not None
