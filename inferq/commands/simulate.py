"""``inferq simulate``: replay a trace against inferq's policy and others, and print what each reaches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from inferq.console import err, print_json
from inferq.tables import Column, Row, print_table
from queue_schemas import BadRequest
from scheduling.autoscale import ScalingRules
from simulator import Objectives, SimulationOptions, Summary, load_trace, simulate
from simulator.engines import PROFILES, EngineProfile
from simulator.plot import draw, load_matplotlib
from simulator.policies import POLICIES, QueueRules
from simulator.scaling import InferqAutoscaler, LagCount, Scaler

from .simulate_options import EngineModelOptions, PolicyOptions, ReportOptions, TraceOptions

DECISIONS = ("affinity", "fairness", "preemption", "slots")
FLEETS = ("fixed", "inferq", "lag-count", "queue-length", "clairvoyant")
_COLUMNS = (
    Column("POLICY"),
    Column("FLEET"),
    Column("SLO %", right=True),
    Column("GOOD/GPU-H", right=True),
    Column("GPU-H", right=True),
    Column("TTFT P50", rank=1, right=True),
    Column("P90", rank=1, right=True),
    Column("P99", right=True),
    Column("TPOT", rank=2, right=True),
    Column("TOK/S", rank=3, right=True),
    Column("HIT %", rank=1, right=True),
    Column("FAIRNESS", rank=4, right=True),
    Column("PREDICTED", rank=5, right=True),
    Column("REFUSALS", rank=6, right=True),
    Column("REDONE", rank=5, right=True),
    Column("FAILED", rank=6, right=True),
)


@dataclass(frozen=True, slots=True)
class _Case:
    """One simulation. ``workers`` is the fleet's size at its beginning; ``setting`` is what its scaler is varied in."""

    policy: str
    fleet: str
    workers: int
    setting: float = 0.0

    @property
    def shown(self) -> str:
        names = {
            "fixed": f"{self.workers} workers",
            "clairvoyant": "clairvoyant",
            "inferq": f"inferq {self.setting:g} ms",
        }
        return names.get(self.fleet) or f"{self.fleet} {self.setting:g}"


def run_simulations(
    source: str,
    requests: TraceOptions,
    policies: PolicyOptions,
    engine: EngineModelOptions,
    report: ReportOptions,
    *,
    as_json: bool,
) -> None:
    """Simulate each policy with each fleet. Raises ``BadRequest`` for what makes no sense, as a malformed trace."""
    if report.plot is not None:
        load_matplotlib()  # rather now than after minutes of work
    cases = list(_cases(policies))
    trace = load_trace(source, seed=requests.seed)
    trace = trace.scaled(speed=requests.speed, limit=requests.limit, copies=requests.copies)
    options = SimulationOptions(
        slots=policies.slots,
        hop_s=policies.hop_ms / 1e3,
        profile=_profile(engine),
        objectives=Objectives(
            report.ttft_ms / 1e3,
            report.tpot_ms / 1e3,
            None if report.deadline_ms is None else report.deadline_ms / 1e3,
        ),
        weights=dict(_weight(text) for text in policies.weight or ()),
        rules=_rules(policies),
    )
    found: list[tuple[_Case, Summary]] = []
    for case in cases:
        err.print(f"{trace.name}: {case.policy}, {case.shown}", markup=False)
        asked = replace(options, policy=case.policy, workers=case.workers, clairvoyant=case.fleet == "clairvoyant")
        found.append((case, simulate(trace, asked, _scaler(case, policies, options.profile.start_s))))
    if as_json:
        print_json([{"policy": case.policy, "fleet": case.shown, **asdict(one)} for case, one in found])
    else:
        print_table(_COLUMNS, [_row(case, one) for case, one in found])
    if report.plot is not None:
        series: dict[str, list[Summary]] = defaultdict(list)
        for case, one in found:
            series[f"{case.policy}, {case.fleet} fleet"].append(one)
        draw(series, f"{trace.name}, {engine.engine}", report.plot)


def _cases(options: PolicyOptions) -> Iterator[_Case]:
    """Every policy with every fleet. Only the oracle is clairvoyant."""
    policies, fleets = options.policy or list(POLICIES), options.fleet or ["fixed"]
    _check("policy", policies, list(POLICIES))
    _check("fleet", fleets, FLEETS)
    if options.min_workers > options.max_workers:
        raise BadRequest("--min-workers must not be above --max-workers")
    for fleet in fleets:
        for policy in policies:
            if fleet == "fixed":
                yield from (_Case(policy, fleet, workers) for workers in options.workers or [4])
            elif fleet != "clairvoyant":
                settings = options.target_wait_ms or [2000.0] if fleet == "inferq" else options.lag_threshold or [10]
                yield from (_Case(policy, fleet, options.min_workers, setting) for setting in settings)
        if fleet == "clairvoyant":
            yield _Case("oracle", fleet, 0)


def _rules(options: PolicyOptions) -> QueueRules:
    without = options.without or []
    _check("without", without, DECISIONS)
    return QueueRules(
        affinity="affinity" not in without,
        fairness="fairness" not in without,
        max_slots=None if "slots" in without else options.max_slots or options.slots,
        max_yields=0 if "preemption" in without else options.max_yields,
    )


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise BadRequest(f"--{option} {name}: there are {', '.join(known)}")


def _scaler(case: _Case, options: PolicyOptions, start_s: float) -> Scaler | None:
    if case.fleet in ("fixed", "clairvoyant"):
        return None
    if case.fleet == "inferq":
        rules = ScalingRules(
            min=options.min_workers,
            max=options.max_workers,
            target_wait_ms=case.setting,
            worker_slots=options.slots,
            scale_in_after_ms=options.scale_in_after_s * 1e3,
        )
        return InferqAutoscaler(rules, start_s)
    return LagCount(
        threshold=int(case.setting),
        least=options.min_workers,
        most=options.max_workers,
        with_running=case.fleet == "queue-length",
    )


def _profile(options: EngineModelOptions) -> EngineProfile:
    _check("engine", [options.engine], list(PROFILES))
    given = asdict(options)
    del given["engine"]
    changes = {name: value for name, value in given.items() if value is not None}
    fields = {
        f"{name.removesuffix('_us')}_s" if name.endswith("_us") else name: value / 1e6
        if name.endswith("_us")
        else value
        for name, value in changes.items()
    }
    profile = PROFILES[options.engine]
    steps = {"step_s", "prefill_s", "sequence_s", "kv_s", "step_tokens"} & fields.keys()
    if profile.pace is not None and steps:
        raise BadRequest(f"the engine {profile.name} has no steps: leave out their options")
    return replace(profile, **fields)


def _weight(text: str) -> tuple[str, float]:
    tenant, _, weight = text.partition("=")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not tenant or not 0 < value < float("inf"):
        raise BadRequest(f"--weight {text}: give a tenant and a number above 0, as in --weight acme=4")
    return tenant, value


def _row(case: _Case, one: Summary) -> Row:
    return Row(
        (
            case.policy,
            case.shown,
            f"{one.attainment * 100:.1f}",
            f"{one.goodput:,.0f}",
            f"{one.gpu_hours:,.2f}",
            _time(one.ttft_p50_s),
            _time(one.ttft_p90_s),
            _time(one.ttft_p99_s),
            _time(one.tpot_mean_s),
            f"{one.output_tokens_per_s:,.0f}",
            f"{one.hit_rate * 100:.1f}",
            "-" if one.fairness is None else f"{one.fairness:.2f}",
            "-" if one.prediction_error is None else f"{one.prediction_error * 100:.0f} % off",
            f"{one.right_refusals:,} of {one.refusals:,} right" if one.refusals else "-",
            f"{one.redone_tokens:,}",
            f"{one.failed:,}",
        )
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 10 else f"{seconds:,.0f} s"
