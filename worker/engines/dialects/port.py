"""The port of a dialect: what differs between engines that all answer the OpenAI API.

How a request is aborted does not differ: its connection is closed, upon which each engine named here aborts it, some
later than others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from queue_schemas import Job
from queue_schemas.records import record
from scheduling.slots import EngineLoad

from ...core.continuation import Continuation


class NotContinuable(Exception):
    """The engine cannot safely continue: the message says why."""


@record
class Reply:
    """What an engine answered to a question about a prompt."""

    status: int
    body: bytes


class Ask(Protocol):
    """Asks the engine something about a prompt."""

    async def __call__(self, path: str, fields: Mapping[str, object]) -> Reply:
        """POST ``fields`` as JSON. Raises ``EngineFailed`` for an engine that is not reached."""
        ...


@record
class AdapterPaths:
    """Where LoRA adapters are loaded and unloaded, with vLLM's fields (:mod:`worker.engines.adapter_calls`). ``hint``:
    how the engine is started so that it has these paths."""

    load: str
    unload: str
    hint: str


class Dialect(Protocol):
    """One engine's ways."""

    @property
    def name(self) -> str:
        """As the setting ``engine_dialect`` has it."""
        ...

    @property
    def health_path(self) -> str:
        """The page that answers 500 or above until the engine is ready, and below 500 from then on."""
        ...

    @property
    def metrics_path(self) -> str:
        """The page of :meth:`read_load` and :meth:`read_progress`; empty: there is none."""
        ...

    @property
    def tells_load_late(self) -> bool:
        """Whether its metrics may say nothing until it has worked, so that it is asked again while it works. Of others
        it is not known whether they take that well."""
        ...

    @property
    def adapter_paths(self) -> AdapterPaths | None:
        """Where adapters are loaded while it serves; None: it cannot."""
        ...

    def read_load(self, page: bytes) -> EngineLoad | None:
        """The load that its metrics page tells; None: none, and slots do not adapt."""
        ...

    def read_progress(self, page: bytes) -> int | None:
        """A number of its metrics page that moves while the engine works; None where the page tells none, so that an
        answer of the engine has to do."""
        ...

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        """How the engine goes on behind the prefix of ``job``.

        Raises ``NotContinuable`` if it would not read the prefix as it was delivered, or if that cannot be found out;
        and what ``ask`` raises.
        """
        ...
