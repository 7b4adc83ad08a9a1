"""Parse the command line of ``python -m <role>.service`` into settings: one flag per field."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence

from .settings import RoleSettings


def parse_settings(
    prog: str, description: str, argv: Sequence[str] | None, *tables: type[RoleSettings]
) -> list[RoleSettings]:
    """The settings of ``tables`` with the flags in ``argv`` (None: the process's own) on top, in the same order.

    Field ``join_token`` is ``--join-token``, and ``url`` of a table with prefixed flags ``--storage-url``; a switch
    also has its ``--no-`` form; a list is written ``a,b``, and one that its table calls repeatable takes every use of
    its flag. Raises ``CannotStart`` for a wrong value; a flag that does not exist ends the process with a usage line.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    for table in tables:
        group = parser.add_argument_group(f"[{table.table}]")
        for name, field in table.model_fields.items():
            flag, dest = table.flag(name), _dest(table, name)
            text = f"{field.description} ({table.variable(name)})".replace("%", "%%")
            if name in table.repeatable:
                metavar = flag.rpartition("-")[2].upper()
                again = f"{text}; may be repeated"
                group.add_argument(flag, dest=dest, default=None, action="append", metavar=metavar, help=again)
            elif field.annotation is bool:
                group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
            else:
                group.add_argument(flag, dest=dest, default=None, metavar=_choices(field.annotation), help=text)
    given = vars(parser.parse_args(argv))
    for table in tables:
        lists = [_dest(table, name) for name in table.repeatable]
        given |= {dest: ",".join(given[dest]) for dest in lists if given[dest] is not None}
    return [table.load(**{name: given[_dest(table, name)] for name in table.model_fields}) for table in tables]


def _dest(table: type[RoleSettings], name: str) -> str:
    """Where the parser keeps the flag of a field: two tables may have fields of one name."""
    return f"{table.table}_{name}" if table.prefixed else name


def _choices(annotation: object) -> str | None:
    return "|".join(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else None
