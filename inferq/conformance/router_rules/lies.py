"""Rules about workers that lie: they are refused, and hurt nobody's jobs but their own."""

from __future__ import annotations

import asyncio
import base64

from ..router_kit import RouterKit
from ..scorecard import NotChecked, Rule
from ..scripted_engine import DONE, FINISH, event
from ..worker_rules.checks import require
from .jobs import PLAIN

_EVENTS = [event(n).decode() for n in range(4)]
_END = (FINISH + DONE).decode()


async def _made_up(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    lease = (await worker.next_job())["lease"]
    raw = bytearray(base64.urlsafe_b64decode(lease))
    raw[-1] ^= 1
    changed = base64.urlsafe_b64encode(bytes(raw)).decode()
    for name, token in (("changed", changed), ("made-up", "x" * 60), ("empty", "")):
        answers = {await worker.output(token, 0, "data: lie\n\n"), await worker.settle(token, PLAIN)}
        answers.add(await worker.release(token))
        require(answers == {"fenced"}, f"a {name} lease is answered {sorted(answers)}")
    await worker.settle(lease, PLAIN)
    require((await client)[1].decode() == PLAIN, "the client did not get its answer")


async def _of_another(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    lease = (await worker.next_job())["lease"]
    thief = kit.another(f"{kit.name}.thief" if kit.key else f"{kit.name}-thief")
    reply = await thief.join()
    require(reply.status == 200, f"a second worker is answered {reply.status} {reply.code}")
    answers = {await thief.output(lease, 0, "data: lie\n\n"), await thief.settle(lease, PLAIN.replace("fine", "lie"))}
    answers.add(await thief.release(lease, "spent"))
    require(answers == {"fenced"}, f"another session's lease is answered {sorted(answers)}")
    await worker.settle(lease, PLAIN)
    require((await client)[1].decode() == PLAIN, "the client got what another session said of its job")


async def _over(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    lease = (await worker.next_job())["lease"]
    await worker.settle(lease, "{}")
    require((await client)[0] == 200, "its client got no answer")
    for name, fields in (("delivered", {}), ("decline", {"for_now": False})):
        reply = await worker.call(name, {"lease": lease, **fields})
        require(reply.status == 403, f"{name} with the lease of a job that has ended is answered {reply.status}")


async def _respelled(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello")
    lease = (await worker.next_job())["lease"]
    for other in (lease + "=", lease + "\n", f" {lease}", lease[:9] + "\n" + lease[9:]):
        answer = await worker.settle(other, "{}")
        require(answer == "fenced", f"a lease that is spelled in another way is answered {answer}")
    await worker.settle(lease, "{}")
    require((await client)[0] == 200, "its client got no answer")


async def _out_of_order(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello", stream=True)
    lease = (await worker.next_job())["lease"]
    await worker.output(lease, 0, _EVENTS[0])
    for seq in (3, 2):
        await worker.output(lease, seq, _EVENTS[seq], head=False)
    await worker.settle(lease, _END, seq=4)
    for _ in range(3):  # what was lost on the way runs again
        for job in await worker.claim(wait_ms=1_000):
            for seq, piece in enumerate(_EVENTS):
                await worker.output(job["lease"], seq, piece)
            await worker.settle(job["lease"], _END, seq=4)
        if client.done():
            break
    async with asyncio.timeout(20.0):
        status, body = await client
    whole = "".join(_EVENTS) + _END
    require(body.decode() == whole or b"error" in body, f"the client got pieces in another order: {status} {body!r}")


async def _without_head(kit: RouterKit) -> None:
    worker = await kit.worker()
    client = kit.ask("hello", stream=True)
    lease = (await worker.next_job())["lease"]
    answer = await worker.output(lease, 0, _EVENTS[0], head=False)
    require(answer == "400 bad_message", f"piece 0 without a head is answered {answer}")
    await worker.settle(lease, "".join(_EVENTS) + _END, stream=True)
    require((await client)[0] == 200, "its client got no answer")


async def _malformed(kit: RouterKit) -> None:
    worker = await kit.worker()
    path = f"/sessions/{worker.session_id}/claim"
    cases: dict[bytes, tuple[int, ...]] = {
        b"": (400,),
        b"{": (400,),
        b"[]": (400,),
        b'{"shard": -1}': (400,),
        b'{"shard": 9999}': (400,),
        b'{"claim": {"seq": 0, "n": 1, "pools": []}}': (400,),
        b'{"claim": {"seq": 1, "n": 1000000, "pools": []}}': (400,),
        b'{"after": "../../etc"}': (400,),
        b'{"after": "18446744073709551615-18446744073709551615"}': (400,),
        b'{"wait_ms": 1e12}': (400,),
        b"[" * 100_000: (400,),
    }
    for body, expected in cases.items():
        reply = await worker.request("POST", path, body)
        require(reply.status in expected, f"{body[:40]!r} is answered {reply.status}")
    reply = await worker.request("POST", path, b"{}", content_type="text/plain")
    require(reply.status == 415, f"a call of type text/plain is answered {reply.status}")
    reply = await worker.request("POST", path, b"\xc1\xff", content_type="application/vnd.msgpack")
    require(reply.status == 400, f"what is no msgpack is answered {reply.status}")
    far = {"shard": worker.shard, "after": f"{2**64 - 1}-0", "seq": 0, "leases": []}
    reply = await worker.call("reconcile", far)
    require(reply.status == 400, f"to have read a message that cannot be is answered {reply.status}")
    require((await worker.heartbeat()).status == 200, "the session did not survive its own nonsense")


async def _too_large(kit: RouterKit) -> None:
    worker = await kit.worker()
    body = b'{"attempts": [{"lease": "x", "seq": 1, "data": ["' + b"a" * (17 << 20) + b'"]}]}'
    try:
        reply = await worker.request("POST", f"/sessions/{worker.session_id}/output", body)
    except OSError:
        return  # the connection was closed on it
    require(reply.status == 413, f"a call of 17 MiB is answered {reply.status}")


async def _unauthorized(kit: RouterKit) -> None:
    if not kit.guarded:
        raise NotChecked("this Router takes every caller of its machine: give it credentials, and the kit a --key")
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"x-inferq-join-token": "wrong"}):
        reply = await kit.another(headers=headers).join()
        require(reply.status == 401, f"a join with {headers} is answered {reply.status}")


async def _beyond_its_scope(kit: RouterKit) -> None:
    if not kit.key:
        raise NotChecked("only a worker's own credential has a scope: give the kit a --key")
    reply = await kit.another("somebody-else").join()
    require(reply.status == 403, f"a worker under another name is answered {reply.status}")
    worker = await kit.worker()
    reply = await worker.join(models=["a-model-of-others"], again=True)
    require(reply.status == 403, f"a model that is not allowed is answered {reply.status}")
    claim = {"seq": 99, "n": 1, "pools": [{"pool": "a-model-of-others"}]}
    reply = await worker.call("claim", {"shard": 0, "claim": claim})
    require(reply.status == 403, f"a claim for a model that is not allowed is answered {reply.status}")
    other = f"somebody-else.{'0' * 16}"
    reply = await worker.request("POST", f"/sessions/{other}/renew")
    require(reply.status == 403, f"a call for another worker's session is answered {reply.status}")


async def _many_polls(kit: RouterKit) -> None:
    worker = await kit.worker()
    polls = [asyncio.ensure_future(worker.messages(wait_ms=20_000)) for _ in range(50)]
    await asyncio.wait(polls, timeout=5.0)
    held = sum(1 for poll in polls if not poll.done())
    for poll in polls:
        poll.cancel()
    require(held <= 1, f"{held} calls of one session are held at a time")


LIE_RULES: tuple[Rule[RouterKit], ...] = (
    Rule("made-up-lease", "a lease that was changed or made up is fenced", _made_up),
    Rule("others-lease", "another session's lease is fenced", _of_another),
    Rule("old-lease", "the lease of a job that has ended opens nothing", _over),
    Rule("respelled-lease", "a lease has one spelling", _respelled),
    Rule("out-of-order", "output that comes out of order never reaches a client so", _out_of_order),
    Rule("no-head", "an answer without a head is refused", _without_head),
    Rule("malformed", "malformed messages are refused, and nothing else happens", _malformed),
    Rule("too-large", "a call of more than 16 MiB is refused", _too_large),
    Rule("credential", "nobody joins without a credential", _unauthorized),
    Rule("scope", "a credential allows its own worker, its models and no more", _beyond_its_scope),
    Rule("many-polls", "of many calls of one session one is held", _many_polls),
)
