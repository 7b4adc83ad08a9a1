"""A forked role is a process as one that was started: its own session, folder, environment, log and end."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.clocks import clock_off_by
from tests.support.fleet import ROOT
from tests.support.preloaded import can_fork
from tests.support.processes import Child, environment, is_alive
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="roles are forked on Linux alone")


def role(folder: Path, *flags: str, module: str = "manager.service", **variables: str) -> Child:
    env = environment(PYTHONPATH=str(ROOT), **variables)
    return Child("role", [sys.executable, "-m", module, *flags], folder / "log", env=env, cwd=folder, preloaded=True)


def serving(folder: Path) -> Child:
    """A Manager that waits for a Redis that is not there."""
    child = role(folder, "--port", "0", "--redis-url", "redis://127.0.0.1:1/0")
    child.start()
    child.until(lambda: "listening" in child.log_text(), 30)
    return child


def test_it_answers_exit_codes_and_logs_as_a_started_one(tmp_path: Path) -> None:
    child = role(tmp_path, "--help")
    child.start()
    assert child.wait(30) == 0
    assert "--lease-ms" in child.log_text()
    wrong = role(tmp_path, INFERQ_MANAGER_LEASE_MS="soon")
    wrong.start()
    assert wrong.wait(30) == 2
    assert "INFERQ_MANAGER_LEASE_MS" in wrong.log_text()


def test_it_has_a_session_and_a_folder_of_its_own_and_no_file_of_ours(tmp_path: Path) -> None:
    with (tmp_path / "ours").open("w") as ours:
        child = serving(tmp_path)
        assert os.getsid(child.pid) == child.pid
        assert Path(f"/proc/{child.pid}/cwd").readlink() == tmp_path
        opened = {str(one.readlink()) for one in Path(f"/proc/{child.pid}/fd").iterdir()}
        assert str(tmp_path / "log") in opened
        assert ours.name not in opened
    child.kill_group()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_ends_by_signals_and_may_be_started_again(tmp_path: Path, number: signal.Signals, code: int) -> None:
    child = serving(tmp_path)
    first = child.pid
    assert child.returncode is None
    child.send(number)
    assert child.wait(15) == code
    assert not child.running
    child.start()
    assert child.pid != first
    child.kill_group()


async def test_it_ends_with_the_tests_that_started_it(tmp_path: Path) -> None:
    """Even if these are killed, and whatever forked it with them."""
    script = tmp_path / "starts.py"
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom tests.unit.test_preloaded import serving\n"
        "if __name__ == '__main__':\n    print(serving(Path('.')).pid, flush=True)\n    time.sleep(60)\n"
    )
    env = environment(PYTHONPATH=str(ROOT))
    tests = Child("tests", [sys.executable, str(script)], tmp_path / "tests.log", env=env, cwd=tmp_path)
    tests.start()
    tests.until(lambda: tests.log_text().endswith("\n"), 60)
    pid = int(tests.log_text())
    assert is_alive(pid)
    tests.kill()
    await eventually(lambda: not is_alive(pid), "the role ends", limit_s=10)


def test_what_changes_the_interpreter_is_started(tmp_path: Path) -> None:
    plain = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "worker.service", "--port", "0"]
    assert can_fork(command, plain)
    assert not can_fork(command, plain | {"LD_PRELOAD": "/usr/lib/libother.so"})
    assert not can_fork(command, plain | clock_off_by(60, tmp_path))
    assert not can_fork([sys.executable, "-m", "inferq", "worker"], plain)
    assert not can_fork(["sh", "-c", "true"], plain)
