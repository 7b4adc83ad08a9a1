"""Where the acting Manager says that it is: who may believe it, and what it may say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from queue_schemas import BadMessage
from queue_schemas.fleet.acting_manager import ActingManager, check_manager_url, prove_address, why_not_followed

TOKEN = "the fleet's secret"
URL = "http://10.0.0.7:9000"
SAID = ActingManager("manager.1", 5, URL, prove_address(TOKEN, "manager.1", URL))


def test_an_address_that_a_member_of_the_fleet_wrote_is_believed() -> None:
    """[A7] The proof holds for who has the same join token, and for a fleet without one as well."""
    assert SAID.proven(TOKEN)
    open_fleet = replace(SAID, proof=prove_address("", "manager.1", URL))
    assert open_fleet.proven("")


@pytest.mark.parametrize(
    "forged",
    [
        replace(SAID, url="http://evil.example:9000"),
        replace(SAID, manager_id="manager.2"),
        replace(SAID, proof=""),
        replace(SAID, proof="\udcff"),
        replace(SAID, proof=prove_address("", "manager.1", URL)),
        replace(SAID, renewal_count=0),
        replace(SAID, url="", proof=prove_address(TOKEN, "manager.1", "")),
    ],
)
def test_an_address_that_somebody_else_wrote_is_not_believed(forged: ActingManager) -> None:
    """[A7] Whoever can write to Redis but has no join token leads nobody astray: not by another URL, not by a proof of
    another holder, not by what an open fleet would believe."""
    assert not forged.proven(TOKEN)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:password@10.0.0.7:9000", "http://10.0.0.7:9000/?token=x", "ftp://10.0.0.7", "10.0.0.7:9000",
        "http://", "http://10.0.0.7:0", "http://a b", "ray:", "ray:../x", "http://10.0.0.7:9000#x", "h" * 3_000,
    ],
)  # fmt: skip
def test_an_address_is_a_plain_url(url: str) -> None:
    """[A7] Credentials never stand in Redis, and what is no URL is not followed even with a proof."""
    with pytest.raises(BadMessage, match="no user, password"):
        check_manager_url(url)
    assert not ActingManager("m", 1, url, prove_address(TOKEN, "m", url)).proven(TOKEN)


@pytest.mark.parametrize("url", ["http://[::1]:9000", "https://manager.internal", "ray:manager", "http://h:9/base"])
def test_addresses_that_a_manager_may_say(url: str) -> None:
    """IPv6, TLS, an actor in Ray, a path in front."""
    assert check_manager_url(url) == url


def test_a_loopback_address_is_followed_only_by_who_was_given_one() -> None:
    """[A7] 127.0.0.1 on another machine is somebody else's program: it gets no join token."""

    def followed(url: str, known: list[str]) -> bool:
        acting = ActingManager("m", 1, url, prove_address(TOKEN, "m", url))
        assert "join token" in why_not_followed(acting, f"not {TOKEN}", known)
        why = why_not_followed(acting, TOKEN, known)
        assert why == "" or "loopback" in why
        return not why

    for loopback in ("http://127.0.0.1:9001", "http://localhost:9001", "http://[::1]:9001", "http://127.8.0.1"):
        assert not followed(loopback, ["http://manager:9000"])
        assert followed(loopback, ["http://manager:9000", "http://127.0.0.1:9000"])
    assert followed("http://10.0.0.8:9000", ["http://manager:9000"])
    assert followed("ray:manager", ["http://manager:9000"])
