"""What the queue decides, as pure functions: no wait, no clock, no randomness, no network.

Roles call these functions, the simulator runs the same ones, and the contract suite compares the Lua scripts with
those that the queue must decide in one step. Each decision has a module of its own; import it from there.
"""

from __future__ import annotations

__all__: list[str] = []
