"""No password of a URL is ever shown."""

from __future__ import annotations

import pytest

from telemetry import redact_url
from telemetry.redaction import redact_arguments


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://user@host", "redis://user@host"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("redis://host/0?client_name=x", "redis://host/0?client_name=x"),
        ("rediss://user:hidden@host:1/0", "rediss://user:***@host:1/0"),
        ("redis://:hidden@host", "redis://:***@host"),
        ("redis://:hid/den@host/0", "redis://:***@host/0"),
        ("redis://:hid?den@host/0", "redis://:***@host/0"),
        ("redis://u:hid@den@host", "redis://u:***@host"),
        ("redis://u:hid://den@host", "redis://u:***@host"),
        ("user:hidden@host", "user:***@host"),
        ("redis://host?password=hidden&db=1", "redis://host?password=***&db=1"),
        ("redis://host?db=1&ssl_Password=hid@den", "redis://host?db=1&ssl_Password=***"),
        ("http://host/?client_secret=hidden", "http://host/?client_secret=***"),
        (
            "redis+sentinel://:hidden@h1,h2/svc?sentinel_password=hidden",
            "redis+sentinel://:***@h1,h2/svc?sentinel_password=***",
        ),
    ],
)
def test_passwords_are_hidden_and_the_rest_stays(url: str, shown: str) -> None:
    """In the authority, however badly it is written, and in parameters that speak of a secret."""
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("serve m --port 1 --api-key hid den --seed 0", "serve m --port 1 --api-key *** *** --seed 0"),
        ("--api-key=hidden --hf_token hidden", "--api-key=*** --hf_token ***"),
        ("--ssl-keyfile-password hidden --token hidden", "--ssl-keyfile-password *** --token ***"),
        (
            "--otlp-endpoint http://u:hidden@h:1 --x=http://u:hidden@h",
            "--otlp-endpoint http://u:***@h:1 --x=http://u:***@h",
        ),
        (
            "--max-num-batched-tokens 8192 --tokenizer t --kv-cache-dtype fp8",
            "--max-num-batched-tokens 8192 --tokenizer t --kv-cache-dtype fp8",
        ),
    ],
)
def test_secrets_of_arguments_are_hidden_and_the_rest_stays(arguments: str, shown: str) -> None:
    """[H24] An engine's own API key and tokens are given to it as options; `inferq config` and logs show neither."""
    assert redact_arguments(arguments.split()) == shown.split()
