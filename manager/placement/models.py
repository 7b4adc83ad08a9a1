"""Tell workers which model to load: one round of :mod:`scheduling.placement` on the registry and the queue's depths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from queue_schemas import LaneDepth, Pool, SessionId
from queue_schemas.lanes import Lane
from scheduling.placement import PlacedWorker, PoolDemand, PoolRules, demand_of, place
from telemetry import get_logger

from ..core import Member, Registry
from ..metrics import FleetMetrics
from ..ports import Clock
from ..settings import ManagerSettings
from .rounds import QueueState, Unserved

RETRY_FAILED_S = 600.0
"""How long a worker is not told again to load a model that it could not load."""

log = get_logger(__name__)


class ModelPlacement:
    """Moves workers of ``registry`` between models. ``changed(worker_id)`` is called when a member's entry has changed.

    What it remembers beside the registry (loads that failed, pools without a worker) is lost with the term.
    """

    def __init__(
        self,
        settings: ManagerSettings,
        registry: Registry,
        metrics: FleetMetrics,
        changed: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._rules = {model: plan.rules for model, plan in settings.placement.items()}
        self._registry = registry
        self._metrics = metrics
        self._changed = changed
        self._clock = clock
        self._refused_until: dict[tuple[SessionId, str], float] = {}
        self._unserved = Unserved()

    @property
    def is_needed(self) -> bool:
        """Whether a worker could load another model."""
        return any(len(member.loadable) >= 2 for member in self._members())

    async def decide(self, queue: QueueState) -> None:
        """Decide, and change the registry."""
        members = self._members()
        depths = with_adapters(queue.depths, members)
        now = self._clock()
        self._note_failures(members, now)
        known = {model for model in (*depths, *self._rules) if not queue.is_away(model)}
        workers = self._placed(members, known, queue, now)
        for move in place(self._demands(known, depths, workers, now), workers):
            member = self._registry.get(move.worker_id)
            log.info("model_assigned", worker=move.worker_id, model=move.model, before=member.model, reason=move.why)
            self._registry.place(move.worker_id, move.model, now)
            self._metrics.placed(move.model)
            self._changed(move.worker_id)

    def _demands(
        self, known: set[str], depths: Mapping[Pool, Mapping[Lane, LaneDepth]], workers: list[PlacedWorker], now: float
    ) -> list[PoolDemand]:
        served = {model for worker in workers if not worker.failed for model in worker.models}
        waiting = {model for model in known if any(lane.waiting for lane in depths.get(Pool(model), {}).values())}
        self._unserved.note(waiting - served, now)
        return [
            demand_of(
                model,
                depths.get(Pool(model), {}),
                self._rules.get(model, PoolRules()),
                self._unserved.for_s(model, now),
            )
            for model in sorted(known)
        ]

    def _placed(self, members: list[Member], known: set[str], queue: QueueState, now: float) -> list[PlacedWorker]:
        """The workers as the decision sees them. One whose pool's shard does not answer stays where it is."""
        refused: dict[SessionId, list[str]] = {}
        for session_id, model in self._refused_until:
            refused.setdefault(session_id, []).append(model)
        # Most workers have the same list: made once, and recognized as the same by the decision.
        loadable: dict[tuple[str, ...], frozenset[str]] = {(): frozenset()}
        placed = []
        for member in members:
            status, model = member.status, member.model
            stays = len(member.loadable) < 2 or not model or queue.is_away(model)
            models = () if stays else member.loadable
            if models not in loadable:
                loadable[models] = frozenset(models) & known
            placed.append(
                PlacedWorker(
                    worker_id=member.worker_id,
                    models=frozenset([model] if member.is_swapping else [*status.models, *([model] if model else ())]),
                    slots=status.slots,
                    loaded=model,
                    loadable=loadable[models],
                    running=status.running,
                    since_s=None if member.told_at is None else now - member.told_at,
                    load_s=member.load_s,
                    failed=member.load_failed,
                    refused=frozenset(refused.get(member.session_id, ())),
                )
            )
        return placed

    def _members(self) -> list[Member]:
        return [member for member in self._registry.members() if member.is_present]

    def _note_failures(self, members: list[Member], now: float) -> None:
        self._refused_until = {one: until for one, until in self._refused_until.items() if now < until}
        for member in members:
            if member.load_failed and member.model:
                self._refused_until[member.session_id, member.model] = now + RETRY_FAILED_S


def with_adapters(
    depths: Mapping[Pool, Mapping[Lane, LaneDepth]], members: Iterable[Member]
) -> dict[Pool, Mapping[Lane, LaneDepth]]:
    """The depths with the jobs of adapters as jobs of the model that workers must load before they load an adapter."""
    bases = {
        member.adapters.set_name: (member.adapters.names, Pool(member.adapters.base))
        for member in members
        if member.adapters.base
    }
    merged = dict(depths)
    for names, base in bases.values():
        for adapter in sorted(names & merged.keys()):
            merged[base] = _together(merged.get(base, {}), merged.pop(Pool(adapter)))
    return merged


def _together(one: Mapping[Lane, LaneDepth], other: Mapping[Lane, LaneDepth]) -> dict[Lane, LaneDepth]:
    lanes = dict(one)
    for lane, depth in other.items():
        so_far = lanes.get(lane, LaneDepth())
        lanes[lane] = LaneDepth(
            waiting=so_far.waiting + depth.waiting,
            leased=so_far.leased + depth.leased,
            oldest_age_ms=max(so_far.oldest_age_ms, depth.oldest_age_ms),
        )
    return lanes
