"""The real scripts agree with a model of the contract, whatever is called in whatever order; and would not if they had
a guard less.

``make model`` runs longer, from another seed each time; a failure prints the shortest calls that lead to it.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

from tests.support.queue import Backend, FakeBackend

from .machine import QueueMachine
from .model_records import Disagreement
from .rewriting import Rewrite

EXAMPLES = int(os.environ.get("INFERQ_MODEL_EXAMPLES", "0"))
"""How many orders of calls are tried on each server; 0: the few of every day, always the same."""
STEPS = int(os.environ.get("INFERQ_MODEL_STEPS", "40"))
FEW = {"fakeredis": 25, "valkey": 25, "redis7": 15}
MUTANTS = {
    "fence": Rewrite("fence", "local same = job.epoch == epoch and job.aid == aid", "local same = true"),
    "marker": Rewrite("notify", "send(router, 'm', marker, ids)", "local _ = router"),
    "tombstone": Rewrite("lifecycle", "leave_tombstone(job.id,", "call('DEL', P .. 'job:' .. job.id,"),
    "idempotent claim": Rewrite("claim", "if last[1] == seq then", "if false then"),
    "renewal stop": Rewrite("renew", "if is_fenced(session_id) then return -1 end", ""),
    "deadline check": Rewrite("claim", "job and tonumber(job.deadline) <= now", "false"),
    "one is asked for each": Rewrite("preemption", "mark(job, 'ZADD', int(-now), id)", ""),
    "charge": Rewrite("claim", "start and start + charge_of(job)", "start and start + 1"),
    "lift": Rewrite("fairness", " or served[1]\n", "\n"),
    "taken back": Rewrite("attempts", "  correct(job, 0)\n", ""),
    "corrected by usage": Rewrite("settle", "note_correction(job, tonumber(ARGV[i + 4]))", "local _ = 0"),
    "remembered": Rewrite("fairness", "exact(stands), '*', exact(stands), tenant", "exact(stands), '*'"),
    "waiting cost": Rewrite("counters", "by * tonumber(cost)", "by"),
    "rates": Rewrite("rates", "if not run_ms then return end", "if run_ms then return end"),
    "arrivals": Rewrite("expire", "if passed >= 0 and passed < LOOK_MS then return end", ""),
}


def run(machine: type[QueueMachine], examples: int, *, steps: int = STEPS, **options: object) -> None:
    """Try so many orders of calls."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **options,  # type: ignore[arg-type]
    )
    run_state_machine_as_test(machine, settings=settings)


@pytest.mark.timeout(
    3_600 if EXAMPLES else 600
)  # it takes seconds; Hypothesis may look for the shortest calls that fail for five minutes
def test_any_order_of_calls_agrees_with_the_model(backend: Backend) -> None:
    """After each call the answer, all that is to be seen of the queue, and what Routers and workers were told are the
    model's; at the end, with everybody well again, every job ends and nothing is left."""
    machine = type("Queue", (QueueMachine,), {"backend": backend})
    run(machine, EXAMPLES or FEW[backend.kind], derandomize=not EXAMPLES)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_guard_less_is_noticed(mutant: str) -> None:
    """The same calls disagree with scripts that lack a guard."""
    machine = type("Mutant", (QueueMachine,), {"backend": FakeBackend(), "rewrites": (MUTANTS[mutant],)})
    with pytest.raises(Disagreement):
        # Each run has its own mix of calls: several short ones find more than a long one.
        for seed in range(1, 11):
            run(hypothesis.seed(seed)(machine), 15, phases=[Phase.generate], report_multiple_bugs=False)
