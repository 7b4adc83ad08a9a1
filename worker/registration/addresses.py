"""Where a worker finds its Managers or Routers, and how it shows them who it is."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from queue_schemas import JOIN_TOKEN_HEADER, CannotStart

from ..settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Addresses:
    """``urls`` in the order in which they are tried; ``headers`` of each call; ``tls``: None for the system's
    certificates."""

    urls: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, settings: WorkerSettings) -> Self:
        """Those of the settings. Raises ``CannotStart`` for certificates that cannot be read."""
        headers = {}
        if key := settings.key.get_secret_value():
            headers["authorization"] = f"Bearer {key}"
        if token := settings.join_token.get_secret_value():
            headers[JOIN_TOKEN_HEADER] = token
        return cls(settings.manager_urls, headers, _tls(settings))


def _tls(settings: WorkerSettings) -> ssl.SSLContext | None:
    if not (settings.tls_ca_file or settings.tls_cert_file):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca_file or None)
        if settings.tls_cert_file:
            context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise CannotStart(f"the certificates of --tls-ca-file and --tls-cert-file cannot be read: {error}") from error
    return context
