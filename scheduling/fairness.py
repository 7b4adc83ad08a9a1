"""Whose turn it is among the tenants of one band: a virtual token counter for each.

Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, with weights. The tenant whose counter is lowest is
served next. It is charged at once by an estimate, and corrected by what its request turns out to have cost. A tenant
that comes (back) is lifted to the lowest counter of those that wait, so that idle time earns nothing. While two tenants
wait, the services that they get over their weights differ by no more than :func:`bound`.

``broker/lua/lib/fairness.lua`` does the same where jobs are claimed; the contract suite compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def units(amount: float) -> float:
    """An amount of service as counters hold it: to a thousandth."""
    return float(f"{amount:.3f}")


def charge_of(cost: int, weight: float) -> float:
    """What a tenant of ``weight`` is charged for a request that costs so much (:mod:`scheduling.cost`)."""
    return cost / float(f"{weight:g}")


def bound(largest_cost: float, running: int) -> float:
    """How far the services of two tenants, each over its weight, may drift apart while both wait all the time.

    ``largest_cost`` is the most that a request is charged or costs, over its tenant's weight; ``running``: how many run
    at once. VTC's bound is 2 * max(w_p * L_input, w_q * M), M the tokens of what runs at once: so much more than its
    counter says may a tenant have been served until its answers are counted.
    """
    return 2 * largest_cost * max(running, 1)


@dataclass
class Band:
    """The counters of one band's tenants."""

    waiting: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    """Where those stand that do not wait, unless they would be lifted anyway."""
    last_left: float | None = None

    def come(self, tenant: str) -> None:
        """``tenant`` has a request that waits."""
        if tenant not in self.waiting:
            least = min(self.waiting.values(), default=self.last_left or 0.0)
            self.waiting[tenant] = units(max(self.left.get(tenant, 0.0), least))

    def next(self) -> str | None:
        """Who is served next: of those that stand level, the first by name."""
        return min(self.waiting, key=lambda tenant: (self.waiting[tenant], tenant), default=None)

    def charge(self, tenant: str, amount: float) -> None:
        """A waiting tenant is served."""
        self.waiting[tenant] = units(self.waiting[tenant] + amount)

    def leave(self, tenant: str) -> None:
        """``tenant`` has no request any more that waits."""
        stands = self.waiting.pop(tenant)
        least = min(self.waiting.values(), default=stands)
        self.left = {name: level for name, level in self.left.items() if level >= least} | {tenant: stands}
        self.last_left = stands

    def correct(self, tenant: str, by: float) -> None:
        """A tenant was charged too little by so much; too much, if it is negative."""
        by = units(by)
        if tenant in self.waiting:
            self.waiting[tenant] += by
        elif tenant in self.left:
            self.left[tenant] = units(self.left[tenant] + by)
        elif by > 0 and self.last_left is not None:
            self.left[tenant] = units(self.last_left + by)
