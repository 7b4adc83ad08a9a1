"""A simulated engine: an OpenAI-compatible server without a model.

Its text is a pure function of its seed and the request, its timing, its prefix cache and its failures are to order.
It runs as a process of its own (``python -m worker.engines.simulated --port 0``) or inside a worker
(:class:`SimulatedEngine`). The pure parts are ``requests``, ``answers``, ``tokens``, ``wire``, ``schedule``,
``prefix_cache`` and ``failures``; ``simulation`` and ``run`` put them in time; ``app`` and ``engine`` are adapters.
"""

from .api.answers import chat_prompt
from .api.requests import prompt_digest
from .engine import SimulatedEngine
from .failures import Failure, FailureKind, parse_rates
from .settings import SimulationSettings
from .simulation import Simulation

__all__ = [
    "Failure",
    "FailureKind",
    "SimulatedEngine",
    "Simulation",
    "SimulationSettings",
    "chat_prompt",
    "parse_rates",
    "prompt_digest",
]
