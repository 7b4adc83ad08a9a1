"""``inferq config``: every setting in force, where its value comes from, and what it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from batches import BatchSettings
from broker import BrokerSettings
from inferq.autoscale.settings import AutoscaleSettings
from inferq.console import out, print_json
from inferq.ray_cluster import RaySettings
from inferq.tables import Column, Row, print_table
from manager.settings import ManagerSettings
from queue_schemas import CannotStart
from router.settings import RouterSettings
from storage import StorageSettings
from telemetry import RoleSettings, SettingFact, TelemetrySettings, explain_settings
from webhooks.settings import NotifierSettings, WebhookSettings
from worker.settings import WorkerSettings

TABLES: dict[str, type[RoleSettings]] = {
    settings.table: settings
    for settings in (
        RouterSettings,
        ManagerSettings,
        WorkerSettings,
        BatchSettings,
        RaySettings,
        AutoscaleSettings,
        BrokerSettings,
        StorageSettings,
        WebhookSettings,
        NotifierSettings,
        TelemetrySettings,
    )
}

_COLUMNS = (
    Column("SETTING"),
    Column("VALUE", shrinks=True),
    Column("FROM", 2),
    Column("VARIABLE", 3),
    Column("MEANING", 1, shrinks=True),
)


def read_facts(tables: Sequence[str] = ()) -> list[SettingFact]:
    """The settings of ``tables`` (all unless given). Raises ``CannotStart`` for a wrong value or an unknown table."""
    unknown = sorted(set(tables) - TABLES.keys())
    if unknown:
        raise CannotStart(f"there is no table {', '.join(unknown)}; known are {', '.join(TABLES)}")
    return [fact for table in tables or TABLES for fact in _facts_of(TABLES[table])]


def show_settings(tables: Sequence[str], *, as_json: bool) -> None:
    """Print them."""
    facts = read_facts(tables)
    if as_json:
        print_json([asdict(fact) for fact in facts])
        return
    for table in dict.fromkeys(fact.table for fact in facts):
        rows = [
            Row(
                (fact.name, fact.value, fact.origin, fact.variable, fact.description),
                "" if fact.origin == "default" else "bold",
            )
            for fact in facts
            if fact.table == table
        ]
        out.print(f"[{table}]", style="bold", markup=False)
        print_table(_COLUMNS, rows)
        out.print()


def _facts_of(settings: type[RoleSettings]) -> list[SettingFact]:
    if settings is not WorkerSettings:
        return explain_settings(settings.load())
    try:
        return explain_settings(settings.load())
    except CannotStart:
        # A worker needs a model, which is not set here. Other errors are raised again.
        facts = explain_settings(settings.load(model="(none)"))
        return [replace(fact, value="") if fact.name == "model" else fact for fact in facts]
