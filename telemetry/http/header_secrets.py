"""Secrets that travel in HTTP headers: the join token, API keys.

A header keeps no spaces around its value and no character but printable ASCII for sure. A secret file that ends with a
newline (``echo`` writes one, and so do Kubernetes secrets made of it) means what stands before it.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, SecretStr

_FIT = re.compile(r"[\x20-\x7e]*")


def header_secret(value: str) -> str:
    """``value`` without the white space around it. Raises ``ValueError`` for one that no header can carry."""
    text = value.strip()
    if not _FIT.fullmatch(text):
        raise ValueError("use printable ASCII characters on one line: it is sent as an HTTP header")
    return text


def _checked(secret: SecretStr) -> SecretStr:
    return SecretStr(header_secret(secret.get_secret_value()))


HeaderSecret = Annotated[SecretStr, AfterValidator(_checked)]
"""The setting of such a secret."""
