"""Rules about jobs: a request reaches the worker, and what the worker says reaches the client, once and in order."""

from __future__ import annotations

import asyncio

from ..router_kit import RouterKit
from ..scorecard import Rule
from ..scripted_engine import DONE, FINISH, event
from ..worker_rules.checks import require

PLAIN = '{"id": "chatcmpl-1", "choices": [{"message": {"content": "fine \u00e9"}, "finish_reason": "stop"}]}'
_EVENTS = [event(n).decode() for n in range(4)]
_END = (FINISH + DONE).decode()


async def _plain(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    job = await worker.next_job()
    require('"hello"' in job["body"], f"the body is not the client's: {job['body'][:100]}")
    require(job["path"] == "/v1/chat/completions" and not job["stream"], f"the job has path {job['path']}")
    require(not {"tenant", "reply_to", "idempotency_key"} & job.keys(), f"a worker is told too much: {sorted(job)}")
    answer = await worker.settle(job["lease"], PLAIN)
    require(answer == "ok", f"a settle is answered {answer}")
    status, body = await client
    require((status, body.decode()) == (200, PLAIN), f"the client got {status} {body[:100]!r}")


async def _stream(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello", stream=True)
    lease = (await worker.next_job())["lease"]
    for seq, piece in enumerate(_EVENTS):
        answer = await worker.output(lease, seq, piece)
        require(answer == "ok", f"a piece is answered {answer}")
    again = await worker.output(lease, 1, *_EVENTS[1:3])
    require(again == "ok", f"pieces that were sent before are answered {again}")
    answer = await worker.settle(lease, _END, seq=len(_EVENTS))
    require(answer == "ok", f"a settle is answered {answer}")
    _, body = await client
    require(body.decode() == "".join(_EVENTS) + _END, f"the client got {body[:200]!r}")


async def _repeated_claim(kit: RouterKit) -> None:
    worker = await kit.worker()
    clients = [kit.ask(f"number {n}") for n in range(2)]
    jobs = [await worker.next_job()]
    again = await worker.claim(seq=worker.seq)
    require([job["job_id"] for job in again] == [jobs[0]["job_id"]], "a repeated claim gives other jobs")
    require(again[0]["attempt_id"] == jobs[0]["attempt_id"], "a repeated claim begins another attempt")
    jobs.append(await worker.next_job())
    require(jobs[0]["job_id"] != jobs[1]["job_id"], "a job is given twice")
    old = await worker.claim(seq=1, wait_ms=0)
    require(not old or old[0]["job_id"] == jobs[0]["job_id"], "an old claim gives new jobs")
    for job in jobs:
        await worker.settle(job["lease"], PLAIN)
    found = await asyncio.gather(*clients)
    require(all(status == 200 for status, _ in found), f"clients got {[status for status, _ in found]}")


async def _held_call(kit: RouterKit) -> None:
    worker = await kit.worker()
    await worker.claim(wait_ms=1)
    while await worker.messages(wait_ms=300):  # that of a Manager that checks a newcomer
        continue
    now = asyncio.get_running_loop().time
    held = asyncio.ensure_future(worker.messages(wait_ms=20_000))
    await asyncio.sleep(0.3)
    require(not held.done(), "a held call was answered although there was nothing to say")
    asked = now()
    client = kit.ask("hello")
    told = await held
    require(now() - asked < 5.0 and bool(told), "a held call was not answered when a request came")
    first = asyncio.ensure_future(worker.messages(wait_ms=20_000))
    await asyncio.sleep(0.2)
    job = await worker.next_job()
    await asyncio.wait({first}, timeout=5.0)
    require(first.done(), "a later call does not end the one that is held")
    await worker.settle(job["lease"], PLAIN)
    await client


async def _settled_twice(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    job = await worker.next_job()
    answers = [await worker.settle(job["lease"], PLAIN), await worker.settle(job["lease"], PLAIN.replace("fine", "no"))]
    require(answers == ["ok", "duplicate"], f"a settle and its repetition are answered {answers}")
    require((await client)[1].decode() == PLAIN, "the client got the second answer")


async def _released(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    job = await worker.next_job()
    require(await worker.release(job["lease"]) == "ok", "a release is not taken")
    late = await worker.output(job["lease"], 0, _EVENTS[0])
    again = await worker.next_job()
    require(again["job_id"] == job["job_id"], "a released job does not come again")
    require(again["epoch"] > job["epoch"], "the next attempt has no higher epoch")
    answers = (late, await worker.settle(job["lease"], PLAIN.replace("fine", "no")))
    require(answers[1] == "fenced", f"a settle of an attempt that was released is answered {answers[1]}")
    await worker.settle(again["lease"], PLAIN)
    require((await client)[1].decode() == PLAIN, "the client got what a released attempt said")


async def _aborted(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello", stream=True)
    job = await worker.next_job()
    await worker.output(job["lease"], 0, _EVENTS[0])
    client.cancel()
    for _ in range(4):
        if any(told["kind"] == "abort" and told["job_id"] == job["job_id"] for told in await worker.messages()):
            return
    require(False, "a worker is not told within 20 s that its client has gone")


async def _left(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    job = await worker.next_job()
    require((await worker.leave()).status == 204, "a session cannot leave")
    reply = await worker.call("renew")
    require(reply.code == "fenced", f"a session that has left is answered {reply.status} {reply.code}")
    other = await kit.worker()
    again = await other.next_job()
    require(again["job_id"] == job["job_id"], "what a session that left held does not run elsewhere")
    require(again["attempt"] == job["attempt"], "a session that leaves spends the attempts of its jobs")
    await other.settle(again["lease"], PLAIN)
    require((await client)[0] == 200, "its client got no answer")


async def _reconciled(kit: RouterKit) -> None:
    worker = await kit.worker()
    clients = [kit.ask(f"number {n}") for n in range(2)]
    kept, dropped = await worker.next_job(), await worker.next_job()
    message = {"shard": worker.shard, "after": worker.after, "seq": worker.seq, "leases": [kept["lease"], "made up"]}
    reply = await worker.call("reconcile", message)
    require(reply.message.get("lost") == ["made up"], f"a reconcile is answered {reply.message}")
    again = await worker.next_job()
    require(again["job_id"] == dropped["job_id"], "a job that its worker does not run is not given out again")
    for job in (kept, again):
        require(await worker.settle(job["lease"], PLAIN) == "ok", "a settle after a reconcile is not taken")
    await asyncio.gather(*clients)


async def _fenced(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello", stream=True)
    job = await worker.next_job()
    await worker.output(job["lease"], 0, _EVENTS[0])
    other = kit.another(f"{kit.name}.other" if kit.key else f"{kit.name}-other")
    reply = await other.join()
    require(reply.status == 200, f"a second worker is answered {reply.status} {reply.code}")
    until = asyncio.get_running_loop().time() + 4 * worker.lease_ms / 1000 + 10
    jobs: list[dict[str, object]] = []
    while not jobs and asyncio.get_running_loop().time() < until:
        await other.heartbeat()
        jobs = await other.claim(wait_ms=500)
    require(bool(jobs), "the job of a worker that is silent for its lease is not given to another one")
    lease = str(jobs[0]["lease"])
    late = await worker.settle(job["lease"], "".join(_EVENTS), seq=1)
    require(late in ("fenced", "409 fenced"), f"what the dead session says late is answered {late}")
    require((await worker.call("renew")).code == "fenced", "a session that was declared dead may renew its leases")
    for seq, piece in enumerate(_EVENTS):
        await other.output(lease, seq, piece)
    await other.settle(lease, _END, seq=len(_EVENTS))
    _, body = await client
    require(body.decode() == "".join(_EVENTS) + _END, f"the client got {body[-200:]!r}")


async def _msgpack_too(kit: RouterKit) -> None:
    import msgpack  # noqa: PLC0415 - only here

    worker = await kit.worker()
    body = msgpack.packb({"shard": worker.shard, "after": "0", "wait_ms": 0})
    path, kind = f"/sessions/{worker.session_id}/claim", "application/vnd.msgpack"
    reply = await worker.request("POST", path, body, content_type=kind, accept=kind)
    require(reply.message.get("raw") == b"\x80", f"a call in msgpack is answered {reply.status} {reply.message}")


JOB_RULES: tuple[Rule[RouterKit], ...] = (
    Rule("plain", "a request is claimed as it was sent, and its client gets what is settled", _plain),
    Rule("stream", "pieces of a stream reach the client in order, each once", _stream),
    Rule("msgpack", "messages are taken and answered in msgpack, too", _msgpack_too),
    Rule("repeated-claim", "a repeated claim gives the same jobs, and an old one none", _repeated_claim),
    Rule("held-call", "a held call is answered when work comes, and ended by a later one", _held_call),
    Rule("settled-twice", "a job is settled once", _settled_twice),
    Rule("released", "a released job comes again, and its old attempt is fenced", _released),
    Rule("aborted", "a worker is told that its client has gone", _aborted),
    Rule("left", "what a session that leaves holds runs elsewhere, as if never started", _left),
    Rule("reconciled", "a reconcile finds what was lost, on either side", _reconciled),
    Rule("dead-session", "a silent session loses its jobs, and what it says late is dropped", _fenced),
)
