"""Engines: what answers the OpenAI API for a worker."""

from .port import Engine, EngineAnswer, EngineCall, EngineGone

__all__ = ["Engine", "EngineAnswer", "EngineCall", "EngineGone"]
