"""The lifecycle's table is what the scripts run: a move that it does not have is refused before anything is written."""

from __future__ import annotations

import itertools

import fakeredis
import pytest
import redis

from broker.redis.scripts import RECORD, Script, compose, load_scripts
from queue_schemas import InferqError, Outcome, State
from queue_schemas.keys import ShardKeys
from queue_schemas.lifecycle import TERMINAL, TRANSITIONS
from tests.support.queue import ServerBackend, parse_record

from .rewriting import Rewrite
from .test_guards import Scene, play

KEYS = ShardKeys(0)
JOB = "0-" + "0" * 32


def mover() -> Script:
    """A script that moves a job from its state to another, as every script does."""
    libraries = {name: text for script in load_scripts(flags=False).values() for name, text in script.parts.items()}
    text = "-- uses: lifecycle, records\ntransition(load_job(ARGV[2]), ARGV[3])\nreturn 'ok'\n"
    return Script.of("move", compose("move", text, libraries))


@pytest.mark.parametrize(("state", "following"), list(itertools.product(State, State)))
def test_only_moves_of_the_table_are_made(state: State, following: State) -> None:
    """All pairs of states; a refused job keeps its record as it was."""
    client = fakeredis.FakeRedis()
    record = " ".join([state, *[""] * (len(RECORD) - 1)])
    client.hset(KEYS.job(JOB), "record", record)
    call = mover().source, 1, KEYS.budget, KEYS.prefix, JOB, following.value
    if following in TRANSITIONS[state]:
        assert client.eval(*call) == b"ok"
        held = client.get(KEYS.job(JOB)) if following in TERMINAL else client.hget(KEYS.job(JOB), "record")
        assert parse_record(held)["state"] == following
        return
    with pytest.raises(redis.ResponseError, match=f"lifecycle: job {JOB} cannot go from {state} to {following}"):
        client.eval(*call)
    assert client.hgetall(KEYS.job(JOB)) == {b"record": record.encode()}


async def test_a_real_server_refuses_as_well(real_backend: ServerBackend) -> None:
    """In the same words."""
    client = real_backend.client()
    await client.set(KEYS.job(JOB), "done 1 ")
    with pytest.raises(redis.ResponseError, match="lifecycle"):
        await client.eval(mover().source, 1, KEYS.budget, KEYS.prefix, JOB, "leased")
    await client.delete(KEYS.job(JOB))
    await client.aclose()


async def test_a_guard_that_is_lost_meets_the_table() -> None:
    """Were the fence to let an attempt through whose job has ended, the job would not end a second time."""
    let_all_through = Rewrite(
        "fence", "if same and job.state == 'leased' then return job end", "if same then return job end"
    )

    async def a_job_ends_once(scene: Scene) -> None:
        await scene.broker.jobs.enqueue(scene.job())
        lease = await scene.worker.claim_one()
        await scene.broker.attempts.settle(lease, Outcome.DONE)
        with pytest.raises(InferqError, match="lifecycle"):
            await scene.broker.attempts.settle(lease, Outcome.DONE)

    await play(a_job_ends_once, let_all_through)
