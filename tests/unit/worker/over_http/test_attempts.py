"""What attempts send over HTTP: frames as pieces, in calls of bounded size, one for all that is sent at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from broker import Undelivered
from queue_schemas import CONTINUED, END, HEAD, BadRequest, Frame, Job, JobId, Lease, Outcome, Pool, SessionId, Settled
from queue_schemas.worker_protocol.encoding import MSGPACK, decode, encode
from queue_schemas.worker_protocol.jobs import NOBODY
from queue_schemas.worker_protocol.output import Answers, OutputCall, ReleaseCall, SettleCall
from worker.over_http import attempts as module
from worker.over_http.attempts import HttpAttempts
from worker.over_http.calls import RouterCalls
from worker.over_http.held_leases import HeldLeases

KINDS = {"output": OutputCall, "settle": SettleCall, "release": ReleaseCall}


class Router:
    """Takes each call as a Router would, and answers each attempt with what ``answer`` says."""

    def __init__(self, answer: Callable[[str, Any], str] = lambda *_: "ok") -> None:
        self.calls: list[tuple[str, Any]] = []
        self._answer = answer

    async def ask(self, path: str, message: Mapping[str, Any], kind: type[Answers]) -> Answers:
        name = path.rpartition("/")[2]
        assert path == f"/sessions/w.0123456789abcdef/{name}"
        read = decode(encode(message, MSGPACK), MSGPACK, KINDS[name])
        self.calls.append((name, read))
        await asyncio.sleep(0)
        return Answers(answers=[self._answer(name, one) for one in read.attempts])  # type: ignore[misc]


def attempts(router: Router) -> HttpAttempts:
    held = HeldLeases()
    held.session_id = SessionId("w.0123456789abcdef")
    return HttpAttempts(cast(RouterCalls, router), held)


def lease(token: str) -> Lease:
    job = Job(
        id=JobId("0-" + "a" * 32), tenant=NOBODY, model=Pool("m"), path="/v1/completions", body=b"", reply_to=token
    )
    return Lease(job, 1, "aid", 1, 1_000, 0)


def frame(seq: int, data: bytes, flags: int = 0) -> bytes:
    head = (200, "text/event-stream", {"retry-after": "1"}) if flags & HEAD else (0, "", {})
    return Frame(JobId("0-" + "a" * 32), 1, "aid", seq, flags, data, *head).pack()


async def test_all_streams_of_a_flush_are_one_call() -> None:
    """Each with its lease, the number of its first piece, and its head with piece 0 alone."""
    router = Router(lambda _, one: {"b": "gone", "c": "full", "d": "fenced"}.get(one.lease, "ok"))
    packed = {
        "a": frame(0, b"x", HEAD | CONTINUED) + frame(1, b"y"),
        "b": frame(7, b"z"),
        "c": frame(1, b""),
        "d": frame(2, b""),
    }
    found = await attempts(router).publish(0, packed)
    assert found == {"b": Undelivered.GONE, "c": Undelivered.FULL, "d": Undelivered.GONE}
    sent = [one for _, call in router.calls for one in call.attempts]
    assert [(one.lease, one.seq, one.data) for one in sent[:2]] == [("a", 0, [b"x", b"y"]), ("b", 7, [b"z"])]
    assert sent[0].head is not None
    assert (sent[0].head.status, sent[0].head.continued, sent[0].head.headers) == (200, True, {"retry-after": "1"})
    assert [one.head for one in sent[1:]] == [None] * 3
    assert len(router.calls) <= 2


async def test_a_large_answer_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last with the settle; what does not fit one call goes before, again where nobody reads."""
    monkeypatch.setattr(module, "PIECE_BYTES", 10)
    monkeypatch.setattr(module, "_FULL_PAUSE_S", 0.0)
    refusals = ["full"]
    router = Router(lambda *_: refusals.pop() if refusals else "ok")
    whole = b"0123456789" * 3 + b"end"
    assert await attempts(router).settle(lease("t"), Outcome.DONE, frame(0, whole, HEAD | END), used=5) is Settled.OK
    assert [name for name, _ in router.calls] == ["output"] * 4 + ["settle"]
    sent = [one for _, call in router.calls for one in call.attempts]
    assert b"".join(one.data[0] for one in sent[1:]) == whole
    assert [one.seq for one in sent[1:]] == [0, 1, 2, 3]
    assert [one.head is not None for one in sent[1:]] == [True, False, False, False]
    assert (sent[-1].outcome, sent[-1].used, sent[-1].run_ms) == (Outcome.DONE, 5, None)


async def test_an_answer_whose_beginning_nobody_takes_is_not_settled() -> None:
    """The queue's answer to the piece decides."""
    router = Router(lambda *_: "fenced")
    data = b"x" * (module.PIECE_BYTES + 1)
    assert await attempts(router).settle(lease("t"), Outcome.DONE, frame(0, data, HEAD | END)) is Settled.FENCED
    assert [name for name, _ in router.calls] == ["output"]


async def test_a_crash_is_reported_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many jobs as one may have: which of them did it is found out among those."""
    router = Router()
    assert await attempts(router).report_crash([lease(f"t{n}") for n in range(300)], "it died") == [Settled.OK] * 300
    assert [len(call.attempts) for _, call in router.calls] == [300]
    assert {one.kind for one in router.calls[0][1].attempts} == {"crashed"}
    monkeypatch.setattr(module, "MAX_RELEASES", 200)
    await attempts(router).report_crash([lease(f"t{n}") for n in range(300)], "it died")
    assert [len(call.attempts) for _, call in router.calls[1:]] == [200, 100]


async def test_releases_say_why_and_how() -> None:
    """Handed back, spent for a while, or yielded with what was said; reasons are cut to what a call takes."""
    router = Router()
    here = attempts(router)
    await here.release(lease("a"), "x" * 900, counted=False)
    await here.release(lease("b"), "why", counted=True, avoid_ms=50)
    following = Job(id=JobId("0-" + "a" * 32), tenant=NOBODY, model=Pool("m"), path="", body=b"", prefix="said so far")
    await here.release_yielded(lease("c"), "an interactive job", following)
    sent = [one for _, call in router.calls for one in call.attempts]
    assert [(one.kind, one.avoid_ms, one.said) for one in sent] == [
        ("handed_back", None, None),
        ("spent", 50, None),
        ("yielded", None, "said so far"),
    ]
    assert len(sent[0].reason) == 500


async def test_one_that_is_refused_costs_the_others_nothing() -> None:
    """Output that no Router takes ends its attempt; an end that none takes is raised to who reports it."""

    def answer(_: str, one: Any) -> str:
        if one.lease == "bad":
            raise BadRequest("no such piece")
        return "ok"

    router = Router(answer)
    mine = attempts(router)
    frames = {name: frame(0, b"x", HEAD) for name in ("a", "bad", "c")}
    assert await mine.publish(0, frames) == {"bad": Undelivered.GONE}
    ends = [mine.settle(lease(name), Outcome.DONE, frame(0, b"x", HEAD | END)) for name in ("a", "bad", "c")]
    good, bad, last = await asyncio.gather(*ends, return_exceptions=True)
    assert (good, last) == (Settled.OK, Settled.OK)
    assert isinstance(bad, BadRequest)


async def test_a_content_type_that_is_too_long_is_cut() -> None:
    """An engine's odd header must not cost its answer."""
    router = Router()
    packed = Frame(JobId("0-" + "a" * 32), 1, "aid", 0, HEAD | END, b"{}", 200, "x" * 5_000, {}).pack()
    assert await attempts(router).settle(lease("a"), Outcome.DONE, packed) is Settled.OK
    assert len(router.calls[0][1].attempts[0].head.content_type) == 1_000
