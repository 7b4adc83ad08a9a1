"""What a worker's credential allows, and the file that says so."""

from __future__ import annotations

import hashlib

import pytest

from queue_schemas import CannotStart, Lane, PermissionRefused
from router.workers.rules import WorkerScope, parse_credentials

DIGEST = hashlib.sha256(b"key").hexdigest()


def scope(**fields: object) -> WorkerScope:
    return WorkerScope.model_validate({"name": "edge", **fields})


def test_a_file_of_credentials_is_read() -> None:
    """Each key leads to the scope of its table; while a key is replaced two lead there."""
    other = hashlib.sha256(b"other").hexdigest()
    found = parse_credentials(
        f'[edge]\nsha256 = ["{DIGEST}", "{other}"]\nmodels = ["a", "b-*"]\nlanes = ["batch"]\nworkers = 2\n', "f"
    )
    assert found[bytes.fromhex(DIGEST)] == found[bytes.fromhex(other)]
    assert found[bytes.fromhex(DIGEST)].name == "edge"
    assert found[bytes.fromhex(DIGEST)].lanes == (Lane.BATCH,)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[edge", "not valid TOML"),
        ("edge = 1", "outside a table"),
        ("[edge]\nsha256 = ['short']", "64 hex digits"),
        ("[edge]\nmodel = 'a'", "edge"),
        ("['a.b']\n", "no dot"),
        ("['a b']\n", "worker id"),
        (f"[a]\nsha256 = ['{DIGEST}']\n[b]\nsha256 = ['{DIGEST}']\n", "has a key that"),
        ("[edge]\nworkers = 0", "workers"),
        ("[edge]\nlanes = ['fast']", "lanes"),
        ("[edge]\nothers = false", "needs a region"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, what: str) -> None:
    """The Router does not start, and its message names the file and the table."""
    with pytest.raises(CannotStart, match=what) as failure:
        parse_credentials(text, "workers.toml")
    assert "workers.toml" in failure.value.message


def test_a_worker_has_the_name_of_its_credential() -> None:
    """Or one below it; a name that only begins alike is another's."""
    for allowed in ("edge", "edge.1", "edge.a-b"):
        scope().check_worker(allowed)
    for refused in ("edge2", "edge-1", "other", "ed"):
        with pytest.raises(PermissionRefused):
            scope().check_worker(refused)


def test_models_lanes_and_regions_are_those_of_the_credential() -> None:
    """A star stands for any rest of a name, at its end alone."""
    limited = scope(models=["a", "b-*"], lanes=["interactive"], region="eu")
    limited.check_models(["a", "b-1", "b-"])
    limited.check_lanes([Lane.INTERACTIVE])
    limited.check_region("eu")
    for model in ("aa", "b", "xb-1"):
        with pytest.raises(PermissionRefused):
            limited.check_models(["a", model])
    with pytest.raises(PermissionRefused):
        limited.check_lanes([Lane.BATCH])
    for region in ("", "us"):
        with pytest.raises(PermissionRefused):
            limited.check_region(region)


def test_the_join_token_has_no_limits() -> None:
    """Its holder is a member of the fleet."""
    unlimited = WorkerScope.unlimited()
    unlimited.check_worker("anybody")
    unlimited.check_models(["anything"])
    unlimited.check_lanes(Lane)
    unlimited.check_region("anywhere")
