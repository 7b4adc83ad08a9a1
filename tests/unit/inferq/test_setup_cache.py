"""What is made once per user is made by one process at a time, and never half used."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inferq.vllm_setup import SetupFailed, VllmEnvironment, environment, find_vllm, prepare_vllm
from inferq.vllm_setup.cache import cache_dir, locked
from inferq.vllm_setup.process import run_logged
from tests.support.processes import is_alive


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.details: list[str] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.steps.append(title)
        yield

    def detail(self, text: str) -> None:
        self.details.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test alone."""
    monkeypatch.setenv("INFERQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Environments whose installation takes no time: a `vllm` that answers, nothing else. Gives what was installed."""
    installed: list[str] = []

    def install(self: environment._Builder, plan: object) -> None:
        installed.append(str(self.folder))
        command = self.folder / "bin" / "vllm"
        command.write_text("#!/bin/sh\necho 0.32.0\n")
        command.chmod(0o755)

    def create(self: environment._Builder) -> None:
        (self.folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environment._Builder, "install", install)
    monkeypatch.setattr(environment._Builder, "create", create)
    monkeypatch.setattr(environment._Builder, "complete_torch", lambda *_: None)
    return installed


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """INFERQ_CACHE_DIR, else XDG_CACHE_HOME, else ~/.cache; a relative XDG_CACHE_HOME is ignored, as its rules say."""
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("INFERQ_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/inferq")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "inferq"


def test_an_environment_is_made_once(no_pip: list[str]) -> None:
    """The second call finds what the first has made, and so does a look that installs nothing."""
    assert find_vllm() is None
    progress = Heard()
    first = prepare_vllm(progress)
    assert [step.split()[0] for step in progress.steps] == ["Creating", "Installing", "Checking"]
    assert prepare_vllm(Heard()) == find_vllm() == first
    assert len(no_pip) == 1


def test_a_killed_set_up_is_begun_anew(no_pip: list[str]) -> None:
    """Without its marker, the last thing that is written, an environment does not count and is cleared."""
    made = prepare_vllm(Heard())
    folder = made.command.parent.parent
    (folder / "inferq-ready.json").unlink()
    (folder / "left-over").touch()
    assert find_vllm() is None
    assert prepare_vllm(Heard()) == made
    assert not (folder / "left-over").exists()
    assert len(no_pip) == 2


def test_an_environment_whose_python_was_removed_does_not_count(no_pip: list[str]) -> None:
    """Its interpreter is a link into the Python that it was made with."""
    made = prepare_vllm(Heard())
    made.python.unlink()
    made.python.symlink_to("/no/such/python")
    assert find_vllm() is None


def test_a_vllm_that_does_not_start_is_not_used(no_pip: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs it, and its last word is in the reason."""

    def install(self: environment._Builder, plan: object) -> None:
        command = self.folder / "bin" / "vllm"
        command.write_text("#!/bin/sh\necho 'ImportError: no libfoo'\nexit 1\n")
        command.chmod(0o755)

    monkeypatch.setattr(environment._Builder, "install", install)
    with pytest.raises(SetupFailed, match="ImportError: no libfoo"):
        prepare_vllm(Heard())
    assert find_vllm() is None


def test_two_set_ups_at_once_do_the_work_once(no_pip: list[str]) -> None:
    """The second waits for the first and uses what it made."""
    found: list[VllmEnvironment] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_vllm(Heard()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert len(no_pip) == 1


def test_a_lock_is_waited_for_with_a_limit() -> None:
    """A set-up that never ends is told of, not waited for without end."""
    progress = Heard()
    with (
        locked("thing", Heard()),
        pytest.raises(SetupFailed, match="another process has been setting up thing"),
        locked("thing", progress, limit_s=0.3),
    ):
        pass
    assert progress.details


def test_what_a_dead_set_up_had_started_holds_its_lock() -> None:
    """The lock passes to children, so that an orphaned pip and a new set-up never write to one folder."""
    with locked("thing", Heard()) as fd:
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1, pass_fds=(fd,))
    assert child.stdin is not None
    with pytest.raises(SetupFailed), locked("thing", Heard(), limit_s=0.3):
        pass
    child.stdin.close()
    child.wait(10)
    with locked("thing", Heard(), limit_s=5):
        pass


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the folder and the variable that changes it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFERQ_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SetupFailed, match="INFERQ_CACHE_DIR"), locked("thing", Heard()):
        pass


def _run(command: list[str], log: Path, limit_s: float = 30.0) -> tuple[int, str, list[str]]:
    lines: list[str] = []
    with locked("thing", Heard()) as fd:
        code, output = run_logged(command, log, lock_fd=fd, limit_s=limit_s, on_line=lines.append, on_tick=lambda: None)
    return code, output, lines


def test_the_output_of_a_step_is_kept_and_reported_line_by_line(tmp_path: Path) -> None:
    """To the log everything, to the listener whole lines, to the caller the exit code and the end of it."""
    log = tmp_path / "log"
    code, output, lines = _run(["sh", "-c", "echo one; echo two >&2; exit 3"], log)
    assert (code, lines) == (3, ["one", "two"])
    assert output == log.read_text() == "one\ntwo\n"


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """Nothing of it is left."""
    pid_file = tmp_path / "pid"
    with pytest.raises(SetupFailed, match="took longer"):
        _run(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait"], tmp_path / "log", limit_s=0.5)
    pid = int(pid_file.read_text())
    limit = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not is_alive(pid)
