"""Signed leases: what one Router gives out another one takes, and nobody else can make."""

from __future__ import annotations

import base64

import pytest

from queue_schemas import Job, JobId, Lease, Pool, SessionId, Tenant
from router.workers import lease_tokens
from router.workers.lease_tokens import HeldLease, LeaseTokens

SESSION = SessionId("edge.0123456789abcdef")
JOB = Job(
    id=JobId("3-" + "a" * 32),
    tenant=Tenant("acme"),
    model=Pool("m"),
    path="/v1/completions",
    body=b"x" * 99,
    reply_to="router.0123456789abcdef",
)
LEASE = Lease(JOB, 2, "b" * 13, 2, 5_000, 10)


def tokens(secret: bytes = b"s" * 32) -> LeaseTokens:
    made = LeaseTokens()
    made.use(secret)
    return made


def test_another_router_takes_it() -> None:
    """It has all that ends an attempt and carries its output, and nothing of who asked."""
    held = tokens().read(tokens().issue(SESSION, LEASE), SESSION)
    assert held is not None
    assert (held.lease.job.id, held.lease.epoch, held.lease.attempt_id) == (JOB.id, 2, "b" * 13)
    assert (held.lease.job.reply_to, held.shard, held.body_bytes, held.lease.job.ttl_ms) == (
        *(JOB.reply_to, 3, 99, JOB.ttl_ms),
    )
    assert b"acme" not in base64.urlsafe_b64decode(tokens().issue(SESSION, LEASE))


def test_every_changed_bit_is_noticed() -> None:
    """Of the signature and of what is signed."""
    signed = bytearray(base64.urlsafe_b64decode(tokens().issue(SESSION, LEASE)))
    for place in range(len(signed)):
        changed = bytearray(signed)
        changed[place] ^= 1
        assert tokens().read(base64.urlsafe_b64encode(bytes(changed)).decode(), SESSION) is None, place


@pytest.mark.parametrize(
    "token", ["", "x", "====", "\u00e9", "a" * 2_000, base64.urlsafe_b64encode(b"s" * 16).decode()]
)
def test_what_is_no_token_is_none(token: str) -> None:
    """And raises nothing."""
    assert tokens().read(token, SESSION) is None


def test_another_sessions_lease_is_worth_nothing() -> None:
    """Also where this Router has just read it for its owner."""
    mine = tokens()
    token = mine.issue(SESSION, LEASE)
    assert mine.read(token, SESSION) is not None
    assert mine.read(token, SessionId("edge.fedcba9876543210")) is None


def test_a_secret_that_was_replaced_is_accepted_once_more() -> None:
    """A queue that lost its secret gets another one while leases of before are held."""
    mine = tokens()
    token = mine.issue(SESSION, LEASE)
    for count in range(3):
        other = tokens()
        for number in range(count):
            other.use(bytes([number]) * 32)
        assert (other.read(token, SESSION) is not None) == (count < 2)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Router forgets the oldest leases, and reads them again when they come."""
    monkeypatch.setattr(lease_tokens, "_MAX_REMEMBERED", 2)
    mine = tokens()
    made = [mine.issue(SESSION, Lease(JOB, epoch, "b" * 13, 1, 1, 1)) for epoch in range(1, 5)]
    for token in (*made, made[0]):
        assert mine.read(token, SESSION) is not None
    assert len(mine._known) == 2


def test_a_lease_has_one_token() -> None:
    """However often it is given out, and however its token could be spelled."""
    mine = tokens()
    token = mine.issue(SESSION, LEASE)
    assert mine.issue(SESSION, Lease(JOB, 2, "b" * 13, 2, 100, 9_999)) == token
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    body = token.rstrip("=")
    others = [body[:-1] + last for last in alphabet if last != body[-1]]
    spelled = [other + token[len(body) :] for other in others if base64.urlsafe_b64decode(other + "==")]
    for other in (*spelled, token + "=", token + "\n", token[:8] + " " + token[8:]):
        assert mine.read(other, SESSION) is None, other
    assert mine.read(token, SESSION) is not None


def held_lease() -> HeldLease:
    mine = tokens()
    held = mine.read(mine.issue(SESSION, LEASE), SESSION)
    assert held is not None
    return held


def test_what_comes_again_counts_once() -> None:
    """Its bytes count as often as they are new: a repeated call is part of the protocol."""
    held = held_lease()
    for _ in range(3):
        held.count(0, [b"abc", b"de"])
    held.count(1, [b"de", b"fgh"])
    assert (held.sent_bytes, held.seen_whole) == (8, True)


def test_what_another_router_was_sent_is_not_known() -> None:
    """Behind a gap all counts; one that goes back to pieces that were not counted is counted for them."""
    held = held_lease()
    held.count(7, [b"abc"])
    assert (held.sent_bytes, held.seen_whole) == (3, False)
    held.count(2**31, [b"x"])
    held.count(0, [b"abcd"])
    held.count(1, [b"ab"] * 6)
    assert (held.sent_bytes, held.seen_whole) == (3 + 1 + 4 + 12, True)
