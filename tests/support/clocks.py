"""Wall clocks that are off, for processes of ours: monotonic time stays right."""

from __future__ import annotations

from pathlib import Path

from .fleet import ROOT

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
