"""Fixtures that any test may ask for, and the rule that nothing required may be skipped in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
import structlog

from broker import Broker, BrokerSettings
from tests.support.servers import Server, server_binary

# No limit on one example: a machine that others use too must not make a property fail.
hypothesis.settings.register_profile("inferq", deadline=None, max_examples=60)
hypothesis.settings.load_profile("inferq")

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

ALLOWED_SKIPS: frozenset[str] = frozenset()
"""Node ids that may be skipped even with ``INFERQ_REQUIRE=all``. None: what is required runs."""


HERE = Path(__file__).parent
PARTS = {
    "units": (HERE / "unit", HERE / "contract"),
    "alone": (HERE / "chaos", HERE / "fuzz", HERE / "integration" / "ray"),
}
"""What ``--part`` chooses: tests of parts; those that load the machine; and, as ``fleets``, all others, which start
whole fleets that mostly wait. Several run at once, but of those that load the machine."""
ANY_AT_ONCE = (HERE / "contract" / "test_model.py",)
"""Files whose tests may run side by side: each takes long and shares nothing. Tests of all others run in one row."""
LONGEST = tuple(
    HERE / name
    for name in (
        *("contract/test_model.py", "unit/simulator", "unit/inferq/test_invocation.py", "contract/test_guards.py"),
        *("integration/worker/test_faults.py", "integration/membership/test_model_swaps.py"),
        *("e2e/test_up.py", "e2e/test_commands.py", "e2e/test_outages.py", "e2e/test_autoscale.py"),
        *("e2e/test_worker_losses.py", "integration/untrusted", "integration/worker/test_engine_load.py"),
    )
)
"""What begins first where several share the work, so that nothing long is left for the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=[*PARTS, "fleets"], help="collect these tests alone")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of another part, nothing is as much as imported."""
    leads_on = any(place.is_relative_to(collection_path) for places in PARTS.values() for place in places)
    return None if leads_on or _is_chosen(collection_path, config) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if others := [item for item in items if not _is_chosen(item.path, config)]:  # of files that were named
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_chosen(item.path, config)]
    for item in items:
        if not _is_in(item.path, ANY_AT_ONCE):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(HERE))))
    items.sort(key=lambda item: not _is_in(item.path, LONGEST))


def _is_chosen(path: Path, config: pytest.Config) -> bool:
    """Whether ``--part`` asks for what lies there."""
    of = next((name for name, places in PARTS.items() if _is_in(path, places)), "fleets")
    return config.getoption("part") in {None, of}


def _is_in(path: Path, places: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def _require_all() -> bool:
    return os.environ.get("INFERQ_REQUIRE") == "all"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``INFERQ_REQUIRE=all`` a skipped test is a failed one."""
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that skips itself."""
    return _refuse_skip((yield))


def _refuse_skip(report: Report) -> Report:
    if report.skipped and _require_all() and report.nodeid not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"skipped, but INFERQ_REQUIRE=all: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """What a test sets up of the logs ends with it: a later one must not write to a stream that is closed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


QUICK = ("--hz", "100")
"""A server that looks each 10 ms, not 100, whether a read has waited long enough: many tests read that nothing came."""


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Valkey 9 for the whole session. Use ``valkey``, which empties it first."""
    with Server(server_binary(), tmp_path_factory.mktemp("valkey"), QUICK) as server:
        yield server


@pytest.fixture(scope="session")
def redis7_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Redis 7.0 for the whole session. Use ``redis7``, which empties it first."""
    with Server(server_binary("redis"), tmp_path_factory.mktemp("redis7"), QUICK) as server:
        yield server


@pytest.fixture
def valkey(valkey_server: Server) -> Server:
    """An empty Valkey 9. Not to be killed: tests that do so start a server of their own (``own_valkey``)."""
    valkey_server.ask("FLUSHALL")
    return valkey_server


@pytest.fixture
def redis7(redis7_server: Server) -> Server:
    """An empty Redis 7.0, the oldest version supported."""
    redis7_server.ask("FLUSHALL")
    return redis7_server


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Server]:
    """A Valkey of this test alone: it may be killed, paused and restarted."""
    with Server(server_binary(), tmp_path / "own-valkey") as server:
        yield server


@pytest.fixture
async def broker(valkey: Server) -> AsyncIterator[Broker]:
    """A broker on an empty Valkey 9, with short limits."""
    broker = await Broker.connect(BrokerSettings(redis_url=valkey.url, retry_limit_ms=2_000))
    yield broker
    await broker.close()
