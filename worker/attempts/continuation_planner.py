"""Plan the continuation of a stream: read what was delivered of it, and ask the engine whether it can go on there."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import orjson

from broker import Broker
from openai_api.paths import wants_usage
from openai_api.sse import DONE_EVENT
from openai_api.transcript import Transcript
from queue_schemas import EngineFailed, Job, StreamBroken
from telemetry import get_logger

from ..core.continuation import Continuation, continue_request, detokenized, tokenized
from ..engines import Engine, EngineCall, new_call_id

TOKENIZE_LIMIT_S = 5.0
PROBE_TTL_S = 300.0
RETRY_PROBE_S = 10.0
"""The same where the engine did not answer."""
_MAX_ANSWER_BYTES = 16 << 20
_PROBE = "The"

log = get_logger(__name__)


class NotContinuable(Exception):
    """The engine cannot safely continue: the message says why."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What earlier attempts of a persisted stream have said. ``prefix``: the text behind which it may continue, empty
    if it has to start over. ``rest``: what is missing if only the end of the stream is, else None."""

    prefix: str = ""
    rest: bytes | None = None


async def read_delivered(broker: Broker, job: Job, limit_bytes: int) -> Delivered:
    """The persisted output of ``job``, up to ``limit_bytes`` of text. Raises what the broker raises."""
    transcript = Transcript(limit_bytes)
    async for frame in broker.output.frames(job.id):
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
    ``EngineFailed`` if it cannot be reached, or does not answer in time.
    """
    requests = tokenized(job)
    original = await _tokens(engine, job, requests.original)
    continued = await _tokens(engine, job, requests.continued)
    texts = detokenized(job, original, continued)
    if await _text(engine, job, texts.continued) != await _text(engine, job, texts.original) + job.prefix:
        raise NotContinuable("its prompt would not be the original one and what was delivered")
    said = len(continued) - len(original)
    if said < 0:
        raise NotContinuable("its prompt would get shorter by what was delivered")
    return continue_request(job, len(original), said)


class ContinuationProbe:
    """Finds out whether ``engine`` continues answers at all, by asking as for one that has just begun, before anything
    is said that would be lost. What was found counts for ``PROBE_TTL_S``; it is asked once, not by each attempt."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._found: dict[tuple[str, str], tuple[bool, float]] = {}

    async def can_continue(self, job: Job) -> bool:
        """Whether it goes on behind a text, by what is known of the model and path of ``job``."""
        key, now = (job.model, job.path), asyncio.get_running_loop().time
        async with self._locks[key]:
            found, until = self._found.get(key, (False, -inf))
            if now() >= until:
                found, ttl_s = True, PROBE_TTL_S
                try:
                    await plan_continuation(self._engine, replace(job, prefix=job.prefix or _PROBE))
                except (NotContinuable, EngineFailed) as error:
                    found = False
                    ttl_s = PROBE_TTL_S if isinstance(error, NotContinuable) else RETRY_PROBE_S
                    log.warning("jobs_do_not_yield", model=job.model, path=job.path, error=str(error))
                self._found[key] = (found, now() + ttl_s)
            return found


async def _tokens(engine: Engine, job: Job, request: bytes) -> list[int]:
    tokens = (await _ask(engine, job, "/tokenize", request)).get("tokens")
    if type(tokens) is not list or not all(type(token) is int for token in tokens):
        raise NotContinuable("its /tokenize answers something else than tokens")
    return tokens


async def _text(engine: Engine, job: Job, request: bytes) -> str:
    text = (await _ask(engine, job, "/detokenize", request)).get("prompt")
    if type(text) is not str:
        raise NotContinuable("its /detokenize answers something else than text")
    return text


async def _ask(engine: Engine, job: Job, path: str, request: bytes) -> dict[str, Any]:
    try:
        async with (
            asyncio.timeout(TOKENIZE_LIMIT_S),
            engine.call(EngineCall(path, request, call_id=new_call_id(job.id))) as answer,
        ):
            status, body = answer.status, await answer.read(_MAX_ANSWER_BYTES)
    except TimeoutError as error:
        raise EngineFailed(f"the engine's {path} did not answer within {TOKENIZE_LIMIT_S:.0f} s") from error
    if status != 200:
        raise NotContinuable(f"its {path} answers {status}")
    try:
        answered = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NotContinuable(f"its {path} does not answer with JSON") from None
    if type(answered) is not dict:
        raise NotContinuable(f"its {path} does not answer with an object")
    return answered
