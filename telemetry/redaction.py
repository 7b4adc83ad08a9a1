"""Hide secrets in URLs, texts and command-line arguments before they are logged, shown or handed out."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SECRET_PARAMETER = re.compile(r"([?&;][^=&;?#@]*(?:passw|secret|token)[^=&;?#@]*=)[^&#]*", re.IGNORECASE)

_IN_TEXT = re.compile(r"(://[^\s/:@]*):[^\s\"']*@")
_SECRET_WORDS = ("passw", "secret")
_SECRET_ENDS = ("api-key", "apikey", "access-key", "auth-key", "-token")


def redact_text(text: str) -> str:
    """``text`` with the passwords of the URLs in it hidden."""
    return _IN_TEXT.sub(r"\1:***@", text) if "://" in text and "@" in text else text


def redact_arguments(arguments: Iterable[str]) -> list[str]:
    """A command's ``arguments`` without the values of options whose names speak of a secret, and without passwords in
    URLs."""
    shown, secret = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            secret = _is_secret(name)
            shown.append(f"{name}=***" if secret and equals else f"{name}{equals}{redact_url(value)}")
        else:
            shown.append("***" if secret else redact_url(argument))
    return shown


def _is_secret(option: str) -> bool:
    name = option.removeprefix("--").lower().replace("_", "-")
    return name == "token" or name.endswith(_SECRET_ENDS) or any(word in name for word in _SECRET_WORDS)


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
