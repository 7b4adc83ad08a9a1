"""Generated traces, and traces scaled."""

from __future__ import annotations

import statistics

import pytest

from queue_schemas import BadRequest
from queue_schemas.lanes import Lane
from simulator import Trace, load_trace
from simulator.requests import TraceRequest


def test_a_seed_determines_a_trace() -> None:
    """The same twice, another one for another seed."""
    source = "poisson:requests=50,sessions=3"
    first, again, other = (list(load_trace(source, seed=seed).requests()) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("kind", ["poisson", "bursts", "tenants"])
def test_rate_and_lengths_are_as_asked_for(kind: str) -> None:
    """On average over many requests."""
    found = list(load_trace(f"{kind}:requests=20000,rate=40,prompt=300,output=50").requests())
    assert len(found) == 20_000
    assert found[-1].at_s == pytest.approx(500, rel=0.05)
    assert statistics.mean(one.prompt_tokens for one in found) == pytest.approx(300, rel=0.03)
    assert statistics.mean(one.output_tokens for one in found) == pytest.approx(50, rel=0.03)
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)


def test_bursts_are_bursts() -> None:
    """In the first ten seconds of each minute there is ten times the rate of the rest."""
    found = load_trace("bursts:requests=50000,rate=100,factor=10").requests()
    in_burst = sum(1 for one in found if one.at_s % 60 < 10)
    assert in_burst / 50_000 == pytest.approx(100 / 150, rel=0.05)


def test_tenants_lanes_and_sessions() -> None:
    """Shares as asked for; a session's requests begin with the same blocks, and share no others."""
    found = list(load_trace("tenants:requests=5000,ratio=4,batch=0.25,sessions=2,prefix=1024,prompt=600").requests())
    assert sum(1 for one in found if one.tenant == "a") / 5000 == pytest.approx(0.8, abs=0.03)
    assert sum(1 for one in found if one.lane is Lane.BATCH) / 5000 == pytest.approx(0.25, abs=0.03)
    assert {one.blocks[:2] for one in found} == {(0, 1), (2, 3)}
    own = [block for one in found for block in one.blocks[2:]]
    assert len(own) == len(set(own))
    assert min(own) > 3
    assert all(len(one.blocks) == one.prompt_tokens // 512 for one in found)


@pytest.mark.parametrize(
    "source",
    ["poisson:speed=1", "poisson:rate=fast", "poisson:rate=0", "bursts:burst_s=60", "poisson:batch=2", "gamma:rate=1"],
)
def test_a_wrong_specification_is_refused(source: str) -> None:
    """With a sentence."""
    with pytest.raises(BadRequest):
        load_trace(source)


def test_a_trace_is_scaled() -> None:
    """Its beginning, copied and faster; copies keep the order of times and have blocks of their own."""
    lines = [TraceRequest(at, 1024, 1, (0, at)) for at in (0, 45, 90)]
    scaled = list(Trace("", lambda: lines).scaled(speed=2, limit=2, copies=2).requests())
    assert [(one.at_s, one.blocks) for one in scaled] == [
        (0, (0, 0)),
        (15, (1, 1)),
        (22.5, (0, 90)),
        (37.5, (1, 91)),
    ]
