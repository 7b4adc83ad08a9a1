"""What to claim next."""

from __future__ import annotations

from copy import deepcopy

from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import DataObject, data, floats, integers, sampled_from

from queue_schemas import LANES, Assignment, Lane, PoolAssignment
from worker.core import Claim, Slots
from worker.core.slots import MAX_CLAIM, PARK_AGAIN_S, RETRY_APART_S, RETRY_MARGIN_S


def assignment(*pools: tuple[str, int], version: int = 1, term: int = 1) -> Assignment:
    parts = [PoolAssignment(pool=pool, shard=shard) for pool, shard in pools]
    return Assignment(term=term, version=version, pools=parts)


def ready_slots(total: int = 4, *pools: tuple[str, int]) -> Slots:
    slots = Slots(total, ready=True)
    assert slots.assign(assignment(*(pools or (("m", 0),))))
    return slots


def test_claims_every_free_slot_of_its_pools_and_lanes() -> None:
    """The first claim asks for all slots, in all lanes of the assigned pools."""
    claim = ready_slots(4).next_claim(0, 0.0)
    assert claim is not None
    assert (claim.n, claim.seq, claim.turn) == (4, 1, 0)
    assert claim.pools == (("m", LANES),)


def test_claims_nothing_without_an_engine_an_assignment_or_on_a_foreign_shard() -> None:
    """A worker claims only what it can run and was given."""
    assert Slots(4, ready=True).next_claim(0, 0.0) is None
    not_ready = Slots(4)
    not_ready.assign(assignment(("m", 0)))
    assert not_ready.next_claim(0, 0.0) is None
    assert ready_slots(4).next_claim(1, 0.0) is None


def test_an_unanswered_claim_is_repeated_unchanged() -> None:
    """Until the answer comes the same claim is given, so that the queue recognises the repeat."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert slots.next_claim(0, 1.0) is claim
    assert claim is not None
    slots.answered(claim, 4, 1.0)
    slots.freed()
    following = slots.next_claim(0, 2.0)
    assert following is not None
    assert (following.seq, following.turn, following.n) == (2, 4, 1)


def test_a_full_claim_is_followed_by_another_as_soon_as_a_slot_is_free() -> None:
    """There may be more where that came from: no wake is needed."""
    slots = ready_slots(2)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 2, 0.0)
    assert slots.next_claim(0, 0.0) is None
    slots.freed()
    assert slots.next_claim(0, 0.0) is not None


def test_a_parked_worker_waits_for_a_wake_and_parks_again_in_time() -> None:
    """A short claim parks: only a wake, or the end of its time as a parked worker, makes it claim again."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 1, 0.0)
    slots.freed()
    assert slots.next_claim(0, 1.0) is None
    assert list(slots.shards_due(PARK_AGAIN_S - 0.1)) == []
    assert list(slots.shards_due(PARK_AGAIN_S)) == [0]
    slots.wake(0)
    woken = slots.next_claim(0, 1.0)
    assert woken is not None
    assert woken.n == 4


def test_a_drained_worker_leaves_the_parked_and_claims_no_more() -> None:
    """A wake must not be lost on a worker that will not follow it: it claims zero jobs, once."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 0, 0.0)
    slots.draining = True
    leaving = slots.next_claim(0, 0.0)
    assert leaving is not None
    assert (leaving.n, leaving.pools) == (0, claim.pools)
    slots.answered(leaving, 0, 0.0)
    assert slots.next_claim(0, 0.0) is None
    slots.wake(0)
    assert slots.next_claim(0, 0.0) is None


def test_another_assignment_first_leaves_the_parked_of_the_old_one() -> None:
    """Parked for pools that are no longer its own, a worker leaves them before it claims from the new ones."""
    slots = ready_slots(4, ("old", 0))
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 0, 0.0)
    assert slots.assign(assignment(("new", 0), version=2))
    leaving = slots.next_claim(0, 0.0)
    assert leaving is not None
    assert (leaving.n, leaving.pools) == (0, (("old", LANES),))
    slots.answered(leaving, 0, 0.0)
    following = slots.next_claim(0, 0.0)
    assert following is not None
    assert (following.n, following.pools) == (4, (("new", LANES),))


def test_an_older_assignment_is_ignored_and_a_new_term_counts_more_than_a_version() -> None:
    """(term, version) orders assignments: an old Manager cannot undo a new one's."""
    slots = Slots(4, ready=True)
    assert slots.assign(assignment(("a", 0), term=2, version=5))
    assert not slots.assign(assignment(("b", 0), term=2, version=4))
    assert not slots.assign(assignment(("b", 0), term=1, version=9))
    assert slots.assign(assignment(("c", 0), term=3, version=1))
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert claim.pools == (("c", LANES),)


def test_the_answer_to_a_registration_is_followed_whatever_its_order() -> None:
    """[A2] A queue that counts terms from a lower one again takes its workers along: they register, and follow."""
    slots = Slots(4, ready=True)
    assert slots.assign(assignment(("a", 0), term=1 << 40, version=5))
    assert not slots.assign(assignment(("b", 0), term=1, version=6))
    assert slots.assign(assignment(("b", 0), term=1, version=6), registered=True)
    assert slots.order == (1, 6)
    assert slots.assign(assignment(("c", 0), term=1, version=7))


def test_only_the_assigned_lanes_are_claimed() -> None:
    """The assignment may leave lanes to other workers."""
    slots = Slots(1, ready=True)
    part = PoolAssignment(pool="m", shard=0, lanes=[Lane.BATCH])
    slots.assign(Assignment(term=1, version=1, pools=[part]))
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert claim.pools == (("m", (Lane.BATCH,)),)


def test_shards_share_the_free_slots_and_never_claim_more_than_there_are() -> None:
    """Two shards get half each; what one reserved is not given to the other."""
    slots = ready_slots(5, ("a", 0), ("b", 1))
    first, second = slots.next_claim(0, 0.0), slots.next_claim(1, 0.0)
    assert first is not None
    assert second is not None
    assert (first.n, second.n) == (3, 2)
    assert slots.free == 0


def test_a_wake_without_a_free_slot_is_passed_on() -> None:
    """Woken on one shard while another took the last slot, it claims zero jobs, which wakes the next worker."""
    slots = ready_slots(1, ("a", 0), ("b", 1))
    a = slots.next_claim(0, 0.0)
    assert a is not None
    slots.answered(a, 0, 0.0)
    b = slots.next_claim(1, 0.0)
    assert b is not None
    slots.answered(b, 1, 0.0)
    slots.wake(0)
    passed_on = slots.next_claim(0, 0.0)
    assert passed_on is not None
    assert passed_on.n == 0


def test_a_spent_attempt_is_looked_for_again_after_two_seconds() -> None:
    """A parked worker that gave a job back spent claims again when it may have it, woken or not."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 1, 0.0)
    slots.freed()
    slots.retry_after(0, 1.0, RETRY_APART_S)
    assert list(slots.shards_due(1.0 + RETRY_APART_S + RETRY_MARGIN_S)) == [0]
    assert slots.next_claim(0, 1.0 + RETRY_APART_S + RETRY_MARGIN_S) is not None


def test_a_retry_that_is_due_late_is_claimed_on_time() -> None:
    """[C8] Also behind claims in between, which happen every 20 s."""
    slots = ready_slots()
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, 0, 0.0)
    slots.retry_after(0, 1.0, 30.0)
    assert list(slots.shards_due(PARK_AGAIN_S)) == [0]
    again = slots.next_claim(0, PARK_AGAIN_S)
    assert again is not None
    slots.answered(again, 0, PARK_AGAIN_S)
    assert slots.due_at(0) == 31.0 + RETRY_MARGIN_S


def test_a_worker_that_can_run_nothing_is_due_at_no_time() -> None:
    """Without a free slot, an engine or an assignment, or on its way out, it waits for a signal instead of a time."""
    slots = ready_slots(1)
    assert slots.due_at(0) is None, "its first claim is still to come"
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert slots.due_at(0) is None, "its slot is reserved"
    slots.answered(claim, 0, 0.0)
    assert slots.due_at(0) == PARK_AGAIN_S
    slots.busy = 1
    assert slots.due_at(0) is None
    slots.freed()
    slots.ready = False
    assert slots.due_at(0) is None
    slots.ready, slots.draining = True, True
    assert slots.due_at(0) is None
    assert slots.due_at(7) is None


class SlotsMachine(RuleBasedStateMachine):
    """A worker's slots under any order of claims, answers, wakes and ends, on two shards."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = ready_slots(3, ("a", 0), ("b", 1))
        self.now = 0.0
        self.sent: dict[int, Claim] = {}

    @rule(shard=integers(0, 1))
    def claim(self, shard: int) -> None:
        claim = self.slots.next_claim(shard, self.now)
        assert shard not in self.sent or claim is self.sent[shard]
        if claim is not None:
            self.sent[shard] = claim

    @precondition(lambda self: self.sent)
    @rule(data=data())
    def answer(self, data: DataObject) -> None:
        claim = self.sent.pop(data.draw(sampled_from(sorted(self.sent))))
        jobs = data.draw(integers(0, claim.n))
        self.slots.answered(claim, jobs, self.now)

    @precondition(lambda self: self.slots.busy)
    @rule()
    def end(self) -> None:
        self.slots.freed()

    @rule(shard=integers(0, 1))
    def wake(self, shard: int) -> None:
        self.slots.wake(shard)

    @rule(shard=integers(0, 1))
    def retry(self, shard: int) -> None:
        self.slots.retry_after(shard, self.now, RETRY_APART_S)

    @rule(seconds=floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def never_promises_more_than_it_has(self) -> None:
        assert 0 <= self.slots.busy + sum(claim.n for claim in self.sent.values()) <= self.slots.total

    @invariant()
    def what_is_due_is_claimed(self) -> None:
        """A time that ``due_at`` names is one at which there is a claim to send: no loop may spin on it."""
        for shard in (0, 1):
            due = deepcopy(self.slots).due_at(shard)
            if due is not None:
                assert deepcopy(self.slots).next_claim(shard, max(due, self.now)) is not None
                assert due <= self.now + PARK_AGAIN_S


TestSlotsMachine = SlotsMachine.TestCase


def test_one_claim_is_bounded() -> None:
    """However many slots are free, the bodies of one claim fit a reply."""
    claim = ready_slots(1_000).next_claim(0, 0.0)
    assert claim is not None
    assert claim.n == MAX_CLAIM
