"""When a simulated engine calls a function, with which arguments, and how long it thinks.

It calls the function that ``tool_choice`` names, the first one where a call is required, and else the first whose name
stands in the user's last message. The arguments are an instance of the function's schema. It thinks where
``reasoning_effort`` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .refusal import Fields, RefusedRequest
from .structured import Shape, json_shape

_THOUGHTS = {"minimal": 2, "low": 4, "medium": 8, "high": 16}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called. ``parameters`` is the JSON schema of its arguments."""

    name: str
    parameters: Any

    @property
    def arguments(self) -> Shape:
        """The shape of a call's arguments."""
        return json_shape(self.parameters, f"the parameters of tool {self.name}")


def chat_tools(fields: Fields) -> list[Tool]:
    """The tools of a chat, each ``{"type": "function", "function": {"name": ..., "parameters": ...}}``."""
    return [_tool(_typed(tool).get("function"), "parameters") for tool in tool_list(fields)]


def response_tools(fields: Fields) -> list[Tool]:
    """The tools of a response, each ``{"type": "function", "name": ..., "parameters": ...}``."""
    return [_tool(_typed(tool), "parameters") for tool in tool_list(fields)]


def tool_list(fields: Fields) -> list[Any]:
    """The ``tools`` of a request, each an object."""
    tools = fields.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RefusedRequest("tools: Input should be a list of objects", param="tools")
    return tools


def tool_named(value: Any, schema_field: str) -> Tool:
    """The tool that ``value`` describes, whose schema stands in ``schema_field``."""
    return _tool(value, schema_field)


def tool_to_call(tools: Sequence[Tool], choice: Any, last_user: str) -> Tool | None:
    """What ``tool_choice`` of a chat or a response makes of ``tools``; None if nothing is called."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        names = {_name_in(tool) for tool in allowed.get("tools", ())}
        tools, choice = [tool for tool in tools if tool.name in names], allowed.get("mode")
    if isinstance(choice, dict):
        name = _name_in(choice)
        if choice.get("type") != "function" or not name:
            raise RefusedRequest("tool_choice: a simulated engine calls functions only", param="tool_choice")
        return required_tool(tools, name)
    if choice in (None, "auto"):
        return next((tool for tool in tools if tool.name in last_user), None)
    if choice == "required":
        return required_tool(tools)
    if choice != "none":
        raise RefusedRequest(
            "tool_choice: Input should be 'none', 'auto', 'required' or name a function", param="tool_choice"
        )
    return None


def required_tool(tools: Sequence[Tool], name: str = "") -> Tool:
    """The tool ``name``, or the first one. Raises :class:`RefusedRequest` if there is none."""
    found = next((tool for tool in tools if not name or tool.name == name), None)
    if found is None:
        wanted = f"tool_choice names {name!r}, which is not in tools" if name else "tool_choice needs at least one tool"
        raise RefusedRequest(wanted, param="tool_choice")
    return found


def thinking(fields: Fields) -> int:
    """How many tokens are thought."""
    return _THOUGHTS.get(str(fields.get("reasoning_effort")), 0)


def _typed(tool: Fields) -> Fields:
    if tool.get("type") != "function":
        raise RefusedRequest(
            f"tools: type {tool.get('type')!r} is not supported by a simulated engine, only 'function'", param="tools"
        )
    return tool


def _tool(value: Any, schema_field: str) -> Tool:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise RefusedRequest("tools: each function has a name", param="tools")
    schema = value.get(schema_field)
    return Tool(name, _NO_PARAMETERS if schema in (None, {}) else schema)


def _name_in(value: Any) -> str:
    """The name that ``value`` gives, as a chat (below ``function``) or a response (directly) writes it."""
    if not isinstance(value, dict):
        return ""
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
