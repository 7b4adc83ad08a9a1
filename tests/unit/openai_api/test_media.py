"""Which URLs of media a request may name."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from openai_api.media import MediaHosts, check_media
from queue_schemas import BadRequest

NONE = MediaHosts()
SOME = MediaHosts.of(["images.example.com", "Cdn.example.com", "10.1.2.3"])
PIXEL = "data:image/png;base64,iVBORw0KGgo="
META = "http://169.254.169.254/latest/meta-data"


def check(request: Any, hosts: MediaHosts = NONE, body: bytes | None = None) -> None:
    check_media(request if body is None else orjson.loads(body), hosts)


def chat(part: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]}


def deep(part: Any, levels: int) -> Any:
    return part if not levels else {"content": [deep(part, levels - 1)]}


@pytest.mark.parametrize(
    "url",
    [
        META,
        "https://example.com/cat.png",
        "HTTP://EXAMPLE.COM/",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://example.com/a",
        "gopher://example.com/",
        "//example.com/a.png",
        r"\\example.com\share",
        " http://example.com/",
        "\thttp://example.com/",
        "ht\ntp://example.com/",
        "\x01http://example.com/",
        "http:example.com",
        "http://127.0.0.1:9000/fabric/v1/broker",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://user@images.example.com@evil.example/",
        "/etc/passwd",
    ],
)
@pytest.mark.parametrize(
    "part",
    [
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda url: {"type": "image_url", "image_url": url},
        lambda url: {"image_url": url},
        lambda url: {"type": "video_url", "video_url": {"url": url}},
        lambda url: {"type": "audio_url", "audio_url": {"url": url}},
        lambda url: {"type": "input_image", "image_url": url},
        lambda url: {"type": "input_file", "file_url": url},
        lambda url: {"type": "image", "source": {"type": "url", "url": url}},
        lambda url: {"type": "document", "source": {"url": url}},
        lambda url: {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]},
        lambda url: [[[{"type": "image_url", "image_url": {"url": url}}]]],
        lambda url: {"type": "url_citation", "uuid": "1", "image_url": {"url": url}},
        lambda url: deep({"type": "image_url", "image_url": {"url": url}}, 400),
    ],
)
def test_media_is_fetched_from_nowhere_by_default(url: str, part: Any) -> None:
    """[E1] Whatever the scheme, the spelling and the nesting: refused, in words that name the setting."""
    with pytest.raises(BadRequest, match="media_domains"):
        check(chat(part(url)))


@pytest.mark.parametrize(
    "request_",
    [
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": META}]}]},
        {"input": [{"type": "function_call_output", "output": [{"type": "input_file", "file_url": META}]}]},
        {"documents": [{"content": [{"type": "image_url", "image_url": {"url": META}}]}]},
        {"query": {"content": [{"type": "image_url", "image_url": {"url": META}}]}},
        {"images": [PIXEL, META]},
        {"data": {"data": META, "data_format": "url"}},
        {"tools": [{"type": "mcp", "server_label": "x", "server_url": META}]},
        {"mcp_servers": [{"type": "url", "url": META}]},
        {"prompt": "x", "image_url": META},
        {"image_url": [META]},
    ],
)
def test_media_is_found_in_every_api(request_: dict[str, Any]) -> None:
    """[E1] Responses, reranking, pooling, tools that engines call, and fields of no API at all."""
    with pytest.raises(BadRequest, match="media_domains"):
        check({"model": "m", **request_})


@pytest.mark.parametrize(
    "body",
    [
        rb'{"messages":[{"content":[{"\u0069mage_\u0075rl":{"url":"http://169.254.169.254/"}}]}]}',
        rb'{"messages":[{"content":[{"image_url":{"\u0075\u0072\u006c":"http:\/\/169.254.169.254/"}}]}]}',
        rb'{"messages":[{"content":[{"image_url":{"url":"\u0068ttp://169.254.169.254/"}}]}]}',
        rb'{"messages":[{"content":[{"image_url":"data:,x","image_url":"http://169.254.169.254/"}]}]}',
    ],
)
def test_escapes_and_doubled_names_hide_nothing(body: bytes) -> None:
    """[E1] What is judged is what an engine reads: of two fields of one name the last."""
    with pytest.raises(BadRequest, match="media_domains"):
        check(None, body=body)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://images.example.com/a.png?x=1#y", True),
        ("http://IMAGES.example.com:8080", True),
        ("https://cdn.example.com/", True),
        ("http://10.1.2.3/a", True),
        ("https://images.example.com.evil.example/", False),
        ("https://evil.images.example.com/", False),
        ("https://images.example.com./", False),
        ("https://images.example.com@evil.example/", False),
        ("https://evil.example\\@images.example.com/", False),
        ("https://images.example.com\\@evil.example/", False),
        ("https://images.example.com#@evil.example/", True),
        ("https://images.example.com /", False),
        ("https://images.example.com\n.evil.example/", False),
        ("https://images。example。com/", False),
        ("https://\u0131mages.example.com/", False),
        ("https://images%2eexample.com/", False),
        ("https:/images.example.com/", False),
        ("https:images.example.com", False),
        ("ftp://images.example.com/", False),
        ("file://images.example.com/etc/passwd", False),
        ("http://167838211/a", False),
        ("DATA:image/png;base64,AA==", True),
        (" data:image/png;base64,AA==", False),
    ],
)
def test_hosts_are_allowed_by_their_exact_names(url: str, allowed: bool) -> None:
    """[E1] Not by suffixes, and only in spellings that no two parsers read differently."""
    assert SOME.allow(url) is allowed


@pytest.mark.parametrize("hosts", [["*"], ["*", "images.example.com"]])
def test_any_host_is_still_http(hosts: list[str]) -> None:
    """[E1] A star opens hosts, not schemes."""
    any_host = MediaHosts.of(hosts)
    assert any_host.allow(META)
    assert not any_host.allow("file:///etc/passwd")


@pytest.mark.parametrize("name", ["", "https://example.com", "*.example.com", "a b", "example.com/x", "bücher.example"])
def test_what_is_no_host_is_refused_at_the_start(name: str) -> None:
    """[E1] A setting that could never match is a mistake."""
    with pytest.raises(ValueError, match="is not a host"):
        MediaHosts.of([name])


@pytest.mark.parametrize(
    "request_",
    [
        chat({"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}),
        chat({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
        chat({"type": "file", "file": {"file_id": "file-1", "filename": "a.pdf"}}),
        chat({"type": "text", "text": "see http://169.254.169.254/ or file:///etc/passwd"}),
        chat({"type": "document", "source": {"type": "text", "data": "https://example.com is a site"}}),
        chat({"type": "search_result", "source": "https://example.com/a", "content": [{"type": "text", "text": "x"}]}),
        chat({"type": "tool_use", "id": "1", "name": "show", "input": {"image_url": "https://example.com/a.png"}}),
        {"messages": [{"role": "user", "content": "http://example.com"}], "metadata": {"image_url": META}},
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {"image_url": {"default": META}}}}}]},
        {"text": {"format": {"schema": {"examples": [{"url": "https://example.com"}]}}}},
        {"input": [{"content": [{"type": "output_text", "annotations": [{"type": "url_citation", "url": META}]}]}]},
        {"documents": ["https://example.com", {"text": "x"}], "query": "file:///etc/passwd"},
    ],
)
def test_what_engines_do_not_fetch_passes(request_: dict[str, Any]) -> None:
    """[E1] Media that a request brings along, texts, citations, schemas, metadata and arguments of tools."""
    check(request_)
