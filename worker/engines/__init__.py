"""Engines: the servers that answer the OpenAI API for a worker, behind one port."""

from .call_ids import new_call_id
from .dialects import Dialect, NotContinuable
from .port import Engine, EngineAnswer, EngineCall, EngineGone
from .step_reader import StepReader

__all__ = [
    "Dialect",
    "Engine",
    "EngineAnswer",
    "EngineCall",
    "EngineGone",
    "NotContinuable",
    "StepReader",
    "new_call_id",
]
