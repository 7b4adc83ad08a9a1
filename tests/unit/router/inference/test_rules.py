"""The rules about keys, sizes, deadlines and models, each alone."""

from __future__ import annotations

import hashlib

import pytest

from queue_schemas import (
    AuthenticationFailed,
    BadRequest,
    BodyTooLarge,
    CannotStart,
    ModelNotFound,
    NoWorker,
    Pool,
    Tenant,
)
from router.http.rules import announced_size, authenticate, check_size, parse_keys
from router.inference.rules import read_deadline
from router.model_directory import Directory, PoolEntry, check_model


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_are_parsed_from_lines_and_commas() -> None:
    """Comments and blank lines are skipped; tenant names may contain any printable character."""
    text = f"# ours\n{digest('a')}:acme inc\n\n{digest('b').upper()} : x".replace(" : x", ":x")
    keys = parse_keys(text + f",{digest('c')}:y # last", "here")
    assert sorted(keys.values()) == ["acme inc", "x", "y"]


@pytest.mark.parametrize("line", ["sk-plain", "abc:tenant", f"{'0' * 64}:", f"{'0' * 64}"])
def test_a_wrong_key_line_is_named(line: str) -> None:
    """A key that is not hashed, or has no tenant, stops the start, and never shows in full."""
    with pytest.raises(CannotStart, match=r"keys\.txt, line 2") as caught:
        parse_keys(f"\n{line}", "keys.txt")
    assert "sk-plain" not in str(caught.value)


def test_a_key_authenticates_its_tenant_only() -> None:
    """The right key gives its tenant; a missing, empty or unknown one is refused with how to send it."""
    keys = parse_keys(f"{digest('sk-1')}:acme,{digest('')}:nobody", "here")
    assert authenticate(keys, b"Bearer sk-1", b"") == "acme"
    assert authenticate(keys, b"bearer  sk-1 ", b"") == "acme"
    assert authenticate(keys, b"", b"sk-1") == Tenant("acme")
    for authorization, api_key in ((b"", b""), (b"Bearer ", b"sk-1"), (b"Bearer x", b"sk-1"), (b"sk-1", b"")):
        with pytest.raises(AuthenticationFailed, match="Bearer KEY"):
            authenticate(keys, authorization, api_key)


def test_sizes_have_limits() -> None:
    """The limit itself passes, one more does not."""
    check_size(10, 10)
    with pytest.raises(BodyTooLarge):
        check_size(11, 10)
    assert announced_size(None) == 0
    assert announced_size(b"12") == 12
    for header in (b"-1", b"x", b"9" * 30):
        with pytest.raises(BadRequest):
            announced_size(header)


def test_a_deadline_is_read_and_bounded() -> None:
    """The header counts before the body's timeout and that before the default; the maximum bounds all."""
    assert read_deadline(None, None, 5, 50) == 5
    assert read_deadline(b"7", None, 5, 50) == 7
    assert read_deadline(b"7", 0.02, 5, 50) == 7
    assert read_deadline(b"700", None, 5, 50) == 50
    assert read_deadline(None, 0.02, 5, 50) == 20
    assert read_deadline(None, 1e-9, 5, 50) == 1
    assert read_deadline(None, 2**64, 5, 50) == read_deadline(None, 1e300, 5, 50) == 50
    for header in (b"0", b"-5", b"1.5", b"soon", b"9" * 20):
        with pytest.raises(BadRequest):
            read_deadline(header, 0.02, 5, 50)


def test_models_are_known_served_or_neither() -> None:
    """An unknown model is not found; a known one without a worker is refused only where the policy says so."""
    directory = Directory({Pool("idle"): PoolEntry(0, 0, 1), Pool("busy"): PoolEntry(1, 4, 1)})
    check_model("busy", directory, "refuse")
    check_model("idle", directory, "queue")
    with pytest.raises(NoWorker):
        check_model("idle", directory, "refuse")
    with pytest.raises(ModelNotFound, match="busy, idle"):
        check_model("none", directory, "queue")
    with pytest.raises(ModelNotFound, match="no worker has registered"):
        check_model("none", Directory(), "queue")
    many = Directory({str(n): PoolEntry(0, 0, 1) for n in range(50)})
    with pytest.raises(ModelNotFound, match=r", \.\.\."):
        check_model("none", many, "queue")
