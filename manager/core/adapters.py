"""The LoRA adapters of one worker: which it could load, and which it was told to load, since when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from queue_schemas import WorkerStatus
from queue_schemas.records import record


@record
class ToldAdapter:
    """When a worker was told to load an adapter, and when its engine listed it first; None: not yet."""

    told_at: float
    loaded_at: float | None = None


@dataclass(frozen=True, slots=True)
class MemberAdapters:
    """``names``: those that it could load while its engine serves ``base`` (empty: whatever it serves), as the set
    ``set_name``. A set whose names are not known yet comes with the worker's next registration."""

    names: frozenset[str] = frozenset()
    set_name: str = ""
    base: str = ""
    told: Mapping[str, ToldAdapter] = field(default_factory=dict)

    @property
    def are_unknown(self) -> bool:
        """Whether the worker must say once more which these are."""
        return bool(self.set_name) and not self.names

    @property
    def assigned(self) -> list[str] | None:
        """What its assignment says."""
        return sorted(self.told) if self.set_name else None

    def served(self, models: Sequence[str]) -> list[str]:
        """Those of its engine's ``models`` that it is to pull: not an adapter that it is to unload."""
        return [model for model in models if model not in self.names or model in self.told]

    def told_before(self, adapters: Sequence[str], models: Sequence[str], now: float) -> MemberAdapters:
        """With ``adapters`` as told, of an engine that lists ``models``: a worker that another Manager knew, or none,
        goes on with what it has."""
        mine = (name for name in adapters if name in self.names or self.are_unknown)
        return replace(self, told={name: ToldAdapter(now, now if name in models else None) for name in mine})

    def tell(self, load: str, instead_of: str, now: float) -> MemberAdapters:
        """With one more, and one less if ``instead_of`` names it."""
        kept = {name: told for name, told in self.told.items() if name != instead_of}
        return replace(self, told=kept | {load: ToldAdapter(now)})

    def without(self, name: str) -> MemberAdapters:
        """With one less."""
        return replace(self, told={one: told for one, told in self.told.items() if one != name})

    def heard(self, status: WorkerStatus, now: float, *, is_swapping: bool) -> MemberAdapters:
        """After ``status``: what was loaded is noted, and what the worker cannot hold any more is told no more."""
        if not self.told:
            return self
        if is_swapping:
            return replace(self, told={})
        fitting = ((name, told) for name, told in self.told.items() if name in self.names or self.are_unknown)
        told = {
            name: ToldAdapter(one.told_at, now) if one.loaded_at is None and name in status.models else one
            for name, one in islice(fitting, status.adapter_room)
        }
        return self if told == self.told else replace(self, told=told)
