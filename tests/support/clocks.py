"""Wall clocks that are off, for processes of ours and for servers: monotonic time stays right."""

from __future__ import annotations

from pathlib import Path

from .fleet import ROOT
from .processes import Child
from .servers import Server

HOUR_S = 3_600

_OFF = """
import datetime, os, time

OFF_S = int(os.environ["CLOCK_OFF_S"])
right_time, right_time_ns = time.time, time.time_ns
time.time = lambda: right_time() + OFF_S
time.time_ns = lambda: right_time_ns() + OFF_S * 10**9


class WrongDatetime(datetime.datetime):
    __slots__ = ()

    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.utcfromtimestamp(time.time())


datetime.datetime = WrongDatetime
"""
"""What Python imports at its start where it lies on the path as ``sitecustomize``."""


def clock_off_by(seconds: int, folder: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is off; ``folder`` gets what makes it so."""
    place = folder / "wrong-clock"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(_OFF)
    return {"CLOCK_OFF_S": str(seconds), "PYTHONPATH": f"{place}:{ROOT}"}


def faketime_library() -> Path | None:
    """The library that gives a process another wall clock (Debian's ``faketime``), where it is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime*.so.1"), None)


class SteppedServer(Server):
    """A server whose wall clock a test moves while it runs, or while it is down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        library = faketime_library()
        assert library is not None, "faketime is not installed"
        self._offset = self.folder / "clock"
        self.step_to(0)
        env = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.process = Child(self.process.name, self.process.args, self.process.log_path, env=env)

    def step_to(self, seconds: int) -> None:
        """From now on its clock is off by so much."""
        beside = self._offset.with_suffix(".new")
        beside.write_text(f"{seconds:+d}s\n")
        beside.replace(self._offset)
