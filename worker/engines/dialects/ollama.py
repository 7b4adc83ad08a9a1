"""Ollama's ways.

Source: ``docs/api.md``, ``docs/faq.mdx``, ``server/routes.go``, ``openai/openai.go`` and ``middleware/openai.go`` of
Ollama (August 2026).

* Health: there is no ``/health``; ``/api/version`` answers from the start. It loads a model upon the first request for
  it, which may take minutes, and unloads it when idle.
* Metrics: none. ``/api/ps`` says which models are loaded, not what waits. So slots do not adapt, and an answer of the
  server is all that proves progress. It runs ``OLLAMA_NUM_PARALLEL`` requests of a model, one by default.
* Continuation: none. Whether a template goes on behind an assistant's message depends on the model, a completion's
  prompt is put into a template, and no page tells text or tokens of a prompt. A cut stream starts again.
* A closed connection aborts a request.
* It loads no adapters by name.
"""

from __future__ import annotations

from queue_schemas import Job
from scheduling.slots import EngineLoad

from ...core.continuation import Continuation
from .port import Ask, NotContinuable


class OllamaDialect:
    """``ollama serve``."""

    name = "ollama"
    health_path = "/api/version"
    metrics_path = ""
    tells_load_late = False
    adapter_paths = None

    def read_load(self, page: bytes) -> EngineLoad | None:
        return None

    def read_progress(self, page: bytes) -> int | None:
        return None

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        raise NotContinuable("Ollama does not say what it makes of a prompt")
