"""Background and resumable streams over real processes, at any Router, while processes are killed."""

from __future__ import annotations

import random

from tests.runs.resumes import ENGINE, resume_all
from tests.support.fleet import Fleet


async def test_pieces_of_a_stream_from_any_router_are_the_persisted_answer(fleet: Fleet) -> None:
    """Sixty resumes through two Routers, by header and by number, of background and resumable streams, while a worker
    is killed: nothing twice, nothing missing, and nothing left when the jobs are deleted."""
    other = fleet.another_router("other")
    await fleet.up(workers=2, **(ENGINE | {"sim_tokens_per_s": 80, "sim_answer_tokens": 60}))
    await other.start()
    result = await resume_all(
        fleet, [fleet.router, other], random.Random(60), resumes=60, streams=8, tokens=80, kills=1
    )
    assert result.resumes >= 60
    assert result.interrupted > 0, "the killed worker ran something"
    assert len(result.ways) == 3
