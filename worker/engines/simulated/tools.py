"""When a simulated engine calls a function, and how long it thinks.

It calls the function that ``tool_choice`` names, the first one where a call is required, and else the first whose name
stands in the user's last message. It thinks where ``reasoning_effort`` asks for it.
"""

from __future__ import annotations

from typing import Any

_THOUGHTS = {"minimal": 2, "low": 4, "medium": 8, "high": 16}


def function_to_call(fields: dict[str, Any], last_user: str) -> str:
    """The name of the function that is called; empty if none is."""
    tools, choice = fields.get("tools"), fields.get("tool_choice", "auto")
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    names = [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else None
        return named if named in names else ""
    if choice == "required":
        return next(iter(names), "")
    return next((name for name in names if name in last_user), "") if choice == "auto" else ""


def thinking(fields: dict[str, Any]) -> int:
    """How many tokens are thought."""
    return _THOUGHTS.get(str(fields.get("reasoning_effort")), 0)
