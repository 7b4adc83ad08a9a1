"""Read the output of persisted jobs, and subscribe Routers to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from openai_api.response_jobs import ResponseStatus, status_of_output
from queue_schemas import (
    Frame,
    JobId,
    OutputPage,
    SessionId,
    ShardKeys,
    State,
    unpack_frames,
)
from queue_schemas.keys import keys_of_job

from ..redis.calls import Caller


class PersistedOutput:
    """The output streams of persisted jobs."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def attach(self, job_id: JobId, listener: SessionId, after: tuple[int, int] = (0, 0)) -> OutputPage | None:
        """A page of a persisted job's output from frame ``(epoch, seq)`` on; later frames are sent to Router
        ``listener``. None if the job is unknown. Who goes on reading asks from the last frame it has: if
        the page does not begin with it, the server lost that frame, and what comes next need not be behind it."""
        return await self._read_output(job_id, listener, after)

    async def detach(self, job_id: JobId, listener: SessionId) -> None:
        """``listener`` is not sent a persisted job's output any more. One try."""
        keys = keys_of_job(self._keys, job_id)
        await self._caller.script("detach", keys.budget, keys.prefix, job_id, listener, retry=False)

    async def read(self, job_id: JobId, after: tuple[int, int] = (0, 0)) -> OutputPage | None:
        """A page of what is kept of a persisted job, from frame ``(epoch, seq)`` on; None if the job is unknown."""
        return await self._read_output(job_id, "", after)

    async def frames(self, job_id: JobId) -> AsyncIterator[Frame]:
        """All that is kept of a persisted job's output now, read a page at a time; nothing if it is unknown."""
        after, complete = (0, 0), False
        while not complete:
            page = await self._read_output(job_id, "", after)
            if page is None or not page.frames:
                return
            for frame in page.frames:
                yield frame
            after, complete = (page.frames[-1].epoch, page.frames[-1].seq + 1), page.complete

    async def response_status(self, job_id: JobId, state: State) -> ResponseStatus:
        """How the response ended whose job ended in ``state``: the word behind ``response.`` of its webhook. Whether it
        is ``incomplete`` stands in its output, which is read for it; of one that is not kept any more: ``failed``."""
        return status_of_output(state, [frame async for frame in self.frames(job_id)])

    async def _read_output(self, job_id: JobId, listener: str, after: tuple[int, int]) -> OutputPage | None:
        keys = keys_of_job(self._keys, job_id)
        first = "{}-{}".format(*after) if after > (0, 0) else "-"
        reply = await self._caller.script("attach", keys.budget, keys.prefix, job_id, listener, first)
        if not reply:
            return None
        state, epoch, attempt_id, end, complete, cause, *frames = reply
        end_epoch, _, end_seq = end.decode().partition("-")
        return OutputPage(
            State(state.decode()),
            epoch,
            attempt_id.decode(),
            (int(end_epoch or 0), int(end_seq or 0)),
            tuple(frame for packed in frames for frame in unpack_frames(packed)),
            bool(complete),
            cause.decode("utf-8", "replace"),
        )
