"""Well-typed messages with extreme values: for the control plane's HTTP calls and for entries of Redis streams.

What a field takes is read from the messages' own schemas, so that a new field, or a new bound, is tried as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from queue_schemas import CONTINUED, END, FABRIC_PREFIX, HEAD, ControlKind, Frame, Heartbeat, JobId, Registration
from queue_schemas.frames import MarkerKind

NUMBERS: tuple[Any, ...] = (
    -(10**400), -(2**63) - 1, -(2**63), -(2**31) - 1, -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**40 - 1, 2**40, 2**40 + 1,
    2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, 1e308, -1e308, 5e-324, 0.5, 1e18,
)  # fmt: skip
TEXTS = (
    "", "x" * 70_000, "\x00", "\x1b[2J", "\u202e", "é" * 300, "a\r\nb", "{}", "[red]", "../..", "%00", "' OR 1=1",
    "http://", "nan", "99999999999999999999",
)  # fmt: skip
ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]] * 5_000, {"a": {}}, ["x"] * 5_000, [""] * 2)
ODD_RUNS = ("", "x" * 101, "%00", "w.0000000000000001", "w.000000000000000g")
numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS)


@dataclass(frozen=True)
class Call:
    """One HTTP call of the control plane."""

    method: str
    path: str
    body: Any = None


def _near(schema: dict[str, Any]) -> list[Any]:
    """Values at and next to the bounds of one field's JSON schema."""
    found: list[Any] = []
    for part in (schema, *schema.get("anyOf", ())):
        for name in ("minimum", "maximum", "exclusiveMaximum"):
            if name in part:
                found += [part[name] - 1, part[name], part[name] + 1]
        if "maxLength" in part:
            found += ["x" * part["maxLength"], "x" * (part["maxLength"] + 1)]
        if "maxItems" in part:
            found += [["x"] * part["maxItems"], ["x"] * (part["maxItems"] + 1)]
        found += part.get("enum", [])
    return found


def extremes_of(message: type[BaseModel], valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``valid`` with up to three of the message's fields set to extreme values, or left out."""
    properties = message.model_json_schema()["properties"]

    @st.composite
    def made(draw: st.DrawFn) -> dict[str, Any]:
        body = dict(valid)
        for name in draw(st.lists(st.sampled_from(sorted(properties)), min_size=1, max_size=3, unique=True)):
            near = _near(properties[name])
            values = st.one_of(numbers, texts, st.sampled_from(ODD), *([st.sampled_from(near)] if near else []))
            body[name] = draw(values)
        if draw(st.integers(0, 9)) == 0:
            body.pop(draw(st.sampled_from(sorted(body))))
        return body

    return made()


def control_calls(worker_id: str, session_id: str, status: dict[str, Any]) -> st.SearchStrategy[Call]:
    """Calls about a worker that lives: as itself, as another run of it, and as somebody else."""
    workers = f"{FABRIC_PREFIX}/workers"
    runs = st.sampled_from([session_id, f"{worker_id}.{'0' * 16}", "outsider.0000000000000001"])
    named = st.sampled_from([worker_id, "outsider", "x" * 63, "x" * 64, ".", "%2e%2e", "0"])

    @st.composite
    def made(draw: st.DrawFn) -> Call:
        run, name = draw(runs), draw(named)
        valid = {**status, "session_id": run}
        match draw(st.sampled_from(["register", "heartbeat", "heartbeat", "drain", "check", "leave", "list"])):
            case "register":
                valid["worker_id"] = run.rpartition(".")[0]
                return Call("POST", workers, draw(extremes_of(Registration, valid)))
            case "heartbeat":
                return Call("POST", f"{workers}/{name}/heartbeat", draw(extremes_of(Heartbeat, valid)))
            case "drain":  # of the live worker it would be followed
                return Call("POST", f"{workers}/{'outsider' if name == worker_id else name}/drain")
            case "check":
                return Call("POST", f"{workers}/{name}/check?session_id={draw(st.sampled_from([run, *ODD_RUNS]))}")
            case "leave":
                return Call("DELETE", f"{workers}/{name}?session_id={draw(st.sampled_from(ODD_RUNS))}")
        return Call("GET", workers)

    return made()


def control_entries(job_ids: Sequence[str]) -> st.SearchStrategy[dict[str, bytes]]:
    """Entries of a worker's control stream: known kinds and others, about jobs that exist or not. None orders the
    worker to drain: that would end it, as it should."""
    kinds = st.sampled_from([ControlKind.WAKE, ControlKind.ABORT, ControlKind.PING, "", "drainx", "x" * 5_000])
    jobs = st.sampled_from([*job_ids, "9999-" + "f" * 32, "0-" + "0" * 32, "10000-" + "0" * 32, "-1", ""])
    return st.builds(
        lambda kind, job, why: {"k": str(kind).encode(), "job": job.encode(), "why": why.encode()}, kinds, jobs, texts
    )


def reply_entries(job_ids: Sequence[str]) -> st.SearchStrategy[dict[str, bytes]]:
    """Entries of a Router's reply stream: frames and markers with extreme numbers, about jobs that exist or not."""
    jobs = st.sampled_from([*job_ids, "9999-" + "f" * 32, "0-" + "0" * 32]).map(JobId)
    counts = st.sampled_from([number for number in NUMBERS if type(number) is int and -(2**63) <= number < 2**64])
    flags = st.sampled_from([0, END, HEAD, HEAD | END, HEAD | CONTINUED, 8, 2**63 - 1, -1])

    @st.composite
    def frames(draw: st.DrawFn) -> dict[str, bytes]:
        head = draw(flags)
        given = (draw(st.sampled_from([200, 204, 400, 599])), draw(texts)[:300]) if head & HEAD else (0, "")
        data = draw(st.sampled_from([b"", b"x" * 100_000, b"data: {}\n\n", b"\xff\x00"]))
        frame = Frame(draw(jobs), draw(counts), draw(texts)[:300], draw(counts), head, data, *given)
        return {"f": frame.pack()}

    markers = st.builds(
        lambda kind, job, epoch, why: {"m": f"{kind} {job} {epoch} {why}".encode()},
        st.sampled_from([*MarkerKind, "none"]),
        jobs,
        numbers,
        texts,
    )
    return frames() | markers
