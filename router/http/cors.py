"""CORS: lets web pages of the configured origins call the Router."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from queue_schemas.headers import CLIENT_HEADERS

ANY_ORIGIN = "*"
EXPOSED_HEADERS = (
    *("x-request-id", "request-id", "x-inferq-service-tier", "location", "allow", "accept-encoding"),
    *("content-range", "accept-ranges", "etag"),
    *sorted(CLIENT_HEADERS),
)
"""Response headers that scripts may read beside the safelisted ones: SDKs in a page act on them."""
MAX_AGE_S = 600
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


def check_origin(origin: str) -> str:
    """``origin`` as browsers write it. Raises ``ValueError`` if it is none."""
    if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"{origin!r} is not an origin: write scheme and host, such as https://app.example.com, or *")
    return origin


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app`` behind CORS for pages of ``origins``; ``app`` itself if there are none.

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
