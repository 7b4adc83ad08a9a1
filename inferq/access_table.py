"""The table in ``docs/security.md`` of who may call which path, made from the services' own declarations.

``python -m inferq.access_table`` prints it, ``--write`` puts it into the document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from broker import BrokerSettings
from manager import ManagerService, ManagerSettings, create_app
from manager.probe import HttpWorkerProbe
from manager.service import open_broker
from queue_schemas import CannotStart
from router import RouterSettings, build_router
from storage import StorageSettings
from telemetry import MetricsRegistry
from telemetry.http.access import DeclaredRoute, declared
from telemetry.http.app import health_app
from worker.routes import Status, make_app

DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- access table: python -m inferq.access_table --write -->", "<!-- end of the access table -->"
_NOWHERE = "redis://127.0.0.1:1/0"


def declared_routes() -> dict[str, list[DeclaredRoute]]:
    """Every route of every service, with the settings that a service has by default. Connects to nothing."""
    broker = BrokerSettings.load(redis_url=_NOWHERE)
    manager = ManagerService(ManagerSettings.load(), open_broker(broker), HttpWorkerProbe(1.0), broker_url=_NOWHERE)
    router = build_router(RouterSettings.load(), broker, StorageSettings.load(url="memory://access-table"))
    return {
        "Router": router.declared_routes(),
        "Manager": declared(create_app(manager)),
        "Worker": declared(make_app(_no_status, lambda: None, MetricsRegistry("worker"), "")),
        "Batcher, notifier": declared(health_app("inferq", MetricsRegistry("batcher"), list)),
    }


def render(services: Mapping[str, Iterable[DeclaredRoute]]) -> str:
    """The table in Markdown. Raises ``ValueError`` for a route that declares no access."""
    lines = ["| service | path | methods | who may call it |", "|---|---|---|---|"]
    for service, routes in services.items():
        rows: dict[tuple[str, str], list[str]] = {}
        for route in routes:
            if route.access is None:
                raise ValueError(f"{service}: {route.method} {route.path} declares no access")
            rows.setdefault((route.path, route.access.value), []).append(route.method)
        lines += [
            f"| {service} | `{path}` | {', '.join(sorted(set(methods)))} | {access} |"
            for (path, access), methods in sorted(rows.items())
        ]
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """``text`` with the table between its marks replaced. Raises ``CannotStart`` if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise CannotStart(f"{DOCUMENT} has no place for the table: write {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _no_status() -> Status:
    raise NotImplementedError("no page is asked for here")


def main() -> int:
    """Print the table or write it."""
    parser = argparse.ArgumentParser(description="Who may call which path.")
    parser.add_argument("--write", action="store_true", help="put it into docs/security.md")
    table = render(declared_routes())
    if parser.parse_args().write:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), table))
    else:
        sys.stdout.write(f"{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
