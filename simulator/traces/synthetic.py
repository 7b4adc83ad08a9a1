"""Generated traces, from a seed: Poisson arrivals, bursts, and two tenants of unequal load.

A specification is ``kind:name=value,...``; see :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from random import Random

from queue_schemas import BadRequest
from queue_schemas.lanes import DEFAULT_BAND, Lane

from ..requests import DEFAULT_TENANT, TraceRequest
from .reading import Trace

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` in all, ``rate`` of them a second on average. Lengths are geometric with means of ``prompt`` and
    ``output`` tokens, or always these where ``fixed`` is 1. Of ``sessions`` > 0, each request belongs to one at random
    and begins with the whole blocks of a session's ``prefix`` tokens.

    bursts: for ``burst_s`` of every ``every_s`` seconds the rate is ``factor`` times as high as in between.
    tenants: the first tenant, ``a``, sends ``ratio`` times as much as ``b``.
    batch: a share of ``batch`` requests is of the batch lane.
    """

    requests: int = 10_000
    rate: float = 10.0
    prompt: int = 512
    output: int = 128
    fixed: int = 0
    sessions: int = 0
    prefix: int = 4096
    every_s: float = 60.0
    burst_s: float = 10.0
    factor: float = 10.0
    ratio: float = 10.0
    batch: float = 0.0


def synthetic_trace(specification: str, seed: int) -> Trace:
    """The trace that ``kind:name=value,...`` describes. Raises ``BadRequest`` with what is wrong with it."""
    kind, _, given = specification.partition(":")
    arrivals = KINDS.get(kind)
    if arrivals is None:
        raise BadRequest(f"{kind!r} is neither a file nor a generator: the generators are {', '.join(KINDS)}")
    workload = _workload(specification, given)
    return Trace(specification, lambda: _requests(kind, workload, arrivals, seed), BLOCK_TOKENS)


def is_specification(text: str) -> bool:
    """Whether ``text`` names a generator."""
    return text.partition(":")[0] in KINDS


def _workload(specification: str, given: str) -> Workload:
    types: Mapping[str, type] = {field.name: type(field.default) for field in fields(Workload)}
    values: dict[str, float | int] = {}
    for part in filter(None, given.split(",")):
        name, _, value = part.partition("=")
        if name not in types:
            raise BadRequest(f"{specification}: there is no {name!r}; there are {', '.join(types)}")
        try:
            values[name] = types[name](value)
        except ValueError as error:
            raise BadRequest(f"{specification}: {value!r} is no number for {name}") from error
    workload = replace(Workload(), **values)  # type: ignore[arg-type]
    for name in ("requests", "rate", "prompt", "output", "every_s", "burst_s", "factor", "ratio"):
        if getattr(workload, name) <= 0:
            raise BadRequest(f"{specification}: {name} must be above 0")
    if workload.burst_s >= workload.every_s or not 0 <= workload.batch <= 1:
        raise BadRequest(f"{specification}: burst_s must be below every_s, and batch a share from 0 to 1")
    return workload


def _requests(
    kind: str, workload: Workload, arrivals: Callable[[Workload, Random], Iterator[float]], seed: int
) -> Iterator[TraceRequest]:
    random = Random(f"{seed} {kind}")
    shared_blocks = workload.prefix // BLOCK_TOKENS
    own_block = workload.sessions * shared_blocks
    draw = random.random
    for number, at_s in enumerate(arrivals(workload, random)):
        if number == workload.requests:
            return
        prompt, output = workload.prompt, workload.output
        if not workload.fixed:
            prompt, output = _geometric(random, prompt), _geometric(random, output)
        blocks: tuple[int, ...] = ()
        if workload.sessions:
            first = random.randrange(workload.sessions) * shared_blocks
            own = prompt // BLOCK_TOKENS
            blocks = (*range(first, first + shared_blocks), *range(own_block, own_block + own))
            own_block += own
            prompt += shared_blocks * BLOCK_TOKENS
        tenant = DEFAULT_TENANT
        if kind == "tenants":
            tenant = "a" if draw() * (workload.ratio + 1) < workload.ratio else "b"
        lane = Lane.BATCH if workload.batch and draw() < workload.batch else Lane.INTERACTIVE
        yield TraceRequest(at_s, prompt, output, blocks, tenant, lane, DEFAULT_BAND)


def _geometric(random: Random, mean: int) -> int:
    """At least 1, ``mean`` on average; the exponential distribution, rounded up, is the geometric one."""
    return 1 if mean <= 1 else int(random.expovariate(1.0) * (mean - 0.5)) + 1


def _poisson(workload: Workload, random: Random) -> Iterator[float]:
    at_s = 0.0
    while True:
        at_s += random.expovariate(workload.rate)
        yield at_s


def _bursts(workload: Workload, random: Random) -> Iterator[float]:
    """Poisson arrivals whose rate rises and falls, by thinning those of the highest rate."""
    share = workload.burst_s / workload.every_s
    low = workload.rate / (1 + share * (workload.factor - 1))
    high = low * workload.factor
    peak = max(low, high)
    at_s = 0.0
    while True:
        at_s += random.expovariate(peak)
        rate = high if at_s % workload.every_s < workload.burst_s else low
        if random.random() * peak < rate:
            yield at_s


KINDS: Mapping[str, Callable[[Workload, Random], Iterator[float]]] = {
    "poisson": _poisson,
    "bursts": _bursts,
    "tenants": _poisson,
}
"""The generators by name: how each of them draws arrivals."""
