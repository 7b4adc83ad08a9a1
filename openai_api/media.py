"""Check the media URLs of a request: engines fetch them, from inside the fleet's network.

A ``data:`` URL brings its media along and always passes. Anything else must be a plain http or https URL of a host that
is allowed by its exact name. URLs that two parsers may read differently (user names, backslashes, spaces, characters
that are not ASCII) are refused, so that an engine fetches from the host that was checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from queue_schemas.errors import BadRequest

ANY_HOST = "*"
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]*[a-z0-9])?)*|\[[0-9a-f:.]+\]")
_URL = re.compile(r"https?://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?#][!-\[\]-~]*)?", re.IGNORECASE)
_DATA = re.compile(r"data:", re.IGNORECASE)
_SCHEME = re.compile(
    r"[\x00-\x20\s]*(?:(?:https?|ftps?|file|s3|gs)\s*:|[a-z][a-z0-9+.-]*\s*:\s*[/\\]|[/\\]{2})", re.IGNORECASE
)
_DROPPED = str.maketrans("", "", "\t\r\n")
"""What URL parsers take out before they look at the scheme."""

_MEDIA_URLS = frozenset({"image_url", "video_url", "audio_url", "file_url", "document_url", "server_url"})
"""Fields whose text is a URL, however it is written."""
_MEDIA = frozenset(
    {
        *("url", "uri", "image", "images", "video", "videos", "audio", "audios", "file", "file_data", "input_audio"),
        *("data", "source"),
    }
)
"""Fields whose text is a URL if it begins with a scheme, and else base64 or an id."""
_FETCHED_NOWHERE = frozenset(
    {
        *("metadata", "functions", "response_format", "structured_outputs", "guided_json", "output_config"),
        *("output_format", "text", "tool_choice"),
    }
)
"""Fields of a request that engines pass on or compile, and never fetch from: any URL may stand there."""
_CITED = frozenset({"url_citation", "web_search_result_location", "search_result", "search_result_location"})
"""Parts that say where a text came from."""
_SAID = frozenset({"url", "source", "data"})
"""Fields that cite, or hold text, in parts of such a type."""
_FIELDS = _MEDIA_URLS | _MEDIA
_NESTS = frozenset({dict, list})
_SHORT = 32


@dataclass(frozen=True, slots=True)
class MediaHosts:
    """The hosts from which media may be fetched. ``any``: from every one."""

    hosts: frozenset[str] = frozenset()
    any: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Those of a setting: exact names, or ``*``. Raises ``ValueError`` for what is no host."""
        hosts = frozenset(name.lower() for name in names)
        for host in hosts - {ANY_HOST}:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is not a host: write its exact name, such as images.example.com, or *")
        return cls(hosts - {ANY_HOST}, ANY_HOST in hosts)

    def allow(self, url: str) -> bool:
        """Whether an engine may be given ``url``."""
        if _DATA.match(url):
            return True
        found = _URL.fullmatch(url)
        return found is not None and (self.any or found[1].lower() in self.hosts)


def check_media(request: Mapping[str, Any], hosts: MediaHosts) -> None:
    """Refuse with ``BadRequest`` a ``request``, a parsed body, that names media at a URL that is not allowed, wherever
    it stands."""
    stack: list[Any] = []
    for name, value in request.items():
        if name == "tools":
            _check_tools(value, hosts)
            continue
        if name in _FETCHED_NOWHERE:
            continue
        if name in _FIELDS:
            _check(value, name, hosts, strict=name in _MEDIA_URLS)
        if type(value) in _NESTS:
            stack.append(value)
    while stack:
        node = stack.pop()
        if type(node) is list:
            # Token ids come in long lists: their types are looked at together.
            if len(node) < _SHORT or not _NESTS.isdisjoint(map(type, node)):
                stack += [item for item in node if type(item) in _NESTS]
            continue
        for name, value in node.items():
            if name in _FIELDS:
                _check_part(node, name, value, hosts)
            if type(value) in _NESTS and not (name == "input" and node.get("type") == "tool_use"):
                stack.append(value)


def _check_tools(tools: Any, hosts: MediaHosts) -> None:
    """Of tools only the servers are reached; in the schemas of their arguments any URL may stand."""
    for tool in tools if type(tools) is list else ():
        if type(tool) is dict and "server_url" in tool:
            _check(tool["server_url"], "server_url", hosts, strict=True)


def _check_part(part: dict[str, Any], name: str, value: Any, hosts: MediaHosts) -> None:
    """Check one field of a content part, or of an object of the same form."""
    kind = part.get("type")
    if name in _MEDIA_URLS or (name == "url" and kind == "url"):
        _check(value, name, hosts, strict=True)
    elif not (name in _SAID and type(kind) is str and (kind in _CITED or kind == "text")):
        _check(value, name, hosts, strict=False)


def _check(value: Any, name: str, hosts: MediaHosts, *, strict: bool) -> None:
    """Check one value: a text, a list of texts, or an object with a ``url`` or ``uri``. ``strict``: its text is a URL
    in any case."""
    if type(value) is dict:
        for inner in ("url", "uri"):
            if type(value.get(inner)) is str:
                _check(value[inner], name, hosts, strict=True)
        return
    for url in value if type(value) is list else (value,):
        if type(url) is not str or not url or hosts.allow(url):
            continue
        if strict or _SCHEME.match(url[:64].translate(_DROPPED)):
            raise BadRequest(
                f"{name} names {url[:80]!r}, which engines may not fetch: send the media as a data: URL, or have "
                "the operator allow its host, written as a plain http(s) URL (setting media_domains, "
                "INFERQ_MEDIA_DOMAINS)",
                param=name,
            )
