"""The commands as a shell calls them: output, exit codes, and JSON for scripts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inferq import __version__
from inferq.cli import app
from inferq.commands.demo import PROMPTS, read_prompts
from inferq.commands.up import share_of_cores
from inferq.console import out
from inferq.fleet.views import pools_table, workers_table
from queue_schemas import (
    Assignment,
    BadRequest,
    CannotStart,
    EngineState,
    InferqError,
    Lane,
    LaneDepth,
    PoolDepth,
    WorkerInfo,
)
from telemetry.environment import free_port

COMMANDS = (
    "up",
    "demo",
    "setup",
    "manager",
    "router",
    "worker",
    "batcher",
    "notifier",
    "batch",
    "webhooks",
    "chat",
    "autoscale",
    "simulate",
    "queues",
    "workers",
    "config",
    "doctor",
    "ray",
)
runner = CliRunner()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine's owner, no fabric of theirs."""
    monkeypatch.chdir(tmp_path)
    for name in ("INFERQ_REDIS_URL", "INFERQ_JOIN_TOKEN", "INFERQ_CONFIG", "INFERQ_ROUTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INFERQ_ROUTER_URL", f"http://127.0.0.1:{free_port()}")


def _rendered(table: object) -> str:
    with out.capture() as capture:
        out.print(table)
    return capture.get()


def test_the_version_is_the_packages() -> None:
    """`inferq --version`."""
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"inferq {__version__}\n")


def test_every_command_is_listed_with_a_sentence() -> None:
    """`inferq` alone is the help."""
    result = runner.invoke(app, [])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.output


@pytest.mark.parametrize("role", ["manager", "router", "worker"])
def test_a_roles_help_is_its_own(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`inferq worker --help` shows what `python -m worker.service --help` shows: every setting as an option."""
    result = runner.invoke(app, [role, "--help"])
    assert result.exit_code == 0
    assert "--port" in result.output + capsys.readouterr().out


def test_config_shows_every_setting_and_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON for scripts; a variable that was set is named as the origin."""
    monkeypatch.setenv("INFERQ_ROUTER_PORT", "18123")
    result = runner.invoke(app, ["config", "--json"])
    assert result.exit_code == 0
    facts = {(fact["table"], fact["name"]): fact for fact in json.loads(result.stdout)}
    assert facts["router", "port"]["value"] == "18123"
    assert facts["router", "port"]["origin"] == "INFERQ_ROUTER_PORT"
    assert facts["worker", "model"]["value"] == ""
    expected = {
        "router",
        "manager",
        "worker",
        "batches",
        "ray",
        "autoscale",
        "broker",
        "storage",
        "webhooks",
        "notifier",
        "telemetry",
    }
    assert {table for table, _ in facts} == expected
    assert all(fact["description"] for fact in facts.values())


def test_config_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tokens nor the password in a URL, in neither form."""
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "t0ken-of-mine")
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://user:passw0rd@localhost:6379/0")
    for arguments in (["config"], ["config", "--json"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0
        assert "t0ken-of-mine" not in result.output
        assert "passw0rd" not in result.output


def test_config_of_one_table_or_of_none_that_exists() -> None:
    """A table that nobody knows is a sentence."""
    shown = json.loads(runner.invoke(app, ["config", "broker", "--json"]).stdout)
    assert {fact["table"] for fact in shown} == {"broker"}
    result = runner.invoke(app, ["config", "brokre"])
    assert isinstance(result.exception, CannotStart)


@pytest.mark.parametrize("command", [["queues"], ["workers"], ["chat", "hello", "--model", "m"]])
def test_without_a_router_there_is_one_sentence(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and what to do, no traceback."""
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    said = result.output + capfd.readouterr().err
    assert "no Router answers at http://127.0.0.1:" in said
    assert "Traceback" not in said


def test_vllm_arguments_with_an_open_quote_are_a_sentence() -> None:
    """[H33] `--vllm-args` that no shell would read names the option and what is wrong, instead of a traceback."""
    result = runner.invoke(app, ["up", "--engine", "sim", "--vllm-args", "--served-model-name it's"])
    assert isinstance(result.exception, CannotStart)
    assert "--vllm-args" in result.exception.message
    assert "quotation" in result.exception.message


def test_a_conversation_cannot_be_json() -> None:
    """`inferq chat --json` without a question is a sentence, not a prompt that writes no JSON."""
    result = runner.invoke(app, ["chat", "--json"])
    assert isinstance(result.exception, BadRequest)
    assert "give a question" in result.exception.message


def test_up_refuses_what_contradicts_itself() -> None:
    """Before anything is started."""
    result = runner.invoke(app, ["up", "--engine", "sim", "--engine-url", "http://127.0.0.1:1"])
    assert isinstance(result.exception, InferqError)


def test_a_queue_that_nobody_serves_stands_out() -> None:
    """Waiting, running and age per lane; a quiet pool is one line."""
    depths = {Lane.INTERACTIVE: LaneDepth(waiting=4, leased=1, oldest_age_ms=90_500), Lane.BATCH: LaneDepth()}
    busy = PoolDepth(model="m", waiting=4, leased=1, outstanding=5, oldest_age_ms=90_500, workers=0, lanes=depths)
    text = _rendered(pools_table([busy, PoolDepth(model="quiet", workers=2, slots=64)]))
    assert ["m", "interactive", "4", "1", "90.5", "s", "0", "0"] in [line.split() for line in text.splitlines()]
    assert ["quiet", "-", "0", "0", "-", "2", "64"] in [line.split() for line in text.splitlines()]
    assert "No model is known" in _rendered(pools_table([]))


def test_the_fleet_is_one_line_per_worker() -> None:
    """Who, in which state, how busy, since when unheard."""
    worker = WorkerInfo(
        worker_id="gpu-1",
        session_id="gpu-1.0123456789abcdef",
        models=["m"],
        slots=8,
        running=3,
        engine=EngineState.STARTING,
        engine_detail="loading weights",
        heartbeat_age_ms=1_500,
        assignment=Assignment(term=1, version=1),
    )
    text = _rendered(workers_table([worker]))
    assert "gpu-1" in text
    assert "starting (loading weights)" in text
    assert "3/8" in text
    assert "1.5 s ago" in text
    assert "inferq worker" in _rendered(workers_table([]))


def test_engines_share_the_cores_and_leave_one() -> None:
    """At least one thread each."""
    assert [share_of_cores(16, 1), share_of_cores(16, 3), share_of_cores(2, 1), share_of_cores(1, 4)] == [15, 5, 1, 1]


def test_the_demos_own_prompts_are_twenty() -> None:
    """Twenty of our own come with the package, whatever the working directory."""
    prompts = read_prompts(None)
    assert not any(prompt.name.startswith("HumanEval") for prompt in prompts)
    assert len(prompts) == PROMPTS
    assert len({prompt.text for prompt in prompts}) == PROMPTS


def test_humaneval_is_read_plain_and_packed(tmp_path: Path) -> None:
    """As openai/human-eval ships it; what is none is a sentence."""
    line = json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}).encode() + b"\n"
    (tmp_path / "h.jsonl").write_bytes(line * 30)
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(line * 30))
    for name in ("h.jsonl", "h.jsonl.gz"):
        prompts = read_prompts(tmp_path / name)
        assert len(prompts) == PROMPTS
        assert prompts[0].name == "HumanEval/0"
        assert "def f():" in prompts[0].text
    (tmp_path / "broken.jsonl").write_text("no JSON")
    for name in ("broken.jsonl", "missing.jsonl"):
        with pytest.raises(BadRequest, match=name):
            read_prompts(tmp_path / name)
