"""One attempt over real sockets: receivers that misbehave, names that lie, certificates that are nobody's."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import threading
import time
from collections.abc import Sequence

import pytest

from tests.support.receiver import CLOSE, HANG, Receiver, receiving, status
from tests.support.servers import Certificates
from webhooks.core.url_rules import Address, UrlRules
from webhooks.dns_lookups import DnsLookups
from webhooks.sender import Answer, Sender

LOOPBACK = UrlRules.allowing(["127.0.0.0/8"], allow_http=True)
HEADERS = {"webhook-id": "evt_1", "webhook-signature": "v1,x"}


async def attempt(url: str, *, limit_s: float = 5.0, rules: UrlRules = LOOPBACK) -> Answer:
    return await Sender(rules, limit_s).send(url, HEADERS, b'{"a":1}')


async def test_what_is_signed_is_what_is_sent() -> None:
    """The body byte for byte, the headers, the path as it was written; nothing of a browser's."""
    async with receiving() as receiver:
        answer = await attempt(f"{receiver.url}/a%2Fb?x=%20&y")
    (request,) = receiver.got
    assert (answer.status, answer.error) == (200, "")
    assert (request.path, request.body) == ("/hook/a%2Fb?x=%20&y", b'{"a":1}')
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("inferq-webhooks/")
    assert request.headers["webhook-id"] == "evt_1"
    assert "cookie" not in request.headers


@pytest.mark.parametrize(
    ("sent", "found", "error"),
    [
        (status("204 No Content"), 204, ""),
        (status("503 Busy", "retry-after: 7"), 503, ""),
        (status("410 Gone"), 410, ""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\nhalf", 200, ""),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz", None, "not an HTTP answer"),
        (b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 5_000_000, 500, ""),
        (CLOSE, None, "closed before an answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None, "closed before an answer"),
        (b"SSH-2.0-OpenSSH\r\n", None, "not an HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", None, "not an HTTP answer"),
    ],
)
async def test_an_answer_is_its_status(sent: bytes, found: int | None, error: str) -> None:
    """However much follows and however it ends; what is no answer is told in plain words."""
    async with receiving(lambda _: sent) as receiver:
        answer = await attempt(receiver.url)
    assert answer.status == found
    assert error in answer.error


@pytest.mark.parametrize("host", ["xn--bcher-kva.example", "XN--BCHER-KVA.Example", "[::FFFF:127.0.0.1]"])
async def test_a_host_that_may_be_given_is_sent_to(host: str) -> None:
    """In its xn-- form, which is what owners of other names are told to give; in capital letters."""
    async with receiving() as receiver:
        sender = Sender(LOOPBACK, 5.0, lookups=DnsLookups(lambda host, port: [ipaddress.ip_address("127.0.0.1")]))
        answer = await sender.send(f"http://{host}:{receiver.port}/", HEADERS, b"{}")
    assert (answer.status, answer.error) == (200, "")


async def test_a_redirect_is_not_followed() -> None:
    """Neither to another host nor to the same."""
    async with receiving() as other, receiving(lambda _: status("307 Go", f"location: {other.url}")) as receiver:
        answer = await attempt(receiver.url)
    assert (answer.status, other.got, len(receiver.got)) == (307, [], 1)


async def test_a_receiver_that_hangs_costs_its_time_limit() -> None:
    """Before an answer, or after half of its head."""
    async with receiving(lambda _: HANG) as receiver:
        began = time.monotonic()
        answer = await attempt(receiver.url, limit_s=0.2)
        assert (answer.status, answer.error) == (None, "no answer within 0.2 s")
        assert time.monotonic() - began < 2


async def test_retry_after_comes_along() -> None:
    """For the schedule to judge."""
    async with receiving(lambda _: status("429 Slow", "retry-after: 30")) as receiver:
        assert (await attempt(receiver.url)).retry_after == "30"


async def test_a_refused_connection_is_a_failed_attempt() -> None:
    """A refused connection says so."""
    async with receiving() as receiver:
        url = receiver.url
    assert (await attempt(url)).error == "no connection: connection refused"


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would connect to addresses that nobody checked."""
    async with receiving() as proxy, receiving() as receiver:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        assert (await attempt(receiver.url)).status == 200
    assert proxy.connections == 0


def names(*answers: Sequence[str]) -> tuple[DnsLookups, list[str]]:
    """A resolver that gives one answer after the other, the last again and again, and what it was asked."""
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[Address]:
        asked.append(host)
        return [ipaddress.ip_address(text) for text in answers[min(len(asked), len(answers)) - 1]]

    return DnsLookups(lookup), asked


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["169.254.169.254"],
        ["0.0.0.0"],  # noqa: S104 - never bound
        [],
    ],
)
async def test_a_name_with_any_private_address_is_not_connected_to(found: list[str]) -> None:
    """A receiver that listens right there gets nothing."""
    async with receiving() as receiver:
        sender = Sender(UrlRules(allow_http=True), 2.0, lookups=names(found)[0])
        answer = await sender.send(f"http://hooks.example.com:{receiver.port}/", HEADERS, b"{}")
    assert "not on the public internet" in answer.error
    assert receiver.connections == 0


async def test_a_name_that_changes_its_address_leads_nowhere() -> None:
    """DNS rebinding: good when it is checked, another a moment later. It is asked once, and what it said is used."""
    async with receiving() as receiver:
        lookups, asked = names(["127.0.0.9"], ["127.0.0.1"])
        rules = UrlRules.allowing(["127.0.0.9"], allow_http=True)
        answer = await Sender(rules, 2.0, lookups=lookups).send(
            f"http://hooks.example.com:{receiver.port}/", HEADERS, b"{}"
        )
    assert (answer.status, asked, receiver.connections) == (None, ["hooks.example.com"], 0)


async def test_the_socket_itself_is_checked_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the HTTP library came to another address by itself, no socket would be made for it."""
    from webhooks import sender as module  # noqa: PLC0415

    class Lying(module._FixedResolver):
        def __init__(self, addresses: Sequence[Address]) -> None:
            super().__init__([ipaddress.ip_address("127.0.0.1")])

    monkeypatch.setattr(module, "_FixedResolver", Lying)
    async with receiving() as receiver:
        sender = Sender(UrlRules(allow_http=True), 2.0, lookups=names(["8.8.8.8"])[0])
        answer = await sender.send(f"http://hooks.example.com:{receiver.port}/", HEADERS, b"{}")
    assert (answer.status, receiver.connections) == (None, 0)


async def test_the_checked_address_is_connected_to_under_its_name() -> None:
    """The Host header is the URL's."""
    async with receiving() as receiver:
        sender = Sender(LOOPBACK, 2.0, lookups=names(["127.0.0.1"])[0])
        answer = await sender.send(f"http://hooks.example.com:{receiver.port}/", HEADERS, b"{}")
    assert answer.status == 200
    assert receiver.got[0].headers["host"] == f"hooks.example.com:{receiver.port}"


@pytest.mark.parametrize("host", ["Hooks.Example.COM", "127.0.0.1", "[::FFFF:127.0.0.1]", "[::ffff:7f00:1]"])
async def test_a_host_is_read_alike_everywhere(host: str) -> None:
    """What was accepted when the endpoint was made can be sent to: letters of either case, addresses of either kind."""
    async with receiving() as receiver:
        sender = Sender(LOOPBACK, 2.0, lookups=names(["127.0.0.1"])[0])
        answer = await sender.send(f"http://{host}:{receiver.port}/", HEADERS, b"{}")
    assert (answer.status, answer.error) == (200, "")


async def test_a_name_server_that_hangs_holds_one_thread() -> None:
    """Attempts for that name end in time; those for others go on meanwhile."""
    hold, asked = threading.Event(), []

    def lookup(host: str, port: int) -> list[Address]:
        asked.append(host)
        if host == "slow.example.com":
            hold.wait(10)
        return [ipaddress.ip_address("127.0.0.1")]

    async with receiving() as receiver:
        sender = Sender(LOOPBACK, 0.3, lookups=DnsLookups(lookup))
        slow = [sender.send(f"http://slow.example.com:{receiver.port}/", HEADERS, b"{}") for _ in range(5)]
        *late, quick = await asyncio.gather(
            *slow, sender.send(f"http://quick.example.com:{receiver.port}/", HEADERS, b"{}")
        )
        assert quick.status == 200
        assert {one.error for one in late} == {"no answer within 0.3 s"}
        assert asked.count("slow.example.com") == 1
        hold.set()
        again = await sender.send(f"http://slow.example.com:{receiver.port}/", HEADERS, b"{}")
        assert again.status == 200


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("tls"))


def server_side(files: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    return context


async def over_tls(receiver: Receiver, files: Certificates | None, host: str) -> Answer:
    client = ssl.create_default_context(cafile=str(files.ca) if files else None)
    rules = UrlRules.allowing(["127.0.0.0/8", "localhost"], allow_http=False)
    sender = Sender(rules, 5.0, tls=client, lookups=names(["127.0.0.1"])[0])
    return await sender.send(f"https://{host}:{receiver.port}/", HEADERS, b"{}")


async def test_receivers_are_verified(certificates: Certificates) -> None:
    """A certificate of a known authority for that very name, or nothing is sent."""
    async with receiving(tls=server_side(certificates)) as receiver:
        assert (await over_tls(receiver, certificates, "localhost")).status == 200
        (request,) = receiver.got
        assert request.headers["host"] == f"localhost:{receiver.port}"
        for answer in (
            await over_tls(receiver, None, "localhost"),
            await over_tls(receiver, certificates, "other.example.com"),
        ):
            assert (answer.status, answer.error) == (None, "its TLS certificate is not valid")
        assert len(receiver.got) == 1
