"""Blocks of options that several commands share, each declared once as a dataclass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

Command = TypeVar("Command", bound=Callable[..., None])


def with_blocks(command: Command) -> Command:
    """Give a Typer command the options of its parameters that are dataclasses.

    Each field of such a dataclass becomes an option, declared by the field's annotation and default; the command gets
    an instance. In the help, the options of blocks follow the command's own, and ``--json`` comes last.
    """
    hints = get_type_hints(command, include_extras=True)
    blocks: dict[str, type[Any]] = {}
    own: list[inspect.Parameter] = []
    shared: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        annotation: Any = hints[parameter.name]
        if not is_dataclass(annotation):
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation))
            continue
        blocks[parameter.name] = block = cast(type[Any], annotation)
        block_hints = get_type_hints(block, include_extras=True)
        shared += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=block_hints[field.name]
            )
            for field in fields(block)
        ]

    json = [parameter for parameter in own if parameter.name == "as_json"]
    parameters = [*(parameter for parameter in own if parameter not in json), *shared, *json]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, block in blocks.items():
            values[name] = block(**{field.name: values.pop(field.name) for field in fields(block)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run  # type: ignore[return-value]
