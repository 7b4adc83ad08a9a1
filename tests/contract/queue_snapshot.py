"""Read the real queue's keys as a ``Snapshot``, to compare with that of the reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from redis.exceptions import ResponseError

from queue_schemas import Control, Frame, Lane, Marker, State
from queue_schemas.control import parse_control
from queue_schemas.frames import unpack_frames, unpack_marker
from queue_schemas.ids import decode_name
from queue_schemas.keys import ShardKeys
from scheduling.arrivals import Arrivals
from scheduling.fairness import Band
from scheduling.prediction import RETRIED, Rate
from tests.contract.model_records import SUSPECT, DeadLetter, Line, Place, Snapshot, require
from tests.support.queue import parse_record

KEYS = ShardKeys(0)
FAMILIES = {
    "job": "HGETALL",
    "q": "XRANGE",
    "retry": "XRANGE",
    "suspects": "XRANGE",
    "active": "ZRANGE",
    "service": "ZRANGE",
    "leases": "HGETALL",
    "clock": "GET",
    "readers": "ZRANGE",
    "claimed": "HGETALL",
    "renewals": "HGETALL",
    "parked": "ZRANGE",
    "offers": "ZRANGE",
    "yieldable": "ZRANGE",
    "ctl": "XRANGE",
    "deadlines": "ZRANGE",
    "heads": "HGETALL",
    "lost": "ZRANGE",
    "reply": "XRANGE",
    "dead": "XRANGE",
    "dead_request": "GET",
    "budget": "HGETALL",
    "counters": "HGETALL",
    "listeners": "SMEMBERS",
    "out": "XRANGE",
    "persisted": "ZRANGE",
    "idem": "GET",
    "warm": "HGETALL",
    "arrivals": "HGETALL",
}
"""How to read each family of keys. There are no others: jobs of regions have a suite of their own."""

Entries = Sequence[tuple[bytes, Mapping[bytes, bytes]]]


class Raw:
    """Every key of the shard with what it holds."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    @classmethod
    async def read(cls, client: Any) -> Raw:
        names = [key.decode() for key in await client.keys(f"{KEYS.prefix}*".replace("{", "?").replace("}", "?"))]
        pipe = client.pipeline(transaction=False)
        for name in names:
            family = _parts(name)[0]
            require(family in FAMILIES, f"{name} is of no family that is known here")
            match FAMILIES[family]:
                case "HGETALL":
                    pipe.hgetall(name)
                case "XRANGE":
                    pipe.xrange(name)
                case "ZRANGE":
                    pipe.zrange(name, 0, -1, withscores=True)
                case "SMEMBERS":
                    pipe.smembers(name)
                case "GET":
                    pipe.get(name)
        found = dict(zip(names, await pipe.execute(raise_on_error=False), strict=True))
        for name, held in found.items():
            if isinstance(held, ResponseError):  # not a record but the tombstone in its place
                found[name] = await client.get(name)
        return cls(found)

    def of(self, family: str) -> dict[tuple[str, ...], Any]:
        """Keys of a family by what follows it in their names."""
        return {tuple(parts[1:]): held for name, held in self.found.items() if (parts := _parts(name))[0] == family}

    def one(self, family: str) -> Any:
        """The key that is a family by itself; empty if there is none."""
        return self.of(family).get((), {})

    def stream(self, family: str, name: str) -> Entries:
        """The entries of one of a family's streams."""
        entries: Entries = self.of(family).get((name,), [])
        return entries


def read_snapshot(raw: Raw) -> Snapshot:
    """The real queue as the model sees it."""
    lines, active = _lines(raw), _active(raw)
    fresh = {line for line in lines if line.kind == "fresh"}
    require(active == fresh, f"tenants with waiting jobs are {fresh}, those in turn {active}")
    standing = {job_id: line for line, jobs in lines.items() for job_id in jobs}
    require(len(standing) == sum(map(len, lines.values())), "a job waits in two places")
    counters, costs = _counters(raw)
    dead = [entry for _, entry in raw.one("dead")]
    letters = {(entry_id.decode(),) for entry_id, _ in raw.one("dead")}
    require(letters == set(raw.of("dead_request")), "each dead letter has its request")
    return Snapshot(
        records={job_id: _record(held, standing.get(job_id)) for (job_id,), held in raw.of("job").items()},
        lines=lines,
        leases={worker: _epochs(held) for (worker,), held in raw.of("leases").items()},
        budgets={_decoded(name): number for name, number in _numbers(raw.one("budget")).items()},
        waiting=counters.pop("waiting", {}),
        costs=costs,
        rates=_rates(*(counters.pop(kind, {}) for kind in ("ran", "ran_ms", "ran_cost", "ran_at"))),
        arrivals=_arrivals(raw),
        looked_at=int(dict(raw.one("arrivals")).get(b"at", 0)),
        bands=_bands(raw),
        leased={place: number for place, number in counters.pop("leased", {}).items() if number},
        turns=counters.pop("turn", {}),
        waits=counters.pop("wait", {}),
        affinities={(*place, event.partition("/")[2]): n for event, by_place in counters.items()
                    if event.startswith("affinity/") for place, n in by_place.items()},
        # Totals that split one of these further have a slash.
        totals={(*place, event): n for event, by_place in counters.items() if "/" not in event
                for place, n in by_place.items()},
        deadlines=_scores(raw.one("deadlines")),
        lost=_scores(raw.one("lost")),
        parked={_place(*where): _scores(held) for where, held in raw.of("parked").items()},
        offers={_place(*where): {worker: int(raw.of("claimed")[worker,][b"free"]) for worker in _scores(held)}
                for where, held in raw.of("offers").items()},
        yieldable={decode_name(pool): _scores(held) for (pool,), held in raw.of("yieldable").items()},
        renewals=_numbers(raw.one("renewals")),
        dead=sorted(_letter(entry) for entry in dead),
        listening={router for (router,) in raw.of("reply")},
        listeners={job_id: {router.decode() for router in held} for (job_id,), held in raw.of("listeners").items()},
        outputs={job_id: [(frame.epoch, frame.seq) for _, entry in held for frame in unpack_frames(entry[b"f"])]
                 for (job_id,), held in raw.of("out").items()},
        kept=_scores(raw.one("persisted")),
        keys={digest: held.decode().partition(" ")[0] for (digest,), held in raw.of("idem").items()},
        warm={slot.decode(): (proof, tuple(holders)) for slot, held in dict(raw.one("warm")).items()
              for proof, *holders in [held.decode().split(" ")]},
    )  # fmt: skip


def differences(real: Snapshot, model: Snapshot) -> list[str]:
    """What is not as it should be, in words."""
    found = []
    for field in fields(Snapshot):
        is_, should_be = getattr(real, field.name), getattr(model, field.name)
        if isinstance(is_, dict):
            names = sorted(is_.keys() | should_be.keys(), key=str)
            found += [
                f"{field.name}: {name} is {is_.get(name)}, should be {should_be.get(name)}"
                for name in names
                if is_.get(name) != should_be.get(name)
            ]
        elif is_ != should_be:
            found.append(f"{field.name}: is {is_}, should be {should_be}")
    return found


def frames_in(entries: Entries) -> list[Frame | Marker]:
    """What a Router reads in its stream's entries."""
    news: list[Frame | Marker] = []
    for _, entry in entries:
        if b"f" in entry:
            news += unpack_frames(entry[b"f"])
        elif b"m" in entry:
            news.append(unpack_marker(entry[b"m"]))
    return news


def control_messages_in(entries: Entries) -> list[Control]:
    """What a worker reads in its control stream's entries."""
    return [control for _, entry in entries if (control := parse_control(dict(entry))) is not None]


def _parts(name: str) -> list[str]:
    return name.removeprefix(KEYS.prefix).split(":")


def _place(pool: str, lane: str) -> Place:
    return Place(decode_name(pool), Lane(lane))


def _counters(raw: Raw) -> tuple[dict[str, dict[Place, int]], dict[tuple[Place, int], int]]:
    """What is counted, by kind and place; and what those that wait cost, by place and band."""
    counters: dict[str, dict[Place, int]] = {}
    costs = {}
    for name, number in _numbers(raw.one("counters")).items():
        pool, lane, *band, kind = name.split(":")
        if kind == "cost":
            costs[_place(pool, lane), RETRIED if band == ["r"] else int(*band)] = number
        else:
            counters.setdefault(kind, {})[_place(pool, lane)] = number
    return counters, costs


def _rates(jobs: dict[Place, int], *sums: dict[Place, int]) -> dict[Place, Rate]:
    return {place: Rate(number, *(one.get(place, 0) for one in sums)) for place, number in jobs.items()}


def _arrivals(raw: Raw) -> dict[Place, Arrivals]:
    looks = {name.decode(): held.decode() for name, held in dict(raw.one("arrivals")).items() if name != b"at"}
    return {_place(*lane.split(":")): Arrivals(*map(int, held.split())) for lane, held in looks.items()}


def _decoded(budget: str) -> str:
    kind, _, rest = budget.partition(":")
    name, _, what = rest.rpartition(":")
    return f"{kind}:{decode_name(name)}:{what}" if name else budget


def _numbers(held: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(number) for name, number in held.items()}


def _epochs(held: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value.split()[0]) for name, value in held.items()}


def _scores(held: Sequence[tuple[bytes, float]]) -> dict[str, int]:
    return {name.decode(): int(score) for name, score in held}


def _lines(raw: Raw) -> dict[Line, list[str]]:
    lines = {
        Line("fresh", _place(pool, lane), int(band), decode_name(tenant)): entries
        for (pool, lane, band, tenant), entries in raw.of("q").items()
    }
    for kind in ("retry", "suspects"):
        lines |= {Line(kind, _place(*where)): entries for where, entries in raw.of(kind).items()}
    return {line: [entry[b"id"].decode() for _, entry in entries] for line, entries in lines.items()}


def _bands(raw: Raw) -> dict[tuple[Place, int], Band]:
    waiting, left = raw.of("active"), raw.of("service")
    bands = {}
    for pool, lane, band in waiting.keys() | left.keys():
        key = (pool, lane, band)
        levels = {name.decode(): level for name, level in left.get(key, ())}
        last_left = levels.pop("*", None)
        stands = {name.decode(): level for name, level in waiting.get(key, ())}
        bands[_place(pool, lane), int(band)] = Band(stands, levels, last_left)
    return bands


def _active(raw: Raw) -> set[Line]:
    return {
        Line("fresh", _place(pool, lane), int(band), decode_name(tenant))
        for (pool, lane, band), tenants in raw.of("active").items()
        for tenant in _scores(tenants)
    }


def _record(held: Mapping[bytes, bytes] | bytes, line: Line | None) -> tuple[object, ...]:
    record = parse_record(held if isinstance(held, bytes) else held[b"record"])
    state, epoch, attempt_id = State(record["state"]), int(record["epoch"]), record["aid"]
    if isinstance(held, bytes) or b"env" not in held:
        return (state, epoch, attempt_id)
    is_suspect = int(held.get(b"suspicion") or 0) >= SUSPECT
    return (state, epoch, attempt_id, int(record["attempts"]), record["owner"], line, is_suspect, held[b"env"])


def _letter(entry: Mapping[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        entry[b"id"].decode(), entry[b"cause"].decode(), entry[b"worker"].decode(), int(entry[b"attempts"])
    )
