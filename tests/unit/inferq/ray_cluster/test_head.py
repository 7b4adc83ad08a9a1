"""The record of a head and its processes. The head is a stand-in here: a shell that writes down an address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.doctor import DoctorTarget, Level
from inferq.doctor.ray import check_ray
from inferq.fleet.client import FleetClient
from inferq.ray_cluster import head as heads
from inferq.ray_cluster.head import Head, locked, read_head, running_head, start_head, stop_head
from inferq.ray_cluster.settings import RaySettings
from queue_schemas import CannotStart
from tests.support.waiting import eventually

_GOES_WELL = "sleep 300 & echo 127.0.0.1:1 > $1/ray_current_cluster; wait"
_IS_STUBBORN = "trap '' TERM; (trap '' TERM; exec sleep 300) & echo 127.0.0.1:1 > $1/ray_current_cluster; wait; wait"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RaySettings]:
    monkeypatch.setattr(heads, "STOP_LIMIT_S", 0.5)  # what the stand-in starts does not end with it
    made = RaySettings.load(
        data_dir=str(tmp_path / "data"), session_dir=str(tmp_path / "s"), dashboard_port=0, start_limit_ms=20_000
    )
    yield made
    left = read_head(made.data_folder)
    if left is not None:
        stop_head(left, made.data_folder)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stand-in's shell script, to be replaced."""
    current = [_GOES_WELL]
    monkeypatch.setattr(
        heads, "head_command", lambda of, *_: ["/bin/sh", "-c", current[0], "sh", str(of.session_folder)]
    )
    yield current


def test_a_head_is_found_again_by_its_record(settings: RaySettings, script: list[str]) -> None:
    """Address, and what a driver must show; nobody else may read it."""
    head = start_head(settings)
    assert running_head(settings.data_folder) == head
    assert (head.address, head.loopback, Path(head.token_file).stat().st_mode & 0o777) == ("127.0.0.1:1", True, 0o600)
    assert (settings.data_folder / "ray.json").stat().st_mode & 0o777 == 0o600
    assert len(head.processes()) == 2


def test_stopping_ends_head_and_children_and_may_be_repeated(settings: RaySettings, script: list[str]) -> None:
    """Also those that do not listen to SIGTERM; the record goes with them."""
    for script[0] in (_GOES_WELL, _IS_STUBBORN):
        head = start_head(settings)
        assert len(head.processes()) == 2
        stop_head(head, settings.data_folder)
        assert head.processes() == []
        assert read_head(settings.data_folder) is None
        stop_head(head, settings.data_folder)


def test_what_a_killed_head_has_left_is_ended_before_the_next_starts(settings: RaySettings, script: list[str]) -> None:
    """A stale record is no running head; its processes are still known by their session."""
    head = start_head(settings)
    os.kill(head.pid, signal.SIGKILL)
    os.waitpid(head.pid, 0)
    assert running_head(settings.data_folder) is None
    assert len(head.processes()) == 1
    again = start_head(settings)
    assert head.processes() == []
    assert again.pid != head.pid
    assert running_head(settings.data_folder) == again


def test_a_process_that_got_the_same_id_later_is_not_touched(settings: RaySettings, tmp_path: Path) -> None:
    """Neither one of another start time nor one after a boot."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for started, of_boot in ((1, boot), (1 << 40, boot), (1, "another")):
            head = Head(other.pid, started, of_boot, "127.0.0.1:1", "", "", loopback=True)
            stop_head(head, tmp_path)
            assert not head.runs
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("echo 'no such port'; exit 3", "code 3: no such port"), ("sleep 300", "was not up within 1 s")],
)
def test_a_head_that_does_not_come_up_says_why_and_leaves_nothing(
    settings: RaySettings, script: list[str], words: str, expected: str
) -> None:
    """Its last words, and where the rest of them is."""
    script[0] = words
    with pytest.raises(CannotStart, match=expected) as refused:
        start_head(settings.model_copy(update={"start_limit_ms": 1_000}))
    assert "ray-head.log" in refused.value.message
    assert read_head(settings.data_folder) is None


def test_one_command_at_a_time_works_on_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second gives up with a sentence."""
    monkeypatch.setattr(heads, "LOCK_LIMIT_S", 0.1)
    with locked(tmp_path), pytest.raises(CannotStart, match="another `inferq ray` works on"), locked(tmp_path):
        raise AssertionError("two at once")
    with locked(tmp_path):
        pass


async def test_the_doctor_reports_a_head_that_ended_by_itself(settings: RaySettings, script: list[str]) -> None:
    """Nothing where none was started."""
    examined = DoctorTarget(redis_url="", client=FleetClient("http://127.0.0.1:1"), data_dir=settings.data_folder)
    assert await check_ray(examined) == []
    head = start_head(settings)
    assert [finding.level for finding in await check_ray(examined)] == [Level.OK]
    os.kill(head.pid, signal.SIGKILL)
    await eventually(lambda: not head.runs, "it has ended")
    (finding,) = await check_ray(examined)
    assert (finding.level, "inferq ray down" in finding.fix) == (Level.WARNING, True)


def test_a_broken_record_is_not_guessed_at(tmp_path: Path) -> None:
    """It says what to look for."""
    (tmp_path / "ray.json").write_text("{")
    with pytest.raises(CannotStart, match="cannot be read"):
        read_head(tmp_path)
