"""Whole simulations: nothing is lost, the same again gives the same, and known formulas hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from queue_schemas.lanes import Lane
from scheduling.autoscale import ScalingRules
from simulator import Objectives, SimulationOptions, Summary, Trace, load_trace, simulate
from simulator.engines import PROFILES, EngineProfile
from simulator.policies import POLICIES, QueueRules
from simulator.requests import TraceRequest
from simulator.scaling import FleetLoad, InferqAutoscaler, LagCount

SMALL = replace(PROFILES["h100-llama-3.1-8b"], kv_tokens=20_000, max_seqs=16)
ONE_BY_ONE = EngineProfile(name="one by one", step_s=0.01, max_seqs=1, kv_tokens=1 << 40)
CONVERSATIONS = "tenants:requests=3000,rate=12,sessions=40,prefix=1024,prompt=900,output=60,batch=0.3"


def conversations(seed: int = 0) -> Trace:
    return load_trace(CONVERSATIONS, seed=seed)


class Flapping:
    """A scaler that has no rest."""

    interval_s = 7.0

    def __init__(self) -> None:
        self._random = random.Random(1)

    def wanted(self, load: FleetLoad) -> int:
        return self._random.randint(1 if load.pool.waiting else 0, 6)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("scaled", ["fixed", "inferq", "lag", "flapping", "clairvoyant"])
def test_every_request_ends_once(policy: str, scaled: str) -> None:
    """With tight caches and fleets that come and go: requests and tokens are those of the trace."""
    scaler = {
        "inferq": InferqAutoscaler(ScalingRules(min=0, max=8, worker_slots=8), SMALL.start_s),
        "lag": LagCount(threshold=4, least=0, most=8, with_running=True),
        "flapping": Flapping(),
    }.get(scaled)
    options = SimulationOptions(
        policy=policy,
        workers=2,
        slots=8,
        profile=SMALL,
        rules=QueueRules(max_slots=16, max_yields=2),
        clairvoyant=scaled == "clairvoyant",
    )
    found = simulate(conversations(), options, scaler)
    lines = list(conversations().requests())
    assert (found.requests, found.failed) == (3000, 0)
    assert found.requests_per_s * found.lasted_s == pytest.approx(3000)
    assert found.output_tokens_per_s * found.lasted_s == pytest.approx(sum(line.output_tokens for line in lines))
    assert found.lasted_s >= lines[-1].at_s
    assert found.gpu_hours > 0


def test_requests_that_never_fit_fail() -> None:
    """They count, and are not good."""
    lines = [TraceRequest(float(number), 30_000 if number % 2 else 100, 10) for number in range(20)]
    found = simulate(Trace("", lambda: lines), SimulationOptions(profile=SMALL))
    assert (found.requests, found.failed, found.attainment) == (20, 10, 0.5)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_same_again_gives_the_same(policy: str) -> None:
    """A seed determines every figure; another seed has others."""
    options = SimulationOptions(policy=policy, workers=3, profile=SMALL)
    first = simulate(conversations(1), options)
    assert first == simulate(conversations(1), options)
    assert first != simulate(conversations(2), options)


def test_the_oracle_finds_what_can_be_found() -> None:
    """Its hit rate is that of one endless cache, and no policy has a better one."""
    computed, prompt, held = 0, 0, set[int]()
    for line in conversations().requests():
        hits = 0
        while hits < len(line.blocks) and line.blocks[hits] in held:
            hits += 1
        held.update(line.blocks)
        computed += min(hits * 512, (line.prompt_tokens - 1) // 512 * 512)
        prompt += line.prompt_tokens
    rates = {
        policy: simulate(conversations(), SimulationOptions(policy=policy, workers=3, profile=SMALL)).hit_rate
        for policy in POLICIES
    }
    assert rates["oracle"] == pytest.approx(computed / prompt, rel=0.01)
    assert max(rates.values()) == rates["oracle"]
    assert rates["bounded-hashing"] > rates["round-robin"]


def waited(trace: Trace) -> Summary:
    """One engine that runs one request at a time."""
    return simulate(trace, SimulationOptions(policy="oracle", workers=1, profile=ONE_BY_ONE, hop_s=0.0))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waiting_is_that_of_m_d_1(load: float) -> None:
    """Poisson arrivals, equal service times: load / 2 (1 - load) service times on average (Pollaczek, Khinchine)."""
    steps = 20
    rate = load / (steps * 0.01)
    found = waited(load_trace(f"poisson:requests=100000,rate={rate},prompt=1,output={steps},fixed=1"))
    assert found.ttft_mean_s - 0.01 == pytest.approx(load / (2 * (1 - load)) * steps * 0.01, rel=0.05)


def test_waiting_is_that_of_m_g_1() -> None:
    """Poisson arrivals, geometric numbers of steps: rate x mean square of service over 2 (1 - load)."""
    trace = load_trace("poisson:requests=100000,rate=3,prompt=1,output=20")
    served = [line.output_tokens * 0.01 for line in trace.requests()]
    mean, square = sum(served) / len(served), sum(one * one for one in served) / len(served)
    found = waited(trace)
    assert found.ttft_mean_s - 0.01 == pytest.approx(3 * square / (2 * (1 - 3 * mean)), rel=0.05)


def test_a_fixed_fleet_costs_its_time() -> None:
    """And a clairvoyant one only what has work: never more."""
    options = SimulationOptions(workers=5, profile=replace(SMALL, gpus=2))
    fixed = simulate(conversations(), options)
    assert fixed.gpu_hours == pytest.approx(5 * 2 * fixed.lasted_s / 3600)
    assert simulate(conversations(), replace(options, clairvoyant=True)).gpu_hours < fixed.gpu_hours


def test_a_started_worker_costs_from_the_moment_it_is_asked_for() -> None:
    """And serves only once it is ready: a request that wakes a fleet from zero waits for its start."""
    lines = [TraceRequest(100.0, 100, 10)]
    scaler = LagCount(threshold=1, least=0, most=1, with_running=False)
    found = simulate(
        Trace("", lambda: lines), SimulationOptions(workers=0, profile=replace(SMALL, start_s=50.0)), scaler
    )
    assert 50 < found.ttft_p50_s < 50 + scaler.interval_s + 1
    assert found.gpu_hours == pytest.approx(50 / 3600, rel=0.01)


def test_objectives_are_both_kept_or_none() -> None:
    """A request is good if its first token and its others came in time."""
    good = simulate(conversations(), SimulationOptions(workers=8))
    assert good.attainment > 0.999
    assert good.goodput == pytest.approx(good.interactive * good.attainment / good.gpu_hours)
    assert good.interactive == sum(line.lane is Lane.INTERACTIVE for line in conversations().requests())
    for objectives in (Objectives(ttft_s=1e-6), Objectives(tpot_s=1e-6)):
        assert simulate(conversations(), SimulationOptions(workers=8, objectives=objectives)).attainment < 0.02


def test_interactive_requests_are_fast_beside_a_saturating_batch() -> None:
    """Where attempts yield, their first token comes about as soon as without a batch; the batch loses little."""
    profile = replace(SMALL, max_seqs=16, kv_tokens=400_000)
    mixed = load_trace("poisson:requests=6000,rate=12,batch=0.75,prompt=300,output=200")
    alone = Trace("", lambda: [line for line in mixed.requests() if line.lane is Lane.INTERACTIVE])
    options = SimulationOptions(workers=1, slots=16, profile=profile)
    idle, without, with_yields = (
        simulate(trace, replace(options, rules=QueueRules(max_yields=yields)))
        for trace, yields in ((alone, 0), (mixed, 0), (mixed, 3))
    )
    assert without.ttft_p90_s > 2 * idle.ttft_p90_s
    assert with_yields.ttft_p90_s < 0.6 * without.ttft_p90_s
    assert with_yields.requests_per_s > 0.9 * without.requests_per_s
    assert with_yields.redone_tokens > 0


def test_affinity_finds_more_than_hashing_and_is_no_slower_at_the_end() -> None:
    """Conversations on workers whose caches hold a part of all."""
    trace = load_trace("poisson:requests=6000,rate=14,sessions=200,prefix=2048,prompt=600,output=60")
    profile = replace(PROFILES["h100-llama-3.1-8b"], kv_tokens=150_000)
    found = {
        policy: simulate(trace, SimulationOptions(policy=policy, workers=4, profile=profile))
        for policy in ("inferq", "round-robin", "least-loaded", "bounded-hashing", "oracle")
    }
    assert found["inferq"].hit_rate > 0.9 * found["oracle"].hit_rate
    assert found["inferq"].hit_rate > 1.3 * found["round-robin"].hit_rate
    assert found["inferq"].ttft_mean_s < found["round-robin"].ttft_mean_s
    assert found["inferq"].ttft_p99_s < 1.1 * found["least-loaded"].ttft_p99_s


@pytest.mark.parametrize(("ratio", "weight"), [(10.0, 1.0), (1.0, 4.0)])
def test_tenants_share_by_tokens_and_weights(ratio: float, weight: float) -> None:
    """At unequal load and equal weights, and at equal load and unequal weights: within 5 %."""
    trace = load_trace(f"tenants:requests=36000,rate=200,ratio={ratio},prompt=400,output=100")
    options = SimulationOptions(workers=1, slots=16, weights={"a": weight})
    fair = simulate(trace, options).fairness
    assert fair is not None
    assert fair > 0.95
    unfair = simulate(trace, replace(options, rules=QueueRules(fairness=False))).fairness
    assert unfair is not None
    assert unfair < 0.5


def test_predicted_waits_are_about_right() -> None:
    """Half of the predictions are off by no more than a quarter, while load rises and falls."""
    trace = load_trace("bursts:requests=12000,rate=16,prompt=600,output=200,factor=6")
    found = simulate(trace, SimulationOptions(workers=1))
    assert found.prediction_error is not None
    assert found.prediction_error < 0.25
    assert simulate(trace, SimulationOptions(policy="round-robin", workers=1)).prediction_error is None


def test_whom_admission_refuses_would_have_waited_too_long() -> None:
    """Of those whose predicted wait is longer than their deadline, and a margin, nearly all do wait longer."""
    trace = load_trace("bursts:requests=12000,rate=16,prompt=600,output=200,factor=6")
    found = simulate(trace, SimulationOptions(workers=1, objectives=Objectives(deadline_s=8.0)))
    assert found.refusals > 1000
    assert found.right_refusals > 0.95 * found.refusals
    assert simulate(trace, SimulationOptions(workers=1)).refusals == 0
