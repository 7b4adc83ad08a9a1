"""Passwords in URLs: hidden before a URL is shown, left out of one that is handed out."""

from __future__ import annotations

import re

_SECRET_PARAMETER = re.compile(r"([?&;][^=&;?#@]*(?:passw|secret|token)[^=&;?#@]*=)[^&#]*", re.IGNORECASE)


def redact_url(url: str) -> str:
    """``url`` with its password hidden, for logs and errors; also what is no valid URL, where too much is hidden rather
    than too little. A user's name stays, and so do parameters whose names do not speak of a secret."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme, rest = "", url
    rest = _SECRET_PARAMETER.sub(r"\1***", rest)
    # Up to the last @: a password that was not percent-encoded may hold a slash or an @ itself.
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{slashes}{user}:***@{place}" if at and colon else f"{scheme}{slashes}{rest}"


def without_credentials(url: str) -> str:
    """``url`` without its user, password and whatever parameter speaks of a secret: a URL to be handed out.

    Several URLs may stand between commas (``redis+cluster://...``); what is no URL comes back empty.
    """
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return ""
    place, question, query = rest.rpartition("@")[2].partition("?")
    kept = [part for part in query.split("&") if not _SECRET_PARAMETER.match(f"?{part}")]
    return f"{scheme}://{place}" + (f"{question}{'&'.join(kept)}" if any(kept) else "")


def has_credentials(url: str) -> bool:
    """Whether ``url`` carries a user, a password or another secret."""
    return bool(url) and without_credentials(url) != url
