"""Where webhooks may go: what a tenant can write into a URL, and what can stand behind a name."""

from __future__ import annotations

import ipaddress

import pytest

from queue_schemas import BadRequest
from webhooks.core.url_rules import Target, UrlRules, check_url, is_public
from webhooks.settings import WebhookSettings

PUBLIC = UrlRules()
OPEN = UrlRules.allowing(["hooks.corp", "127.0.0.0/8", "fd00::/8"], allow_http=True)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://example.com/hook?token=a%20b", Target("https", "example.com", 443)),
        ("HTTPS://Hooks.Example.COM:8443", Target("https", "hooks.example.com", 8443)),
        ("https://xn--bcher-kva.example/", Target("https", "xn--bcher-kva.example", 443)),
        ("https://8.8.8.8/hook", Target("https", "8.8.8.8", 443)),
        ("https://[2606:4700::1111]:444/hook", Target("https", "2606:4700::1111", 444)),
        ("https://1.example.com", Target("https", "1.example.com", 443)),
    ],
)
def test_a_public_https_url_is_taken(url: str, target: Target) -> None:
    """What it names is what our client would connect to."""
    assert check_url(url, PUBLIC) == target


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "a.localhost",
        "redis",
        "db.internal",
        "metadata.google.internal",
        "printer.local",
        "127.0.0.1",
        "127.1",
        "127.0.0.1.",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.0x1",
        "example.0x",
        "0",
        "0.0.0.0",  # noqa: S104 - refused, not bound
        "10.0.0.7",
        "100.64.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.31.255.255",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::a00:1]",
        "[64:ff9b:1::808:808]",
        "[2002:7f00:1::]",
        "[2001:0:53aa:64c::]",
        "[2001:db8::1]",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[fd00:ec2::254]",
        "[fec0::1]",
        "[ff02::1]",
        "[v1.example]",
        "127%2e0%2e0%2e1",
        "\u2460\u2461\u2466.0.0.1",
        "b\u00fccher.example",
        "example.com\u3002evil",
        "example..com",
        "-example.com",
        "example.com.",
        "",
        ".",
        "a" * 64 + ".com",
        ".".join(["a" * 60] * 5),
    ],
)
def test_a_host_that_is_not_a_public_one_is_refused(host: str) -> None:
    """However it is spelled: addresses of this network, names without a dot, forms that parsers disagree about."""
    with pytest.raises(BadRequest, match="the webhook's URL") as refused:
        check_url(f"https://{host}/hook", PUBLIC)
    assert refused.value.param == "url"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "allow_http"),
        ("ftp://example.com/", "https://"),
        ("https:example.com", "https://"),
        ("https:/example.com", "https://"),
        ("//example.com", "https://"),
        ("javascript:alert(1)", "https://"),
        ("https://user:secret@example.com/", "user name"),
        ("https://example.com@127.0.0.1/", "user name"),
        ("https://127.0.0.1#@example.com/", "#"),
        ("https://example.com/#part", "#"),
        ("https://localhost[2606:4700::1]:8443/", "cannot be parsed"),
        ("https://[2606:4700::1]127.0.0.1/", "cannot be parsed"),
        ("https://example.com:0443/", "cannot be parsed"),
        ("https://example.com\\@127.0.0.1/", "characters"),
        ("https://example.com/a b", "characters"),
        ("https://example.com/\r\nhost: x", "characters"),
        (" https://example.com/", "characters"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:65536/", "cannot be parsed"),
        ("https://example.com:8a/", "cannot be parsed"),
        ("https://[::1", "cannot be parsed"),
        ("https://example.com/" + "a" * 2048, "2048"),
        ("", "characters"),
    ],
)
def test_a_url_of_another_kind_is_refused_with_its_reason(url: str, why: str) -> None:
    """[H2] Each sentence says what is wrong, and none repeats what may be a secret."""
    with pytest.raises(BadRequest, match=why) as refused:
        check_url(url, PUBLIC)
    assert "secret" not in refused.value.message


def test_the_operator_may_allow_more() -> None:
    """Plain http, hosts by name and networks by number are allowed where the settings say so, and only those."""
    for url in ("http://example.com/", "https://hooks.corp/", "http://127.0.0.1:81/", "https://[fd00::7]/"):
        check_url(url, OPEN)
    for url in (
        "https://other.corp.internal/",
        "https://10.0.0.1/",
        "https://2130706433/",
        "https://x.hooks.corp.lan/",
    ):
        with pytest.raises(BadRequest):
            check_url(url, OPEN)
    assert OPEN.allows("hooks.corp", ipaddress.ip_address("10.0.0.1"))
    assert OPEN.allows("a.example", ipaddress.ip_address("::ffff:127.0.0.1"))
    assert not OPEN.allows("a.example", ipaddress.ip_address("10.0.0.1"))
    assert not PUBLIC.allows("localhost", ipaddress.ip_address("127.0.0.1"))


def test_an_address_that_carries_a_public_one_is_public() -> None:
    """A name looked up through NAT64 or 6to4 is judged by where its packets end up."""
    for address in ("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::", "2606:4700::1111", "1.1.1.1"):
        assert is_public(ipaddress.ip_address(address)), address


def test_what_is_allowed_must_be_readable() -> None:
    """A misspelt network is refused at the start, not at the first webhook."""
    settings = WebhookSettings(allow_private=["10.0.0.0/8", "hooks.corp"], allow_http=True)
    assert settings.rules.hosts == {"hooks.corp"}
    for wrong in ("10.0.0.1/8", "http://hooks.corp", "*", ""):
        with pytest.raises(ValueError, match="is not a host name"):
            WebhookSettings(allow_private=[wrong])
