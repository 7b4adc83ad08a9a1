"""What to claim next."""

from __future__ import annotations

from copy import deepcopy

from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import DataObject, data, floats, integers, sampled_from

from queue_schemas import LANES, Assignment, Claimed, Lane, Lease, PoolAssignment
from queue_schemas.lanes import LANE_CYCLE, lane_order
from scheduling.cache_age import GENERATIONS
from tests.support.queue import make_job
from worker.core import Claim, Slots
from worker.core.slots import MAX_CLAIM, PARK_AGAIN_S, RETRY_APART_S, RETRY_MARGIN_S


def assignment(*pools: tuple[str, int], version: int = 1, term: int = 1) -> Assignment:
    parts = [PoolAssignment(pool=pool, shard=shard) for pool, shard in pools]
    return Assignment(term=term, version=version, pools=parts)


def ready_slots(total: int = 4, *pools: tuple[str, int]) -> Slots:
    slots = Slots(total, ready=True)
    assert slots.assign(assignment(*(pools or (("m", 0),))))
    return slots


def answer_to(claim: Claim, jobs: int, handed_over: int) -> Claimed:
    """What the queue answers that gives so many jobs. ``handed_over``: in the session so far."""
    on_their_way = max(handed_over - claim.received, 0)
    parked = jobs < claim.n - on_their_way
    offered = max(claim.offer - on_their_way - jobs, 0) if parked else 0
    leases = tuple(make_lease() for _ in range(jobs))
    return Claimed(leases, parked=parked, handed_over=handed_over, offered=offered)


def answer(slots: Slots, claim: Claim, jobs: int, now: float, *, handed_over: int = 0) -> None:
    """Answer ``claim`` with so many jobs."""
    slots.answered(claim, answer_to(claim, jobs, handed_over), now)


def make_lease() -> Lease:
    return Lease(make_job(), 1, "attempt", 1, 1_000, 0)


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
    answer(slots, claim, 4, 1.0)
    slots.freed()
    following = slots.next_claim(0, 2.0)
    assert following is not None
    assert (following.seq, following.turn, following.n) == (2, 4, 1)


def test_a_full_claim_is_followed_by_another_as_soon_as_a_slot_is_free() -> None:
    """There may be more where that came from: no wake is needed."""
    slots = ready_slots(2)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 2, 0.0)
    assert slots.next_claim(0, 0.0) is None
    slots.freed()
    assert slots.next_claim(0, 0.0) is not None


def test_a_parked_worker_waits_for_a_wake_and_parks_again_in_time() -> None:
    """A short claim parks: only a wake, or the end of its time as a parked worker, makes it claim again."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 1, 0.0)
    slots.freed()
    assert slots.next_claim(0, 1.0) is None
    assert not slots.has_claim(0, PARK_AGAIN_S - 0.1)
    assert slots.has_claim(0, PARK_AGAIN_S)
    slots.wake(0)
    woken = slots.next_claim(0, 1.0)
    assert woken is not None
    assert woken.n == 4


def test_a_drained_worker_leaves_the_parked_and_claims_no_more() -> None:
    """A wake must not be lost on a worker that will not follow it: it claims zero jobs, once."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    slots.draining = True
    leaving = slots.next_claim(0, 0.0)
    assert leaving is not None
    assert (leaving.n, leaving.pools) == (0, claim.pools)
    answer(slots, leaving, 0, 0.0)
    assert slots.next_claim(0, 0.0) is None
    slots.wake(0)
    assert slots.next_claim(0, 0.0) is None


def test_another_assignment_first_leaves_the_parked_of_the_old_one() -> None:
    """Parked for pools that are no longer its own, a worker leaves them before it claims from the new ones."""
    slots = ready_slots(4, ("old", 0))
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    assert slots.assign(assignment(("new", 0), version=2))
    leaving = slots.next_claim(0, 0.0)
    assert leaving is not None
    assert (leaving.n, leaving.pools) == (0, (("old", LANES),))
    answer(slots, leaving, 0, 0.0)
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
    answer(slots, a, 0, 0.0)
    b = slots.next_claim(1, 0.0)
    assert b is not None
    answer(slots, b, 1, 0.0)
    slots.wake(0)
    passed_on = slots.next_claim(0, 0.0)
    assert passed_on is not None
    assert passed_on.n == 0


def test_a_spent_attempt_is_looked_for_again_after_two_seconds() -> None:
    """A parked worker that gave a job back spent claims again when it may have it, woken or not."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 1, 0.0)
    slots.freed()
    slots.retry_after(0, 1.0, RETRY_APART_S)
    assert slots.has_claim(0, 1.0 + RETRY_APART_S + RETRY_MARGIN_S)
    assert slots.next_claim(0, 1.0 + RETRY_APART_S + RETRY_MARGIN_S) is not None


def test_a_retry_that_is_due_late_is_claimed_on_time() -> None:
    """[C8] Also behind claims in between, which happen every 20 s."""
    slots = ready_slots()
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    slots.retry_after(0, 1.0, 30.0)
    assert slots.has_claim(0, PARK_AGAIN_S)
    again = slots.next_claim(0, PARK_AGAIN_S)
    assert again is not None
    answer(slots, again, 0, PARK_AGAIN_S)
    assert slots.due_at(0) == 31.0 + RETRY_MARGIN_S


def test_a_worker_that_can_run_nothing_is_due_at_no_time() -> None:
    """Without a free slot, an engine or an assignment, or on its way out, it waits for a signal instead of a time."""
    slots = ready_slots(1)
    assert slots.due_at(0) is None, "its first claim is still to come"
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert slots.due_at(0) is None, "its slot is reserved"
    answer(slots, claim, 0, 0.0)
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
    """A worker's slots under any order of claims, answers, handed jobs, wakes, ends and changes of their number, on two
    shards or on one."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = ready_slots(3, ("a", 0), ("b", 1))
        self.now = 0.0
        self.sent: dict[int, Claim] = {}
        self.offered = {0: 0, 1: 0}
        """What the queue may hand over."""
        self.handed_over = {0: 0, 1: 0}
        self.unread = {0: 0, 1: 0}
        self.version = 1
        self.promised_before = 0

    @rule(total=integers(1, 5))
    def resize(self, total: int) -> None:
        self.slots.total = total

    @rule(shards=integers(1, 2))
    def assign(self, shards: int) -> None:
        self.version += 1
        self.slots.assign(assignment(*(("a", 0), ("b", 1))[:shards], version=self.version))

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
        handed_over = self.handed_over[claim.shard]
        jobs = data.draw(integers(0, max(claim.n - max(handed_over - claim.received, 0), 0)))
        answer = answer_to(claim, jobs, handed_over)
        self.offered[claim.shard] = answer.offered
        self.slots.answered(claim, answer, self.now)

    @rule(shard=integers(0, 1))
    def hand_over(self, shard: int) -> None:
        if self.offered[shard]:
            self.offered[shard] -= 1
            self.handed_over[shard] += 1
            self.unread[shard] += 1

    @rule(shard=integers(0, 1))
    def read(self, shard: int) -> None:
        if self.unread[shard]:
            self.unread[shard] -= 1
            self.slots.handed_over(shard)

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
        """What runs, what is on its way, what a claim may bring and what may be handed over, until it is answered by an
        older offer, fit the slots; what does not fit a lowered number of them does not grow."""
        promised = self.slots.busy + sum(self.unread.values())
        for shard in (0, 1):
            claim, may_bring = self.sent.get(shard), 0
            if claim is not None:
                asked = max(claim.n, claim.offer)
                may_bring = max(asked - (self.handed_over[shard] - claim.received), 0)
            promised += max(may_bring, self.offered[shard])
        assert 0 <= promised <= max(self.slots.total, self.promised_before)
        self.promised_before = promised

    @invariant()
    def what_is_due_is_claimed(self) -> None:
        """A time that ``due_at`` names is one at which there is a claim to send: no loop may spin on it."""
        for shard in (0, 1):
            due = deepcopy(self.slots).due_at(shard)
            if due is not None:
                assert deepcopy(self.slots).next_claim(shard, max(due, self.now)) is not None
                assert due <= self.now + PARK_AGAIN_S

    @invariant()
    def a_claim_is_announced(self) -> None:
        """``has_claim`` says whether ``next_claim`` has a new one."""
        for shard in (0, 1):
            new = deepcopy(self.slots).next_claim(shard, self.now)
            assert self.slots.has_claim(shard, self.now) == (new is not None and shard not in self.sent)


TestSlotsMachine = SlotsMachine.TestCase


def test_a_lowered_number_of_slots_lets_what_runs_end() -> None:
    """Nothing is claimed until fewer jobs run than there are slots."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 4, 0.0)
    slots.total = 2
    assert (slots.free, slots.all_in_use) == (-2, True)
    for _ in range(2):
        slots.freed()
        assert slots.next_claim(0, 0.0) is None
    slots.freed()
    following = slots.next_claim(0, 0.0)
    assert following is not None
    assert (following.n, following.offer) == (1, 1)


def test_an_offer_above_a_lowered_number_of_slots_is_taken_back() -> None:
    """A parked worker offers fewer at once; what it was handed before uses its slots up all the same."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    assert not slots.all_in_use
    slots.total = 1
    smaller = slots.next_claim(0, 0.0)
    assert smaller is not None
    assert (smaller.n, smaller.offer) == (1, 1)
    answer(slots, smaller, 0, 0.0, handed_over=2)
    assert [slots.handed_over(0), slots.handed_over(0)] == [True, True]
    assert (slots.busy, slots.free, slots.next_claim(0, 0.0)) == (2, -1, None)


def test_a_worker_without_a_slot_for_its_offer_leaves_the_parked() -> None:
    """What it runs already fills the lowered number: it claims zero jobs, once."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 2, 0.0)
    slots.total = 2
    leaving = slots.next_claim(0, 0.0)
    assert leaving is not None
    assert (leaving.n, leaving.offer) == (0, 0)
    answer(slots, leaving, 0, 0.0)
    assert slots.next_claim(0, 0.0) is None


def test_more_slots_are_offered_at_once() -> None:
    """A raised number is used without waiting for a job to end."""
    slots = ready_slots(1)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 1, 0.0)
    slots.total = 3
    following = slots.next_claim(0, 0.0)
    assert following is not None
    assert (following.n, following.offer) == (2, 2)


def test_one_claim_is_bounded() -> None:
    """However many slots are free, the bodies of one claim fit a reply."""
    claim = ready_slots(1_000).next_claim(0, 0.0)
    assert claim is not None
    assert claim.n == MAX_CLAIM


def test_a_parked_worker_is_handed_jobs_and_claims_when_its_offer_is_used_up() -> None:
    """What it offers stays reserved; each job that it is handed uses a slot up; behind the last one it claims again."""
    slots = ready_slots(2)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert (claim.n, claim.offer, claim.received) == (2, 2, 0)
    answer(slots, claim, 0, 0.0)
    assert slots.free == 0
    assert slots.handed_over(0)
    assert slots.next_claim(0, 1.0) is None
    assert slots.handed_over(0)
    assert (slots.busy, slots.next_claim(0, 1.0)) == (2, None)
    slots.freed()
    following = slots.next_claim(0, 1.0)
    assert following is not None
    assert (following.n, following.offer, following.received) == (1, 1, 2)


def test_a_queue_that_takes_no_offer_is_not_asked_again_until_it_wakes_us() -> None:
    """A Router may offer none of the slots for jobs: the worker is parked all the same, and waits for its wake."""
    slots = ready_slots(2)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, Claimed((), parked=True, handed_over=0, offered=0), 0.0)
    assert slots.next_claim(0, 1.0) is None
    assert slots.has_claim(0, PARK_AGAIN_S)
    slots.wake(0)
    assert slots.next_claim(0, 1.0) is not None


def test_slots_are_offered_anew_when_more_are_free_than_offered() -> None:
    """So that the queue knows who is free, at the price of one claim for many jobs."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    for handed in (1, 2):
        assert slots.next_claim(0, 1.0) is None
        slots.handed_over(0)
        slots.freed()
        assert slots.has_claim(0, 1.0) == (handed == 2)
    again = slots.next_claim(0, 1.0)
    assert again is not None
    assert (again.n, again.offer, again.received) == (4, 4, 2)


def test_a_job_on_its_way_when_a_claim_was_answered_has_its_slot() -> None:
    """The queue has counted it among what the claim asked for; nothing else may take the slot."""
    slots = ready_slots(2)
    first = slots.next_claim(0, 0.0)
    assert first is not None
    answer(slots, first, 0, 0.0)
    slots.wake(0)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 1, 0.0, handed_over=1)
    assert (slots.busy, slots.free) == (1, 0)
    assert slots.next_claim(0, 0.0) is None, "it waits for the job that is on its way, instead of asking over and over"
    assert slots.handed_over(0)
    assert (slots.busy, slots.free) == (2, 0)


def test_a_worker_of_two_shards_offers_nothing() -> None:
    """Slots that one shard's jobs may take at any time could not serve the other."""
    claim = ready_slots(4, ("a", 0), ("b", 1)).next_claim(0, 0.0)
    assert claim is not None
    assert claim.offer == 0


def test_an_offer_is_withdrawn_when_another_shard_is_assigned() -> None:
    """Its slots are shared from then on."""
    slots = ready_slots(4, ("a", 0))
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    slots.assign(assignment(("a", 0), ("b", 1), version=2))
    withdrawn = slots.next_claim(0, 0.0)
    assert withdrawn is not None
    assert withdrawn.offer == 0
    assert slots.next_claim(1, 0.0) is None  # jobs may still be handed over by the offer
    answer(slots, withdrawn, 0, 0.0)
    assert slots.next_claim(1, 0.0) is not None


def test_a_job_that_cannot_be_run_any_more_is_refused() -> None:
    """On its way out, or without an engine: it is handed back, and its slot is busy until it is."""
    slots = ready_slots(1)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    answer(slots, claim, 0, 0.0)
    slots.draining = True
    assert not slots.handed_over(0)
    assert slots.busy == 1
    slots.freed()
    assert slots.free == 1


def test_a_slot_that_was_given_up_is_claimed_for_an_interactive_job() -> None:
    """The turns on which lower lanes go first are passed over, once for all that was given up."""
    slots = ready_slots(1)
    for turn in range(2 * LANE_CYCLE):
        claim = slots.next_claim(0, 0.0)
        assert claim is not None
        is_after_yield = turn % 2 == 1
        assert not is_after_yield or lane_order(claim.turn)[0] is Lane.INTERACTIVE
        slots.answered(claim, Claimed((make_lease(),)), 0.0)
        slots.freed()
        if not is_after_yield:
            slots.yielded(0)


def test_a_slot_that_was_given_up_is_spoken_for_until_its_claim_is_answered() -> None:
    """For another interactive job it is not spare; one that a job left at its end is."""
    slots = ready_slots(3)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, Claimed((make_lease(), make_lease(), make_lease())), 0.0)
    slots.freed()
    slots.yielded(0)
    assert slots.spare == 0
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert (claim.n, claim.given_up, slots.spare) == (1, 1, 0)
    slots.freed()
    assert slots.spare == 1
    slots.answered(claim, Claimed((make_lease(),)), 0.0)
    assert slots.spare == 1
    again = slots.next_claim(0, 0.0)
    assert again is not None
    assert (again.given_up, slots.spare) == (0, 1)


def test_an_engine_that_stopped_begins_with_an_empty_cache() -> None:
    """Every claim says which cache it is; one that is repeated says what it said."""
    slots = ready_slots(4)
    slots.engine_is(ready=True)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    assert claim.cache == 0
    slots.engine_is(ready=False)
    assert slots.next_claim(0, 0.0) == claim
    answer(slots, claim, 0, 0.0)
    slots.engine_is(ready=True)
    again = slots.next_claim(0, 30.0)
    assert again is not None
    assert again.cache == GENERATIONS


def test_a_parked_worker_says_that_its_cache_has_forgotten() -> None:
    """Jobs that are handed to it count as of the number that it said last."""
    slots = ready_slots(4)
    claim = slots.next_claim(0, 0.0)
    assert claim is not None
    slots.answered(claim, Claimed(parked=True, offered=4), 0.0)
    assert slots.next_claim(0, 1.0) is None
    slots.cache += 1
    again = slots.next_claim(0, 1.0)
    assert again is not None
    assert (again.cache, again.offer) == (1, 4)
    slots.answered(again, Claimed(parked=True, offered=4), 1.0)
    assert slots.next_claim(0, 2.0) is None


def test_a_shard_that_found_no_free_slot_asks_again() -> None:
    """Its claim for none, which passes a wake on, was answered before the other shard's that took the slot."""
    slots = ready_slots(1, ("m", 0), ("n", 1))
    first = slots.next_claim(0, 0.0)
    assert first is not None
    slots.wake(1)
    nothing = slots.next_claim(1, 0.0)
    slots.answered(first, Claimed(parked=True), 0.0)
    if nothing is not None:
        slots.answered(nothing, Claimed(), 0.0)
    assert slots.has_claim(1, 0.1)


def test_a_rise_is_told_only_where_jobs_are_handed_over() -> None:
    """A worker of several shards offers nothing."""
    slots = ready_slots(4, ("m", 0), ("n", 1))
    for shard in (0, 1):
        claim = slots.next_claim(shard, 0.0)
        assert claim is not None
        slots.answered(claim, Claimed(parked=True), 0.0)
    slots.cache += 1
    assert not slots.has_claim(0, 1.0)
    assert not slots.has_claim(1, 1.0)
