"""The autoscaler of one pool: looks at queue and fleet, decides, and has its driver start and end workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from queue_schemas import InferqError, PoolDepth, SessionId, WorkerInfo, new_session_id
from scheduling.autoscale import Stabilizer, Wish, drain_order, load_of, together
from scheduling.capacity import WorkerCapacity
from telemetry import get_logger
from telemetry.backoff import Backoff

from .drivers.port import Driver, DriverFailed
from .metrics import AutoscaleMetrics
from .roster import Roll, Roster
from .settings import AutoscaleSettings

SAY_AGAIN_S = 10.0
_MAX_NAMES = 10
_BACKOFF = Backoff(1.0, 30.0)
_Result = TypeVar("_Result")

log = get_logger(__name__)


class FabricPort(Protocol):
    """:class:`inferq.autoscale.fabric.Fabric`."""

    async def claim(self, pool: str, autoscaler_id: SessionId, ttl_ms: int) -> bool: ...

    async def pool(self, model: str) -> PoolDepth: ...

    async def workers(self) -> list[WorkerInfo]: ...

    async def drain(self, worker_id: str) -> None: ...


class Autoscaler:
    """Call :meth:`look` now and then. Whatever fails changes nothing, is in :attr:`reasons`, and is tried again.

    It acts only while it holds the pool's claim, which a Manager gives to one autoscaler at a time.
    """

    def __init__(
        self,
        settings: AutoscaleSettings,
        fabric: FabricPort,
        driver: Driver,
        metrics: AutoscaleMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._fabric = fabric
        self._driver = driver
        self._metrics = metrics
        self._clock = clock
        self._id = new_session_id(settings.autoscaler_id)
        self._claimed_until = float("-inf")
        self._stabilizer = Stabilizer()
        self._capacity = WorkerCapacity()
        self._roster = Roster(settings.pool, settings.start_timeout, settings.stop_timeout, returns=driver.drains)
        self._told: dict[tuple[str, str], float] = {}
        self._driver_failures = 0
        self._driver_resumes_at = float("-inf")
        self._said = ""
        self._looked = False
        self.reasons: list[str] = ["it has not looked yet"]
        """Why it does not scale now, in sentences; empty if it does."""
        self.workers: dict[str, frozenset[str]] = {}
        """The pool's workers by state at the last look, as in :class:`Roll`."""

    async def look(self) -> None:
        """One look, and the steps that follow from it."""
        reasons: list[str] = []
        self._looked = False
        try:
            await self._look(reasons)
        except DriverFailed as error:
            self._driver_failures += 1
            self._driver_resumes_at = self._clock() + _BACKOFF.pause_s(self._driver_failures)
            self._metrics.failed("driver")
            reasons.append(error.message)
        except InferqError as error:
            self._metrics.failed("manager")
            reasons.append(error.message)
        if not self._looked:
            self._stabilizer = Stabilizer()  # what was not seen was not quiet
        for reason in reasons:
            if reason not in self.reasons:
                log.warning("not_scaling", pool=self._settings.pool, reason=reason)
        self.reasons = reasons

    async def drain_all(self) -> None:
        """Let every worker of the driver go, and return once they are gone or ``stop_timeout`` has passed."""
        limit = self._clock() + self._settings.stop_timeout / 1000
        while await self._claim() and self._clock() < limit:
            roll = await self._roll(await self._step(self._driver.workers()))
            if not roll.owned:
                return
            await self._see_off(roll.owned, roll)
            await asyncio.sleep(self._settings.interval_ms / 1000)

    async def give_up(self) -> None:
        """Leave the pool to another autoscaler."""
        self._claimed_until = float("-inf")
        try:
            await asyncio.gather(*(self._fabric.claim(pool, self._id, 0) for pool in self._settings.pools))
        except InferqError as error:
            log.info("claim_not_given_up", error=error.message, then="it lapses by itself")

    async def _look(self, reasons: list[str]) -> None:
        own = self._settings
        if not await self._claim():
            reasons.append(f"another autoscaler acts for {own.pool}")
            return
        if self._clock() < self._driver_resumes_at:
            reasons += self.reasons  # what the driver said
            return
        if others := await self._claim_adapters():
            reasons.append(f"another autoscaler acts for {_names(others)}: their jobs do not count here")
        roll = await self._roll(await self._step(self._driver.workers()))
        self.workers = roll.groups
        self._metrics.show_workers(roll.counts)
        self._metrics.start_up.set(self._roster.start_up_ms / 1000)
        if roll.missing:
            limit_s = own.start_timeout / 1000
            reasons.append(f"workers that take no work after {limit_s:g} s: {_names(roll.missing)}")
        if roll.stuck:
            limit_s = own.stop_timeout / 1000
            reasons.append(f"workers that have not ended {limit_s:g} s after they were to: {_names(roll.stuck)}")
        now_ms = self._clock() * 1000
        wish = await self._wish([pool for pool in own.pools if pool not in others], now_ms)
        decision = self._stabilizer.decide(wish, roll.size, now_ms, own.rules, start_up_ms=self._roster.start_up_ms)
        if wish.replicas is None:
            self._metrics.failed("queue")
            reasons.append(decision.why)
        self._looked = True
        self._metrics.wanted.set(decision.replicas)
        self._tell(f"{roll.size} -> {decision.replicas} workers: {decision.why}", roll.size != decision.replicas)
        self._told = {key: at for key, at in self._told.items() if key[0] in roll.owned}
        if not self._driver.drains:  # else its platform ends what drains, and starts anew what does not start
            await self._see_off(roll.leaving | roll.missing, roll)
        await self._scale(roll, decision.replicas)
        if roll.size == decision.replicas:
            await self._replace_outdated(roll)
        self._driver_failures = 0

    async def _claim(self) -> bool:
        """Take or keep the pool's claim; whether we have it."""
        asked_at, ttl_ms = self._clock(), self._settings.claim_ttl_ms
        acting = await self._fabric.claim(self._settings.pool, self._id, ttl_ms)
        self._claimed_until = asked_at + ttl_ms / 1000 if acting else float("-inf")
        self._metrics.acting.set(acting)
        return acting

    async def _claim_adapters(self) -> list[str]:
        """Take or keep the claims of the adapters; those that another autoscaler has. Only who has the pool's asks: two
        with the same settings must not have half of them each."""
        names, ttl_ms = self._settings.adapters, self._settings.claim_ttl_ms
        claimed = await asyncio.gather(*(self._fabric.claim(name, self._id, ttl_ms) for name in names))
        return [name for name, acting in zip(names, claimed, strict=True) if not acting]

    async def _roll(self, owned: frozenset[str]) -> Roll:
        return self._roster.call(owned, await self._fabric.workers(), self._clock() * 1000)

    async def _wish(self, names: Sequence[str], now_ms: float) -> Wish:
        """What the queues of these pools call for; nothing is known of a queue that nobody shows."""
        try:
            pools = await asyncio.gather(*(self._fabric.pool(name) for name in names))
        except InferqError as error:
            return Wish(None, error.message)
        load = together([load_of(pool) for pool in pools])
        wish = self._capacity.wish(load, self._settings.rules, now_ms, start_up_ms=self._roster.start_up_ms)
        self._metrics.serves.set(self._capacity.per_s(now_ms) or 0.0)
        return wish

    async def _scale(self, roll: Roll, target: int) -> None:
        more = min(target - roll.size, self._settings.max - len(roll.owned) - len(roll.foreign))
        if more > 0 and self._holds_claim:
            await self._step(self._driver.scale_to(len(roll.owned) + more))
            self._metrics.scaled("out", more)
        fewer = min(roll.size - target, len(roll.candidates))
        if fewer > 0 and self._holds_claim:
            outdated = self._driver.outdated
            ordered = sorted(drain_order(roll.candidates), key=lambda worker_id: worker_id not in outdated)
            leaving = self._driver.removable(ordered, fewer)
            self._metrics.scaled("in", len(leaving))
            if self._driver.drains:
                await self._step(self._driver.remove(leaving))
            else:
                self._roster.let_go(leaving)
                await self._see_off(leaving, roll)

    async def _replace_outdated(self, roll: Roll) -> None:
        """Let a worker go that runs with other settings than those of now; a later look starts another for it. One at a
        time, and none before all others take work: where the new settings do not work, the old workers serve on."""
        outdated = [worker for worker in roll.candidates if worker.worker_id in self._driver.outdated]
        going = [worker.worker_id for worker in outdated if not worker.ready]  # these serve nobody
        if not going and not roll.leaving and not roll.missing and not roll.starting:
            going = drain_order(outdated)[:1]
        if going:
            self._roster.let_go(going)
            await self._see_off(going, roll)

    async def _see_off(self, leaving: Iterable[str], roll: Roll) -> None:
        """Have those that leave drain, and remove them once the registry knows them no more: whatever they ran they
        have finished or handed over by then. Both are said again after a while."""
        now = self._clock()
        stages = {one: "drain" if one in roll.registered and not self._driver.drains else "remove" for one in leaving}
        due = [one for one, stage in stages.items() if self._told.get((one, stage), -1e9) <= now - SAY_AGAIN_S]
        if not self._holds_claim:
            return
        self._told |= {(one, stages[one]): now for one in due}
        for worker_id in due:
            if stages[worker_id] == "drain":
                await self._fabric.drain(worker_id)
                log.info("worker_drained", worker=worker_id)
        if removed := [one for one in due if stages[one] == "remove"]:
            await self._step(self._driver.remove(removed))

    @property
    def _holds_claim(self) -> bool:
        """Whether no other autoscaler can act: a call before may have taken longer than the claim lasts."""
        return self._clock() < self._claimed_until

    async def _step(self, call: Awaitable[_Result]) -> _Result:
        """What the driver answers. Raises ``DriverFailed``, also if it takes too long or is broken."""
        limit_s = self._settings.driver_timeout / 1000
        try:
            # Longer than the limit that a driver keeps by itself and can tell more about.
            async with asyncio.timeout(limit_s + 1):
                return await call
        except TimeoutError as error:
            raise DriverFailed(f"the driver did not finish a step within {limit_s:g} s") from error
        except DriverFailed:
            raise
        except InferqError as error:
            raise DriverFailed(error.message) from error

    def _tell(self, said: str, changes: bool) -> None:
        if changes and said != self._said:
            log.info("scaling", pool=self._settings.pool, decision=said)
        self._said = said


def _names(worker_ids: Iterable[str]) -> str:
    """The first of them, for a sentence."""
    ordered = sorted(worker_ids)
    return ", ".join(ordered[:_MAX_NAMES]) + (", ..." if len(ordered) > _MAX_NAMES else "")
