"""All of the fabric on one machine: each role a process of its own, started, watched, stopped in order."""

from .plan import RoleSpec, StackOptions, StackPlan, plan_stack
from .run import RunningStack, run_stack

__all__ = ["RoleSpec", "RunningStack", "StackOptions", "StackPlan", "plan_stack", "run_stack"]
