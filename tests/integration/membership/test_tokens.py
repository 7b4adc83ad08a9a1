"""Join tokens that are wrong, at the start and later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from queue_schemas import FABRIC_PREFIX, JOIN_TOKEN_HEADER
from tests.integration.membership.scene import WAIT_LIMIT_S, LongStream, open_ended_engine
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

RIGHT, WRONG = "the-right-token", "not-the-token"


async def status_of(worker: Role) -> dict[str, Any]:
    """The worker's page, which wants the join token."""
    return dict(await worker.page("/status", {JOIN_TOKEN_HEADER: RIGHT}))


def set_token(role: Role, token: str) -> None:
    """Give a role another join token for its next start."""
    arguments = role.process.args
    arguments[arguments.index("--join-token") + 1] = token


@pytest.fixture
def roles(tmp_path: Path, own_valkey: Server) -> Fleet:
    """A fleet whose Manager and Router have the right token."""
    return Fleet(tmp_path, own_valkey, manager={"join_token": RIGHT}, router={"join_token": RIGHT})


async def test_a_wrong_token_at_the_start_is_one_sentence(roles: Fleet) -> None:
    """A worker, at the Router or at the Manager, and a Router: each ends with code 2, says what to set, and has not
    learned where Redis is."""
    async with roles as fleet:
        await fleet.manager.start()
        await fleet.router.start()
        outsiders = [
            fleet.worker("at-the-router", manager_url=fleet.router.url, join_token=WRONG),
            fleet.worker("at-the-manager", manager_url=fleet.manager.url, join_token=WRONG),
            fleet.worker("without", manager_url=fleet.router.url),
            fleet.another_router("router-2", join_token=WRONG),
        ]
        for outsider in outsiders:
            outsider.process.start()
        for outsider in outsiders:
            assert await outsider.ended(WAIT_LIMIT_S) == 2
            log = outsider.process.log_text()
            sentences = [line for line in log.splitlines() if line.startswith("inferq: ")]
            assert len(sentences) == 1, log
            assert "INFERQ_JOIN_TOKEN" in sentences[0]
            assert "Traceback" not in log
            assert fleet.server.url not in log
        headers = {JOIN_TOKEN_HEADER: WRONG}
        body = {"worker_id": "w", "session_id": "w.0000000000000001", "slots": 1}
        for role in (fleet.router, fleet.manager):
            for method, path in (("POST", "workers"), ("GET", "broker")):
                url = f"{role.url}{FABRIC_PREFIX}/{path}"
                async with fleet.session.request(method, url, json=body, headers=headers) as answer:
                    assert answer.status == 401
                    assert str(fleet.server.port) not in await answer.text()


async def test_a_token_that_becomes_wrong_is_waited_out(roles: Fleet) -> None:
    """The Manager is restarted with another token: the worker keeps its stream, says on /ready what is wrong, and is a
    member again, as the same session id, when the token is right again."""
    async with roles as fleet, open_ended_engine() as engine:
        await fleet.manager.start()
        await fleet.router.start()
        worker = fleet.worker("worker-1", join_token=RIGHT, engine="url", engine_url=engine.url)
        await worker.start()
        before = (await status_of(worker))["session_id"]
        stream = await LongStream(fleet, fleet.router).begun()
        fleet.manager.process.kill()
        set_token(fleet.manager, WRONG)
        await fleet.manager.start()

        async def says_so() -> bool:
            status, body = await worker.get("/ready")
            return status == 503 and b"join token" in body

        await eventually(says_so, "the worker says what is wrong", limit_s=WAIT_LIMIT_S)
        await stream.goes_on()
        fleet.manager.process.kill()
        set_token(fleet.manager, RIGHT)
        await fleet.manager.start()
        await worker.ready()
        status = await status_of(worker)
        assert (status["session_id"], status["running"]) == (before, 1)
        engine.finish()
        await stream.whole()
        assert engine.calls == 1
        assert "Traceback" not in worker.process.log_text()
