"""inferq's queue: hand-over, and the order in which workers claim."""

from __future__ import annotations

from queue_schemas.lanes import BANDS, Lane, lane_order
from simulator.fleet import Worker
from simulator.policies import PullQueue
from simulator.requests import Request, TraceRequest

from .test_push import Idle


class Fabric:
    """A queue, its workers, and what ran where."""

    def __init__(self, *slots: int) -> None:
        self.ran: list[Request] = []
        self.queue = PullQueue(self._send)
        self.workers = [Worker(number, Idle(), count, 0.0) for number, count in enumerate(slots)]
        for worker in self.workers:
            self.queue.joined(worker)

    def _send(self, worker: Worker, request: Request) -> None:
        worker.running += 1
        request.worker = worker
        self.ran.append(request)

    def arrive(self, lane: Lane = Lane.INTERACTIVE, band: int = 2) -> Request:
        request = Request(0, TraceRequest(0.0, 1, 1, lane=lane, band=band), 0.0)
        self.queue.arrive(request)
        return request

    def end(self, worker: Worker) -> None:
        worker.running -= 1
        self.queue.freed(worker)


def test_work_is_handed_to_the_worker_with_most_free_slots() -> None:
    """As long as one has a free slot; then it waits, in order."""
    fabric = Fabric(2, 4)
    numbers = [request.worker.number for request in (fabric.arrive() for _ in range(6)) if request.worker]
    assert numbers[:2] == [1, 1]
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
    fabric.queue.left(fabric.workers[1])
    assert fabric.arrive().worker is fabric.workers[0]
    assert fabric.arrive().worker is None
