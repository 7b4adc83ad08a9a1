"""A simulated engine without a socket: requests in, answers out, in its own time.

What needs no waiting is answered by :meth:`Simulation.open` itself; the rest is a :class:`~.run.Run` to be awaited.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import orjson

from ..dialects.vllm import LOAD_PATH, UNLOAD_PATH
from .adapter_load import AdapterLoad
from .api import messages, responses, scoring, wire
from .api.adapters import parse_load, parse_unload
from .api.answers import Choice, answer, embedding, packed_embedding
from .api.refusal import RefusedRequest
from .api.requests import (
    Embed,
    Generate,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_embeddings,
    parse_tokenize,
)
from .api.wire import Reply
from .failures import Failure, FailureKind, drawn_failure
from .prefix_cache import PrefixCache
from .run import EngineCore, Run, Work
from .schedule import Pace, Slots
from .settings import SimulationSettings
from .tokens import count_tokens, encode_tokens

_ANSWER_IDS = {"chat": "chatcmpl-", "text": "cmpl-", "responses": "resp_", "messages": "msg_"}
_WIRES: dict[str, type[wire.AnswerWire]] = {
    "chat": wire.StreamWire,
    "text": wire.StreamWire,
    "responses": responses.ResponseWire,
    "messages": messages.MessageWire,
}
REMEMBERED_ORDERS = 4096
REMEMBERED_ANSWERS = 1024
REMEMBERED_BODY_BYTES = 8192


def engine_mark(name: str) -> str:
    """What the ids of an engine's answers begin with, behind their kind: so they tell which engine gave them."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


class _Route(NamedTuple):
    method: str
    handle: Callable[[bytes], Reply | Run | AdapterLoad]


class Simulation:
    """One simulated engine. ``clock`` gives seconds and must be the event loop's."""

    def __init__(self, settings: SimulationSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._started_at = clock()
        self._created = int(time.time())
        self._salt = engine_mark(settings.name) + secrets.token_hex(4)
        self._number = 0
        self._ordered: OrderedDict[bytes, int] = OrderedDict()
        self._failures: Counter[FailureKind] = Counter()
        self._cache = PrefixCache(settings.prefix_cache_blocks, settings.block_tokens)
        interval_s = 1 / settings.tokens_per_s if settings.tokens_per_s else 0.0
        pace = Pace(
            settings.ttft_ms / 1e3,
            settings.prefill_us_per_token / 1e6,
            interval_s,
            settings.lockstep,
            settings.serial_prefill,
        )
        kv_blocks = settings.kv_cache_tokens // settings.block_tokens
        slots = Slots(settings.max_num_seqs, kv_blocks, settings.block_tokens)
        self._engine = EngineCore(slots, pace, clock)
        self._routes = self._make_routes(settings)

    def _make_routes(self, settings: SimulationSettings) -> dict[str, _Route]:
        routes = {
            "/v1/chat/completions": _Route("POST", self._generation(parse_chat)),
            "/v1/completions": _Route("POST", self._generation(parse_completion)),
            "/v1/responses": _Route("POST", self._generation(responses.parse_responses)),
            messages.PATH: _Route("POST", self._generation(messages.parse_messages)),
            "/v1/embeddings": _Route("POST", lambda body: self._embed(parse_embeddings(body, settings))),
            "/v1/models": _Route("GET", lambda _: Reply(200, wire.JSON, wire.model_list(settings, self._created))),
            "/health": _Route("GET", lambda _: Reply(200, wire.JSON, b"")),
            "/metrics": _Route("GET", lambda _: Reply(200, wire.METRICS, self.metrics())),
            "/version": _Route("GET", lambda _: Reply(200, wire.JSON, b'{"version":"simulated"}')),
        }
        scored: dict[str, Callable[[bytes, SimulationSettings], Reply]] = {
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), scoring.rerank),
            **dict.fromkeys(("/score", "/v1/score"), scoring.score),
            **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations"), scoring.hear),
            "/classify": scoring.classify,
            "/pooling": scoring.pooling,
            "/v1/messages/count_tokens": scoring.count_message_tokens,
        }
        routes |= {path: _Route("POST", partial(_answered, handle, settings)) for path, handle in scored.items()}
        if settings.tokenizes:
            routes |= {
                "/tokenize": _Route("POST", self._tokenize),
                "/detokenize": _Route("POST", self._detokenize),
            }
        if settings.adapter_updates:
            routes |= {
                LOAD_PATH: _Route("POST", self._load_adapter),
                UNLOAD_PATH: _Route("POST", self._unload_adapter),
            }
        return routes

    @property
    def ready(self) -> bool:
        """Whether ``start_ms`` have passed."""
        start_ms = self.settings.start_ms
        return start_ms is not None and self._clock() - self._started_at >= start_ms / 1e3

    async def until_ready(self) -> None:
        """Return once :attr:`ready`; never, if it never is."""
        start_ms = self.settings.start_ms
        await self._engine.until(math.inf if start_ms is None else self._started_at + start_ms / 1e3)

    @property
    def output(self) -> int:
        """A number that grows whenever the engine got something done."""
        engine = self._engine
        return engine.prompt_tokens + engine.generated_tokens + engine.finished.total()

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._engine.slots.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._engine.slots.waiting

    def open(self, method: str, path: str, body: bytes) -> Reply | Run | AdapterLoad:
        """The answer to a request, or what will produce it."""
        route = self._routes.get(path)
        if route is None:
            return _refusal("Not Found", "NotFoundError", 404)
        if not self.ready:
            return _refusal("The engine is loading its model.", "ServiceUnavailableError", 503)
        if method != route.method:
            return _refusal("Method Not Allowed", "BadRequestError", 405)
        try:
            return route.handle(body)
        except RefusedRequest as refusal:
            if path.startswith(messages.PATH):
                body = messages.error_object(refusal.message, refusal.status)
                return Reply(refusal.status, wire.JSON, body)
            return _refusal(refusal.message, refusal.kind, refusal.status, refusal.param)

    def _serve_adapters(self, adapters: tuple[str, ...]) -> None:
        """Serve these adapters from now on; what was remembered of bodies, which name some, is forgotten."""
        self.settings = replace(self.settings, adapters=adapters)
        self._routes = self._make_routes(self.settings)

    def _load_adapter(self, body: bytes) -> Reply | AdapterLoad:
        name, ordered = parse_load(body, self.settings.adapters, self.settings.max_adapters)
        failure = None if ordered is None else self._failure(ordered, f"load {name}")

        def loaded() -> Reply:
            self._serve_adapters(tuple(dict.fromkeys((*self.settings.adapters, name))))
            return Reply(200, wire.TEXT, f"Success: LoRA adapter '{name}' added successfully.".encode())

        return AdapterLoad(self._engine, self.settings.adapter_load_ms / 1e3, failure, loaded)

    def _unload_adapter(self, body: bytes) -> Reply:
        name = parse_unload(body, self.settings.adapters)
        self._serve_adapters(tuple(adapter for adapter in self.settings.adapters if adapter != name))
        return Reply(200, wire.TEXT, f"Success: LoRA adapter '{name}' removed successfully.".encode())

    def crash(self) -> None:
        """End every run at once: each raises :class:`~.run.EngineCrashed`."""
        self._engine.crash()

    def metrics(self) -> bytes:
        """Prometheus text under vLLM's names, and ``simulation:failures_total``."""
        engine, cache = self._engine, self._cache
        blocks, tokens = self.settings.prefix_cache_blocks, self.settings.block_tokens
        config = f'block_size="{tokens}",enable_prefix_caching="{blocks > 0}",num_gpu_blocks="{blocks}"'
        samples: dict[str, float] = {
            "vllm:num_requests_running": engine.slots.running,
            "vllm:num_requests_waiting": engine.slots.waiting,
            'vllm:num_requests_waiting_by_reason{reason="capacity"}': engine.slots.waiting,
            "vllm:kv_cache_usage_perc": engine.slots.kv_usage,
            "vllm:num_preemptions_total": engine.slots.preemptions,
            "vllm:prefix_cache_queries_total": cache.queried_tokens,
            "vllm:prefix_cache_hits_total": cache.hit_tokens,
            f"vllm:cache_config_info{{{config}}}": 1,
            "vllm:prompt_tokens_total": engine.prompt_tokens,
            "vllm:generation_tokens_total": engine.generated_tokens,
        }
        for reason in ("stop", "length", "abort"):
            samples[f'vllm:request_success_total{{finished_reason="{reason}"}}'] = engine.finished[reason]
        for kind in FailureKind:
            samples[f'simulation:failures_total{{kind="{kind}"}}'] = self._failures[kind]
        return wire.metrics_text(samples, self.settings.models[0])

    def _generation(self, parse: Callable[[bytes, SimulationSettings], Generate]) -> Callable[[bytes], Reply | Run]:
        """What handles a body that ``parse`` understands."""

        def understand(body: bytes) -> tuple[Generate, tuple[Choice, ...]]:
            request = parse(body, self.settings)
            return request, answer(request, self.settings)

        # The same body gets the same text, so it is drawn once: load tests repeat their bodies.
        remembered = lru_cache(maxsize=REMEMBERED_ANSWERS)(understand)

        def handle(body: bytes) -> Reply | Run:
            repeats = len(body) <= REMEMBERED_BODY_BYTES and not self.settings.nondeterministic
            return self._generate(*(remembered if repeats else understand)(body))

        return handle

    def _generate(self, request: Generate, choices: tuple[Choice, ...]) -> Reply | Run:
        self._number += 1
        failure = self._failure(request.failure, f"{request.model}\0{request.prompt}")
        content_type = wire.EVENTS if request.stream else wire.JSON
        if failure is not None and (reply := _failed_at_once(failure, content_type)):
            return reply
        answer_id = f"{_ANSWER_IDS[request.api]}{self._salt}{self._number:08x}"
        created = int(time.time())
        prompt_tokens = sum(asked.prompt_tokens for asked in request.prompts)

        def admit() -> int:
            asked = request.prompts
            return sum(self._cache.admit(one.model, one.prompt, one.prompt_tokens) for one in asked)

        def usage(cached_tokens: int) -> wire.Usage:
            said, thought = (sum(n) for n in zip(*((len(c.pieces), c.thoughts) for c in choices), strict=True))
            return wire.Usage(prompt_tokens, cached_tokens, said, thought)

        write = _WIRES[request.api]
        work = Work(
            number=self._number,
            prompt_tokens=prompt_tokens,
            admit=admit,
            steps=max(len(choice.pieces) for choice in choices),
            width=len(choices),
            finish=choices[0].finish,
            stream=write(request, choices, answer_id, created) if request.stream else None,
            plain=lambda cached: write(request, choices, answer_id, created).whole(usage(cached)),
            usage=usage,
            failure=failure,
        )
        return self._start(work)

    def _embed(self, request: Embed) -> Reply | Run:
        self._number += 1
        failure = self._failure(request.failure, f"{request.model}\0{request.inputs}")
        if failure is not None and (reply := _failed_at_once(failure, wire.JSON)):
            return reply
        tokens = sum(count_tokens(text) for text in request.inputs)

        def plain(_: int) -> bytes:
            vectors = [
                embedding(text, request.model, self.settings.seed, request.dimensions) for text in request.inputs
            ]
            shown = [packed_embedding(vector) for vector in vectors] if request.base64 else vectors
            answer_id = f"embd-{self._salt}{self._number:08x}"
            return wire.embedding_list(shown, answer_id, int(time.time()), request.model, tokens)

        work = Work(
            number=self._number,
            prompt_tokens=tokens,
            admit=lambda: 0,
            steps=0,
            width=1,
            finish="stop",
            stream=None,
            plain=plain,
            usage=lambda cached: wire.Usage(tokens, cached, 0),
            failure=failure,
        )
        return self._start(work)

    def _start(self, work: Work) -> Reply | Run:
        run = Run(self._engine, work)
        if self.settings.instant and work.failure is None and self._engine.slots.free:
            return run.finish_at_once()
        return run

    def _failure(self, ordered: Failure | None, asked: str) -> Failure | None:
        """The failure of this request: what it ordered, unless used up or meant for another engine, or a drawn one."""
        failure = ordered
        if ordered is not None:
            if ordered.on not in ("", self.settings.name) or (
                ordered.times and self._order_count(f"{ordered}\0{asked}") > ordered.times
            ):
                failure = None
        elif self.settings.failure_rates:
            failure = drawn_failure(self.settings.failure_rates, self.settings.seed, self._number)
        if failure is not None:
            self._failures[failure.kind] += 1
        return failure

    def _order_count(self, order: str) -> int:
        """How often this very order came with this very prompt, this time included."""
        key = hashlib.blake2b(order.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._ordered[key] = self._ordered.pop(key, 0) + 1
        if len(self._ordered) > REMEMBERED_ORDERS:
            self._ordered.popitem(last=False)
        return self._ordered[key]

    def _tokenize(self, body: bytes) -> Reply:
        ids = [token for text in parse_tokenize(body, self.settings) for token in encode_tokens(text)]
        fields = {"count": len(ids), "max_model_len": self.settings.max_model_len, "tokens": ids, "token_strs": None}
        return Reply(200, wire.JSON, orjson.dumps(fields))

    def _detokenize(self, body: bytes) -> Reply:
        return Reply(200, wire.JSON, orjson.dumps({"prompt": parse_detokenize(body, self.settings)}))


def _answered(handle: Callable[[bytes, SimulationSettings], Reply], settings: SimulationSettings, body: bytes) -> Reply:
    return handle(body, settings)


def _refusal(message: str, kind: str, status: int, param: str | None = None) -> Reply:
    return Reply(status, wire.JSON, wire.error_object(message, kind, status, param))


def _failed_at_once(failure: Failure, content_type: str) -> Reply | None:
    """The answer of failures that come before the first token and need no wait."""
    if failure.kind is FailureKind.NEVER_READY:
        return _refusal("The engine is loading its model.", "ServiceUnavailableError", 503)
    if failure.after_tokens:
        return None
    if failure.kind is FailureKind.ERROR:
        kind = "InternalServerError" if failure.status >= 500 else "BadRequestError"
        return _refusal("A failure that was ordered.", kind, failure.status)
    if failure.kind is FailureKind.GARBAGE:
        return Reply(200, content_type, wire.GARBAGE)
    return None
