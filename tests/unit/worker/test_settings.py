"""The worker's settings and its command line."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

from queue_schemas import CannotStart, check_worker_id
from worker import WorkerSettings
from worker.engines import choice
from worker.engines.choice import make_engine
from worker.engines.process import ProcessEngine
from worker.service import read_settings


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_line_of_the_readme() -> None:
    """Worker id, Manager URL, port and model are flags; a model means vLLM."""
    flags = "--worker-id worker-1 --manager-url http://localhost:18000 --port 7000 --model m"
    settings, _ = read_settings(flags.split())
    assert (settings.worker_id, settings.manager_urls) == ("worker-1", ["http://localhost:18000"])
    assert (settings.port, settings.model, settings.engine_kind) == (7000, "m", "vllm")


def test_several_manager_urls() -> None:
    """Repeated or with commas, in order."""
    flags = "--engine sim --manager-url http://a,http://b --manager-url http://c"
    assert read_settings(flags.split())[0].manager_urls == ["http://a", "http://b", "http://c"]


@pytest.mark.parametrize("role", ["manager", "router", "worker"])
def test_help_is_that_of_the_command(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each role's program names itself as the command line does; --manager-url is a flag of those that ask Managers."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"{role}.service").main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: inferq {role} ")
    assert "--manager-urls" not in text
    assert ("--manager-url URL" in text) == (role != "manager")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("role", ["manager", "router", "worker"])
def test_logs_name_the_module_however_it_is_started(role: str) -> None:
    """Under ``python -m`` a line of the log names ``<role>.service``, not ``__main__``."""
    started = runpy.run_module(f"{role}.service", run_name="started")
    assert started["log"]._logger_factory_args == (f"{role}.service",)


def test_an_engine_url_is_enough() -> None:
    """An attached server needs no further word."""
    assert read_settings(["--engine-url", "http://localhost:8000"])[0].engine_kind == "url"


def test_options_of_the_simulated_engine() -> None:
    """``--sim-...`` flags reach the simulated engine, switches and values alike, between our own."""
    flags = "--engine sim --sim-ttft-ms 5 --slots 3 --sim-instant --sim-name=x --region r"
    settings, _ = read_settings(flags.split())
    assert settings.sim_args == ["--ttft-ms", "5", "--instant", "--name=x"]
    assert (settings.slots, settings.region) == (3, "r")


def test_a_region_that_cannot_be_is_refused_at_start() -> None:
    """Not at the first registration."""
    with pytest.raises(CannotStart, match="region must be at most 100 characters"):
        WorkerSettings.load(engine="sim", region="x" * 101)


def test_arguments_of_vllm_are_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting holds them all, quotes included."""
    monkeypatch.setenv("INFERQ_WORKER_VLLM_ARGS", "--max-model-len 512 --chat-template 'a b'")
    settings = WorkerSettings.load(model="m")
    assert settings.vllm_args == ["--max-model-len", "512", "--chat-template", "a b"]


def test_a_name_is_made_from_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a worker id the host's name serves, made into a valid one."""
    for host in ("gpu-7.example.org", "-odd host!", "___"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        check_worker_id(WorkerSettings.load(engine="sim").name)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "say what to serve"),
        ({"engine_url": "localhost:8000"}, "--engine-url must be"),
        ({"engine": "sim", "manager_urls": "localhost"}, "must begin with http"),
        ({"engine": "sim", "worker_id": "a b"}, "not a worker id"),
        ({"engine": "sim", "slots": 0}, "slots"),
        ({"engine": "sim", "max_answer_bytes": (96 << 20) + 1}, "max.answer.bytes"),
        ({"engine": "sim", "frame_buffer_bytes": (96 << 20) + 1}, "frame.buffer.bytes"),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(given: dict[str, object], sentence: str) -> None:
    """What is wrong, and where it can be corrected."""
    with pytest.raises(CannotStart, match=sentence):
        WorkerSettings.load(**given)


def test_installed_models_go_by_the_names_that_clients_use() -> None:
    """The model that the worker starts with comes first; a folder has a name of its own. Sim takes them as names."""
    settings = WorkerSettings.load(model="/m/a", served_model_name="a", installed_models="b=/m/b,org/c,a=/elsewhere")
    assert list(settings.installed.items()) == [("a", "/m/a"), ("b", "/m/b"), ("org/c", "org/c")]
    assert WorkerSettings.load(model="a").installed == {"a": "a"}
    simulated = WorkerSettings.load(engine="sim-process", model="a", installed_models="b")
    assert list(simulated.installed) == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"engine": "sim", "model": "a"}, "starts itself"),
        ({"engine_url": "http://e", "model": "a"}, "starts itself"),
        ({"engine": "sim-process", "model": "a,b"}, "the one model to start with"),
        ({"engine": "sim-process"}, "the one model to start with"),
        ({"model": "a", "installed_models": "b" * 300}, "model"),
        ({"model": "a", "installed_models": [f"m{number}" for number in range(300)]}, "at most 256"),
    ],
)
def test_installed_models_need_an_engine_that_can_load_them(flags: dict[str, object], why: str) -> None:
    """A worker cannot restart an engine that is not its own, and starts with one model."""
    with pytest.raises(CannotStart, match=why):
        WorkerSettings.load(**({"installed_models": "c"} | flags))


def test_a_worker_without_installed_models_says_nothing_of_them() -> None:
    """Its engine loads what it did, and its messages are as short as before."""
    engine = make_engine(WorkerSettings.load(engine="sim-process", model="a,b"))
    assert isinstance(engine, ProcessEngine)
    assert engine.loadable == ()


def test_adapters_are_those_of_the_first_model() -> None:
    """None is named like a model of the engine, and only that model's vLLM can load any."""
    assert WorkerSettings.load(model="/m/a", served_model_name="a", installed_models="b").own_models == {"a", "b"}
    assert WorkerSettings.load(engine="sim", model="a, b").own_models == {"a", "b"}
    for wrong in (0, 257):
        with pytest.raises(CannotStart, match="max_adapters"):
            WorkerSettings.load(model="a", max_adapters=wrong)


def test_only_the_model_that_adapters_fit_is_started_with_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where no folder is given."""
    given: list[tuple[str, object]] = []

    def note_launch(_: str, model: str, **options: object) -> object:
        given.append((model, options["max_adapters"]))
        return lambda port: None

    monkeypatch.setattr(choice, "vllm_launch", note_launch)
    monkeypatch.setattr(choice, "find_vllm", lambda command: "/opt/vllm")
    settings = {"engine": "vllm", "model": "a", "installed_models": "b", "max_adapters": 3}
    choice.make_engine(WorkerSettings.load(**settings, adapters_dir=str(tmp_path)))
    choice.make_engine(WorkerSettings.load(**settings))
    assert given == [("a", 3), ("b", 0), ("a", 0), ("b", 0)]
