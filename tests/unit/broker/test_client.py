"""``Broker`` stays a small front: few methods of its own, few per part."""

from __future__ import annotations

import fakeredis

from broker import Broker

MAX_METHODS = 10
PARTS = {
    "attempts",
    "dead_letters",
    "durable_replies",
    "fleet",
    "known_pools",
    "jobs",
    "maintenance",
    "output",
    "persisted_jobs",
    "replies",
    "signed_leases",
    "stats",
    "workers",
}


def public_methods(kind: type) -> list[str]:
    return [name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_")]


async def test_no_part_of_the_broker_has_more_than_ten_public_methods() -> None:
    """Neither the front nor any part grows into a class that does everything, and the parts are those named here."""
    broker = Broker.over(fakeredis.FakeAsyncRedis(protocol=2))
    parts = {
        name: part
        for name, part in vars(broker).items()
        if not name.startswith("_") and type(part).__module__.startswith("broker.")
    }
    assert parts.keys() == PARTS
    for name, part in {"broker": broker, **parts}.items():
        methods = public_methods(type(part))
        assert len(methods) <= MAX_METHODS, f"{name} has {len(methods)} public methods: {sorted(methods)}"
    await broker.close()


async def test_the_reference_of_the_broker_names_every_part() -> None:
    """A reader of ``Broker`` finds each part and whom it is for."""
    assert {name for name in PARTS if f"``{name}``" not in (Broker.__doc__ or "")} == set()
