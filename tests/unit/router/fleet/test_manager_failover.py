"""Which of several Managers a Router asks: the acting one that proves to be of the fleet, else those it was given."""

from __future__ import annotations

import pytest

from queue_schemas import CannotStart, ManagerUnavailable
from queue_schemas.fleet.acting_manager import ActingManager, prove_address
from router.fleet.manager_client import RemoteManager
from router.fleet.manager_failover import MAX_FOLLOWED, NOBODY_ACTS_S, ManagerRoute
from telemetry.http.fabric_calls import FabricCall, Forwarded

TOKEN = "the fleet's secret"
ONE, TWO, FOLLOWED = "http://one:9000", "http://two:9000", "http://10.0.0.9:9000"
CALL = FabricCall("POST", "/fabric/v1/workers", body=b"{}", join_token=TOKEN)
STANDS_BY = Forwarded(503, (), b'{"error": {"code": "manager_unavailable"}}')
ACCEPTED = Forwarded(200, (), b"{}")
AWAY = ManagerUnavailable("away")


class Fakes:
    """Managers by URL: what each answers, and who was asked."""

    def __init__(self, **answers: Forwarded | ManagerUnavailable) -> None:
        self.answers: dict[str, Forwarded | ManagerUnavailable] = dict(answers)
        self.asked: list[str] = []
        self.now = 100.0

    def route(self, *urls: str, token: str = TOKEN) -> ManagerRoute:
        return ManagerRoute(urls, token, self.open, lambda: self.now)

    def open(self, url: str) -> RemoteManager:
        fakes = self
        if url.startswith("ray:"):
            raise CannotStart("this process is in no Ray cluster")

        class Fake(RemoteManager):
            async def forward(self, call: FabricCall) -> Forwarded:
                fakes.asked.append(url)
                answer = fakes.answers.get(url, AWAY)
                if isinstance(answer, ManagerUnavailable):
                    raise answer
                return answer

        return Fake(url, TOKEN)


def said(url: str, *, token: str = TOKEN, renewal_count: int = 1) -> ActingManager:
    return ActingManager("m", renewal_count, url, prove_address(token, "m", url))


async def test_the_acting_manager_is_called_first() -> None:
    """[A7] The Router was given a Manager that stands by: calls go to the one that acts."""
    fakes = Fakes(**{ONE: STANDS_BY, FOLLOWED: ACCEPTED})
    route = fakes.route(ONE)
    route.note_acting(said(FOLLOWED))
    assert await route.forward(CALL) == ACCEPTED
    assert fakes.asked == [FOLLOWED]
    assert not route.trouble


async def test_an_answer_that_is_not_a_managers_leads_to_the_next_one() -> None:
    """[H48] A proxy's 503, or one that is nested without an end, is no answer of a Manager that acts."""
    for body in (b"<html>", b"[" * 200_000):
        fakes = Fakes(**{ONE: Forwarded(503, (), body), TWO: ACCEPTED})
        assert await fakes.route(ONE, TWO).forward(CALL) == ACCEPTED


async def test_the_configured_managers_are_called_in_turn() -> None:
    """[A7] While Redis says nothing, the first that neither stands by nor is away answers; one that was away is asked
    last for a while."""
    fakes = Fakes(**{ONE: AWAY, TWO: ACCEPTED})
    route = fakes.route(ONE, TWO)
    assert await route.forward(CALL) == ACCEPTED
    assert await route.forward(CALL) == ACCEPTED
    assert fakes.asked == [ONE, TWO, TWO]
    fakes.now += 60
    await route.forward(CALL)
    assert fakes.asked[3:] == [ONE, TWO]


@pytest.mark.parametrize(
    "record",
    [said("http://evil.example"), said(FOLLOWED, token="guessed"), said("http://127.0.0.1:9000"), said("ray:manager")],
    ids=["no proof of ours", "of another token", "another machine's loopback", "an actor from outside Ray"],
)  # fmt: skip
async def test_an_unproven_or_unreachable_acting_url_is_not_followed(record: ActingManager) -> None:
    """[A7] The join token goes nowhere but to the configured Managers and to one that proves that it has it."""
    if "evil" in record.url:
        record = ActingManager("m", 1, record.url, "0" * 64)
    fakes = Fakes(**{ONE: ACCEPTED, record.url: ACCEPTED})
    route = fakes.route(ONE)
    route.note_acting(record)
    assert await route.forward(CALL) == ACCEPTED
    assert fakes.asked == [ONE]


async def test_it_returns_to_the_configured_managers_when_the_acting_one_is_gone() -> None:
    """[A7] A killed Manager's address stays in Redis until its lease ends: the others are asked meanwhile."""
    fakes = Fakes(**{ONE: ACCEPTED, FOLLOWED: AWAY})
    route = fakes.route(ONE)
    route.note_acting(said(FOLLOWED))
    assert await route.forward(CALL) == ACCEPTED
    route.note_acting(said(FOLLOWED, renewal_count=0))
    await route.forward(CALL)
    assert fakes.asked == [FOLLOWED, ONE, ONE]


async def test_a_refused_token_is_reported_only_if_no_manager_accepts_it() -> None:
    """[A7] One Manager with another token does not speak for the others."""
    refused = Forwarded(401, (), b"{}")
    fakes = Fakes(**{ONE: refused, TWO: ACCEPTED})
    assert await fakes.route(ONE, TWO).forward(CALL) == ACCEPTED
    fakes.answers[TWO] = STANDS_BY
    assert await fakes.route(ONE, TWO).forward(CALL) == refused


async def test_it_reports_why_workers_cannot_join() -> None:
    """[A7] Nobody reached, or no lease renewed for a while: one sentence without an address, gone when it is well."""
    fakes = Fakes(**{ONE: AWAY})
    route = fakes.route(ONE)
    with pytest.raises(ManagerUnavailable):
        await route.forward(CALL)
    assert "workers cannot join" in route.trouble
    assert ONE not in route.trouble
    fakes.answers[ONE] = ACCEPTED
    await route.forward(CALL)
    assert not route.trouble
    route.note_acting(said(ONE))
    fakes.now += NOBODY_ACTS_S + 1
    assert "no Manager acts" in route.trouble
    route.note_acting(said(ONE, renewal_count=2))
    assert not route.trouble


async def test_the_number_of_remembered_managers_is_limited() -> None:
    """[A7] Each restart may have another address; a Router keeps a bounded number."""
    fakes = Fakes()
    route = fakes.route(ONE)
    for port in range(1, 3 * MAX_FOLLOWED):
        route.note_acting(said(f"http://10.0.0.9:{port}", renewal_count=port))
    assert len(route._managers) <= MAX_FOLLOWED + 1
