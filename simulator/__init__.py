"""Replay traces against inferq's decisions and others, in discrete-event time: :func:`simulate`."""

from __future__ import annotations

from .measures import Objectives, Summary
from .simulation import SimulationOptions, simulate
from .traces import Trace, load_trace

__all__ = ["Objectives", "SimulationOptions", "Summary", "Trace", "load_trace", "simulate"]
