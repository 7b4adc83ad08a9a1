"""The open requests of each persisted job: any number per job, each fed at its own pace.

The output of a persisted job is kept, so a request that misses frames, or is slower than its job, stops taking live
frames and catches up from what is kept, page by page (:mod:`router.jobs.persisted_requests`). So a slow client loses
nothing and takes no memory. Nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Iterable

from queue_schemas import Frame, Job, JobId, Marker, shard_of_job

from .open_request import OpenRequest

MAX_BUFFERED_FRAMES = 1_024
"""Live frames of one job that are buffered while a page of it is read; past that another page is read."""


class Followers:
    """The requests that wait for persisted jobs, by job."""

    def __init__(self, buffer_bytes: int, check_s: float) -> None:
        """``buffer_bytes`` may wait for one client; a job that is silent for ``check_s`` is read again."""
        self._buffer_bytes = buffer_bytes
        self._check_s = check_s
        self._by_job: dict[JobId, dict[OpenRequest, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_job.values()))

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._by_job

    def add(self, request: OpenRequest, job: Job) -> None:
        """From now on ``request`` waits for ``job``."""
        self._by_job.setdefault(job.id, {})[request] = None

    def discard(self, request: OpenRequest, job: Job) -> None:
        """``request`` no longer waits for ``job``, if it did."""
        requests = self._by_job.get(job.id)
        if requests is not None:
            requests.pop(request, None)
            if not requests:
                del self._by_job[job.id]

    def deliver(self, item: Frame | Marker) -> bool:
        """Feed every request for the item's job; False if there is none here."""
        requests = self._by_job.get(item.job_id)
        if requests is None:
            return False
        for request in tuple(requests):
            if not request.catching_up:
                self._feed(request, item)
            elif request.live_buffer is not None:
                request.live_buffer.append(item)
                if len(request.live_buffer) > MAX_BUFFERED_FRAMES:
                    request.live_buffer = None
        return True

    def resume_live(self, request: OpenRequest, buffered: Iterable[Frame | Marker]) -> None:
        """``request`` has read all kept output; ``buffered`` came live meanwhile."""
        request.catching_up = False
        for item in buffered:
            self._feed(request, item)

    def lost(self, shard: int) -> None:
        """The reply stream of ``shard`` was lost, with what was on it."""
        for job_id, requests in self._by_job.items():
            if shard_of_job(job_id) == shard:
                for request in requests:
                    request.start_catching_up()

    def recheck(self, job_id: JobId) -> None:
        """This Router may have been removed from the listeners of a job."""
        for request in self._by_job.get(job_id, ()):
            request.start_catching_up()

    def sweep(self, now_s: float) -> None:
        """Read the jobs again that have been silent for ``check_s``."""
        for requests in self._by_job.values():
            for request in requests:
                if request.received:
                    request.received, request.checked_s = False, now_s
                elif not request.catching_up and now_s - request.checked_s >= self._check_s:
                    request.checked_s = now_s
                    request.start_catching_up()

    def _feed(self, request: OpenRequest, item: Frame | Marker) -> None:
        merger = request.merger
        if merger is None or request.catching_up:
            return
        request.received = True
        request.feed(merger, item)
        request.notify()
        if merger.gap or (merger.pending_bytes > self._buffer_bytes and not merger.closed):
            request.start_catching_up()
