"""Plan the continuation of a stream: read what was delivered of it, and ask the engine whether it can go on there."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import orjson

from openai_api.paths import wants_usage
from openai_api.sse import DONE_EVENT
from openai_api.transcript import Transcript
from queue_schemas import EngineFailed, Job, StreamBroken
from telemetry import get_logger

from ..core import Continuation
from ..engines import Engine, EngineCall, NotContinuable, new_call_id
from ..engines.dialects import Reply
from ..queue import Queue

TOKENIZE_LIMIT_S = 5.0
"""So long an engine may take over what is asked of it to plan one continuation."""
PROBE_WAIT_S = 1.0
"""So long attempts wait for what another one is finding out of the engine."""
PROBE_TTL_S = 300.0
RETRY_PROBE_S = 10.0
"""The same where the engine did not answer, doubled each time up to ``PROBE_TTL_S``."""
_MAX_ANSWER_BYTES = 16 << 20
_MAX_SILENCES = 16
_PROBE = "The"

log = get_logger(__name__)


class EngineSilent(EngineFailed):
    """The engine did not answer in time when it was asked for tokens or text."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What earlier attempts of a persisted stream have said. ``prefix``: the text behind which it may continue, empty
    if it has to start over. ``rest``: what is missing if only the end of the stream is, else None."""

    prefix: str = ""
    rest: bytes | None = None


async def read_delivered(queue: Queue, job: Job, limit_bytes: int) -> Delivered:
    """The persisted output of ``job``, up to ``limit_bytes`` of text. Raises what the queue raises."""
    transcript = Transcript(limit_bytes)
    async for frame in queue.output.frames(job.id):
        transcript.add(frame.data)
    try:
        if transcript.complete:
            return Delivered(rest=b"")
        if job.on_loss != "continue":
            return Delivered()  # it may have other choices, which have not begun
        if transcript.finished and (transcript.usage or not wants_usage(orjson.loads(job.body))):
            return Delivered(rest=DONE_EVENT)
        return Delivered(prefix=transcript.text or "")
    except StreamBroken:
        return Delivered()  # not plain text: no engine can continue it


async def plan_continuation(engine: Engine, job: Job) -> Continuation:
    """How ``engine`` goes on behind the prefix of ``job``.

    Raises ``NotContinuable`` if it would not read the prefix as it was delivered, or does not let us find out;
    ``EngineFailed`` if it cannot be reached, ``EngineSilent`` if it does not answer within ``TOKENIZE_LIMIT_S``.
    """

    async def ask(path: str, fields: Mapping[str, object]) -> Reply:
        call = EngineCall(path, orjson.dumps(fields), call_id=new_call_id(job.id))
        async with engine.call(call) as answer:
            return Reply(answer.status, await answer.read(_MAX_ANSWER_BYTES))

    try:
        async with asyncio.timeout(TOKENIZE_LIMIT_S):
            return await engine.dialect.plan(job, ask)
    except TimeoutError as error:
        raise EngineSilent(
            f"the engine did not answer within {TOKENIZE_LIMIT_S:.0f} s what it makes of a prompt"
        ) from error


@dataclass(frozen=True, slots=True)
class _Found:
    """What is known of an engine until a time of the event loop. ``silences``: how often in a row it did not answer."""

    continues: bool
    until: float
    silences: int = 0


class Continuations:
    """Plans how ``engine`` goes on, and knows whether it does so at all: that is asked as for an answer that has just
    begun, before anything is said that would be lost. By model and path one attempt at a time asks, and again after
    ``PROBE_TTL_S``; the others go by what is known, and where nothing is wait for ``PROBE_WAIT_S``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._found: dict[tuple[str, str], _Found] = {}

    async def can_continue(self, job: Job) -> bool:
        """Whether it goes on behind a text, by what is known of the model and path of ``job``."""
        key, now = (job.model, job.path), asyncio.get_running_loop().time
        found, lock = self._found.get(key), self._locks[key]
        if found is not None and (now() < found.until or lock.locked()):
            return found.continues
        try:
            async with asyncio.timeout(PROBE_WAIT_S if lock.locked() else None):
                await lock.acquire()
        except TimeoutError:
            return False
        try:
            found = self._found.get(key)
            return found.continues if found is not None and now() < found.until else await self._probe(key, job)
        finally:
            lock.release()

    async def plan(self, job: Job) -> Continuation:
        """As :func:`plan_continuation`. A job of which nobody has seen anything is not held up by an engine that does
        not answer: it is ``NotContinuable``, at once while the engine is known to be silent."""
        if job.stream:
            return await plan_continuation(self._engine, job)
        key = (job.model, job.path)
        found = self._found.get(key)
        if found is not None and found.silences and asyncio.get_running_loop().time() < found.until:
            raise NotContinuable("it did not answer of late when it was asked for tokens")
        try:
            return await plan_continuation(self._engine, job)
        except EngineSilent as error:
            self._note_silence(key)
            raise NotContinuable(str(error)) from error

    async def _probe(self, key: tuple[str, str], job: Job) -> bool:
        try:
            await plan_continuation(self._engine, replace(job, prefix=job.prefix or _PROBE))
        except (NotContinuable, EngineFailed) as error:
            log.warning("jobs_do_not_yield", model=job.model, path=job.path, error=str(error))
            if isinstance(error, EngineFailed):
                self._note_silence(key)
                return False
            continues = False
        else:
            continues = True
        self._found[key] = _Found(continues, asyncio.get_running_loop().time() + PROBE_TTL_S)
        return continues

    def _note_silence(self, key: tuple[str, str]) -> None:
        before = self._found.get(key)
        silences = before.silences if before is not None else 0
        ttl_s = min(RETRY_PROBE_S * 2**silences, PROBE_TTL_S)
        self._found[key] = _Found(False, asyncio.get_running_loop().time() + ttl_s, min(silences + 1, _MAX_SILENCES))
