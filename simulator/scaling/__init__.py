"""What decides how many workers there are: inferq's autoscaler, and what it is compared with."""

from __future__ import annotations

from .inferq import InferqAutoscaler
from .lag_count import LagCount
from .port import FleetLoad, Scaler

__all__ = ["FleetLoad", "InferqAutoscaler", "LagCount", "Scaler"]
