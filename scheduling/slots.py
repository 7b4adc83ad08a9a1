"""How many slots a worker keeps, from what its engine says of its load: full, with next to nothing waiting inside.

A worker asks its engine about once a second (:func:`asks_now`), calls :func:`next_state` with each reading, and uses
``SlotState.limit``.

* **Standing queue.** Requests wait in an engine for a moment whenever they arrive. Only what waited at two readings in
  a row counts: the smaller of both, as CoDel takes the minimum over an interval (Nichols and Jacobson, "Controlling
  Queue Delay", ACM Queue 2012).
* **Down, to what it runs.** The limit becomes this worker's requests at the engine without its share of the standing
  queue. That figure stays the same while requests end and waiting ones move up, so a decrease that still has to take
  effect is not repeated.
* **Down, before it thrashes.** A preemption, or a KV cache that is nearly full, takes a fixed share away, once for each
  time that a decrease had its effect.
* **Up, by doubling at first.** From the setting on it may grow with nothing waiting, room in the KV cache and all slots
  in use. Until the first sign of overload it doubles, as long as the KV cache has room for that (slow start: Jacobson,
  1988): the setting is a guess, and what a new worker does not take waits.
* **Then by probing.** It grows by one, then by twice as much each time, at most by a quarter. After a decrease it
  waits, twice as long after each that follows (additive increase and multiplicative decrease: Chiu and Jain, 1989).
* **Back, by doubling.** Below the setting, with slots free, a limit binds nobody: what lowered it is over, as where one
  long prompt took all of an engine's steps. It doubles, up to the setting: a worker with few slots is handed little,
  and what its cache holds would be computed elsewhere meanwhile.
* **Without readings** the limit is the setting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from queue_schemas.records import record

MISSES_ALLOWED: Final = 2
"""Readings in a row that may be missing before the limit is the setting again."""
CLEAN_READINGS: Final = 2
"""Readings without a sign of overload, all slots in use, before the limit grows, and that prove that it may have."""
IDLE_READINGS: Final = 10
"""How many times as seldom an engine is asked that has nothing to do, or tells no load."""
KV_ROOM: Final = 0.85
"""Share of the KV cache in use below which the limit may grow."""
KV_FULL: Final = 0.95
"""Share in use at which it shrinks: running requests grow, and one that finds no room is computed again."""
PREEMPTED_KEEPS: Final = 0.9
KV_FULL_KEEPS: Final = 0.95
MAX_BACKOFF: Final = 4
"""Doublings of the wait before the limit grows again: 16 readings."""


@record
class EngineLoad:
    """One reading of an engine. Requests that no slot could run (they wait for an adapter or a grammar) do not count as
    ``waiting``. None: the engine does not say."""

    waiting: int
    running: int | None = None
    kv_usage: float | None = None
    """Share of the KV cache in use, 0 to 1."""
    preemptions: int | None = None
    """Since it started."""
    prefix_queries: int | None = None
    """Prompt tokens looked up in the prefix cache since it started."""
    prefix_hits: int | None = None
    """Of these, tokens that it held."""
    generated: int | None = None
    """Tokens generated since it started."""
    cache_tokens: int | None = None
    """What its KV cache holds in all; 0 if it keeps no prefixes."""


@record
class SlotBounds:
    """``setting``: the limit where an engine does not say its load; ``maximum``: the highest, not below the setting."""

    setting: int
    maximum: int


@record
class SlotState:
    """The limit in force and what led to it."""

    limit: int
    step: int = 1
    """By how much it grows next."""
    clean: int = 0
    """Clean readings in a row."""
    hold: int = 0
    """Readings until it may grow."""
    backoff: int = 0
    """Decreases that no proven increase has made good."""
    unproven: bool = False
    """Whether it grew, and no clean readings followed yet."""
    missed: int = 0
    """Readings in a row that are missing."""
    overloaded: bool = False
    """Whether there was a sign of overload since the engine began."""
    waiting: int = 0
    """What the last reading said was waiting."""
    preemptions: int | None = None
    """What it said of preemptions."""


def first_state(bounds: SlotBounds) -> SlotState:
    """The state before the first reading: the setting."""
    return SlotState(bounds.setting)


def asks_now(state: SlotState, bounds: SlotBounds, *, busy: int, passed: int) -> bool:
    """Whether a worker with ``busy`` requests reads its engine's load now, ``passed`` intervals after the last time."""
    if passed >= IDLE_READINGS:
        return True
    return state.missed <= MISSES_ALLOWED and (busy > 0 or state.limit < bounds.setting)


def next_state(
    state: SlotState, bounds: SlotBounds, load: EngineLoad | None, *, busy: int, all_in_use: bool
) -> SlotState:
    """The state after one reading. ``load`` is None if the engine gave none; ``busy`` are this worker's requests at the
    engine; ``all_in_use`` is whether every slot is busy or about to be."""
    if load is None:
        if state.missed >= MISSES_ALLOWED:
            return replace(first_state(bounds), missed=state.missed, backoff=state.backoff, overloaded=state.overloaded)
        return replace(state, missed=state.missed + 1, clean=0)
    seen = replace(
        state,
        hold=max(state.hold - 1, 0),
        missed=0,
        waiting=load.waiting,
        preemptions=load.preemptions if load.preemptions is not None else state.preemptions,
    )
    target = _overload_target(state, load, busy)
    if target is not None:
        return _shrunk(seen, target)
    # Below the setting a worker need not show that it wants more: it is seldom full while it offers less than others.
    wanted = all_in_use or state.limit < bounds.setting
    if not wanted or load.waiting or (load.kv_usage or 0.0) >= KV_ROOM:
        return replace(seen, clean=0)
    may_double = not state.overloaded and load.kv_usage is not None and 2 * load.kv_usage < KV_ROOM
    return _grown(replace(seen, clean=state.clean + 1), bounds, all_in_use=all_in_use, may_double=may_double)


def _overload_target(state: SlotState, load: EngineLoad, busy: int) -> int | None:
    """The most slots that this reading allows; None: it shows no overload."""
    targets = []
    standing = min(load.waiting, state.waiting)
    if standing:
        # Other clients of the engine answer for their part of what is there.
        present = max((load.running or 0) + load.waiting, busy, 1)
        targets.append(busy - (2 * standing * busy + present) // (2 * present))  # rounded
    if busy <= state.limit:  # the last decrease had its effect
        before, after = state.preemptions, load.preemptions
        if before is not None and after is not None and after > before:
            targets.append(int(busy * PREEMPTED_KEEPS))
        if load.kv_usage is not None and load.kv_usage >= KV_FULL:
            targets.append(int(busy * KV_FULL_KEEPS))
    return min(targets, default=None)


def _shrunk(state: SlotState, target: int) -> SlotState:
    limit = max(min(state.limit, target), 1)
    if limit == state.limit:
        return replace(state, clean=0, overloaded=True)
    backoff = min(state.backoff + 1, MAX_BACKOFF)
    return replace(
        state, limit=limit, step=1, clean=0, hold=1 << backoff, backoff=backoff, unproven=False, overloaded=True
    )


def _grown(state: SlotState, bounds: SlotBounds, *, all_in_use: bool, may_double: bool) -> SlotState:
    if state.clean < CLEAN_READINGS:
        return state
    if state.unproven:
        state = replace(state, unproven=False, backoff=max(state.backoff - 1, 0))
    if state.hold or state.limit >= bounds.maximum:
        return state
    if state.limit < bounds.setting and not all_in_use:
        return replace(state, limit=min(2 * state.limit, bounds.setting), clean=0, unproven=True)
    if may_double:
        return replace(state, limit=min(2 * state.limit, bounds.maximum), clean=0, unproven=True)
    step = min(state.step, max(state.limit // 4, 1))
    limit = min(state.limit + step, bounds.maximum)
    return replace(state, limit=limit, step=2 * step, clean=0, unproven=True)
