"""Web pages of other origins: what browsers are told, with every answer and before they ask."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from queue_schemas.headers import CLIENT_HEADERS

ANY_ORIGIN = "*"
EXPOSED_HEADERS = (
    *("x-request-id", "request-id", "location", "allow", "accept-encoding"),
    *("content-range", "accept-ranges", "etag"),
    *sorted(CLIENT_HEADERS),
)
"""What scripts may read of an answer's headers, beside those that they always may: SDKs in a page act upon them."""
MAX_AGE_S = 600
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


def check_origin(origin: str) -> str:
    """``origin`` as browsers write it. Raises ``ValueError`` if it is none."""
    if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is not an origin: write scheme and host, such as https://app.example.com, or *")
    return origin


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app`` that lets pages of ``origins`` call it; ``app`` itself if there are none.

    Keys travel in headers, which a script sets itself: no cookies are let through.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=_METHODS,
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
        max_age=MAX_AGE_S,
    )
