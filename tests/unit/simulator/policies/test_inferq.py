"""inferq's queue: hand-over, and the order in which workers claim."""

from __future__ import annotations

from queue_schemas.lanes import BANDS, Lane, lane_order
from scheduling.slots import EngineLoad
from simulator.clock import Clock
from simulator.fleet import Worker
from simulator.policies import POLICIES, PolicyContext, QueueRules
from simulator.requests import Request, TraceRequest

from .test_push import Idle

PLAIN = QueueRules()


class Fabric:
    """A queue, its workers, and what ran where."""

    def __init__(self, *slots: int, rules: QueueRules = PLAIN) -> None:
        self.ran: list[Request] = []
        self.number = 0
        self.clock = Clock()
        self.queue = POLICIES["inferq"].make(PolicyContext(self.clock, self._send, self._take_back, 0.0, 512), rules)
        self.workers = [Worker(number, Idle(), count, 0.0) for number, count in enumerate(slots)]
        for worker in self.workers:
            worker.ready = True
            self.queue.joined(worker)

    def _send(self, worker: Worker, request: Request) -> None:
        worker.running += 1
        request.worker = worker
        self.ran.append(request)

    def arrive(
        self, lane: Lane = Lane.INTERACTIVE, band: int = 2, blocks: tuple[int, ...] = (), at_s: float = 0.0
    ) -> Request:
        self.clock.now = at_s
        self.number += 1
        line = TraceRequest(at_s, 600 * len(blocks) + 1, 10, blocks, lane=lane, band=band)
        request = Request(self.number, line, at_s)
        self.queue.arrive(request)
        return request

    def _take_back(self, request: Request) -> None:
        worker, request.worker = request.worker, None
        assert worker is not None
        worker.running -= 1
        self.queue.ended(request, worker)

    def end(self, worker: Worker, request: Request | None = None) -> None:
        worker.running -= 1
        self.queue.ended(request or self.ran[0], worker)


def test_work_is_handed_to_the_worker_with_the_lowest_load() -> None:
    """As long as one has a free slot; then it waits, in order."""
    fabric = Fabric(2, 4)
    numbers = [request.worker.number for request in (fabric.arrive() for _ in range(6)) if request.worker]
    assert numbers[:3] == [0, 1, 1]
    assert sorted(numbers) == [0, 0, 1, 1, 1, 1]
    first, second = fabric.arrive(), fabric.arrive()
    assert fabric.queue.waiting == 2
    fabric.end(fabric.workers[0])
    assert (first.worker, second.worker) == (fabric.workers[0], None)


def test_claims_follow_the_order_of_lanes() -> None:
    """Each of 64 claims of a worker looks at the lanes in the order of its turn."""
    fabric = Fabric(1)
    worker = fabric.workers[0]
    fabric.arrive()
    for _ in range(64):
        for lane in Lane:
            fabric.arrive(lane)
    for turn in range(64):
        fabric.end(worker)
        assert fabric.ran[-1].lane is lane_order(turn)[0]


def test_an_urgent_band_goes_first_and_none_starves() -> None:
    """Of four claims of a lane one begins with another band, each in turn."""
    fabric = Fabric(1)
    fabric.arrive()
    for _ in range(20):
        for band in range(BANDS):
            fabric.arrive(band=band)
    for _ in range(12):
        fabric.end(fabric.workers[0])
    assert [request.band for request in fabric.ran[1:]] == [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]


def test_a_worker_that_leaves_claims_nothing() -> None:
    """What waits is for the others."""
    fabric = Fabric(1, 1)
    fabric.workers[1].leaving = True
    fabric.queue.left(fabric.workers[1])
    assert fabric.arrive().worker is fabric.workers[0]
    assert fabric.arrive().worker is None


def test_a_conversation_goes_where_its_prefix_is() -> None:
    """As long as that worker has about as many free slots as any; then to the one with the most."""
    fabric = Fabric(8, 8)
    home = fabric.arrive(blocks=(1, 2)).worker
    others = [fabric.arrive(blocks=(1, 2, number)).worker for number in range(10, 14)]
    assert others[:2] == [home] * 2
    assert fabric.arrive(blocks=(50, 51)).worker is not home
    cold = Fabric(8, 8, rules=QueueRules(affinity=False))
    assert len({worker.number for worker in (cold.arrive(blocks=(1, 2)).worker for _ in range(2)) if worker}) == 2


def test_a_warm_request_overtakes_until_the_first_has_waited_too_long() -> None:
    """Its worker claims it before older ones that are warm elsewhere, within their patience."""
    fabric = Fabric(1, 1)
    here, there = fabric.arrive(blocks=(1, 2)).worker, fabric.arrive(blocks=(5, 6)).worker
    assert here is not None and there is not None and here is not there
    for number in range(40):  # until waits are long, and patience is
        fabric.arrive(blocks=(100 + number, 0), at_s=number / 10)
    for _ in range(39):
        fabric.clock.now += 0.5
        fabric.end(there)
    fabric.end(there)
    elsewhere = fabric.arrive(blocks=(5, 6, 7), at_s=30.0)
    warm = fabric.arrive(blocks=(1, 2, 3), at_s=30.0)
    fabric.clock.now = 30.1
    fabric.end(here)
    assert warm.worker is here
    assert elsewhere.worker is None
    late = fabric.arrive(blocks=(1, 2, 4), at_s=30.2)
    fabric.clock.now = 60.0
    fabric.end(here)
    assert elsewhere.worker is here
    assert late.worker is None


def test_a_batch_yields_to_an_interactive_request_and_goes_on_first() -> None:
    """The attempt that began last is stopped; it waits before new requests of its lane."""
    fabric = Fabric(4, rules=QueueRules(affinity=False, max_yields=1))
    batch = [fabric.arrive(Lane.BATCH) for _ in range(4)]
    waiting = fabric.arrive(Lane.BATCH)
    urgent = fabric.arrive()
    fabric.clock.run()
    assert urgent.worker is fabric.workers[0]
    assert [request.worker is None for request in batch] == [False, False, False, True]
    fabric.end(fabric.workers[0], urgent)
    assert (batch[3].worker is None, waiting.worker is None) == (False, True)
    fabric.arrive(at_s=10.0)
    fabric.clock.run()
    assert [request.worker is None for request in batch] == [False, False, True, False]


def test_slots_follow_the_engines_load() -> None:
    """What waits inside an engine twice in a row is taken out of its slots, and what waits in the queue is not sent."""
    fabric = Fabric(8, rules=QueueRules(max_slots=8))
    worker = fabric.workers[0]
    worker.engine = Crowded()
    for _ in range(10):
        fabric.arrive()
    for second in range(1, 4):
        fabric.clock.at(second + 0.5, lambda _: seen.append(worker.slots))
    seen: list[int] = []
    fabric.clock.at(3.6, lambda _: fabric.clock.stop())
    fabric.clock.run()
    assert seen[0] == 8
    assert seen[-1] < 8
    fabric.end(worker)
    assert fabric.queue.waiting == 2


def test_slots_come_back_while_a_worker_is_idle() -> None:
    """It is handed nothing while others have more free slots, so nothing else would ever bring them back."""
    fabric = Fabric(8, rules=QueueRules(max_slots=8))
    worker = fabric.workers[0]
    worker.engine = Crowded()
    fabric.arrive()
    fabric.clock.at(3.5, lambda _: _end_all(fabric, worker))
    seen: list[int] = []
    fabric.clock.at(3.6, lambda _: seen.append(worker.slots))
    fabric.clock.at(20.0, lambda _: fabric.clock.stop())
    fabric.clock.run()
    assert (seen, worker.slots) == ([1], 8)


def _end_all(fabric: Fabric, worker: Worker) -> None:
    worker.engine = Idle()
    fabric.end(worker)


class Crowded(Idle):
    """An engine that runs five requests and keeps the rest waiting."""

    def load(self) -> EngineLoad:
        return EngineLoad(waiting=3, running=5)


def test_a_wait_is_predicted_once_enough_is_known() -> None:
    """From what eight requests took: with one slot, those that wait before it and half of the one that runs."""
    fabric = Fabric(1)
    for number in range(9):
        fabric.arrive(at_s=float(number))
        fabric.ran[-1].generated = fabric.ran[-1].output_tokens
        fabric.ran[-1].began_at = number - 2.0
        if number < 8:
            fabric.end(fabric.workers[0], fabric.ran[-1])
    waits = [fabric.arrive(at_s=8.0).predicted_ms for _ in range(3)]
    assert waits == [1000, 3000, 5000]
    fabric.ran[-1].generated = 0  # an attempt that is lost says nothing of how long others take
    fabric.end(fabric.workers[0], fabric.ran[-1])
    assert fabric.arrive(at_s=8.0).predicted_ms == 5000
    early = Fabric(1)
    assert [early.arrive().predicted_ms for _ in range(3)] == [None, None, None]
