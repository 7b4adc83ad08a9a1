"""Persisted jobs and the requests that follow them: any number of them one job, each at its own pace.

What a persisted job says is kept, so a request may fall behind what comes live: then nothing is fed to it but what is
read from there, page by page (:mod:`router.jobs.persisted_requests`), until it has caught up. So a reader that is slow
loses nothing, and takes no memory. Nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from queue_schemas import Frame, Job, JobId, Marker, shard_of_job

if TYPE_CHECKING:
    from .open_requests import OpenRequest


MAX_HELD = 1_024
"""Frames of one job that are held while a page of it is on its way; past that another page is read."""


class Followers:
    """The open requests of each persisted job."""

    def __init__(self, buffer_bytes: int, check_s: float) -> None:
        """``buffer_bytes``: what may wait for a client; ``check_s``: how long a job may be silent until it is looked at
        whether it really is."""
        self._buffer_bytes = buffer_bytes
        self._check_s = check_s
        self._by_job: dict[JobId, dict[OpenRequest, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_job.values()))

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._by_job

    def add(self, request: OpenRequest, job: Job) -> None:
        """``request`` follows ``job`` from now on."""
        self._by_job.setdefault(job.id, {})[request] = None

    def discard(self, request: OpenRequest, job: Job) -> None:
        """``request`` does not follow ``job`` any more, if it did."""
        requests = self._by_job.get(job.id)
        if requests is not None:
            requests.pop(request, None)
            if not requests:
                del self._by_job[job.id]

    def deliver(self, item: Frame | Marker) -> bool:
        """Hand on what came of a persisted job; False if nobody here follows it."""
        requests = self._by_job.get(item.job_id)
        if requests is None:
            return False
        for request in tuple(requests):
            if not request.behind:
                self._feed(request, item)
            elif request.held is not None:
                request.held.append(item)
                if len(request.held) > MAX_HELD:
                    request.held = None
        return True

    def caught_up(self, request: OpenRequest, held: Iterable[Frame | Marker]) -> None:
        """``request`` has read all that was kept; ``held`` came meanwhile."""
        request.behind = False
        for item in held:
            self._feed(request, item)

    def lost(self, shard: int) -> None:
        """What came for the jobs of ``shard`` may not have arrived."""
        for job_id, requests in self._by_job.items():
            if shard_of_job(job_id) == shard:
                for request in requests:
                    fall_behind(request)

    def look_again(self, job_id: JobId) -> None:
        """This Router may have been taken off the listeners of a job."""
        for request in self._by_job.get(job_id, ()):
            fall_behind(request)

    def sweep(self, now_s: float) -> None:
        """Look after jobs of which nothing was heard for long."""
        for requests in self._by_job.values():
            for request in requests:
                if request.heard:
                    request.heard, request.looked_s = False, now_s
                elif not request.behind and now_s - request.looked_s >= self._check_s:
                    request.looked_s = now_s
                    fall_behind(request)

    def _feed(self, request: OpenRequest, item: Frame | Marker) -> None:
        stitch = request.stitch
        if stitch is None or request.behind:
            return
        request.heard = True
        request.take_in(stitch, item)
        request.notify()
        if stitch.gap or (stitch.pending_bytes > self._buffer_bytes and not stitch.closed):
            fall_behind(request)


def fall_behind(request: OpenRequest) -> None:
    """``request`` has to read what is kept of its job."""
    request.behind = True
    request.held = None
    request.notify()
